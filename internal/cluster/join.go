package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/client"
	"microk8s/internal/args"
	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/fileaccess"
	"microk8s/internal/journal"
	"microk8s/internal/kubeconfig"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/ranges"
	"microk8s/internal/serverargs"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// JoinOptions say what to join, and as what.
type JoinOptions struct {
	Target     client.Target
	Worker     bool
	SkipVerify bool
	// Force joins also where that ends a cluster of several nodes, or one in use: see AbandonError.
	Force bool
	// Version is the version of this node's Kubernetes, such as v1.37.1; "" if it is not known.
	Version string
	// NodeIP is the address of this host by which the cluster is to know it. The zero value takes --node-ip of the kubelet, if
	// somebody set it, or else the address that the cluster sees.
	NodeIP netip.Addr
}

// joinParams is what the journal keeps of a join.
type joinParams struct {
	Connection string `json:"connection"` // with the token
	Worker     bool   `json:"worker,omitempty"`
	SkipVerify bool   `json:"skip_verify,omitempty"`
	Version    string `json:"version,omitempty"`
	Self       string `json:"self"` // this node's name
	// Advertise is the address under which other nodes reach this one, where that is not the one
	// that the cluster sees.
	Advertise string `json:"advertise,omitempty"`
	// NodeIP is Advertise where somebody chose it.
	NodeIP string `json:"node_ip,omitempty"`
	// Stopped: the node was stopped, or never started, before the join.
	Stopped bool `json:"stopped,omitempty"`
}

func (p *joinParams) operation() string {
	if p.Worker {
		return opJoinWorker
	}
	return opJoin
}

// ErrMember says that the node belongs to a cluster already.
var ErrMember = errors.New("this node already belongs to a cluster")

// ErrOther is wrapped when another change was begun and has not ended.
var ErrOther = errors.New("another change was interrupted")

// Join makes this node part of a cluster. If an earlier join to the same cluster was
// interrupted, it goes on; one to another cluster is taken back first. Without Force it returns an
// *AbandonError where this node's own cluster has other nodes or is in use. On failure the node is
// what it was (the error is then a *journal.Failed with Undone set).
func (n *Node) Join(ctx context.Context, j *journal.Journal, o JoinOptions) error {
	n.defaults()
	hostname, err := n.nodeName()
	if err != nil {
		return err
	}
	p := &joinParams{Connection: o.Target.Reveal(), Worker: o.Worker, SkipVerify: o.SkipVerify, Version: o.Version, Self: hostname}
	if chosen := nodeconfig.Load(n.Env).NodeIPs; !o.NodeIP.IsValid() && len(chosen) == 1 && !IsMember(n.Env) {
		o.NodeIP = chosen[0]
	}
	if o.NodeIP.IsValid() {
		p.NodeIP = o.NodeIP.String()
		p.Advertise = p.NodeIP
	}
	if resumed, err := n.resumeJoin(ctx, j, p); resumed || err != nil {
		return err
	}
	if IsMember(n.Env) {
		return ErrMember
	}
	if !n.state().Installed {
		if err := n.Install(ctx); err != nil {
			return fmt.Errorf("cannot set up the node: %w", err)
		}
		p.Stopped = true
	}
	p.Stopped = p.Stopped || n.state().Stopped
	if !o.Force && (!p.Stopped || n.state().Clustered) {
		if err := n.abandons(ctx, hostname); err != nil {
			return err
		}
	}
	// Of an earlier membership that ended when the others were removed.
	if err := os.RemoveAll(n.file(saved)); err != nil {
		return err
	}
	if err := n.preflight(ctx, p); err != nil {
		return err
	}
	return j.Run(ctx, n.joinPlan(p), p)
}

