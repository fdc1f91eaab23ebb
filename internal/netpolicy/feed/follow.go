package feed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"

	"microk8s/internal/backoff"
	"microk8s/internal/netpolicy"
)

// State is the cluster as the feed says it is. What has not changed stays the same pointer.
type State struct {
	mu         sync.Mutex
	namespaces map[string]map[string]string
	pods       map[string]*netpolicy.Pod
	nodes      map[string]*netpolicy.Node
	policies   map[string]*netpolicy.Policy
	cluster    map[string]*netpolicy.ClusterPolicy
	lines      map[id][]byte
}

// Input returns the cluster at this moment. It may be called at any time.
func (s *State) Input(node string) netpolicy.Input {
	s.mu.Lock()
	defer s.mu.Unlock()
	return netpolicy.Input{
		Node: node, Namespaces: maps.Clone(s.namespaces), Pods: slices.Collect(maps.Values(s.pods)),
		Nodes: slices.Collect(maps.Values(s.nodes)), Policies: slices.Collect(maps.Values(s.policies)),
		Cluster: slices.Collect(maps.Values(s.cluster)),
	}
}

// ErrUnknown is said of an API server that has no feed: one of an earlier version.
var ErrUnknown = errors.New("the API server is of a version that does not serve network policies to nodes")

// Follow calls changed with the state of the cluster, first when all of it is known and then after
// each change, until ctx ends; it is always the same State. When the connection ends it
// tries again, with growing pauses, and calls failed with the reason each time; what is known stays.
func Follow(ctx context.Context, cfg *rest.Config, changed func(*State), failed func(error)) error {
	cfg = rest.CopyConfig(cfg)
	cfg.Timeout = 0 // the answer does not end
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return fmt.Errorf("cannot follow the network policies: %w", err)
	}
	base, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return fmt.Errorf("cannot follow the network policies: %w", err)
	}
	f := &follower{client: client, url: strings.TrimRight(base.String(), "/") + Path, changed: changed, state: newState()}
	newWaits := func() wait.Backoff { return backoff.New(250*time.Millisecond, 10*time.Second) }
	waits := newWaits()
	for {
		synced, err := f.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if synced {
			waits = newWaits()
		}
		failed(err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(waits.Step()):
		}
	}
}

func newState() *State {
	return &State{
		namespaces: map[string]map[string]string{}, pods: map[string]*netpolicy.Pod{}, nodes: map[string]*netpolicy.Node{},
		policies: map[string]*netpolicy.Policy{}, cluster: map[string]*netpolicy.ClusterPolicy{}, lines: map[id][]byte{},
	}
}

type follower struct {
	client  *http.Client
	url     string
	changed func(*State)
	state   *State
}

// once follows one connection to its end, which is always an error.
func (f *follower) once(ctx context.Context) (synced bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.url, nil)
	if err != nil {
		return false, err
	}
	res, err := f.client.Do(req)
	if err != nil {
		return false, fmt.Errorf("cannot follow the network policies: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(res.Body, 512))
		if res.StatusCode == http.StatusNotFound {
			return false, ErrUnknown
		}
		return false, fmt.Errorf("cannot follow the network policies: the API server answers %s: %s", res.Status, bytes.TrimSpace(said))
	}
	in := json.NewDecoder(res.Body)
	seen := map[id]bool{}
	for {
		var l line
		if err := in.Decode(&l); err != nil {
			return synced, fmt.Errorf("the connection by which network policies come has ended: %w", err)
		}
		if l.Kind == kindSynced {
			f.state.keep(seen)
			seen, synced = nil, true
		} else {
			i := id{l.Kind, l.Key}
			if !synced {
				seen[i] = true
			}
			if err := f.state.set(i, l.Object); err != nil {
				return synced, fmt.Errorf("cannot read what the API server says of %s %s: %w", l.Kind, l.Key, err)
			}
		}
		if synced {
			f.changed(f.state)
		}
	}
}

// keep removes what was not seen: it went while nobody told.
func (s *State) keep(seen map[id]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.lines {
		if !seen[i] {
			s.remove(i)
		}
	}
}

// set takes over one thing, and leaves what is the same as it is.
func (s *State) set(i id, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if data == nil {
		s.remove(i)
		return nil
	}
	if bytes.Equal(s.lines[i], data) {
		return nil
	}
	var err error
	switch i.kind {
	case kindPod:
		err = decode(s.pods, i.key, data)
	case kindNode:
		err = decode(s.nodes, i.key, data)
	case kindPolicy:
		err = decode(s.policies, i.key, data)
	case kindCluster:
		err = decode(s.cluster, i.key, data)
	case kindNamespace:
		var labels map[string]string
		if err = json.Unmarshal(data, &labels); err == nil {
			s.namespaces[i.key] = labels
		}
	default:
		return nil // of a later version
	}
	if err == nil {
		s.lines[i] = bytes.Clone(data)
	}
	return err
}

func decode[T any](into map[string]*T, key string, data []byte) error {
	out := new(T)
	if err := json.Unmarshal(data, out); err != nil {
		return err
	}
	into[key] = out
	return nil
}

func (s *State) remove(i id) {
	delete(s.lines, i)
	switch i.kind {
	case kindPod:
		delete(s.pods, i.key)
	case kindNode:
		delete(s.nodes, i.key)
	case kindPolicy:
		delete(s.policies, i.key)
	case kindCluster:
		delete(s.cluster, i.key)
	case kindNamespace:
		delete(s.namespaces, i.key)
	}
}
