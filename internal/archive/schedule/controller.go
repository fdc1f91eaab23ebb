package schedule

import (
	"context"
	"errors"
	"hash/fnv"
	"io"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/tools/cache"

	"microk8s/internal/kube"
)

// Controller makes archives when they are due, on one of the nodes on which it runs. The archive itself
// is made by the command line, in a process of its own.
type Controller struct {
	Node string // this node's name
	Core func() (*kube.Core, error)
	// Exec runs a program of the product.
	Exec func(ctx context.Context, stdin io.Reader, argv ...string) error
	// Command makes one archive by the settings and writes the record.
	Command []string
	// Newest is a file of this node that says which archive is the newest that was proven; "" for none.
	Newest string
	Log    *slog.Logger

	now   func() time.Time // nil is time.Now
	claim time.Duration    // 0 is claimed
}

// Times.
const (
	// claimed is how long a claim stands that is not renewed: another node begins after that. It is
	// renewed three times in it.
	claimed = 90 * time.Second
	// longest is how long one archive may take.
	longest = 12 * time.Hour
	// pause is between two tries while the API server does not answer.
	pause = 5 * time.Second
	// spread is how far apart nodes begin, so that mostly one of them tries.
	spread = 5 * time.Second
)

// Run goes on until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	if c.now == nil {
		c.now = time.Now
	}
	if c.claim == 0 {
		c.claim = claimed
	}
	for ctx.Err() == nil {
		core, err := c.Core()
		if err == nil {
			err = c.follow(ctx, core)
		}
		if ctx.Err() != nil {
			break
		}
		c.Log.Debug("the schedule of backups cannot be followed now", "err", err)
		wait(ctx, pause)
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// follow watches the ConfigMap and makes what is due, until ctx ends or something fails.
func (c *Controller) follow(ctx context.Context, core *kube.Core) error {
	ctx, cancel := context.WithCancel(ctx)
	changed := make(chan *corev1.ConfigMap, 1)
	latest := func(m *corev1.ConfigMap) {
		select {
		case <-changed: // one that nobody has read
		default:
		}
		changed <- m
	}
	list := cache.NewListWatchFromClient(core, "configmaps", kube.SystemNamespace, fields.OneTermEqualSelector("metadata.name", Name))
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: list, ObjectType: &corev1.ConfigMap{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { latest(o.(*corev1.ConfigMap)) },
			UpdateFunc: func(_, o any) { latest(o.(*corev1.ConfigMap)) },
			DeleteFunc: func(any) { latest(nil) },
		},
	})
	ended := make(chan struct{})
	go func() { defer close(ended); informer.RunWithContext(ctx) }()
	defer func() { cancel(); <-ended }()
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m := <-changed:
			timer.Stop()
			if m == nil {
				continue
			}
			s, err := Parse(m)
			if err != nil {
				c.Log.Warn("no backups are made", "err", err)
				continue
			}
			if err := s.keepNewest(c.Newest); err != nil {
				c.Log.Warn("cannot write down which archive is the newest", "err", err)
			}
			if s.Settings != nil {
				timer.Reset(max(0, c.begin(s).Sub(c.now())))
			}
		case <-timer.C:
			switch err := c.make(ctx, core); {
			case errors.Is(err, errTaken):
				c.Log.Debug("another node makes the archive")
				timer.Reset(c.claim) // it may die without a word
			case err != nil && ctx.Err() == nil:
				c.Log.Warn("no archive was made", "err", err)
				timer.Reset(pause)
			}
		}
	}
}

// begin is when this node tries: when it is due and nobody has a claim, each node a little later.
func (c *Controller) begin(s *State) time.Time {
	at := s.Due()
	if s.Claim != nil && s.Claim.Node != c.Node && s.Claim.Until.After(at) {
		at = s.Claim.Until
	}
	h := fnv.New32a()
	h.Write([]byte(c.Node))
	return at.Add(time.Duration(h.Sum32()) % spread)
}

// make claims the archive that is due, and makes it.
func (c *Controller) make(ctx context.Context, core *kube.Core) error {
	due := false
	claim := func(first bool) error {
		return Change(ctx, core, func(s *State) error {
			now := c.now()
			due = s.Settings != nil && !s.Due().After(now)
			if first && !due {
				return nil
			}
			if s.Claim != nil && s.Claim.Node != c.Node && s.Claim.Until.After(now) || !first && s.Claim == nil {
				return errTaken
			}
			s.Claim = &Claim{c.Node, now.Add(c.claim).UTC()}
			return nil
		})
	}
	if err := claim(true); err != nil || !due {
		return err
	}
	c.Log.Info("making an archive of the cluster")
	run, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	renewed := make(chan struct{})
	go func() {
		defer close(renewed)
		last := c.now()
		for {
			wait(run, c.claim/3)
			if run.Err() != nil {
				return
			}
			switch err := claim(false); {
			case err == nil:
				last = c.now()
			case errors.Is(err, errTaken) || c.now().Sub(last) > c.claim:
				cancel() // somebody else makes it, or may begin to
				return
			}
		}
	}()
	err := c.Exec(run, nil, c.Command...)
	cancel()
	<-renewed
	if err != nil {
		c.Log.Warn("the archive was not made", "err", err)
	}
	// The command has written the record. Where it could not, what it did not say is said here.
	return Change(ctx, core, func(s *State) error {
		if s.Claim != nil && s.Claim.Node == c.Node {
			s.Claim = nil
		}
		if s.Settings != nil && !s.Due().After(c.now()) {
			old := s.Record
			s.Record = &Record{Attempt: c.now().UTC(), Node: c.Node, Error: "it ended without a word"}
			if err != nil {
				s.Record.Error = err.Error()
			}
			if old != nil {
				s.Record.Proven, s.Record.At = old.Proven, old.At
			}
		}
		return nil
	})
}