// IsMember reports whether this node has joined a cluster, or others have joined it.
func IsMember(env snapenv.Env) bool {
	c := nodeconfig.Load(env)
	members, _ := storedir.Dir(env.BackendLive()).Members()
	if c.Worker || len(members) > 1 {
		return true
	}
	// Of an etcd that several nodes share nothing here says who they are: this node has joined,
	// or others have asked it to.
	_, err := os.Stat(filepath.Join(env.ClusterDir(), saved))
	return !c.Datastore.Own() && (err == nil || c.Clustered)
}

// resumeJoin deals with what an interrupted command has left.
func (n *Node) resumeJoin(ctx context.Context, j *journal.Journal, p *joinParams) (resumed bool, err error) {
	r, err := j.Pending()
	if err != nil || r == nil {
		return false, err
	}
	if r.Operation != opJoin && r.Operation != opJoinWorker {
		return false, fmt.Errorf("%w: %s; run it again to finish it", ErrOther, r.Operation)
	}
	var old joinParams
	if err := json.Unmarshal(r.Params, &old); err != nil {
		return false, fmt.Errorf("cannot read the journal of the interrupted join: %w", err)
	}
	plan := n.joinPlan(&old)
	if r.Undoing {
		n.Say("A previous join failed (%s) and its rollback was interrupted; resuming it", r.Reason)
		if err := j.Undo(ctx, plan, r.Reason); err != nil {
			return false, err
		}
		return false, nil
	}
	if old.Connection == p.Connection && old.Worker == p.Worker {
		n.Say("A previous join was interrupted; resuming it")
		return true, j.Resume(ctx, plan)
	}
	n.Say("A previous join to another cluster or in another role was interrupted; rolling it back")
	if err := j.Undo(ctx, plan, "another join was started"); errors.Is(err, journal.ErrCommitted) {
		return false, fmt.Errorf("the node has joined already: %w", ErrMember)
	} else if err != nil {
		return false, err
	}
	return false, nil
}

// UndoJoin takes an interrupted join back; it does nothing where there is none, and gives
// journal.ErrCommitted where the node has joined.
func (n *Node) UndoJoin(ctx context.Context, j *journal.Journal) (found bool, err error) {
	n.defaults()
	r, err := j.Pending()
	if err != nil || r == nil || r.Operation != opJoin && r.Operation != opJoinWorker {
		return false, err
	}
	var p joinParams
	if err := json.Unmarshal(r.Params, &p); err != nil {
		return true, fmt.Errorf("cannot read the journal of the interrupted join: %w", err)
	}
	return true, j.Undo(ctx, n.joinPlan(&p), "it was cancelled")
}

// joinPlan is the list of steps. Nothing outside of the node changes before its services start;
// the join counts when the cluster has been told that the node is in.
func (n *Node) joinPlan(p *joinParams) journal.Plan {
	s := &joinRun{Node: n, joinParams: p}
	plan := journal.Plan{Operation: p.operation(), Commit: StepConfirm, Renamed: renamed, Steps: []journal.Step{
		step(StepAsk, s.ask, s.release),
		step(StepSaveState, func(context.Context) error { return n.save() }, func(context.Context) error { return os.RemoveAll(n.file(saved)) }),
		step(StepStop, s.stop, s.startAgain),
	}}
	if p.Worker {
		plan.Steps = append(plan.Steps,
			step(StepArguments, s.workerArgs, s.back("args", "lock")),
			step(StepCertificates, s.workerCerts, s.back("certs", "credentials")),
			step(StepStart, s.start, s.stopAgain),
		)
	} else {
		plan.Steps = append(plan.Steps,
			step(StepArguments, s.controlPlaneArgs, s.back("args", "lock")),
			step(StepCertificates, s.controlPlaneCerts, s.back("certs", "credentials")),
			step(StepJoinDatastore, s.joinDatastore, s.leaveDatastore),
			step(StepStart, s.start, s.stopAgain),
		)
	}
	plan.Steps = append(plan.Steps,
		step(StepWait, s.waitForNode, nil),
		step(StepConfirm, s.confirm, nil),
		step(StepCleanUp, s.clean, nil),
	)
	return plan
}

