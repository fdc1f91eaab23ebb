// Package control enables and disables addons, with everything that this means on a node and in its cluster: the
// lock, disk and packs, addons that others need, the arguments of kubelets, hooks, waiting. The commands enable and
// disable, and what is done for the objects of addons ([Controller.CarryOut]), are this one thing; what is
// written and removed in the cluster is package addon's.
package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/cluster-agent/api"
	"microk8s/internal/addon"
	"microk8s/internal/images"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pack"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
)

const (
	// APIWait bounds the wait for a node that can be used (cli.md 5.3).
	APIWait = 30 * time.Second
	// lockWait is how long one who changes addons waits for another one.
	lockWait = 15 * time.Minute

	// readyWait bounds the wait for an addon's pods. What they wait for is said as soon as
	// it is known; this is for what does not end by itself.
	readyWait = 3 * time.Minute

	// answerWait bounds the wait for answers of an addon whose pods are ready. kube-proxy takes
	// up to some seconds to let traffic through to them.
	answerWait = time.Minute

	// goneWait bounds the wait for the end of a disabled addon's pods, which get 30 s by default.
	goneWait = time.Minute

	// hookGrace is how long a hook may go on when its caller is interrupted.
	hookGrace = 10 * time.Second

	// SkipLockVar is set for what runs inside an enable, which holds the lock already.
	SkipLockVar = "MICROK8S_ADDONS_SKIP_LOCK"

	// storage is the addon with data of people.
	storage = "hostpath-storage"
)

// Request is one addon with its arguments.
type Request struct {
	Addon addon.Addon
	Args  []string
}

// Reporter is told how it goes.
type Reporter interface {
	// Step runs one step and shows how it went.
	Step(title string, do func() error) error
	Say(line string)  // a result
	Note(line string) // all else
	// Ask returns the answer to a question, "" for none.
	Ask(question string) (string, error)
}

// Refusal is an error with what to do about it.
type Refusal struct {
	Err   error
	Hints []string
}

func (e *Refusal) Error() string { return e.Err.Error() }
func (e *Refusal) Unwrap() error { return e.Err }

func refuse(hint, format string, a ...any) error {
	return &Refusal{Err: fmt.Errorf(format, a...), Hints: []string{hint}}
}

// HookError is how a hook ended that has said why.
type HookError struct{ Code int }

func (e *HookError) Error() string { return fmt.Sprintf("its hook ended with exit code %d", e.Code) }

// Controller changes addons from one node. Set all fields; hooks use In and Out of Hook.
type Controller struct {
	Env     snapenv.Env
	Set     *addon.Set
	Report  Reporter
	Version string // of the package, for the names of packs
	Wait    bool   // for pods and answers
	// Others asks the other nodes for the same, and says so with action.
	Others func(ctx context.Context, action string, req api.ConfigureRequest) error
	// Restart restarts kubelite, and returns when the API answers again, or the wait for that has ended.
	Restart func(ctx context.Context) error
	// Hook prepares the call of an addon's hook: environment, input and output.
	Hook func(*exec.Cmd)
}

// Enable turns an addon on, or changes its arguments. The lock is held.
func (c *Controller) Enable(ctx context.Context, r Request) error {
	if r.Addon.Hook("enable") != "" {
		return c.hook(ctx, "enable", r)
	}
	if r.Addon.Builtin != "" {
		c.Report.Say(r.Addon.Builtin)
		c.say("Addon %s is already enabled", r.Addon.FullName())
		return nil
	}
	had, on, err := c.Set.Enabled(ctx, r.Addon.Name)
	if err != nil {
		return err
	}
	if on && len(r.Args) == 0 && c.Set.Declare {
		r.Args = had.Args
	}
	online := c.Set.Online && len(r.Addon.Images) > 0
	if on && had.Complete() && slices.Equal(had.Args, r.Args) && had.Online == online && had.Version == r.Addon.Version {
		c.say("Addon %s is already enabled", r.Addon.FullName())
		c.Set.Show(ctx, r.Addon.Name)
		return nil
	}
	if question := r.Addon.Question(); question != "" && len(r.Args) == 0 {
		answer, err := c.Report.Ask(question)
		if err != nil {
			return err
		}
		if answer != "" {
			r.Args = []string{answer}
		}
		if err := addon.Check(r.Addon, r.Args); err != nil {
			return err
		}
	}
	if err := c.room(ctx, r); err != nil {
		return err
	}
	for _, name := range r.Addon.Needs(r.Args) {
		if err := c.needed(ctx, name); err != nil {
			return err
		}
	}
	var applied addon.Applied
	if err := c.Report.Step("Enabling "+r.Addon.Name, func() error {
		applied, err = c.Set.Enable(ctx, r.Addon, r.Args)
		return err
	}); err != nil {
		return err
	}
	if ip, domain, ok := applied.DNS(); ok {
		c.say("CoreDNS service deployed with IP address %s", ip)
		if err := c.kubeletDNS(ctx, ip.String(), domain); err != nil {
			return err
		}
		if err := c.Set.Spread(ctx); err != nil {
			return err
		}
	}
	for _, line := range r.Addon.Notes() {
		c.Report.Say(line)
	}
	if c.Wait {
		if err := c.await(ctx, r.Addon, applied); err != nil {
			return err
		}
	}
	c.say("%s is enabled", r.Addon.Title())
	return nil
}

