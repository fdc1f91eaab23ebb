// Package enforcer keeps the network policies of this node in force: it follows what the API
// server says (package feed) and what the CNI has done on this host, has the model made (package
// netpolicy) and puts it into the kernel (package nft).
//
// A new pod may say nothing, and nobody may reach it but its node, until its policies are in
// force. That takes a few milliseconds: which pod has which address is read from the results that
// the CNI library leaves on this host, before the first container starts, and not from the pod's
// status, which follows a second later.
package enforcer

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/rest"

	"microk8s/internal/filewatch"
	"microk8s/internal/hostnet"
	"microk8s/internal/hostwatch"
	"microk8s/internal/netpolicy"
	"microk8s/internal/netpolicy/feed"
	"microk8s/internal/netpolicy/nft"
	"microk8s/internal/snapenv"
)

// Options of an enforcer; all but Report are required.
type Options struct {
	Env      snapenv.Env
	NodeName string
	Log      *slog.Logger
	// Report is called with the reason for which policies are not enforced, and with "" when they
	// are (again). May be nil.
	Report func(why string)
}

// Enforcer is what enforces. Make it with New before any pod can start.
type Enforcer struct {
	Options
	table    *nft.Table
	compiler netpolicy.Compiler

	mu      sync.Mutex // guards what follows, and that one model at a time is applied
	subnets []netip.Prefix
	state   *feed.State // nil until everything is known once
	made    bool        // this process has made the table, closed
	amended map[*netpolicy.Pod]*netpolicy.Pod
	last    *netpolicy.Model
	partial string // what this host cannot judge

	patience time.Duration // how long nothing may come before it is reported

	wake chan struct{} // holds at most one value: look again
	cut  chan struct{} // the same: connections have to be looked at
}

// settle is how long changes are collected: an API server tells of one change to many objects one
// by one.
const settle = 5 * time.Millisecond

// New closes the node's pods where no policies are in force yet. An error means that policies
// cannot be enforced on this host.
func New(ctx context.Context, o Options) (*Enforcer, error) {
	if o.Report == nil {
		o.Report = func(string) {}
	}
	table, err := nft.New(o.Log)
	if err != nil {
		o.Report(err.Error())
		return nil, err
	}
	e := &Enforcer{
		Options: o, table: table, amended: map[*netpolicy.Pod]*netpolicy.Pod{},
		wake: make(chan struct{}, 1), cut: make(chan struct{}, 1), subnets: hostnet.PodSubnets(o.Env), patience: 30 * time.Second,
	}
	if e.made, err = table.Close(ctx, e.subnets); err != nil {
		o.Report(err.Error())
		return nil, err
	}
	return e, nil
}

// SetSubnets says which addresses the pods of this node have. When it returns, pods with such an
// address are closed until they are known; so it comes before the CNI can use them.
func (e *Enforcer) SetSubnets(ctx context.Context, subnets []netip.Prefix) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if slices.Equal(e.subnets, subnets) {
		return nil
	}
	e.subnets = slices.Clone(subnets)
	if e.state != nil {
		return e.apply(ctx)
	}
	if !e.made {
		return nil // an earlier process has closed its own, and which ones now will be said with the first model
	}
	_, err := e.table.Apply(ctx, &netpolicy.Model{Closed: e.subnets})
	return err
}

// Partial says what this host cannot judge, which is reported as long as everything else is enforced.
// It comes before Run.
func (e *Enforcer) Partial(why string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.partial = why
}

// Owner has the table put back after somebody else has removed it, or some of it.
func (e *Enforcer) Owner() hostwatch.Owner {
	return hostwatch.Owner{
		Name: "network policies",
		Concerns: func(c hostwatch.Change) bool {
			return (c.Kind == hostwatch.Table || c.Kind == hostwatch.Chain || c.Kind == hostwatch.Rule) && c.Table == hostnet.PolicyTable
		},
		Sync: func(ctx context.Context) ([]string, error) {
			if e.table.Check(ctx) == nil {
				return nil, nil
			}
			return []string{"table " + hostnet.PolicyTable}, e.table.Restore(ctx)
		},
	}
}

