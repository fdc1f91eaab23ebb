package daemons

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-base/configz"
	"k8s.io/klog/v2"
	controllerapp "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

// The controller manager and the scheduler end when they lose their leader lease, and do not start
// with what they cannot use. As programs of their own they would be started again by whoever
// watches over them; here this is done by [Group.StartAlone], so that the API server, the kubelet
// and the others go on (docs/adr/0017). What Kubernetes keeps global in a process, and would find
// there from the run before, is cleared first.

const (
	// firstRestart is the pause before a daemon is started again. It is as long as the controllers
	// of the run before may take to end (--controller-shutdown-timeout).
	firstRestart = 10 * time.Second
	// lastRestart is the longest pause; it doubles up to here.
	lastRestart = 2 * time.Minute
	// settled is how long a daemon has to run before it counts as healthy again.
	settled = 30 * time.Second
	// wholeAgain is how long a daemon runs without a part of it before it is tried as a whole.
	wholeAgain = 10 * time.Minute
	// afterExit is how long a run may take to return after it asked for the end of the process.
	afterExit = 15 * time.Second
)

// ErrLease is the cause when a daemon ended because it does not lead any more.
var ErrLease = errors.New("it lost its leader lease: the API server did not answer in time, or another node took over")

// Observer is told how the daemons of [Group.StartAlone] are. Its methods are called from several
// goroutines.
type Observer interface {
	// Down says that a daemon ended, why, and when it is started again.
	Down(daemon string, why error, again time.Time)
	// Without says that a daemon runs again, without a part of it, why, and when it is tried as a whole.
	Without(daemon string, why error, again time.Time)
	// Up says that a daemon runs, and has for a while.
	Up(daemon string)
}

// StartAlone runs a daemon that can be run again: when it ends it is started again, with growing
// pauses, and the group's other daemons go on. o may be nil. Not safe for concurrent use, like
// [Group.Go].
func (g *Group) StartAlone(d *Daemon, o Observer) {
	if d.again == nil {
		g.Start(d)
		return
	}
	catchExits()
	g.log.Info("starting", "daemon", d.Name)
	go g.keep(d, o)
}

// keep runs a daemon again and again until the group ends. The daemon itself ends with the process.
func (g *Group) keep(d *Daemon, o Observer) {
	newPause := func() wait.Backoff {
		return wait.Backoff{Duration: g.firstRestart(), Factor: 2, Jitter: 0.1, Steps: 1000, Cap: lastRestart}
	}
	pause, run, missing := newPause(), d.Run, ""
	for {
		began := time.Now()
		ctx, stop := context.WithoutCancel(g.ctx), context.CancelFunc(func() {})
		whole := missing == ""
		up := time.AfterFunc(settled, func() {
			if o != nil && whole {
				o.Up(d.Name)
			}
		})
		if !whole {
			ctx, stop = context.WithTimeout(ctx, g.wholeAgain())
		}
		err := runToEnd(ctx, d.Name, run)
		tried := ctx.Err() != nil
		stop()
		up.Stop()
		if g.ctx.Err() != nil {
			return // the process ends
		}
		if tried {
			err = errWholeAgain
		}
		if time.Since(began) > lastRestart {
			pause = newPause()
		}
		next := pause.Step()
		g.log.Error("a daemon ended; the others go on", "daemon", d.Name, "err", err, "retry_in", next.Round(time.Second))
		if o != nil {
			o.Down(d.Name, err, time.Now().Add(next))
		}
		select {
		case <-g.ctx.Done():
			return
		case <-time.After(next):
		}
		why := err
		if run, missing, err = d.again(why); err != nil { // the words were right when the process started
			g.log.Error("a daemon cannot be started again", "daemon", d.Name, "err", err)
			return
		}
		g.log.Info("starting again", "daemon", d.Name, "without", missing)
		if missing != "" && o != nil {
			o.Without(d.Name, fmt.Errorf("%s: %w", missing, why), time.Now().Add(g.wholeAgain()))
		}
	}
}

// errWholeAgain is the cause when a run without a part was ended.
var errWholeAgain = errors.New("it is tried as a whole again")

// missingSubnets is said of a controller manager that runs without its controller of pod subnets.
const missingSubnets = "it goes on without the node-ipam-controller, so new nodes get no pod subnet until this is repaired"

