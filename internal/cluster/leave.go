package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"microk8s/apiserver-proxy/config"
	"microk8s/internal/args"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/fileaccess"
	"microk8s/internal/journal"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/serverargs"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// LeaveOptions say how to leave.
type LeaveOptions struct {
	// Force leaves also when the cluster cannot be told: it must then be told with remove-node.
	Force bool
	// Confirm asks a person about something that cannot be taken back; an error stops the
	// operation. nil refuses with ErrUnconfirmed.
	Confirm func(question string) error
}

// ErrUnconfirmed is wrapped when nobody could be asked, or the answer was no.
var ErrUnconfirmed = errors.New("not confirmed")

func confirm(ask func(string) error, format string, a ...any) error {
	if ask == nil {
		return ErrUnconfirmed
	}
	return ask(fmt.Sprintf(format, a...))
}

type leaveParams struct {
	Self   string `json:"self"` // this node's name
	Worker bool   `json:"worker,omitempty"`
	Member string `json:"member,omitempty"` // of the datastore: this node's address there
	ID     uint64 `json:"id,omitempty"`     // of that member; 0 in journals of earlier versions
	Force  bool   `json:"force,omitempty"`
	// Elsewhere: the member's address is not one of this host's. It may be another machine's, of
	// whose disk this one is a copy: the member stays.
	Elsewhere bool `json:"elsewhere,omitempty"`
	// Port is that of the datastore's member, which the new one has too: firewalls were opened for it.
	Port int `json:"port,omitempty"`
}

// Reasons not to leave.
var (
	// ErrNotMember: the node is in no cluster.
	ErrNotMember = errors.New("this node is not in a cluster")
	// ErrLast: it is the only node of its cluster, and keeps the data. It has become an ordinary
	// single node.
	ErrLast = errors.New("this is the only node of its cluster")
	// ErrOnlyCopy: no other member that could take the data over answers.
	ErrOnlyCopy = errors.New("this node holds the only copy of the datastore that can be used")
	// ErrContact is wrapped when the datastore's other members did not do what was asked.
	ErrContact = errors.New("the other members of the datastore could not be reached")
)

// Leave takes this node out of its cluster and makes it a single node with an empty datastore,
// new keys, and nothing of the cluster's. An interrupted one is finished; an interrupted join is
// taken back.
func (n *Node) Leave(ctx context.Context, j *journal.Journal, o LeaveOptions) error {
	n.defaults()
	if found, err := n.UndoJoin(ctx, j); found && !errors.Is(err, journal.ErrCommitted) {
		return err
	} else if found { // finish it first
		r, err := j.Pending()
		if err != nil {
			return err
		}
		var p joinParams
		if err := json.Unmarshal(r.Params, &p); err != nil {
			return err
		}
		if err := j.Resume(ctx, n.joinPlan(&p)); err != nil {
			return err
		}
	}
	if r, err := j.Pending(); err != nil {
		return err
	} else if r != nil && r.Operation == opLeave {
		var p leaveParams
		if err := json.Unmarshal(r.Params, &p); err != nil {
			return fmt.Errorf("cannot read the journal of the interrupted leave: %w", err)
		}
		n.Say("A previous leave was interrupted; resuming it")
		// The disk may have been copied to another machine, or the journal be an earlier version's.
		if own := ownMember(n.Env.BackendLive()); own.Address != "" && own.Address == p.Member {
			p.ID, p.Elsewhere = own.ID, n.elsewhere(own)
			at := cmp.Or(renamed[r.Step], r.Step)
			if early := at == StepStopKubernetes || at == StepLeaveDatastore; early && o.Force && !p.Force {
				if err := n.confirmLast(ctx, own, o); err != nil {
					return err
				}
			}
		}
		p.Force = p.Force || o.Force
		return j.Resume(ctx, n.leavePlan(&p))
	} else if r != nil {
		return fmt.Errorf("%w: %s; run it again to finish it", ErrOther, r.Operation)
	}
	p, err := n.mayLeave(ctx, o)
	if err != nil {
		return err
	}
	return j.Run(ctx, n.leavePlan(p), p)
}