// joinRun is one process' part in a join.
type joinRun struct {
	*Node
	*joinParams
	conn *client.Client
	got  *answer
	gone *bool // the cluster, see patience
}

// answer is what the cluster said, kept in a file until the join is done or undone.
type answer struct {
	api.JoinResponse
	Server  string `json:"server"`  // address that was contacted, without port
	Address string `json:"address"` // this node's
	// A worker's, made for this join.
	KubeletKey, KubeletCert, ProxyKey, ProxyCert string
}

// ours reports whether the cluster consists of this product's nodes.
func (a *answer) ours() bool { return a.Product == api.Product }

const answerFile = "answer.json"

func (s *joinRun) answer() (*answer, error) {
	if s.got != nil {
		return s.got, nil
	}
	data, err := os.ReadFile(s.file(answerFile))
	if err != nil {
		return nil, fmt.Errorf("cannot read what the cluster answered: %w", err)
	}
	var a answer
	if err := json.Unmarshal(data, &a); err != nil {
		return nil, fmt.Errorf("cannot read what the cluster answered: %w", err)
	}
	s.got = &a
	return s.got, nil
}

func (s *joinRun) connection() (*client.Client, error) {
	if s.conn != nil {
		return s.conn, nil
	}
	t, err := client.Parse(s.Connection)
	if err != nil {
		return nil, err
	}
	s.conn = client.New(t)
	s.conn.SkipVerify, s.conn.Dial = s.SkipVerify, s.Dial
	s.conn.Warn = func(text string) { s.Say("WARNING: %s", text) }
	return s.conn, nil
}

func (s *joinRun) request() api.JoinRequest {
	var digests map[string]string
	if !s.Worker {
		digests = map[string]string{}
		if own, _, err := serverargs.Read(s.Env); err == nil { // a broken file is found when it is written
			digests = own.Digests()
		}
		digests["carries"] = "1"
	}
	return api.JoinRequest{
		ServerArguments: digests,
		Hostname:        s.Self, Port: strconv.Itoa(nodeconfig.Load(s.Env).AgentPort), Worker: api.Worker(s.Worker),
		Product: api.Product, Version: s.Version, DatastoreProtocol: api.DatastoreProtocol,
		AdvertiseAddress: s.Advertise, Secrets: 2,
	}
}

// ask has the cluster let this node in. The answer is on disk when it returns.
func (s *joinRun) ask(ctx context.Context) error {
	if _, err := s.answer(); err == nil {
		return nil
	}
	c, err := s.connection()
	if err != nil {
		return err
	}
	resp, err := c.Join(ctx, s.request())
	if err != nil {
		return err
	}
	a := &answer{JoinResponse: *resp, Server: c.RemoteAddr().String(), Address: resp.HostnameOverride}
	if c.RemoteAddr() == nil {
		a.Server = c.Target().Host
	}
	if err := a.check(s.Worker); err != nil {
		return err
	}
	if s.Worker {
		if err := s.signed(ctx, c, a); err != nil {
			return err
		}
	}
	data, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(s.file(answerFile), data, 0o600, nil); err != nil {
		return err
	}
	s.got = a
	return nil
}