// Run enforces until ctx ends; then it leaves everything in place.
func (e *Enforcer) Run(ctx context.Context, cfg *rest.Config) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { e.watchResults(ctx) })
	wg.Go(func() { e.applyLoop(ctx) })
	wg.Go(func() { e.cutLoop(ctx) })
	said, lost := "", time.Now() // since when nothing comes; zero while it does
	return feed.Follow(ctx, cfg, func(s *feed.State) {
		said, lost = "", time.Time{}
		e.mu.Lock()
		e.state = s
		e.mu.Unlock()
		nudge(e.wake)
	}, func(err error) {
		if err.Error() != said {
			said = err.Error()
			e.Log.Info("the network policies of the cluster cannot be followed", "err", err)
		}
		if lost.IsZero() {
			lost = time.Now()
		}
		if errors.Is(err, feed.ErrUnknown) {
			e.unknown(ctx, err)
		} else if time.Since(lost) > e.patience {
			e.Report("changes of policies do not reach this node: " + err.Error())
		}
	})
}

// unknown opens the pods again where the cluster has no policies for its nodes: its API servers
// are of an earlier version.
func (e *Enforcer) unknown(ctx context.Context, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state != nil || !e.made {
		return // another API server of this cluster does
	}
	e.made = false
	e.Report(err.Error() + ": upgrade the control-plane nodes")
	if err := e.table.Remove(ctx); err != nil {
		e.Log.Warn("pods stay closed", "err", err)
	}
}

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// watchResults looks again whenever the CNI has started or stopped a pod.
func (e *Enforcer) watchResults(ctx context.Context) {
	for ctx.Err() == nil {
		changed, err := watchDirectory(ctx, resultsDir(e.Env))
		if err != nil {
			e.Log.Warn("new pods are only known by their status", "err", err)
			return
		}
		nudge(e.wake)
		for range changed {
			nudge(e.wake)
		}
	}
}

func watchDirectory(ctx context.Context, dir string) (<-chan struct{}, error) {
	if err := makeDirectory(dir); err != nil {
		return nil, err
	}
	return filewatch.Watch(ctx, filewatch.Options{Match: func(path string) bool {
		return strings.Contains(path, "/"+hostnet.NetworkName+"-")
	}}, dir)
}

func (e *Enforcer) applyLoop(ctx context.Context) {
	retry := time.NewTimer(0)
	retry.Stop()
	defer retry.Stop()
	reported := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.wake:
		case <-retry.C:
		}
		select { // what comes together is done together
		case <-ctx.Done():
			return
		case <-time.After(settle):
		}
		e.mu.Lock()
		err := e.apply(ctx)
		known, partial := e.state != nil, e.partial
		e.mu.Unlock()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			e.Log.Warn("network policies are not as the cluster wants them", "err", err)
			e.Report(err.Error())
			reported = true
			retry.Reset(time.Second)
		case known:
			if reported {
				e.Log.Info("network policies are enforced again")
			}
			e.Report(partial)
			reported = false
		}
	}
}

// apply brings the table in line with what is known; e.mu is held.
func (e *Enforcer) apply(ctx context.Context) error {
	if e.state == nil {
		return nil
	}
	in := e.state.Input(e.NodeName)
	in.Closed = e.subnets
	in.Pods = e.amend(in.Pods)
	m := e.compiler.Compile(in)
	tightened, err := e.table.Apply(ctx, m)
	if err != nil {
		return err
	}
	e.last = m
	if tightened {
		nudge(e.cut)
	}
	return nil
}

// amend sets the addresses that the CNI assigned to the pods of this node. What is not changed stays
// the same pointer, also from call to call.
func (e *Enforcer) amend(pods []*netpolicy.Pod) []*netpolicy.Pod {
	byPod := results(e.Env)
	amended := make(map[*netpolicy.Pod]*netpolicy.Pod, len(byPod))
	for i, p := range pods {
		if p.Node != e.NodeName || p.HostNetwork {
			continue
		}
		ips := byPod[p.UID]
		if len(ips) == 0 || slices.Equal(ips, p.IPs) {
			continue
		}
		with := e.amended[p]
		if with == nil || !slices.Equal(with.IPs, ips) {
			changed := *p
			changed.IPs = ips
			with = &changed
		}
		amended[p] = with
		pods[i] = with
	}
	e.amended = amended
	return pods
}

// cutLoop ends connections that are forbidden now. It is apart from applying, since it reads all
// connections of the host.
func (e *Enforcer) cutLoop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.cut:
		}
		e.mu.Lock()
		m := e.last
		e.mu.Unlock()
		n, err := nft.Cut(m)
		if err != nil {
			e.Log.Warn("connections that are forbidden now may go on", "err", err)
		}
		if n > 0 {
			e.Log.Info("connections were ended that a network policy forbids now", "connections", n)
		}
		select { // reading many connections costs; a second may not pass
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}
