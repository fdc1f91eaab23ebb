// Package renewal keeps a running node's certificates in order: it looks when the host's
// addresses change, when somebody edits the names or a file disappears, and when the next
// certificate becomes due, and then lets internal/certs do what is needed. Only services that
// cannot read a new certificate by themselves are restarted.
package renewal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"microk8s/internal/certs"
	"microk8s/internal/filewatch"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// Store is what is kept in order.
type Store interface {
	Renew(ctx context.Context) (certs.Change, error)
	NextRenewal() time.Time
}

var _ Store = (*certs.Store)(nil)

// Controller is the loop. Set the first four fields; the others have defaults.
type Controller struct {
	Env   snapenv.Env
	Store Store
	// Restart restarts services by name. An error makes the Controller try again.
	Restart func(ctx context.Context, names ...string) error
	Log     *slog.Logger

	// Addresses returns a channel that is sent to when an address of the host changes; it is
	// closed when watching ends. nil means the kernel's.
	Addresses func(ctx context.Context) (<-chan struct{}, error)
	Settle    time.Duration // quiet time after an event before acting; 2 s by default
	Retry     time.Duration // after a failure; a minute by default
	Done      func()        // called after each look; for tests
}

// longest is the longest time between two looks, in case an event was lost or the clock jumped.
const longest = 12 * time.Hour

// Run keeps going until ctx ends.
func (k *Controller) Run(ctx context.Context) error {
	if k.Addresses == nil {
		k.Addresses = hostAddresses
	}
	if k.Settle == 0 {
		k.Settle = 2 * time.Second
	}
	if k.Retry == 0 {
		k.Retry = time.Minute
	}
	files, err := filewatch.Watch(ctx, filewatch.Options{Settle: k.Settle, Match: interesting}, k.Env.CertsDir(), k.Env.CredentialsDir())
	if err != nil {
		return fmt.Errorf("cannot watch the certificates: %w", err)
	}
	addresses, err := k.Addresses(ctx)
	if err != nil {
		k.Log.Warn("changes of addresses are noticed late", "err", err)
	}
	pending := []string{} // services still to be restarted
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-addresses:
			if !open {
				addresses = nil
				k.Log.Warn("changes of addresses are noticed late from now on")
			}
			timer.Reset(k.Settle)
		case _, open := <-files:
			if !open {
				files = nil
				if ctx.Err() == nil {
					k.Log.Warn("changes of certificates are noticed late from now on")
				}
			}
			timer.Reset(0)
		case <-timer.C:
			timer.Reset(k.look(ctx, &pending))
			if k.Done != nil {
				k.Done()
			}
		}
	}
}

// interesting leaves out temporary files, and those that only this program writes.
func interesting(path string) bool {
	name := filepath.Base(path)
	return name[0] != '.' && name != "csr.conf" && name != "csr.conf.rendered"
}

// look puts things in order and says when to look again.
func (k *Controller) look(ctx context.Context, pending *[]string) time.Duration {
	change, err := k.Store.Renew(ctx)
	for _, name := range change.Restart {
		if !slices.Contains(*pending, name) {
			*pending = append(*pending, name)
		}
	}
	if len(change.Issued) > 0 {
		k.Log.Info("certificates were issued", "names", change.Issued, "restart", change.Restart)
	}
	switch {
	case len(*pending) == 0:
	case nodeconfig.ReadState(k.Env).Changing, nodeconfig.ReadState(k.Env).Stopped:
		err = errors.Join(err, errors.New("services are not restarted while the node joins or is stopped"))
	default:
		if restartErr := k.Restart(ctx, *pending...); restartErr != nil {
			err = errors.Join(err, fmt.Errorf("cannot restart %v, which still use an old certificate: %w", *pending, restartErr))
		} else {
			*pending = nil
		}
	}
	if err != nil && ctx.Err() == nil {
		k.Log.Error("cannot renew certificates; trying again", "err", err, "retry_in", k.Retry)
		return k.Retry
	}
	next := time.Until(k.Store.NextRenewal())
	if next <= 0 { // due, and yet nothing more can be done: the CA itself ends
		next = longest
	}
	return min(max(next, time.Minute), longest)
}

// hostAddresses subscribes to the kernel's changes of addresses.
func hostAddresses(ctx context.Context) (<-chan struct{}, error) {
	updates, done := make(chan netlink.AddrUpdate), make(chan struct{})
	if err := netlink.AddrSubscribe(updates, done); err != nil {
		return nil, fmt.Errorf("cannot watch the host's addresses: %w", err)
	}
	context.AfterFunc(ctx, func() { close(done) })
	changed := make(chan struct{})
	go func() {
		defer close(changed)
		for range updates { // ends when done is closed or the socket breaks
			select {
			case changed <- struct{}{}:
			case <-ctx.Done():
			}
		}
	}()
	return changed, nil
}
