package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"microk8s/internal/archive/job"
	"microk8s/internal/args"
	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/journal"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// kindRestore names the copies of what a node had before it became another cluster.
const kindRestore = "before-restore"

// restoreTrees are the folders that a restore changes, by the name of their copy.
func restoreTrees(env snapenv.Env) map[string]string { return savedTrees(env) }

// ownFlags are arguments that belong to the machine and not to the cluster, by file: a restore leaves
// them as they are here.
var ownFlags = map[string][]string{
	nodeconfig.Kubelet:   {"node-ip", "hostname-override"},
	nodeconfig.APIServer: {"advertise-address", "bind-address", "external-hostname"},
	"kube-proxy":         {"hostname-override", "bind-address"},
	"cluster-agent":      {"bind"},
}

// MachineFlags returns the arguments that a restore leaves as they are, as "FILE --FLAG", sorted.
func MachineFlags() (out []string) {
	for file, flags := range ownFlags {
		for _, f := range flags {
			out = append(out, file+" --"+f)
		}
	}
	slices.Sort(out)
	return out
}

type restoreParams struct {
	Self string `json:"self"`
	// Staged is the folder of the opened archive: node/ and datastore/. It is removed at the end.
	Staged  string `json:"staged"`
	Stopped bool   `json:"stopped,omitempty"` // the node was, before
}

// StageDir is where an archive is opened before [Node.Restore], so that a restore which was interrupted
// finds it.
func StageDir(env snapenv.Env) string { return filepath.Join(env.ClusterDir(), "restore") }

// ResumeRestore finishes or takes back a restore that was interrupted; found is false where there is none.
func (n *Node) ResumeRestore(ctx context.Context, j *journal.Journal) (found bool, err error) {
	n.defaults()
	r, err := j.Pending()
	if err != nil || r == nil {
		return false, err
	}
	if r.Operation != opRestore {
		return false, fmt.Errorf("%w: %s; run it again to finish it", ErrOther, r.Operation)
	}
	var p restoreParams
	if err := json.Unmarshal(r.Params, &p); err != nil {
		return true, fmt.Errorf("cannot read the journal of the interrupted restore: %w", err)
	}
	n.Say("A previous restore was interrupted; resuming it")
	return true, j.Resume(ctx, n.restorePlan(&p))
}

// Restore makes this machine the only node of the cluster whose archive was opened in [StageDir]. What it
// was before is kept. If it fails, the machine is as it was.
func (n *Node) Restore(ctx context.Context, j *journal.Journal) error {
	n.defaults()
	name, err := n.nodeName()
	if err != nil {
		return err
	}
	p := &restoreParams{Self: name, Staged: StageDir(n.Env), Stopped: n.state().Stopped}
	return j.Run(ctx, n.restorePlan(p), p)
}

func (n *Node) restorePlan(p *restoreParams) journal.Plan {
	s := &restoreRun{Node: n, restoreParams: p}
	return journal.Plan{Operation: opRestore, Commit: StepStart, Steps: []journal.Step{
		step(StepSaveState, s.save, func(context.Context) error { return os.RemoveAll(s.file(kindRestore)) }),
		step(StepStop, s.stop, s.startAgain),
		step(StepSetAside, func(context.Context) error { return n.setBackendAside() }, s.takeBack),
		step(StepCertificates, s.certificates, s.back("certs", "credentials")),
		step(StepArguments, s.arguments, s.back("args", "lock")),
		step(StepSetUp, func(ctx context.Context) error { return n.Install(ctx) }, nil),
		step(StepFill, s.fill, s.stopStore),
		step(StepStart, s.start, nil),
		step(StepRemaining, s.remaining, nil),
		step(StepWait, s.wait, nil),
		step(StepCleanUp, s.clean, nil),
	}}
}

type restoreRun struct {
	*Node
	*restoreParams
}

func (s *restoreRun) staged(name string) string { return filepath.Join(s.Staged, "node", name) }

// save copies what the node is now. It appears whole, and only once.
func (s *restoreRun) save(context.Context) error {
	to := s.file(kindRestore)
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	if err := os.RemoveAll(to + ".new"); err != nil {
		return err
	}
	for name, from := range restoreTrees(s.Env) {
		if err := copyTree(from, filepath.Join(to+".new", name)); err != nil {
			return fmt.Errorf("cannot keep a copy of %s: %w", from, err)
		}
	}
	if err := os.Rename(to+".new", to); err != nil {
		return err
	}
	return syncDir(s.Env.ClusterDir())
}

// back undoes changes of folders.
func (s *restoreRun) back(names ...string) func(context.Context) error {
	return func(context.Context) error {
		for _, name := range names {
			if err := restoreTree(s.file(kindRestore+"/"+name), restoreTrees(s.Env)[name], name == "lock"); err != nil {
				return fmt.Errorf("cannot restore %s: %w", name, err)
			}
		}
		return nil
	}
}

func (s *restoreRun) stop(ctx context.Context) error {
	if err := s.lock(snapenv.LockJoining); err != nil {
		return err
	}
	return s.stopAll(ctx)
}

// startAgain undoes stop: by then every file is what it was.
func (s *restoreRun) startAgain(ctx context.Context) error {
	if err := s.lock(snapenv.LockInstalled); err != nil {
		return err
	}
	if err := s.unlock(snapenv.LockJoining); err != nil {
		return err
	}
	if s.Stopped {
		return nil
	}
	return s.Services.Start(ctx)
}