// aboutSubnets reports whether the controller manager ended for a node's pod subnet: one outside of
// --cluster-cidr, or none at all. Its node-ipam-controller refuses to start then, and with it all the
// others (pkg/controller/nodeipam/ipam/range_allocator.go, occupyCIDRs).
func aboutSubnets(why error) bool {
	text := why.Error()
	return strings.Contains(text, "as occupied for node:") || strings.Contains(text, "does not exist in cluster cidrs configuration") ||
		strings.Contains(text, "failed to parse node ")
}

// withoutSubnets returns the words of a controller manager without that controller.
func withoutSubnets(words []string) []string {
	off := "-node-ipam-controller"
	if !slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, "--controllers") }) {
		off = "*," + off // the default
	}
	return append(slices.Clone(words), "--controllers="+off)
}

// wholeAgain is shorter in tests.
func (g *Group) wholeAgain() time.Duration {
	if g.whole != 0 {
		return g.whole
	}
	return wholeAgain
}

// firstRestart is shorter in tests.
func (g *Group) firstRestart() time.Duration {
	if g.restart != 0 {
		return g.restart
	}
	return firstRestart
}

// runToEnd runs a daemon until it returns, or asks for the end of the process. Its context ends
// after that: while the scheduler leads it must not, since it would end the process on the spot.
func runToEnd(ctx context.Context, name string, run func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	exit := exits.expect(name)
	returned := make(chan error, 1)
	go func() {
		err := ErrLease // where the goroutine is ended by its exit
		defer func() { returned <- err }()
		if err = run(ctx); err == nil {
			err = ErrEnded
		}
	}()
	asked := false
	var err error
	select {
	case err = <-returned:
	case <-exit:
		asked, err = true, ErrLease
		cancel()
		select {
		case err = <-returned:
		case <-time.After(afterExit):
		}
	}
	select {
	case <-exit: // both at once
		asked = true
	default:
	}
	// The controller manager releases its lease, and asks for the end of the process, when it could
	// not start; then it returns the cause. Otherwise it returns nothing.
	if asked && errors.Is(err, ErrEnded) {
		err = ErrLease
	}
	return err
}

// exitRegistry knows which daemons run that may ask for the end of the process.
type exitRegistry struct {
	once sync.Once
	mu   sync.Mutex
	wait map[string]chan struct{}
}

var exits = exitRegistry{wait: map[string]chan struct{}{}}

// expect returns a channel that is closed when the daemon asks for the end of the process.
func (r *exitRegistry) expect(name string) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := make(chan struct{})
	r.wait[name] = c
	return c
}

// asked closes the channel of a daemon and reports whether there is one.
func (r *exitRegistry) asked(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.wait[name]
	if ok {
		close(c)
		delete(r.wait, name)
	}
	return ok
}

// catchExits makes an end of the process that the controller manager or the scheduler asks for,
// by klog, an end of the goroutine that asks. klog.OsExit is made to be replaced.
func catchExits() {
	exits.once.Do(func() {
		klog.OsExit = func(code int) {
			if name := exitingDaemon(); name != "" {
				exits.asked(name)
				runtime.Goexit()
			}
			os.Exit(code)
		}
	})
}

// exitCallers are the packages from which these daemons end the process when they do not lead.
var exitCallers = map[string]string{
	"k8s.io/kubernetes/cmd/kube-controller-manager/app.": ControllerManager,
	"k8s.io/kubernetes/cmd/kube-scheduler/app.":          Scheduler,
}

// exitingDaemon returns the name of the daemon whose main package is on the stack of this
// goroutine, "" if it is none of these.
func exitingDaemon() string {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		frame, more := frames.Next()
		for prefix, name := range exitCallers {
			if strings.HasPrefix(frame.Function, prefix) {
				return name
			}
		}
		if !more {
			return ""
		}
	}
}

// forget clears what a run of a daemon has left in the process.
func forget(name string) error {
	switch name {
	case ControllerManager:
		configz.Delete(controllerapp.ConfigzName)
		// It reserves a name for the metrics of its informers and never releases it, and then
		// refuses to start. Nothing else releases a name that somebody else holds. The API server
		// and the scheduler lose theirs too: they stop counting in informers' metrics.
		cache.ResetInformerNamesForTesting()
	case Scheduler:
		configz.Delete("componentconfig")
	default:
		return fmt.Errorf("%s cannot run twice in a process", name)
	}
	return nil
}
