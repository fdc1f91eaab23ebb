// Package service starts, stops and queries the services of one node. [Manager] is the one
// interface; it has two implementations: snapd's (through snapctl) and a supervisor of our own
// for machines without snapd. Both run the same program with the same arguments,
// `$SNAP/bin/microk8s daemon <name>`; what that does is in internal/daemon.
//
// The package knows nothing of Kubernetes and leaves the preparation of a service (its
// arguments, the host's settings) to the started program.
package service

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"microk8s/internal/snapenv"
)

// Names of the services, in the order in which they are started; they are stopped in reverse.
const (
	Containerd   = "containerd"
	Datastore    = "k8s-dqlite"
	ClusterAgent = "cluster-agent"
	Kubelite     = "kubelite"
	Proxy        = "apiserver-proxy"
)

// Names lists all services in start order.
func Names() []string {
	return []string{Containerd, Datastore, ClusterAgent, Kubelite, Proxy}
}

// Phase is what a service is doing.
type Phase string

// The phases. A service that ended with status [ExitIdle] had nothing to do on this node and is
// Idle, which is no failure; Backoff waits for the next start after a failure.
const (
	Running  Phase = "running"
	Stopping Phase = "stopping"
	Backoff  Phase = "restarting"
	Idle     Phase = "idle"
	Stopped  Phase = "stopped"
	Failed   Phase = "failed"
)

// State is one service as its manager sees it.
type State struct {
	Name     string    `json:"name"`
	Phase    Phase     `json:"phase"`
	Enabled  bool      `json:"enabled"`             // starts at boot
	PID      int       `json:"pid,omitempty"`       // main process, while Running or Stopping; 0 when not known
	Since    time.Time `json:"since,omitzero"`      // when the phase began; zero when not known
	Restarts int       `json:"restarts,omitempty"`  // restarts after failures since it was last started
	LastExit string    `json:"last_exit,omitempty"` // how the process ended last, such as "exit status 1"
	// LastWords is the last line that the process wrote before it was restarted after a
	// failure the last time; "" when it was not.
	LastWords string `json:"last_words,omitempty"`
}

// Manager drives the services of this node. Without names a call means all of them. Unknown
// names are refused with an error that wraps [ErrUnknown] before anything is done. Methods may
// be called at any time, from several goroutines and processes.
type Manager interface {
	// Start starts services and enables them, so that the next boot starts them too. It
	// returns when their processes run, not when they are ready. What runs already is left.
	Start(ctx context.Context, names ...string) error

	// Stop stops and disables services and returns when their processes have ended. Containers
	// outlive containerd: the supervisor ends them too if there are no names; under snapd that is
	// up to the caller.
	Stop(ctx context.Context, names ...string) error

	// Restart stops and starts what is enabled. Containers survive a restart of containerd.
	Restart(ctx context.Context, names ...string) error

	// Status returns the state of all services in start order.
	Status(ctx context.Context) ([]State, error)
}

// ErrUnknown is wrapped by the error for a name that is not a service.
var ErrUnknown = errors.New("no such service")

// Resolve maps the names that people and addons use to services: the parts of kubelite by
// their own names, with or without `kube-`, and snap names such as microk8s.daemon-kubelite.
func Resolve(name string) (string, error) {
	short := strings.TrimPrefix(name, "microk8s.")
	short = strings.TrimPrefix(short, "snap.microk8s.")
	short = strings.TrimSuffix(strings.TrimPrefix(short, "daemon-"), ".service")
	switch strings.TrimPrefix(short, "kube-") {
	case "apiserver", "proxy", "kubelet", "scheduler", "controller-manager":
		return Kubelite, nil
	}
	if slices.Contains(Names(), short) {
		return short, nil
	}
	switch short {
	case "apiserver-kicker", "etcd", "flanneld":
		return "", fmt.Errorf("%w: %s is not part of this product", ErrUnknown, short)
	}
	return "", fmt.Errorf("%w: %s (there are %s)", ErrUnknown, name, strings.Join(Names(), ", "))
}

// resolveAll resolves names and puts them in start order; no names gives all services.
func resolveAll(names []string) ([]string, error) {
	if len(names) == 0 {
		return Names(), nil
	}
	want := map[string]bool{}
	for _, n := range names {
		s, err := Resolve(n)
		if err != nil {
			return nil, err
		}
		want[s] = true
	}
	return slices.DeleteFunc(Names(), func(n string) bool { return !want[n] }), nil
}

// New returns the manager of this machine: snapctl's where snapd started the process, otherwise
// the client of our supervisor.
func New(env snapenv.Env) Manager {
	if env.Snapd {
		return &Snapctl{Snap: env.Name, Run: runProgram}
	}
	return NewClient(env)
}
