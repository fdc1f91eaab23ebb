package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/datastore/backup"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/diskspace"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/nodeconfig"
)

// Exit codes of dbctl (cli.md 1.11).
const (
	exitDumpFailed    = 1 // the datastore could not be read
	exitArchiveFailed = 2 // the archive could not be made
	exitRestoreFailed = 3 // the datastore could not be written
	exitArchiveBad    = 4 // the archive could not be read
	exitNoDatastore   = 10
)

// Names of archives: the layout for the time, and what matches it.
const (
	backupLayout  = "backup-2006-01-02-15-04-05"
	backupPattern = "backup-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-[0-9][0-9]-[0-9][0-9]-[0-9][0-9]" + backup.Suffix
)

type dbctlOptions struct {
	verb, archive string
	output        string
	keep          int
	prune, debug  bool
	noCopy        bool
}

func (a *App) newDbctl() *cobra.Command {
	o := dbctlOptions{}
	cmd := &cobra.Command{
		Use:   "dbctl backup [-o FILE|DIRECTORY] [--keep N] | restore FILE [--prune] [--no-copy] [--debug] | disarm",
		Short: "Back up the datastore, or restore it",
		Long: `Back up the datastore to an archive, or restore one, or let it grow again after it has reached
its limit. The node must be running.

  microk8s dbctl backup [-o FILE|DIRECTORY] [--keep N]
      Write all keys, as of one moment, to FILE.tar.gz. Without a file name the archive is
      named backup-YYYY-MM-DD-HH-MM-SS.tar.gz, in the given or the current directory. It
      holds every secret of the cluster: keep it where others cannot read it. With --keep
      only the newest N archives with such names are kept; use it from a timer.
  microk8s dbctl restore FILE [--prune] [--no-copy]
      Restore every key to what it is in the archive. Keys that are not in it are kept,
      or deleted with --prune. It may be run again after a failure. Join tokens, the
      secrets between nodes, and which nodes may be in the cluster stay as they are now: a
      restore brings back no token that was used or revoked, and no node that was removed.
      What the datastore had before is archived first, except with --no-copy; the last three
      such archives are kept.
  microk8s dbctl disarm
      Let the datastore take writes again that it refuses because it had reached its limit
      (--quota-backend-bytes in args/k8s-dqlite). Delete what is not needed before:
      microk8s status shows what takes most.

Backup and restore check what they have written, by number and hash of the keys.`,
		Args: func(cmd *cobra.Command, args []string) error {
			wrong := func(format string, v ...any) error { return &usageError{cmd, fmt.Errorf(format, v...)} }
			rest := args
			if len(args) > 0 {
				o.verb, rest = args[0], args[1:]
			}
			switch o.verb {
			case "":
			case "backup":
				if o.prune || o.noCopy {
					return wrong("--prune and --no-copy are for restore")
				}
			case "restore":
				if len(rest) == 0 {
					return wrong("the archive to restore is missing")
				}
				o.archive, rest = rest[0], rest[1:]
				if o.output != "" || cmd.Flags().Changed("keep") {
					return wrong("--output and --keep are for backup")
				}
			case "disarm":
				if o.prune || o.noCopy || o.output != "" || cmd.Flags().Changed("keep") {
					return wrong("disarm has no options")
				}
			default:
				return wrong("none of backup, restore and disarm: %s", o.verb)
			}
			if len(rest) > 0 {
				return wrong("unexpected argument: %s", rest[0])
			}
			if cmd.Flags().Changed("keep") && o.keep < 1 {
				return wrong("--keep is %d; it must be at least 1", o.keep)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.verb == "" {
				return cmd.Help()
			}
			_, err := os.Stat(a.Env.DatastoreSocket())
			if err != nil || !a.state().HA {
				fmt.Fprintln(a.Out, "Please ensure the kubernetes apiserver is running and HA is enabled.")
				fmt.Fprintln(a.Err, "  start the node with: microk8s start; see what is wrong with: microk8s status")
				return exitError(exitNoDatastore)
			}
			switch o.verb {
			case "restore":
				return a.dbRestore(cmd.Context(), o)
			case "disarm":
				return a.dbDisarm(cmd.Context())
			}
			return a.dbBackup(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "archive to write, or an existing directory for it")
	cmd.Flags().IntVar(&o.keep, "keep", 0, "afterwards remove all but the newest N archives with generated names")
	cmd.Flags().BoolVar(&o.prune, "prune", false, "delete the keys that are not in the archive")
	cmd.Flags().BoolVar(&o.noCopy, "no-copy", false, "archive nothing of what the datastore has before a restore")
	cmd.Flags().BoolVar(&o.debug, "debug", false, "show what the tool does")
	return cmd
}

// dbDisarm ends the datastore's alarms.
func (a *App) dbDisarm(ctx context.Context) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, a.Env.Bin("k8s-dqlite"), "alarm", "disarm", "--endpoint", "unix://"+a.Env.DatastoreSocket())
	cmd.Env = a.Env.Environ(a.Environ)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, bytes.TrimSpace(out.Bytes()))
	}
	fmt.Fprint(a.Out, out.String())
	members, err := peers.Members(ctx, a.Env.BackendLive())
	if err != nil {
		return nil // it has answered, and this was a note only
	}
	for _, m := range members {
		if s := m.Space; m.Self && s != nil && s.Quota > 0 && s.Bytes >= s.Quota/100*90 {
			fmt.Fprintf(a.Err, "The datastore still holds %d of %d MiB and will soon refuse writes again; microk8s status shows what takes most.\n", s.Bytes>>20, s.Quota>>20)
		}
	}
	return nil
}