// check refuses answers that cannot be used, before anything is done with them.
func (a *answer) check(worker bool) error {
	if _, err := netip.ParseAddr(a.Address); err != nil {
		return fmt.Errorf("cannot use the cluster's answer: %q is not this node's address", a.Address)
	}
	if port, err := strconv.ParseUint(a.APIPort, 10, 16); err != nil || port == 0 {
		return fmt.Errorf("cannot use the cluster's answer: the API server's port is %q", a.APIPort)
	}
	// One of ours lets this node have it after the join.
	if a.CallbackToken == "" && !a.ours() || strings.ContainsAny(a.CallbackToken, " \t\r\n") {
		return errors.New("cannot use the cluster's answer: its callback token is not valid")
	}
	if a.CA == "" {
		return errors.New("cannot use the cluster's answer: it has no CA")
	}
	if _, err := parseKubeletArgs(a.KubeletArgs); err != nil {
		return fmt.Errorf("cannot use the cluster's answer: its kubelet arguments: %w", err)
	}
	if a.ServerArguments != nil {
		if err := a.ServerArguments.Check(); err != nil {
			return fmt.Errorf("cannot use the cluster's answer: its API server's arguments: %w", err)
		}
	}
	if worker {
		if a.CAKey != nil {
			return errors.New("Joining process failed. Make sure the cluster you connect to supports joining worker nodes.") //nolint:staticcheck // upstream's text
		}
		return nil
	}
	switch {
	case a.CAKey == nil || *a.CAKey == "" || a.ServiceAccountKey == "":
		return errors.New("cannot use the cluster's answer: the keys of a control-plane node are missing")
	case a.EtcdServers == "" && !a.ours():
		return errors.New("this is a cluster of upstream's MicroK8s, whose datastore other programs cannot share; join it as a worker, with --worker")
	case a.EtcdServers == "" && (len(a.Voters) == 0 || a.ClusterCert == "" || a.ClusterKey == ""):
		return errors.New("cannot use the cluster's answer: it names no member of the datastore")
	}
	return nil
}

// parseKubeletArgs reads the other node's argument file. Lines that a shell would run are never
// written here, whoever sends them (cluster-agent.md 8, W11).
func parseKubeletArgs(text string) (*args.File, error) {
	if strings.ContainsAny(text, "`\x00") || strings.Contains(text, "$(") {
		return nil, errors.New("they have a command substitution in them")
	}
	return args.Parse([]byte(text), args.GrammarFor("kubelet"))
}

