// Package daemons runs Kubernetes' own daemons (kube-apiserver, kube-controller-manager,
// kube-scheduler, kube-proxy, kubelet) together in one process, from the unmodified module.
//
// Each daemon gets the command line words of its own argument file, exactly as its program
// would. What Kubernetes keeps global in a process (feature gates, logging, the signal
// handler) is set once here. Together with main and the pod network this is the only place
// that imports k8s.io/kubernetes.
package daemons

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	logsapi "k8s.io/component-base/logs/api/v1"
)

// Names of the daemons, which are also the names of their argument files.
const (
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	Proxy             = "kube-proxy"
	Kubelet           = "kubelet"
)

// daemonOrder is the order in which the daemons' words are looked at.
var daemonOrder = []string{APIServer, ControllerManager, Scheduler, Proxy, Kubelet}

// Daemon is a parsed daemon, ready to run.
type Daemon struct {
	Name string
	// Run blocks until the daemon ends. It ends in good order when ctx does, unless EndsProcess
	// is set; any other return is a failure, a nil error included.
	Run func(ctx context.Context) error
	// EndsProcess is set for daemons that do not return when ctx ends: kube-proxy goes on, the
	// controller manager and the scheduler end the process on the spot, with whatever else
	// runs in it. They are left to end with the process.
	EndsProcess bool

	// again makes another Run after one has ended for some reason; nil for a daemon that runs once
	// in a process. missing is what that run does without because of the reason, "" for nothing.
	again func(why error) (run func(ctx context.Context) error, missing string, err error)
}

// parsers make a Daemon of command line words. The returned error is about the words.
var parsers = map[string]func(words []string) (func(ctx context.Context) error, error){
	APIServer:         newAPIServer,
	ControllerManager: newControllerManager,
	Scheduler:         newScheduler,
	Proxy:             newProxy,
	Kubelet:           newKubelet,
}

// Parse checks the words of every named daemon and sets the process-wide feature gates from
// all of them; call it once in a process. words maps the daemon's name to its command line
// without the program name. All errors are returned together, each naming its daemon.
func Parse(words map[string][]string) (map[string]*Daemon, error) {
	// Each daemon applies its logging options to the one process, so they must be the same.
	logsapi.ReapplyHandling = logsapi.ReapplyHandlingIgnoreUnchanged
	words = shareLogging(words)

	out := make(map[string]*Daemon, len(words))
	var errs []error
	for _, name := range daemonOrder {
		w, wanted := words[name]
		if !wanted {
			continue
		}
		run, err := parsers[name](w)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		out[name] = &Daemon{Name: name, Run: run, EndsProcess: name != APIServer && name != Kubelet}
		if name == ControllerManager || name == Scheduler {
			out[name].again = func(why error) (func(context.Context) error, string, error) {
				if err := forget(name); err != nil {
					return nil, "", err
				}
				now, missing := w, ""
				if name == ControllerManager && aboutSubnets(why) {
					now, missing = withoutSubnets(w), missingSubnets
				}
				run, err := parsers[name](now)
				return run, missing, err
			}
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	// The control plane's daemons share one registry of feature gates and emulated versions.
	if err := componentGlobals.Set(); err != nil {
		return nil, fmt.Errorf("feature gates: %w", err)
	}
	return out, nil
}

// ErrEnded is the cause when a daemon returned although nobody asked it to.
var ErrEnded = errors.New("ended by itself")

// Group runs daemons until the first one ends, but for those of [Group.StartAlone].
type Group struct {
	log  *slog.Logger
	ctx  context.Context
	stop context.CancelFunc
	done chan result
	run  []string // names of the jobs that end with ctx and still run

	restart time.Duration // see firstRestart; 0 but in tests
	whole   time.Duration // see wholeAgain; 0 but in tests
}

type result struct {
	name    string
	err     error
	awaited bool
}

// NewGroup makes an empty group whose daemons end with ctx.
func NewGroup(ctx context.Context, log *slog.Logger) *Group {
	ctx, stop := context.WithCancel(ctx)
	return &Group{log: log, ctx: ctx, stop: stop, done: make(chan result, 16)}
}

// Start runs a daemon. Not safe for concurrent use, like [Group.Go].
func (g *Group) Start(d *Daemon) {
	if !d.EndsProcess {
		g.Go(d.Name, d.Run)
		return
	}
	g.log.Info("starting", "daemon", d.Name)
	go func() { g.done <- result{name: d.Name, err: d.Run(context.WithoutCancel(g.ctx))} }()
}

// Go runs a job of ours like a daemon: it ends when the group's context does.
func (g *Group) Go(name string, run func(context.Context) error) {
	g.run = append(g.run, name)
	g.log.Info("starting", "daemon", name)
	go func() { g.done <- result{name, run(g.ctx), true} }()
}

// Context ends when the group does.
func (g *Group) Context() context.Context { return g.ctx }

// Failed tells of the first daemon that ended, if one has; it does not block.
func (g *Group) Failed() error {
	select {
	case r := <-g.done:
		return g.ended(r)
	default:
		return nil
	}
}

// Wait blocks until the group's context ends or a daemon does, then stops those that end with
// their context and gives them the grace time for it. The error names the daemon that ended
// by itself; it is nil after an orderly stop.
func (g *Group) Wait(grace time.Duration) error {
	return g.WaitFor(func() time.Duration { return grace })
}

// WaitFor is [Group.Wait] with a grace time that is asked for when the end begins.
func (g *Group) WaitFor(graceTime func() time.Duration) error {
	var first error
	select {
	case <-g.ctx.Done():
	case r := <-g.done:
		if err := g.ended(r); g.ctx.Err() == nil {
			first = err
			// At once: others may end the process before it can be said in order.
			g.log.Error("a daemon ended, and the others with it", "err", err)
		}
	}
	g.stop()
	grace := graceTime()
	timeout := time.NewTimer(grace)
	defer timeout.Stop()
	for len(g.run) > 0 {
		select {
		case r := <-g.done:
			if err := g.ended(r); r.err != nil && !errors.Is(err, context.Canceled) {
				g.log.Warn("ended with an error while stopping", "daemon", r.name, "err", r.err)
			}
		case <-timeout.C:
			g.log.Warn("did not stop in time", "daemons", strings.Join(g.run, ", "), "grace", grace)
			return first
		}
	}
	return first
}

func (g *Group) ended(r result) error {
	if r.awaited {
		if i := slices.Index(g.run, r.name); i >= 0 {
			g.run = slices.Delete(g.run, i, i+1)
		}
	}
	if r.err == nil {
		r.err = ErrEnded
	}
	return fmt.Errorf("%s: %w", r.name, r.err)
}
