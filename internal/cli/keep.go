package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"microk8s/internal/cluster"
	"microk8s/internal/datastore/backup"
	"microk8s/internal/nodeconfig"
)

// keptArchives is how many archives of each kind [App.keepCopy] leaves.
const keptArchives = 3

// keepCopy archives what the datastore has before a command changes all of it, as
// var/kubernetes/before-COMMAND-DATE.tar.gz, which root alone can read, and removes the oldest such
// archives. With skip, and where the datastore is not the product's own, it does nothing.
func (a *App) keepCopy(ctx context.Context, command string, skip bool) error {
	if skip || !nodeconfig.Load(a.Env).Datastore.Own() {
		return nil
	}
	dir := filepath.Dir(a.Env.BackendLive())
	kind := "before-" + command
	archive := filepath.Join(dir, kind+a.Now().UTC().Format(keptLayout)+backup.Suffix)
	failed := func(err error) error {
		return &Failure{Err: fmt.Errorf("cannot keep a copy of what the datastore has: %w", err), Code: ExitUsage,
			Hints: []string{"nothing was changed; to do without a copy, run the same command with --no-copy"}}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return failed(err)
	}
	work, err := os.MkdirTemp(dir, ".dbctl-")
	if err != nil {
		return failed(err)
	}
	defer os.RemoveAll(work)
	keys := filepath.Join(work, "keys")
	if err := a.migrator(ctx, false, "backup-dqlite", keys); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return failed(err)
	}
	if _, err := a.packKeys(keys); err != nil {
		return failed(err)
	}
	if err := backup.Pack(ctx, keys, archive); err != nil {
		return failed(err)
	}
	if _, err := backup.Prune(dir, kind+keptPattern+backup.Suffix, keptArchives); err != nil {
		return failed(err)
	}
	fmt.Fprintf(a.Err, "What the datastore had is kept in %s; take it back with: microk8s dbctl restore %[1]s --prune\n", archive)
	return nil
}

// The date in the names of kept archives, and what matches it.
const (
	keptLayout  = "-2006-01-02-15-04-05"
	keptPattern = "-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-[0-9][0-9]-[0-9][0-9]-[0-9][0-9]"
)

// soleNode refuses what would cut this node off from the others of its cluster: what says what the
// command cannot do, why what the others would lose, and redo what they have to do after --force, "" where
// the command has no such flag.
func (a *App) soleNode(ctx context.Context, force bool, what, why, redo string) error {
	if force {
		return nil
	}
	err := cluster.Others(ctx, a.Env, a.log())
	if err == nil {
		return nil
	}
	f := &Failure{Err: fmt.Errorf("cannot %s: %w", what, err), Code: ExitUsage, Hints: []string{
		why, "on each of them run microk8s leave, then here microk8s remove-node NAME; afterwards they may join again",
	}}
	if redo == "" {
		f.Hints = append(f.Hints, "nothing was changed")
	} else {
		f.Hints = append(f.Hints, "nothing was changed; to do it all the same, run the same command with --force: "+redo)
	}
	return f
}