func (a *App) dbBackup(ctx context.Context, o dbctlOptions) error {
	failed := func(code int, err error) error {
		if ctx.Err() != nil {
			return context.Canceled
		}
		return &Failure{Err: fmt.Errorf("Backup process failed. %w", err), Code: code} //nolint:staticcheck // upstream's words
	}
	fmt.Fprintln(a.Out, "Backing up the datastore")
	dir, name := filepath.Split(o.output)
	if fi, err := os.Stat(o.output); err == nil && fi.IsDir() {
		dir, name = o.output, ""
	}
	generated := name == ""
	if o.keep > 0 && !generated {
		return failed(exitArchiveFailed, errors.New("--keep needs generated names: give a directory with --output, or nothing"))
	}
	if generated {
		name = a.Now().Local().Format(backupLayout)
	}
	archive := filepath.Join(dir, strings.TrimSuffix(name, backup.Suffix)+backup.Suffix)
	// Beside the archive, where there must be space for it anyway.
	work, err := os.MkdirTemp(filepath.Dir(archive), ".dbctl-")
	if err != nil {
		return failed(exitArchiveFailed, err)
	}
	defer os.RemoveAll(work)
	keys := filepath.Join(work, "keys")
	if err := a.migrator(ctx, o.debug, "backup-dqlite", keys); err != nil {
		return failed(exitDumpFailed, err)
	}
	secret, err := a.packKeys(keys)
	if err != nil {
		return failed(exitArchiveFailed, err)
	}
	if err := backup.Pack(ctx, keys, archive); err != nil {
		return failed(exitArchiveFailed, err)
	}
	fmt.Fprintf(a.Out, "The backup is: %s\n", archive)
	if secret {
		fmt.Fprintln(a.Err, "The archive has the key of encryption at rest in it: keep it as you keep the Secrets.")
	}
	if o.keep == 0 {
		return nil
	}
	removed, err := backup.Prune(dir, backupPattern, o.keep)
	for _, r := range removed {
		fmt.Fprintf(a.Err, "removed the old backup %s\n", r)
	}
	if err != nil {
		return failed(exitArchiveFailed, err)
	}
	return nil
}

func (a *App) dbRestore(ctx context.Context, o dbctlOptions) error {
	failed := func(code int, err error) error {
		if ctx.Err() != nil {
			return &Failure{Err: errors.New("interrupted: some keys may have been restored and others not"),
				Hints: []string{"run it again: microk8s dbctl restore " + o.archive}, Code: exitInterrupted}
		}
		return &Failure{Err: fmt.Errorf("Restore process failed. %w", err), Code: code} //nolint:staticcheck // upstream's words
	}
	fmt.Fprintf(a.Out, "Restoring from %s\n", o.archive)
	work, err := a.restoreFolder(ctx, o.archive)
	if err != nil {
		return failed(exitArchiveBad, err)
	}
	defer os.RemoveAll(work)
	keys := filepath.Join(work, "keys")
	set, err := backup.Unpack(ctx, o.archive, keys)
	if err != nil {
		return failed(exitArchiveBad, err)
	}
	if set.Manifest.Revision == 0 {
		fmt.Fprintln(a.Err, "the archive has no list of its content, as upstream's have none: that it is complete cannot be checked")
	}
	if err := a.keepCopy(ctx, "restore", o.noCopy); err != nil {
		return err
	}
	if err := a.unpackKeys(keys); err != nil {
		return failed(exitRestoreFailed, err)
	}
	var extra []string
	if o.prune {
		extra = append(extra, "--prune")
	}
	if err := a.migrator(ctx, o.debug, "restore-to-dqlite", keys, extra...); err != nil {
		return failed(exitRestoreFailed, err)
	}
	fmt.Fprintf(a.Out, "Restored %d keys\n", set.Manifest.Keys)
	fmt.Fprintln(a.Out, "Join tokens and the secrets between nodes are those of now, not of the archive; new tokens: microk8s add-node")
	return nil
}

