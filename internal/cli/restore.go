package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/archive"
	"microk8s/internal/archive/job"
	"microk8s/internal/archive/place"
	"microk8s/internal/cluster"
	"microk8s/internal/datastore/backup"
	"microk8s/internal/diskspace"
)

type restoreOptions struct {
	backupOptions
	dryRun, yes, force bool
}

func (a *App) newRestore() *cobra.Command {
	var o restoreOptions
	cmd := &cobra.Command{
		Use:   "restore ARCHIVE [--from PLACE] (--identity-file FILE | --passphrase-file FILE) [--dry-run] [-y] [-o json|yaml]",
		Short: "Bring a cluster back from an archive of microk8s backup",
		Long: `Bring a cluster back from an archive of microk8s backup. ARCHIVE is a file, or the name of one in
the place of --from. It is compared with its manifest and restored into a scratch datastore first.

On a node of the cluster that the archive is of, and whose datastore runs, all objects become what
they were: others are deleted. On any other machine, this machine becomes the only node of that
cluster, with its keys, arguments, addons and objects; what it was before is kept beside the
datastore. Other nodes then leave and join again.

What must not come back does not: join tokens, secrets between nodes, and which nodes may be in
the cluster are those of now. Contents of volumes are not part of an archive.

See first what it would do, with --dry-run. Interrupted at any moment, it goes on, or is rolled
back, when it is run again.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return &usageError{cmd, fmt.Errorf("unexpected argument: %s", args[1])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			return a.restore(cmd.Context(), name, o)
		},
	}
	cmd.Flags().StringVar(&o.place, "from", "", "where the archive is: /DIR, nfs:/DIR or s3://BUCKET/FOLDER?endpoint=URL; without it a file of that name, or as scheduled")
	cmd.Flags().StringVar(&o.credentials, "s3-credentials-file", "", "file with aws_access_key_id and aws_secret_access_key, as ~/.aws/credentials has them")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "check the archive and show what would be done; change nothing")
	cmd.Flags().BoolVar(&o.force, "force", false, "make this machine that cluster although other nodes belong to the one that it is in")
	addOpening(cmd, &o.backupOptions)
	addYes(cmd.Flags(), &o.yes)
	o.out = addOutput(cmd, "text")
	return cmd
}

// restorePlan is the kind RestorePlan.
type restorePlan struct {
	documentMeta
	Archive  string    `json:"archive"`
	Cluster  string    `json:"cluster"`
	Created  time.Time `json:"created"`
	Node     string    `json:"node"`
	Version  string    `json:"version,omitempty"`
	Revision int64     `json:"revision"`
	Keys     int       `json:"keys"`
	// Running: the objects of the running cluster change. Otherwise this machine becomes the cluster.
	Running bool `json:"running"`
	// Of keys: those that are written, deleted, and left as they are now.
	Write  int      `json:"write"`
	Delete int      `json:"delete"`
	Leave  int      `json:"leave"`
	Files  []string `json:"files"` // of the archive that are installed
	Keep   []string `json:"keep"`  // arguments of this machine that stay
}

func (a *App) restore(ctx context.Context, name string, o restoreOptions) error {
	node, j, err := a.change()
	if err != nil {
		return err
	}
	defer j.Close()
	node.Fill = a.fill
	if !o.dryRun {
		found, err := node.ResumeRestore(ctx, j)
		if err != nil {
			return a.changeFailure(&Failure{Err: err}, err)
		}
		if found {
			fmt.Fprintln(a.Out, "The interrupted restore is done; see the node with: microk8s status")
			return nil
		}
	}
	if name == "" {
		return &Failure{Err: errors.New("the archive to restore is missing"), Code: ExitUsage, Hints: []string{"see what there is with: microk8s backup list --from PLACE"}}
	}
	who, err := a.identities(o.backupOptions)
	if err != nil {
		return err
	}
	w, name, err := a.archiveOf(ctx, name, o.backupOptions)
	if err != nil {
		return err
	}
	work := cluster.StageDir(a.Env)
	if o.dryRun {
		if work, err = job.Work(a.Env); err != nil {
			return err
		}
		defer os.RemoveAll(work)
	} else {
		if err := os.RemoveAll(work); err != nil { // of one that ended before it began
			return err
		}
		if err := os.MkdirAll(filepath.Dir(work), 0o755); err != nil {
			return err
		}
	}
	began := false
	defer func() {
		if !began {
			os.RemoveAll(cluster.StageDir(a.Env))
		}
	}()
	p := a.progress()
	var opening *archive.Opened
	scratch, err := job.Work(a.Env)
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	err = p.step("Read "+name, func() (err error) {
		r, err := w.Place.Get(ctx, name)
		if err != nil {
			return err
		}
		defer r.Close()
		to := work
		if o.dryRun {
			to = filepath.Join(work, "open")
		}
		opening, err = archive.Read(ctx, r, to, who...)
		return err
	})
	if err == nil {
		err = p.step(fmt.Sprintf("Restore its %d keys into a scratch datastore, and compare", opening.Manifest.Datastore.Keys), func() error { return w.Prove(ctx, scratch, opening) })
	}
	var full *diskspace.Error
	if err != nil && !errors.As(err, &full) {
		return opened(err)
	} else if err != nil {
		return err
	}
	plan, err := a.planRestore(ctx, name, scratch, opening)
	if err != nil {
		return err
	}
	if o.dryRun {
		return a.showRestore(plan, o.out)
	}
	if !plan.Running {
		if err := a.soleNode(ctx, o.force, "make this machine another cluster", "they would lose this node and its control plane", "then each of them must leave and join again"); err != nil {
			return err
		}
	}
	if err := a.showRestore(plan, &output{}); err != nil {
		return err
	}
	if err := a.confirm("The objects of now are replaced; they are archived first.", o.yes, ""); err != nil {
		return err
	}
	if plan.Running {
		return a.restoreRunning(ctx, opening)
	}
	if !a.state().Installed {
		if err := a.Parts.Install(ctx, a.Env, a.log()); err != nil {
			return fmt.Errorf("cannot set up the node: %w", err)
		}
	}
	began = true
	if err := node.Restore(ctx, j); err != nil {
		return a.changeFailure(&Failure{Err: fmt.Errorf("cannot restore: %w", err)}, err)
	}
	m := opening.Manifest
	fmt.Fprintf(a.Out, "This machine is the cluster of %s now, with %d keys as of revision %d\n", m.Created.Format(time.RFC3339), m.Datastore.Keys, m.Datastore.Revision)
	fmt.Fprintln(a.Err, "Each other node: there run  sudo microk8s leave --force  and join again with a line of: microk8s add-node\nWorkers that join under their old name have the volumes on their disks again.")
	return nil
}

// archiveOf finds an archive: a file of this machine, or one of a place.
func (a *App) archiveOf(ctx context.Context, name string, o backupOptions) (*job.Job, string, error) {
	if st, err := os.Stat(name); o.place == "" && err == nil && st.Mode().IsRegular() {
		full, err := filepath.Abs(name)
		if err != nil {
			return nil, "", err
		}
		p, err := place.Open(filepath.Dir(full), place.Keys{})
		if err != nil {
			return nil, "", err
		}
		j, err := a.archives(p)
		return j, filepath.Base(full), err
	}
	if o.place == "" && strings.Contains(name, "/") {
		return nil, "", &Failure{Err: fmt.Errorf("there is no file %s", name), Code: exitNotProven, Hints: []string{"see what there is with: microk8s backup list --from PLACE"}}
	}
	j, _, err := a.fromPlace(ctx, o)
	return j, name, err
}

// planRestore finds out what a restore would do here.
func (a *App) planRestore(ctx context.Context, name, work string, o *archive.Opened) (*restorePlan, error) {
	m := o.Manifest
	plan := &restorePlan{
		documentMeta: documentOf("RestorePlan"), Archive: name, Cluster: m.Cluster, Created: m.Created, Node: m.Node, Version: m.Version,
		Revision: m.Datastore.Revision, Keys: m.Datastore.Keys, Files: []string{}, Keep: []string{},
	}
	set, err := backup.Open(o.Keys())
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(a.Env.Cert("ca.crt"))
	same := err == nil && archive.ClusterID(ca) == m.Cluster
	have := map[string][]byte{}
	if _, err := os.Stat(a.Env.DatastoreSocket()); same && err == nil {
		keys := filepath.Join(work, "now")
		if err := a.migrator(ctx, false, "backup-dqlite", keys); err == nil {
			plan.Running = true
			now, err := backup.Open(keys)
			if err != nil {
				return nil, err
			}
			for n := range now.Manifest.Keys {
				p, err := now.Pair(n)
				if err != nil {
					return nil, err
				}
				have[string(p.Key)] = p.Value
			}
		} else if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if same && !plan.Running && len(a.otherMembers()) > 0 {
		return nil, &Failure{Err: errors.New("this node is of that cluster, and its datastore does not answer"), Code: exitNotProven,
			Hints: []string{"its data may be there: see microk8s status, start it with microk8s start", "if most of its members are gone for good: sudo microk8s recover --dry-run", "if nothing is left of it: sudo microk8s leave --force, then restore again"}}
	}
	inArchive := map[string]bool{}
	for n := range set.Manifest.Keys {
		p, err := set.Pair(n)
		if err != nil {
			return nil, err
		}
		key := string(p.Key)
		inArchive[key] = true
		switch old, there := have[key]; {
		case backup.Elsewhere(key):
			plan.Leave++
		case !there || !bytes.Equal(old, p.Value) || p.TTL > 0:
			plan.Write++
		}
	}
	for key := range have {
		if !inArchive[key] && !backup.Elsewhere(key) {
			plan.Delete++
		}
	}
	if !plan.Running {
		for file := range m.Files {
			plan.Files = append(plan.Files, file)
		}
		slices.Sort(plan.Files)
		plan.Keep = cluster.MachineFlags()
	}
	return plan, nil
}

// otherMembers are the addresses of the datastore's other members, as this node's files have them.
func (a *App) otherMembers() (out []string) { return cluster.OtherMembers(a.Env) }

func (a *App) showRestore(p *restorePlan, out *output) error {
	if out.document() {
		return a.print(out, p)
	}
	w := a.Out
	fmt.Fprintf(w, "archive: %s, made at %s on node %s, %d keys at revision %d\n", p.Archive, p.Created.Format(time.RFC3339), p.Node, p.Keys, p.Revision)
	if p.Running {
		fmt.Fprintf(w, "here: the cluster that it is of, which runs; its objects become what they were\n")
		fmt.Fprintf(w, "  %d keys are written, %d are deleted, the others are the same\n", p.Write, p.Delete)
		fmt.Fprintf(w, "  what is there now is archived first, beside the datastore\n")
	} else {
		fmt.Fprintf(w, "here: another machine, which becomes the only node of that cluster\n")
		fmt.Fprintf(w, "  %d keys are written, and %d files are installed: keys and certificates of the CAs, arguments, addons, launch configurations\n", p.Write, len(p.Files))
		fmt.Fprintf(w, "  these arguments stay as they are here: %s\n", strings.Join(p.Keep, ", "))
		fmt.Fprintf(w, "  what this machine is now is kept beside the datastore\n")
	}
	fmt.Fprintf(w, "  %d keys of the archive do not come back: join tokens, secrets between nodes, records of nodes and machines\n", p.Leave)
	return nil
}

// restoreRunning makes the objects of the running cluster what they were.
func (a *App) restoreRunning(ctx context.Context, o *archive.Opened) error {
	if err := a.keepCopy(ctx, "restore", false); err != nil {
		return err
	}
	if data, err := os.ReadFile(o.File(job.EncryptionFile)); err == nil {
		if err := os.WriteFile(filepath.Join(o.Keys(), backup.KeysName), data, 0o600); err != nil {
			return err
		}
		if err := a.unpackKeys(o.Keys()); err != nil {
			return err
		}
	}
	p := a.progress()
	if err := p.step("Write the objects", func() error { return a.migrator(ctx, false, "restore-to-dqlite", o.Keys(), "--cluster") }); err != nil {
		if ctx.Err() != nil {
			return &Failure{Err: errors.New("interrupted: some keys may have been restored and others not"), Hints: []string{"run the same command again: microk8s restore ..."}, Code: exitInterrupted}
		}
		return failf("run the same command again: microk8s restore ...", "cannot restore: %w", err)
	}
	fmt.Fprintf(a.Out, "The objects are those of %s, revision %d\n", o.Manifest.Created.Format(time.RFC3339), o.Manifest.Datastore.Revision)
	return nil
}

// fillWait bounds the wait for a datastore that was started just now.
const fillWait = time.Minute

// fill restores a backup into this node's datastore, which was started just now.
func (a *App) fill(ctx context.Context, keys string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	end := time.After(fillWait)
	for {
		err := a.migrator(ctx, false, "restore-to-dqlite", keys, "--cluster")
		if err == nil || ctx.Err() != nil {
			return err
		}
		if _, there := os.Stat(a.Env.DatastoreSocket()); there == nil {
			return err // it runs, so it is not that
		}
		select {
		case <-end:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}