func (s *restoreRun) takeBack(ctx context.Context) error {
	if err := s.stopStore(ctx); err != nil {
		return err
	}
	return s.takeBackendBack()
}

func (s *restoreRun) stopStore(ctx context.Context) error {
	return s.Services.Stop(ctx, service.Datastore)
}

// certificates installs the cluster's keys and removes what was issued with others: the first start issues
// the machine's again.
func (s *restoreRun) certificates(context.Context) error {
	// What is interrupted after this must not start as something in between.
	if err := s.unlock(snapenv.LockInstalled); err != nil {
		return err
	}
	for _, name := range job.ClusterCerts {
		if _, err := os.Stat(s.staged(job.CertsFolder + "/" + name)); err != nil {
			return fmt.Errorf("the archive lacks %s: %w", name, err)
		}
	}
	if err := emptyExcept(s.Env.CertsDir(), "csr.conf.template"); err != nil {
		return err
	}
	if err := emptyExcept(s.Env.CredentialsDir()); err != nil {
		return err
	}
	access := fileaccess.For(s.Env)
	for _, name := range job.ClusterCerts {
		data, err := os.ReadFile(s.staged(job.CertsFolder + "/" + name))
		if err != nil {
			return err
		}
		write := access.WriteShared
		if strings.HasSuffix(name, ".key") {
			write = access.WriteSecret
		}
		if err := write(s.Env.Cert(name), data); err != nil {
			return err
		}
	}
	// A cluster of one node: certificates follow this host's addresses.
	return s.unlock(snapenv.LockNoReissue)
}

// arguments installs the archive's argument files, with the flags that belong to this machine as they are.
func (s *restoreRun) arguments(context.Context) error {
	access := fileaccess.For(s.Env)
	from := s.staged(job.ArgsFolder)
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		own := map[string]string{}
		for _, flag := range ownFlags[name] {
			own[flag] = ""
			if f, err := args.Load(s.file(kindRestore+"/args/"+name), args.GrammarFor(name)); err == nil {
				own[flag], _ = f.Get(flag)
			}
		}
		if err := os.MkdirAll(filepath.Dir(s.Env.Args(name)), 0o755); err != nil {
			return err
		}
		if err := access.WriteShared(s.Env.Args(name), data); err != nil {
			return err
		}
		if len(own) == 0 {
			return nil
		}
		if err := s.editArgs(name, own); err != nil {
			return err
		}
		return ignoreMissing(os.Remove(s.Env.Args(name) + ".backup"))
	})
	if err != nil {
		return fmt.Errorf("cannot install the arguments: %w", err)
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (s *restoreRun) fill(ctx context.Context) error {
	if data, err := os.ReadFile(s.staged(job.EncryptionFile)); err == nil {
		if err := fileaccess.For(s.Env).WriteSecret(encryption.Path(s.Env), data); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.Services.Start(ctx, service.Datastore); err != nil {
		return fmt.Errorf("cannot start the datastore: %w", err)
	}
	return s.Fill(ctx, filepath.Join(s.Staged, "datastore"))
}

func (s *restoreRun) start(ctx context.Context) error {
	if err := s.unlock(snapenv.LockJoining, snapenv.LockStopped); err != nil {
		return err
	}
	return s.Services.Start(ctx)
}

// remaining installs what may come late: added addon repositories and launch configurations, where this
// machine has none of that name.
func (s *restoreRun) remaining(context.Context) error {
	for folder, to := range map[string]string{job.AddonsFolder: s.Env.AddonRepositories(), job.LaunchFolder: s.Env.LaunchDir()} {
		from := s.staged(folder)
		err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && path == from {
				return fs.SkipDir
			}
			if err != nil || d.IsDir() {
				return err
			}
			name, err := filepath.Rel(from, path)
			if err != nil {
				return err
			}
			target := filepath.Join(to, name)
			if _, err := os.Lstat(target); err == nil {
				return nil
			}
			st, err := d.Info()
			if err != nil {
				return err
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			return atomicfile.Write(target, data, st.Mode().Perm(), nil)
		})
		if err != nil {
			return fmt.Errorf("cannot install %s: %w", to, err)
		}
	}
	return nil
}

func (s *restoreRun) wait(ctx context.Context) error {
	return s.awaitReady(ctx, s.Self, "everything is restored", "microk8s status")
}

// clean keeps what the node had, under a date, and removes the opened archive.
func (s *restoreRun) clean(context.Context) error {
	if _, err := os.Lstat(s.backendAside()); err == nil {
		if _, err := os.Lstat(filepath.Join(s.backendAside(), leftNode)); errors.Is(err, fs.ErrNotExist) {
			if err := os.Rename(s.file(kindRestore), filepath.Join(s.backendAside(), leftNode)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := os.Chmod(s.backendAside(), 0o700); err != nil {
			return err
		}
		kept, err := s.keepDated(s.backendAside(), kindRestore, s.Now())
		if err != nil {
			return err
		}
		s.Say("What this machine had before is kept in %s", kept)
	}
	return errors.Join(os.RemoveAll(s.file(kindRestore)), os.RemoveAll(s.file(saved)), os.RemoveAll(s.Staged))
}

// OtherMembers returns the addresses of the datastore's other members, as this node's files have them.
func OtherMembers(env snapenv.Env) (out []string) {
	own := ownMember(env.BackendLive())
	stored, _ := storedir.Dir(env.BackendLive()).Members() // none on a node that was never started
	for _, m := range stored {
		if m.ID != own.ID {
			out = append(out, m.Address)
		}
	}
	return out
}
