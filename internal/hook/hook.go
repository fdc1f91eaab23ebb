// Package hook is what snapd's hooks of the snap do. Each hook of the package is a script of
// two lines that calls `microk8s hook NAME`, so that all of them are tested as the plain
// program that they are.
//
// A hook may be run again after a crash at any point, is silent when it succeeds, and says what
// it did and why it refuses on standard error, which snapd keeps for `snap change`. How a node
// is laid out and taken away is in internal/setup; when which hook runs, and what becomes of
// the snap when it fails, is snapd's.
package hook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
	"microk8s/internal/turn"
)

// Runner runs hooks. All fields but Log must be set.
type Runner struct {
	Env snapenv.Env
	Log *slog.Logger

	// Snapctl runs snapd's snapctl and gives what it prints.
	Snapctl func(ctx context.Context, args ...string) (string, error)

	// Install, Configure and Refresh are those of internal/setup.
	Install, Configure, Refresh func(ctx context.Context, env snapenv.Env, log *slog.Logger) error

	// Remove takes the node off the host.
	Remove func(ctx context.Context, env snapenv.Env, log *slog.Logger) error

	// Members says who the members of the datastore are (internal/datastore/peers).
	Members func(ctx context.Context, dir string) ([]peers.Member, error)

	// Turn has the nodes of the cluster refreshed one after the other (internal/turn).
	Turn Turn
	// TurnWait is how long the turn is waited for: the node before may have come back just now, and its refresh
	// may have interrupted the API server.
	TurnWait time.Duration

	// CheckConfig looks at a launch configuration: its error holds every mistake in it, for a
	// strict check also keys that are not known.
	CheckConfig func(text []byte, strict bool) error

	// PreInit applies the part of a launch configuration that concerns a node before its first
	// start.
	PreInit func(ctx context.Context, env snapenv.Env, text []byte) error

	// Health says how the node is: a word of `snapctl set-health` and why.
	Health func(ctx context.Context) (state, message string)
}

// Turn is what internal/turn's Lease does. The error of Take is a *turn.HeldError while another node has it.
type Turn interface {
	Take(ctx context.Context, node, why string, limit time.Duration) error
	End(ctx context.Context, node string) error
}

// ErrUnknown is wrapped when no hook has that name.
var ErrUnknown = errors.New("no such hook")

// Run runs the hook of that name.
func (r *Runner) Run(ctx context.Context, name string) error {
	hook, ok := map[string]func(context.Context) error{
		"install":                   r.install,
		"configure":                 r.configure,
		"pre-refresh":               r.preRefresh,
		"post-refresh":              r.postRefresh,
		"remove":                    r.remove,
		"check-health":              r.checkHealth,
		"connect-plug-network-bind": r.reconcile,
	}[name]
	if !ok {
		return fmt.Errorf("cannot run hook %q: %w", name, ErrUnknown)
	}
	if r.Log == nil {
		r.Log = slog.New(slog.DiscardHandler)
	}
	return hook(ctx)
}

// launchFiles are where a user puts a launch configuration for the first start, first come
// first served (cli.md 8.1).
func (r *Runner) launchFiles() []string {
	return []string{
		r.Env.HostPath("etc/microk8s.yaml"),
		filepath.Join(r.Env.UserCommon, ".microk8s.yaml"),
		r.Env.UserLaunchFile(),
	}
}

// install lays the node out. A launch configuration is looked at before anything is made, and
// applied as far as it concerns a node that does not run yet; the cluster agent applies all of
// it later. An error undoes the installation.
func (r *Runner) install(ctx context.Context) error {
	path, text, err := r.launchConfig()
	if err != nil {
		return err
	}
	if text != nil {
		if err := r.CheckConfig(text, false); err != nil {
			return fmt.Errorf("cannot use the launch configuration %s: %w", path, err)
		}
	}
	if err := r.Install(ctx, r.Env, r.Log); err != nil {
		return err
	}
	if text == nil {
		return nil
	}
	// The mark that all of it was applied is the agent's: then this is not the first time.
	if _, err := os.Lstat(r.Env.LaunchFile(snapenv.LaunchInstall) + ".applied"); err == nil {
		return nil
	}
	if err := atomicfile.Write(r.Env.LaunchFile(snapenv.LaunchInstall), text, 0o600, nil); err != nil {
		return fmt.Errorf("cannot keep the launch configuration: %w", err)
	}
	if err := r.PreInit(ctx, r.Env, text); err != nil {
		return fmt.Errorf("cannot apply the launch configuration %s: %w", path, err)
	}
	return nil
}

func (r *Runner) launchConfig() (path string, text []byte, err error) {
	for _, path := range r.launchFiles() {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return path, nil, fmt.Errorf("cannot read the launch configuration: %w", err)
		}
		return path, text, nil
	}
	return "", nil, nil
}

// configure runs after installation, refresh and revert, and whenever a setting is changed. A
// wrong setting is refused before anything is done, which makes snapd keep the one before.
func (r *Runner) configure(ctx context.Context) error {
	if err := r.config(ctx); err != nil {
		return err
	}
	return r.reconcile(ctx)
}

// reconcile brings the node in line with this revision. No service is restarted.
func (r *Runner) reconcile(ctx context.Context) error {
	return r.Configure(ctx, r.Env, r.Log)
}

// snapSet is the launch configuration that came with `snap set microk8s config=…`. Its name
// with .applied behind it is the one that the agent has applied.
const snapSet = "snap-set.yaml"