// packKeys puts the keys of encryption at rest beside the dumped data, where this cluster encrypts.
func (a *App) packKeys(dir string) (found bool, err error) {
	data, err := os.ReadFile(a.encryptionFile())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, os.WriteFile(filepath.Join(dir, backup.KeysName), data, 0o600)
}

// unpackKeys adds the keys of an archive to those that this cluster reads with, before the data comes.
func (a *App) unpackKeys(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, backup.KeysName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	path := a.encryptionFile()
	own, err := os.ReadFile(path)
	if err == nil && bytes.Equal(own, data) {
		return nil
	}
	byHand := func(why error) error {
		return fmt.Errorf("the Secrets in the archive are encrypted with keys that cannot be added to %s (%w); add them by hand: they are in the file %s of the archive", path, why, backup.KeysName)
	}
	if err != nil {
		return byHand(err)
	}
	have, err := encryption.Parse(own)
	if err != nil {
		return byHand(err)
	}
	others, err := encryption.Parse(data)
	if err != nil {
		return byHand(err)
	}
	all, err := have.Merge(others)
	if err != nil {
		return byHand(err)
	}
	if len(all) == len(have) {
		return nil
	}
	if err := fileaccess.For(a.Env).WriteSecret(path, all.Encode()); err != nil {
		return err
	}
	fmt.Fprintf(a.Err, "The archive's key of encryption at rest was added to %s; the API server reads Secrets with it within a minute.\n", path)
	fmt.Fprintln(a.Err, "Copy that file to the same place on every other control-plane node, then encrypt everything with one key: microk8s encryption rotate")
	return nil
}

// encryptionFile is the configuration of encryption at rest that the API server of this node uses, or
// would.
func (a *App) encryptionFile() string {
	if _, err := os.Stat(a.Env.Args(nodeconfig.APIServer)); err != nil {
		return encryption.Path(a.Env)
	}
	if path := nodeconfig.Load(a.Env).APIServer.EncryptionConfig; path != "" {
		return path
	}
	return filepath.Join(a.Env.Data, "no-encryption")
}

// restoreFolder makes a folder on the disk of the node's data, with room for what is in an archive.
// /tmp is in memory on many machines, and an archive has two files for each key.
func (a *App) restoreFolder(ctx context.Context, archive string) (string, error) {
	need, err := backup.Needs(ctx, archive)
	if err != nil {
		return "", err
	}
	parent := filepath.Join(a.Env.Data, "tmp")
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", err
	}
	left, err := filepath.Glob(filepath.Join(parent, "dbctl-*")) // of a command that was killed
	if err != nil {
		return "", err
	}
	for _, l := range left {
		if err := os.RemoveAll(l); err != nil {
			return "", err
		}
	}
	if err := diskspace.Check(parent, need); err != nil {
		return "", fmt.Errorf("cannot unpack the archive: %w", err)
	}
	return os.MkdirTemp(parent, "dbctl-")
}

// migrator runs the datastore's own tool. Only its exit status counts; what it said is shown
// when it failed.
func (a *App) migrator(ctx context.Context, debug bool, mode, dir string, extra ...string) error {
	args := append([]string{"migrator", "--endpoint", "unix://" + a.Env.DatastoreSocket(), "--mode", mode, "--db-dir", dir}, extra...)
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, a.Env.Bin("k8s-dqlite"), args...)
	cmd.Env = a.Env.Environ(a.Environ)
	cmd.Stdout, cmd.Stderr = &said, &said
	if debug {
		cmd.Args = append(cmd.Args, "--debug")
		cmd.Stdout, cmd.Stderr = a.Err, a.Err
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(said.String()); text != "" {
			return fmt.Errorf("%w\n%s", err, text)
		}
		return err
	}
	return nil
}