func (c *Controller) say(format string, a ...any) { c.Report.Say(fmt.Sprintf(format, a...)) }

// await returns when the pods of an addon are ready and what they serve answers. Its object then says so, or why not.
func (c *Controller) await(ctx context.Context, a addon.Addon, applied addon.Applied) error {
	note := func(reason string) { c.Report.Note("  " + reason) }
	err := c.Report.Step("Waiting for the pods of "+a.Name, func() error {
		wait, cancel := context.WithTimeout(ctx, readyWait)
		defer cancel()
		return c.Set.Wait(wait, applied, note)
	})
	if err == nil {
		err = c.Report.Step("Waiting for answers of "+a.Name, func() error {
			wait, cancel := context.WithTimeout(ctx, answerWait)
			defer cancel()
			return c.Set.Answers(wait, applied, nodeconfig.Load(c.Env).NodeName, note)
		})
	}
	if ctx.Err() == nil {
		c.Set.ShowReady(ctx, a.Name, err)
	}
	return err
}

// kubeletDNS makes the kubelets of all nodes give pods address and domain of the DNS service,
// where this node's arguments say something else.
func (c *Controller) kubeletDNS(ctx context.Context, ip, domain string) error {
	if _, err := os.Stat(c.Env.Args(nodeconfig.Kubelet)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	changed, err := nodeconfig.SetFlags(c.Env, nodeconfig.Kubelet, map[string]string{"cluster-dns": ip, "cluster-domain": domain})
	if err != nil {
		return fmt.Errorf("cannot set --cluster-dns of the kubelet: %w", err)
	}
	if !changed {
		return nil
	}
	update := []map[string]string{{"--cluster-dns": ip}, {"--cluster-domain": domain}}
	if err := c.Others(ctx, "Adding arguments --cluster-dns and --cluster-domain to nodes.",
		api.ConfigureRequest{Services: []api.ConfigureService{{Name: "kubelet", Update: update, Restart: true}}}); err != nil {
		return err
	}
	return c.Report.Step(fmt.Sprintf("Restarting the kubelet with --cluster-dns=%s --cluster-domain=%s", ip, domain), func() error {
		if err := c.Restart(ctx); err != nil {
			return err
		}
		return ctx.Err()
	})
}

// needed enables an addon that another one needs, unless it is on.
func (c *Controller) needed(ctx context.Context, name string) error {
	x, err := c.Set.Find(name)
	if err != nil {
		return err
	}
	if had, on, err := c.Set.Enabled(ctx, name); err != nil || on && had.Complete() {
		return err
	}
	set := *c.Set
	set.Declare = true // nothing else asks for it
	inner := *c
	inner.Set, inner.Wait = &set, true
	return inner.Enable(ctx, Request{Addon: x})
}

// room refuses an addon that no node has disk for: the kubelet would evict its pods, or take
// none. Nothing has been changed then.
func (c *Controller) room(ctx context.Context, r Request) error {
	pressed, roomy, err := c.Set.Disks(ctx)
	if err != nil {
		return err
	}
	full := status.FullDisk(c.Env)
	if full != nil {
		here := nodeconfig.Load(c.Env).NodeName
		roomy = slices.DeleteFunc(roomy, func(n string) bool { return n == here })
	}
	const hint = "free some space there and run the same command again"
	switch {
	case len(roomy) > 0:
		return nil
	case full != nil:
		return refuse(hint, "cannot enable %s: %s", r.Addon.Name, full.What)
	case len(pressed) > 0:
		return refuse(hint, "cannot enable %s: not enough disk for pods on %s", r.Addon.Name, strings.Join(pressed, ", "))
	}
	return nil // no node is ready: the wait says so
}

// Disable turns an addon off. The lock is held.
func (c *Controller) Disable(ctx context.Context, r Request) error {
	if r.Addon.Hook("disable") != "" {
		return c.hook(ctx, "disable", r)
	}
	_, on, err := c.Set.Enabled(ctx, r.Addon.Name)
	if err != nil {
		return err
	}
	destroy := false
	if r.Addon.Name == storage {
		if destroy, err = c.askDestroy(on, r.Args); err != nil {
			return err
		}
	}
	c.Set.Everything = r.Addon.Keeps() && len(r.Args) > 0
	left, err := c.Set.Leftover(ctx, r.Addon.Name)
	if err != nil {
		return err
	}
	if err := c.Report.Step("Disabling "+r.Addon.Name, func() error {
		return c.Set.Disable(ctx, r.Addon.Name) // also finishes one that was interrupted
	}); err != nil {
		return err
	}
	var ending []string
	if on && c.Wait {
		if err := c.Report.Step("Waiting for the end of its pods", func() error {
			wait, cancel := context.WithTimeout(ctx, goneWait)
			defer cancel()
			ending = left.Gone(wait)
			return ctx.Err()
		}); err != nil {
			return err
		}
	}
	if destroy {
		dir := c.Env.DefaultStorage()
		if err := c.Report.Step("Deleting "+dir, func() error { return EmptyDir(dir) }); err != nil {
			return fmt.Errorf("cannot delete the data of volumes: %w", err)
		}
		if err := c.sayElsewhere(ctx); err != nil {
			return err
		}
	}
	if !on {
		c.say("Addon %s is already disabled", r.Addon.FullName())
		return nil
	}
	if len(ending) > 0 {
		c.Report.Note("still ending: " + strings.Join(ending, ", ") + "\nwatch them with: microk8s kubectl get pods -A -w")
	}
	c.say("%s is disabled", r.Addon.Title())
	return nil
}

// CheckDisable checks the arguments of a disable, which some addons only have.
func CheckDisable(r Request) error {
	switch {
	case r.Addon.Keeps() && len(r.Args) == 1 && strings.TrimPrefix(r.Args[0], "--") == "destroy-objects":
		return nil
	case r.Addon.Keeps():
		return fmt.Errorf("it takes destroy-objects or nothing, and got %q", r.Args)
	case r.Addon.Name != storage:
		return fmt.Errorf("it takes no arguments, and got %q", r.Args)
	}
	_, err := destroyStorage(r.Args)
	return err
}

// sayElsewhere names the nodes that still have data of volumes: a node's is deleted there only.
func (c *Controller) sayElsewhere(ctx context.Context) error {
	count, err := c.Set.VolumesElsewhere(ctx, nodeconfig.Load(c.Env).NodeName)
	if err != nil || len(count) == 0 {
		return err
	}
	var on []string
	for _, node := range slices.Sorted(maps.Keys(count)) {
		on = append(on, fmt.Sprintf("%s (%d)", node, count[node]))
	}
	c.say("Data of volumes on other nodes is kept: %s", strings.Join(on, ", "))
	c.say("To delete that too, run there: sudo rm -r %s", c.Env.DefaultStorage())
	return nil
}

// destroyStorage reads the arguments of the disable of the addon with data of people.
func destroyStorage(words []string) (destroy bool, err error) {
	for _, w := range words {
		switch w {
		case "destroy-storage", "--destroy-storage":
			destroy = true
		default:
			return false, fmt.Errorf("unexpected argument %q", w)
		}
	}
	return destroy, nil
}

// askDestroy finds out whether the data of volumes on this node is to be deleted: by the
// arguments, or by a question, to which anything but y is no.
func (c *Controller) askDestroy(on bool, words []string) (bool, error) {
	destroy, err := destroyStorage(words)
	entries, _ := os.ReadDir(c.Env.DefaultStorage())
	if err != nil || destroy || !on || len(entries) == 0 {
		return destroy, err
	}
	answer, err := c.Report.Ask(fmt.Sprintf("Remove PVC storage at %s ? (Y/N): ", c.Env.DefaultStorage()))
	if err != nil {
		return false, err
	}
	answer = strings.ToLower(answer)
	if destroy = answer == "y" || answer == "yes"; !destroy {
		c.say("\nStorage removal: the data stays")
	}
	return destroy, nil
}

// EmptyDir deletes what is in a folder, which itself, a mount point maybe, stays.
func EmptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

// hook enables or disables an addon of an added repository: its own program does it.
func (c *Controller) hook(ctx context.Context, verb string, r Request) error {
	on, err := c.Set.ForeignOn(ctx, r.Addon)
	if err != nil {
		return err
	}
	if on == (verb == "enable") {
		c.say("Addon %s is already %sd", r.Addon.FullName(), verb)
		return nil
	}
	hook := exec.CommandContext(ctx, r.Addon.Hook(verb), r.Args...)
	hook.Cancel = func() error { return hook.Process.Signal(os.Interrupt) }
	hook.WaitDelay = hookGrace
	c.Hook(hook)
	// Bash itself reads this file before the hook: hooks without set -e would end well whatever failed in them.
	hook.Env = append(hook.Env, SkipLockVar+"=1", "BASH_ENV="+c.Env.FirstFailure(), fmt.Sprintf("MICROK8S_HOOK_OF=%d", os.Getpid()))
	err = hook.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		c.Set.ShowHook(ctx, r.Addon, verb == "enable", r.Args)
		return nil
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return &HookError{exit.ExitCode()}
	case errors.Is(err, fs.ErrPermission):
		return refuse("set them with: sudo chmod +x "+r.Addon.Hook(verb), "%s hook for %s addon needs execute permissions", verb, r.Addon.Name)
	}
	return fmt.Errorf("its hook %s ended: %w", r.Addon.Hook(verb), err)
}