// config hands the setting `config` to the cluster agent, which watches the directory.
func (r *Runner) config(ctx context.Context) error {
	value, err := r.Snapctl(ctx, "get", "config")
	if err != nil {
		return fmt.Errorf("cannot read the settings: %w", err)
	}
	value = strings.TrimSuffix(value, "\n") // snapctl's own
	if value == "" {
		return nil
	}
	text := []byte(value)
	path := r.Env.LaunchFile(snapSet)
	for _, known := range []string{path, path + ".applied"} {
		if old, err := os.ReadFile(known); err == nil && string(old) == value {
			return nil
		}
	}
	if err := r.CheckConfig(text, true); err != nil {
		return fmt.Errorf("the setting config is refused, and nothing was changed:\n%w", err)
	}
	if !nodeconfig.ReadState(r.Env).Installed {
		return nil // nothing to configure; the next run does
	}
	// It may hold a token.
	if err := atomicfile.Write(path, text, 0o600, nil); err != nil {
		return fmt.Errorf("cannot pass on the setting config: %w", err)
	}
	return nil
}

// postRefresh brings data and arguments that the old revision left in line with the new one,
// before the services start. An error brings the old revision back.
func (r *Runner) postRefresh(ctx context.Context) error {
	if err := r.Refresh(ctx, r.Env, r.Log); err != nil {
		return err
	}
	r.dropIns(ctx, "post-refresh")
	return nil
}

// remove takes the node off the host. Its errors are told, and the removal goes on.
func (r *Runner) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, removeLimit)
	defer cancel()
	err := r.Remove(ctx, r.Env, r.Log)
	r.dropIns(ctx, "remove")
	return err
}

// removeLimit ends a removal that hangs: what is left then is told. snapd has no limit that
// one could rely on.
const removeLimit = 4 * time.Minute

// checkHealth tells snapd what status knows.
func (r *Runner) checkHealth(ctx context.Context) error {
	if !nodeconfig.ReadState(r.Env).Installed {
		return nil
	}
	state, message := r.Health(ctx)
	args := []string{"set-health", state}
	if state != "okay" {
		args = append(args, healthMessage(message))
	}
	if _, err := r.Snapctl(ctx, args...); err != nil {
		return fmt.Errorf("cannot report the node's health to snapd: %w", err)
	}
	return nil
}

// healthMessage makes a message that snapd takes: of 7 to 70 characters.
func healthMessage(s string) string {
	const least, most = 7, 70
	if len(s) < least {
		s = "the node: " + s
	}
	if runes := []rune(s); len(runes) > most {
		s = string(runes[:most-1]) + "…"
	}
	return s
}

// preRefresh runs while everything still does. An error cancels the refresh, and nothing has
// happened.
func (r *Runner) preRefresh(ctx context.Context) error {
	if !nodeconfig.ReadState(r.Env).Installed {
		return nil
	}
	if err := r.mayGo(ctx); err != nil {
		return err
	}
	if err := setup.NoteIdentity(r.Env); err != nil {
		return fmt.Errorf("cannot note which cluster this node belongs to: %w", err)
	}
	return nil
}

// mayGo says why this node may not stop now: another one has the turn, or the datastore needs it.
func (r *Runner) mayGo(ctx context.Context) error {
	members, err := r.Members(ctx, r.Env.BackendLive())
	if errors.Is(err, peers.ErrNotRunning) {
		return nil // a worker, or a node that is stopped: nothing depends on it
	}
	if err != nil {
		r.Log.Warn("cannot find out whether the cluster can do without this node", "err", err)
		return nil
	}
	if len(members) < 2 {
		return nil
	}
	node := nodeconfig.Load(r.Env).NodeName
	if err := r.take(ctx, node); err != nil {
		return err
	}
	// They are asked again: until now another node had the turn, perhaps.
	if again, err := r.Members(ctx, r.Env.BackendLive()); err == nil {
		members = again
	}
	err = quorum(members)
	if err != nil {
		if endErr := r.Turn.End(ctx, node); endErr != nil {
			r.Log.Warn("the turn of this node ends by itself", "err", endErr)
		}
	}
	return err
}

// take takes the turn. Without an API server nobody can be asked; then the quorum alone decides, since
// the refresh may be what brings the API server back.
func (r *Runner) take(ctx context.Context, node string) error {
	limit, cancel := context.WithTimeout(ctx, r.TurnWait)
	defer cancel()
	var held *turn.HeldError
	for {
		err := r.Turn.Take(limit, node, turn.ForRefresh, turn.RefreshLimit)
		if err == nil {
			return nil
		}
		var now *turn.HeldError
		if errors.As(err, &now) {
			held = now
		}
		select {
		case <-limit.Done():
			if held != nil {
				return fmt.Errorf("cannot refresh this node now: %w", held)
			}
			r.Log.Warn("the nodes cannot be asked which of them is refreshed; the datastore's quorum alone decides", "err", err)
			return nil
		case <-time.After(r.TurnWait / 30):
		}
	}
}

// quorum refuses when the cluster works now and would not without this node. Leadership needs
// no care: the datastore hands it over when it is stopped.
func quorum(members []peers.Member) error {
	voters, alive, self := 0, 0, false
	var down []string
	for _, m := range members {
		if m.Role != storedir.Voter {
			continue
		}
		voters++
		switch {
		case m.Self:
			self = true
		case m.Online:
			alive++
		default:
			down = append(down, m.Address)
		}
	}
	need := voters/2 + 1
	// With one or two voters no node can ever be missed, and they have to be refreshed too. A
	// cluster that has lost its quorum loses nothing more.
	if !self || voters < 3 || alive >= need || alive+1 < need {
		return nil
	}
	return fmt.Errorf("cannot refresh this node now: %d of the %d voters of the datastore are needed, and without this one only %d would be alive (%v does not answer); "+
		"wait until the others are back (see microk8s status), then run the same command again", need, voters, alive, down)
}