// release tells the cluster that this node does not join after all.
func (s *joinRun) release(ctx context.Context) error {
	c, err := s.connection()
	if err == nil {
		limit, cancel := context.WithTimeout(ctx, s.patience(ctx, 2*dialTimeout))
		defer cancel()
		err = c.Release(limit, s.Self)
		c.Close()
	}
	var refused *client.ServerError
	var unknown *client.VerifyError
	if err != nil && !errors.As(err, &refused) && !errors.As(err, &unknown) {
		s.Say("WARNING: cannot tell the cluster that this node does not join (%v): the token is free for others in ten minutes at most", err)
	}
	s.got = nil
	if err := os.Remove(s.file(answerFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// stop ends everything that runs, so that nothing uses files while they change.
func (s *joinRun) stop(ctx context.Context) error {
	if err := s.lock(snapenv.LockJoining); err != nil {
		return err
	}
	return s.stopAll(ctx)
}

// containersWait bounds the orderly end of the containers; what is left then is killed.
const containersWait = 60 * time.Second

func (n *Node) stopAll(ctx context.Context) error {
	if err := n.Services.Stop(ctx, service.Kubelite); err != nil {
		return fmt.Errorf("cannot stop the services: %w", err)
	}
	limit, cancel := context.WithTimeout(ctx, containersWait)
	err := n.StopContainers(limit)
	cancel()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		n.Log.Warn("some containers could not be stopped cleanly", "err", err)
	}
	if err := n.Services.Stop(ctx); err != nil {
		return fmt.Errorf("cannot stop the services: %w", err)
	}
	if err := n.ResetNetwork(ctx); err != nil {
		n.Log.Warn("cannot remove the pod network from the host", "err", err)
	}
	return ctx.Err()
}

// startAgain undoes stop: by then every file is what it was.
func (s *joinRun) startAgain(ctx context.Context) error {
	if err := s.unlock(snapenv.LockJoining); err != nil {
		return err
	}
	if s.Stopped {
		return nil
	}
	if err := s.unlock(snapenv.LockStopped); err != nil {
		return err
	}
	return s.Services.Start(ctx)
}

func (s *joinRun) back(trees ...string) func(context.Context) error {
	return func(context.Context) error { return s.restore(trees...) }
}

// start starts all that this node now runs.
func (s *joinRun) start(ctx context.Context) error {
	if err := s.unlock(snapenv.LockStopped); err != nil {
		return err
	}
	if err := s.Services.Start(ctx); err != nil {
		return fmt.Errorf("cannot start the services: %w", err)
	}
	return nil
}

func (s *joinRun) stopAgain(ctx context.Context) error { return s.stopAll(ctx) }

// kubeletArgs are those of the contacted node, with what belongs to this one.
func (s *joinRun) kubeletArgs(a *answer, change map[string]string) error {
	f, err := parseKubeletArgs(a.KubeletArgs)
	if err != nil {
		return err
	}
	own, err := nodeconfig.File(s.Env, nodeconfig.Kubelet)
	if err != nil {
		return err
	}
	if a.ours() {
		// Flags that say where things are come from this package's version, and those that
		// the other node does not set stay as they are here.
		for _, flag := range own.Flags() {
			if _, set := f.Get(flag); !set {
				if v, ok := own.Get(flag); ok {
					if err := f.Set(flag, v); err != nil {
						return err
					}
				}
			}
		}
	}
	f.Unset("node-ip")
	if err := keepMachineFlags(own, f); err != nil {
		return err
	}
	if s.isOwn(a.Address) {
		change["node-ip"] = a.Address
	} else {
		s.Say("WARNING: the cluster sees this node as %s, which is not an address of this host: other nodes may not reach its pods", a.Address)
	}
	for flag, value := range change {
		if err := f.Set(flag, value); err != nil {
			return err
		}
	}
	return f.Save(s.Env.Args("kubelet"))
}

// machineFlags are arguments of the kubelet that belong to the machine: its size and its name, of
// which the cluster was told.
var machineFlags = []string{"kube-reserved", "system-reserved", "reserved-cpus", "reserved-memory", "hostname-override"}

// keepMachineFlags replaces the arguments that belong to the other machine by those of this one.
func keepMachineFlags(own, f *args.File) error {
	for _, flag := range machineFlags {
		if v, ok := own.Get(flag); !ok {
			f.Unset(flag)
		} else if err := f.Set(flag, v); err != nil {
			return err
		}
	}
	return nil
}

// sameNetwork takes over the cluster's addresses of pods and Services.
func (s *joinRun) sameNetwork(a *answer) error {
	file, err := nodeconfig.File(s.Env, nodeconfig.KubeProxy)
	if err != nil {
		return err
	}
	own, _ := file.Value("cluster-cidr", s.Env.Lookup)
	if a.ClusterCIDR != "" && own != a.ClusterCIDR {
		s.Say("WARNING: Joining a cluster that has a different CIDR. The kube-proxy CIDR configuration will be overwritten.")
		s.Say("Cluster CIDR: %s -- Node CIDR: %s(will be overwritten)", a.ClusterCIDR, own)
		if err := s.editArgs("kube-proxy", map[string]string{"cluster-cidr": a.ClusterCIDR}); err != nil {
			return err
		}
		if err := s.editArgs("kube-controller-manager", map[string]string{"cluster-cidr": a.ClusterCIDR}); err != nil {
			return err
		}
	}
	if a.ServiceCIDR != "" {
		for _, name := range []string{"kube-apiserver", "kube-controller-manager"} {
			if err := s.editArgs(name, map[string]string{"service-cluster-ip-range": a.ServiceCIDR}); err != nil {
				return err
			}
		}
	}
	if err := s.rangesOf(a); err != nil {
		return err
	}
	if a.ours() && !a.CNI {
		return nil
	}
	// The cluster has a pod network of its own: this file makes the built-in one stand aside. The
	// cluster's is applied on the nodes that have it.
	if _, err := os.Stat(s.Env.CNIManifest()); errors.Is(err, fs.ErrNotExist) {
		if err := atomicfile.Write(s.file(placedCNI), []byte(foreignCNI), 0o600, nil); err != nil {
			return err
		}
		return fileaccess.For(s.Env).WriteShared(s.Env.CNIManifest(), []byte(foreignCNI))
	}
	return nil
}

// rangesOf has args/cni-env, and on a control-plane node a node's share of the pods' range, say what the cluster has.
func (s *joinRun) rangesOf(a *answer) error {
	if a.ClusterCIDR == "" || a.ServiceCIDR == "" {
		return nil // an agent of upstream's
	}
	r, err := ranges.Of(a.ClusterCIDR, a.ServiceCIDR, a.NodeMasks)
	if err != nil {
		return fmt.Errorf("the cluster has sent addresses that cannot be used: %w", err)
	}
	if len(a.NodeMasks) > 0 {
		if err := s.editArgs("kube-controller-manager", r.ShareFlags()); err != nil {
			return err
		}
	}
	return ranges.TakeOver(s.Env, r)
}

// foreignCNI is the manifest of a pod network that this node does not have itself.
const foreignCNI = "# The cluster that this node has joined brings its own pod network.\n"

// placedCNI holds what a join has written as the manifest of a pod network, which leave removes
// again as long as nobody else has changed it.
const placedCNI = saved + "/cni.yaml"

// apiServers lists host:port of the API servers, the contacted node's first.
func (a *answer) apiServers() []string {
	if len(a.APIServers) > 0 {
		return a.APIServers
	}
	port, _ := strconv.Atoi(a.APIPort)
	list := []string{join(a.Server, port)}
	for _, ip := range a.ControlPlaneNodes {
		if ip != a.Server {
			list = append(list, join(ip, port))
		}
	}
	return list
}

// confirm tells the cluster that the node is in. From here on there is no way back but leave.
func (s *joinRun) confirm(ctx context.Context) error {
	a, err := s.answer()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // done, and cleaned up after
	}
	if err != nil || !a.ours() {
		return err
	}
	c, err := s.connection()
	if err != nil {
		return err
	}
	defer c.Close()
	err = waitFor(ctx, 20*time.Second, func(ctx context.Context) error {
		err := c.Confirm(ctx, s.Self)
		var refused *client.ServerError
		var unknown *client.VerifyError
		if errors.As(err, &refused) || errors.As(err, &unknown) {
			return &finalError{err}
		}
		return err
	})
	if err != nil && ctx.Err() != nil {
		return err
	}
	if err != nil {
		// The node is in, whatever becomes of the token.
		s.Say("WARNING: the node has joined, but cannot confirm that to the cluster (%v); the token may be used once more within ten minutes, to prevent that revoke it: microk8s add-node --revoke", err)
	}
	return nil
}

// clean ends the join: what was kept for its undo goes away, except the arguments, which leave
// puts back.
func (s *joinRun) clean(context.Context) error {
	for _, secret := range []string{answerFile, saved + "/certs", saved + "/credentials", saved + "/lock"} {
		if err := os.RemoveAll(s.file(secret)); err != nil {
			return err
		}
	}
	if s.Worker { // it has no datastore any more
		if _, err := os.Lstat(s.Env.BackendLive()); err == nil {
			if err := s.setBackendAside(); err != nil {
				return err
			}
		}
	}
	if err := s.keepBackendAsBackup(); err != nil {
		return err
	}
	return s.unlock(snapenv.LockJoining)
}

// kubeconfigFor writes a kubeconfig for the API server, or the proxy in front of it.
func (n *Node) kubeconfigFor(file, user, server, ca, cert, key string) error {
	data, err := kubeconfig.Config{CA: []byte(ca), Cert: []byte(cert), Key: []byte(key), Server: server, User: user}.Encode()
	if err != nil {
		return err
	}
	return fileaccess.For(n.Env).WriteSecret(n.Env.Credential(file), data)
}