// CheckPack refuses an addon whose images are not on this node: its pack is missing.
func CheckPack(ctx context.Context, env snapenv.Env, version string, r Request, online bool) error {
	if len(r.Addon.Images) == 0 || online {
		return nil
	}
	missing := addon.Missing(env, r.Addon)
	for end := time.Now().Add(APIWait); len(missing) > 0 && sideloads(env, missing) && time.Now().Before(end); missing = addon.Missing(env, r.Addon) {
		select { // kubelite takes it from there within seconds, and at a node's start after the images of the snap
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if len(missing) > 0 { // they may have come in another way
		if have, err := images.List(ctx, env); err == nil {
			missing = slices.DeleteFunc(missing, func(name string) bool {
				return slices.ContainsFunc(have, func(i images.Image) bool { return i.Name == name })
			})
		}
	}
	if len(missing) == 0 {
		return nil
	}
	f := &Refusal{Err: fmt.Errorf("cannot enable %s: its images are in the pack %s, which is not on this node", r.Addon.Name, pack.File(r.Addon.Name, version, runtime.GOARCH))}
	f.Hints = append(f.Hints, "nothing was changed; get that file, or "+pack.File("", version, runtime.GOARCH)+", from where the snap is from, and run: microk8s addons import FILE")
	if len(r.Addon.Online) > 0 {
		f.Hints = append(f.Hints, "with internet: microk8s enable "+strings.Join(append([]string{r.Addon.Name}, r.Args...), " ")+" --online")
	}
	return f
}

// sideloads reports whether a pack with one of the images waits in the sideload folder.
func sideloads(env snapenv.Env, names []string) bool {
	waiting, _ := pack.List(env.SideloadDir())
	return slices.ContainsFunc(waiting, func(k pack.Kept) bool { return slices.ContainsFunc(names, k.Has) })
}

// Lock waits for the lock that lets one enable or disable at a time change this node; limit 0 stands for 15 minutes.
// It is a POSIX record lock: it goes with the process.
func Lock(ctx context.Context, env snapenv.Env, limit time.Duration, note func(string)) (unlock func(), err error) {
	f, err := os.OpenFile(env.Lock(snapenv.LockAddons), os.O_RDWR|os.O_CREATE, 0o660)
	if err != nil {
		return nil, err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	said := false
	limit = cmp.Or(limit, lockWait)
	end := time.NewTimer(limit)
	defer end.Stop()
	holder := func() string {
		who := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &who); err != nil || who.Pid <= 0 {
			return "another enable or disable"
		}
		return fmt.Sprintf("another enable or disable (process %d)", who.Pid)
	}
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &lock)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("cannot lock the addons: %w", err)
		}
		if !said {
			said = true
			note(fmt.Sprintf("waiting for %s to end", holder()))
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-end.C:
			who := holder()
			f.Close()
			return nil, refuse("see what that process does, or end it, and run the same command again", "%s did not end within %s", who, limit)
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		}
	}
}