// mayLeave finds out what leaving means here.
func (n *Node) mayLeave(ctx context.Context, o LeaveOptions) (*leaveParams, error) {
	hostname, err := n.nodeName()
	if err != nil {
		return nil, err
	}
	p := &leaveParams{Self: hostname, Worker: n.state().Worker, Force: o.Force, Port: storedir.Dir(n.Env.BackendLive()).Port()}
	if p.Worker {
		p.Port = storedir.Dir(n.backendBackup()).Port() // what it was before the join
		return p, nil
	}
	if !IsMember(n.Env) {
		if n.state().Clustered {
			// Others have been here. From now on certificates follow this host's addresses again.
			if err := n.unlock(snapenv.LockNoReissue); err != nil {
				return nil, err
			}
			return nil, errors.Join(ErrLast, n.unpin())
		}
		return nil, ErrNotMember
	}
	if !nodeconfig.Load(n.Env).Datastore.Own() {
		return p, nil // the datastore is not the cluster's nodes'
	}
	own := ownMember(n.Env.BackendLive())
	p.Member, p.ID, p.Elsewhere = own.Address, own.ID, n.elsewhere(own)
	if o.Force {
		return p, n.confirmLast(ctx, own, o)
	}
	if p.Elsewhere {
		if voters, answers := n.others(ctx, own); !answers {
			return nil, fmt.Errorf("%w: none of the voters %s answers", ErrContact, strings.Join(voters, ", "))
		}
		return p, nil
	}
	list, err := peers.Members(ctx, n.Env.BackendLive())
	if errors.Is(err, peers.ErrNotRunning) {
		if _, answers := n.others(ctx, own); answers {
			return p, nil // they are asked, and know whether this node was removed
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cannot leave: %w: %w", ErrContact, err)
	}
	if !slices.ContainsFunc(list, func(m peers.Member) bool { return m.Self || m.Address == p.Member }) {
		return p, nil // somebody has removed it already
	}
	voters, others := 0, 0
	for _, m := range list {
		self := m.Self || m.Address == p.Member
		if m.Role == storedir.Voter && !self {
			voters++
		}
		if !self && m.Online {
			others++
		}
	}
	if len(list) > 1 && voters == 0 && others == 0 {
		return nil, ErrOnlyCopy
	}
	return p, nil
}

// confirmLast asks before a node leaves by force whose copy of the cluster's data may be the last one.
func (n *Node) confirmLast(ctx context.Context, own storedir.Member, o LeaveOptions) error {
	voters, answers := n.others(ctx, own)
	if answers {
		return nil
	}
	who := "There is no other voter of the datastore."
	if len(voters) > 0 {
		who = "No other voter of the datastore answers (" + strings.Join(voters, ", ") + ")."
	}
	return confirm(o.Confirm, "%s This node may have the last copy of the cluster's data%s. "+
		"After it has left, the copy is kept on this node, but nothing runs with it.", who, n.howFar())
}

// unpin takes the address that a join has written into the arguments out of them, where nobody had
// set it before.
func (n *Node) unpin() error {
	for _, x := range []struct{ file, flag string }{{"kubelet", "node-ip"}, {"kube-apiserver", "advertise-address"}} {
		before, err := args.Load(n.file(saved+"/args/"+x.file), args.GrammarFor(x.file))
		if err != nil {
			continue // this node never joined another
		}
		value, _ := before.Get(x.flag)
		if err := n.editArgs(x.file, map[string]string{x.flag: value}); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) leavePlan(p *leaveParams) journal.Plan {
	s := &leaveRun{Node: n, leaveParams: p}
	return journal.Plan{Operation: opLeave, Commit: StepForget, Renamed: renamed, Steps: []journal.Step{
		step(StepStopKubernetes, s.quiet, s.resume),
		step(StepLeaveDatastore, s.depart, nil),
		step(StepForget, s.forget, nil),
		step(StepSetUp, func(ctx context.Context) error { return n.Install(ctx) }, nil),
		step(StepStart, s.start, nil),
		step(StepWait, s.wait, nil),
		step(StepCleanUp, func(context.Context) error {
			return errors.Join(os.RemoveAll(n.file(saved)), os.RemoveAll(n.file(departedFile)))
		}, nil),
	}}
}

type leaveRun struct {
	*Node
	*leaveParams
}

func (s *leaveRun) quiet(ctx context.Context) error {
	if err := os.RemoveAll(s.file(departedFile)); err != nil { // of an earlier leave that was taken back
		return err
	}
	if err := s.lock(snapenv.LockJoining); err != nil {
		return err
	}
	if err := s.Services.Stop(ctx, service.Kubelite); err != nil {
		return fmt.Errorf("cannot stop the services: %w", err)
	}
	return nil
}

func (s *leaveRun) resume(ctx context.Context) error {
	if err := s.unlock(snapenv.LockJoining); err != nil {
		return err
	}
	return s.Services.Start(ctx)
}

// depart takes this node's member out of the datastore, while its daemon still runs, so that a
// leader can hand over.
func (s *leaveRun) depart(ctx context.Context) error {
	if s.Worker || s.Member == "" {
		return nil
	}
	if s.Elsewhere {
		return s.staysMember(ctx)
	}
	live := s.Env.BackendLive()
	everyone := append(storedir.Dir(live).Addresses(), s.Member)
	err := s.removeMember(ctx, s.removeWait, live, s.ID, s.Member, everyone)
	if err != nil && !errors.Is(err, peers.ErrReplaced) && ctx.Err() == nil { // after a crash its daemon may be down, and its vote needed
		if startErr := s.Services.Start(ctx, service.Datastore); startErr == nil {
			err = waitFor(ctx, s.removeWait, func(ctx context.Context) error {
				return s.removeMember(ctx, s.removeWait, live, s.ID, s.Member, everyone)
			})
		}
	}
	if errors.Is(err, peers.ErrReplaced) { // it was removed, and another one is in its place
		s.Log.Info("this node's member was removed before", "err", err)
		err = nil
	}
	if ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	if err == nil {
		return s.noteDeparted()
	}
	if s.Force {
		s.Say("WARNING: cannot tell the cluster that this node leaves (%v); on one of its nodes run: microk8s remove-node %s --force", err, s.Self)
		return nil
	}
	return fmt.Errorf("%w: %w", ErrContact, err)
}

// departWait bounds Depart.
const departWait = 15 * time.Second

// Depart takes this node's member out of the datastore, and nothing more, for a node that is about to be
// removed from its host. It does nothing on a node that is no member, and fails where no other voter
// answers. On a host that does not have the member's address it leaves the member alone.
func (n *Node) Depart(ctx context.Context) error {
	n.defaults()
	live := n.Env.BackendLive()
	own := ownMember(live)
	if n.state().Worker || own.Address == "" || len(storedir.Dir(live).Addresses()) < 2 || n.elsewhere(own) {
		return nil
	}
	if voters, answers := n.others(ctx, own); !answers {
		return fmt.Errorf("%w: none of the voters %s answers", ErrContact, strings.Join(voters, ", "))
	}
	if err := n.removeMember(ctx, departWait, live, own.ID, own.Address, append(storedir.Dir(live).Addresses(), own.Address)); err != nil && !errors.Is(err, peers.ErrReplaced) {
		return fmt.Errorf("%w: %w", ErrContact, err)
	}
	return nil
}

// staysMember is depart on a host that does not have its member's address. It removes nothing.
func (s *leaveRun) staysMember(ctx context.Context) error {
	address := host(s.Member)
	dial, err := s.memberDial(s.Env.BackendLive())
	if err == nil && peers.Answers(ctx, s.Member, dial) {
		s.Say("WARNING: the cluster's member %s runs on another machine, of whose disk this one is a copy: it stays a member", address)
		return s.noteDeparted()
	}
	s.Say("WARNING: the cluster knows this node as %s, which is not an address of this host; that member was left as it is. "+
		"If no other machine has it, run on another node: microk8s remove-node %s --force", address, address)
	return ctx.Err()
}

// forget removes every secret and setting of the cluster. From here on there is only forward.
func (s *leaveRun) forget(ctx context.Context) error {
	if err := s.stopAll(ctx); err != nil {
		return err
	}
	// First: what is interrupted after it must not start as half a member.
	if err := s.unlock(snapenv.LockInstalled); err != nil {
		return err
	}
	if _, err := os.Lstat(s.file(departedFile)); err != nil {
		if err := s.keepLeft(); err != nil {
			return err
		}
	}
	if err := emptyExcept(s.Env.CertsDir(), "csr.conf.template"); err != nil {
		return err
	}
	if err := emptyExcept(s.Env.CredentialsDir()); err != nil {
		return err
	}
	for _, path := range []string{s.store().BackupDir(), s.Env.BackendLive(), s.file(answerFile)} { // the backend only where others have it
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	if err := s.keepPort(); err != nil {
		return err
	}
	if err := config.Uninstall(s.Env); err != nil {
		return err
	}
	// The arguments that the join has changed.
	names := []string{"kubelet", "kube-proxy", "kube-apiserver", "kube-controller-manager"}
	if carried, err := os.ReadDir(s.file(saved + "/args")); err == nil {
		for _, f := range carried {
			if f.Type().IsRegular() && serverargs.Carries(f.Name()) {
				names = append(names, f.Name())
			}
		}
	}
	if err := os.RemoveAll(s.Env.Args("cluster")); err != nil { // files that came with the cluster's arguments
		return err
	}
	for _, name := range names {
		data, err := os.ReadFile(s.file(saved + "/args/" + name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = writeLike(s.Env.Args(name), data)
		}
		if err != nil {
			return fmt.Errorf("cannot restore the arguments: %w", err)
		}
		if err := os.Remove(s.Env.Args(name) + ".backup"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := s.ownNetwork(); err != nil {
		return err
	}
	if err := s.unlock(snapenv.LockNoReissue, snapenv.LockWorker, snapenv.LockNoDqlite); err != nil {
		return err
	}
	return s.ownDatastore()
}

// keepPort has the new member of the datastore listen on the port of the one before; the first start
// does not replace the file.
func (s *leaveRun) keepPort() error {
	if s.Port == 0 || s.Port == storedir.DefaultPort {
		return nil
	}
	access := fileaccess.For(s.Env)
	if err := access.SharedDir(s.Env.BackendLive()); err != nil {
		return err
	}
	first, err := storedir.Init{Address: join(storedir.Loopback, s.Port)}.Encode()
	if err != nil {
		return err
	}
	return access.WriteShared(storedir.Dir(s.Env.BackendLive()).File(storedir.InitFile), first)
}

// ownNetwork removes the manifest of a pod network that the join has placed, unless it was changed
// since: then it is the user's.
func (s *leaveRun) ownNetwork() error {
	placed, err := os.ReadFile(s.file(placedCNI))
	if errors.Is(err, fs.ErrNotExist) {
		placed, err = []byte(placedUnrecorded), nil
	}
	if err != nil {
		return fmt.Errorf("cannot restore the pod network: %w", err)
	}
	now, err := os.ReadFile(s.Env.CNIManifest())
	if errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(now, placed) {
		return nil
	}
	if err == nil {
		err = os.Remove(s.Env.CNIManifest())
	}
	if err != nil {
		return fmt.Errorf("cannot restore the pod network: %w", err)
	}
	return nil
}

// placedUnrecorded is the manifest that earlier versions placed without a record.
const placedUnrecorded = "# The cluster that this node has joined brings its own pod network.\n"

// ownDatastore points the API server at this node's datastore where it still uses an etcd, as on
// the node that had it first: the arguments of the others were put back to what they were.
func (s *leaveRun) ownDatastore() error {
	if nodeconfig.Load(s.Env).Datastore.Owner != nodeconfig.ExternalEtcd {
		return nil
	}
	if err := s.editArgs(nodeconfig.APIServer, map[string]string{
		"etcd-servers": nodeconfig.OwnEtcdServers, "etcd-cafile": "", "etcd-certfile": "", "etcd-keyfile": "",
	}); err != nil {
		return err
	}
	return os.Remove(s.Env.Args(nodeconfig.APIServer) + ".backup")
}

// emptyExcept removes what is in a folder, but not the named files.
func emptyExcept(folder string, keep ...string) error {
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if err == nil && !slices.Contains(keep, e.Name()) {
			err = os.RemoveAll(filepath.Join(folder, e.Name()))
		}
	}
	return err
}

func (s *leaveRun) start(ctx context.Context) error {
	if err := s.unlock(snapenv.LockJoining, snapenv.LockStopped); err != nil {
		return err
	}
	if s.state().LowMemory {
		return nil // it was fit for a worker only
	}
	return s.Services.Start(ctx)
}

// leaveReady is how long the new single node may take; that it is late is said, and no failure.
const leaveReady = 2 * time.Minute

func (s *leaveRun) wait(ctx context.Context) error {
	if s.state().LowMemory {
		s.Say("WARNING: this machine has too little memory for a control plane: its services do not run; see microk8s start --help")
		return nil
	}
	return s.awaitReady(ctx, s.Self, "this node is a single node now", "microk8s inspect")
}
