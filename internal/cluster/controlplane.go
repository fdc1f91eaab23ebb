package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	dqlite "github.com/canonical/go-dqlite/v3/client"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/serverargs"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
	"microk8s/internal/tokenstore"

	"crypto/tls"
)

// controlPlaneArgs sets arguments and locks of a control-plane node.
func (s *joinRun) controlPlaneArgs(context.Context) error {
	a, err := s.answer()
	if err != nil {
		return err
	}
	if err := s.sameNetwork(a); err != nil {
		return err
	}
	api := map[string]string{"secure-port": a.APIPort, "token-auth-file": ""}
	if a.AuthorizationMode != "" {
		api["authorization-mode"] = strings.Trim(a.AuthorizationMode, `"'`)
	}
	if s.isOwn(a.Address) {
		api["advertise-address"] = a.Address
	}
	if a.EtcdServers != "" {
		api["etcd-servers"] = strings.Trim(a.EtcdServers, `"'`)
		for flag, item := range externalEtcd(a) {
			api[flag] = ""
			if item.text != "" {
				api[flag] = "${SNAP_DATA}/certs/" + item.file
			}
		}
	}
	if err := s.editArgs("kube-apiserver", api); err != nil {
		return err
	}
	if err := s.serverArguments(a); err != nil {
		return err
	}
	if err := s.kubeletArgs(a, map[string]string{}); err != nil {
		return err
	}
	if a.EtcdServers != "" {
		if err := s.lock(snapenv.LockNoDqlite); err != nil {
			return err
		}
	}
	return s.unlock(snapenv.LockLowMemory)
}

// serverArguments takes over the arguments in which all API servers of a cluster must agree. The
// key of encryption at rest is written with the datastore, which has not been made yet.
func (s *joinRun) serverArguments(a *answer) error {
	set := a.ServerArguments
	if set == nil { // an older release's cluster: what it has is not encrypted with this node's key
		return s.editArgs("kube-apiserver", map[string]string{encryption.Flag: "", encryption.ReloadFlag: ""})
	}
	if key := set.Encryption(); key != nil && a.EtcdServers != "" && s.ownKeyFile(key) { // this node's datastore keeps its own
		key.Name = serverargs.Folder + encryption.FileName
		set.Flags[encryption.Flag] = []string{key.Name}
	}
	changed, err := set.Write(s.Env, encryption.Path(s.Env))
	if err != nil {
		return fmt.Errorf("cannot take over the API server's arguments: %w", err)
	}
	if len(changed) > 0 {
		s.Say("Taking over the cluster's arguments of the API server: --%s", strings.Join(changed, ", --"))
	}
	return nil
}

// ownKeyFile reports whether the key of encryption at rest is kept in the datastore's folder.
func (s *joinRun) ownKeyFile(f *serverargs.File) bool { return f.Name == encryption.Argument }

type etcdFile struct{ file, text string }

// externalEtcd lists the files of a cluster with an etcd of its own, by flag.
func externalEtcd(a *answer) map[string]etcdFile {
	return map[string]etcdFile{
		"etcd-cafile":   {"remote-etcd-ca.crt", a.EtcdCA},
		"etcd-certfile": {"remote-etcd.crt", a.EtcdCert},
		"etcd-keyfile":  {"remote-etcd.key", a.EtcdKey},
	}
}

// controlPlaneCerts writes the CA with its key, and issues everything of this node under it.
func (s *joinRun) controlPlaneCerts(ctx context.Context) error {
	a, err := s.answer()
	if err != nil {
		return err
	}
	files := fileaccess.For(s.Env)
	secrets := map[string]string{
		s.Env.Cert("ca.key"): *a.CAKey, s.Env.Cert("serviceaccount.key"): a.ServiceAccountKey,
	}
	for _, item := range externalEtcd(a) {
		if item.text != "" {
			secrets[s.Env.Cert(item.file)] = item.text
		}
	}
	for path, text := range secrets {
		if err := files.WriteSecret(path, []byte(text)); err != nil {
			return err
		}
	}
	if err := s.writeCallback(a); err != nil {
		return err
	}
	if err := files.WriteShared(s.Env.Cert("ca.crt"), []byte(a.CA)); err != nil {
		return err
	}
	// Tokens for joining the single node are worth nothing here.
	for _, name := range joinTokens {
		if err := os.Remove(s.Env.Credential(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := s.unlock(snapenv.LockNoReissue); err != nil { // so that every address gets into the certificate
		return err
	}
	if _, err := s.store().Renew(ctx); err != nil {
		return err
	}
	return s.lock(snapenv.LockNoReissue)
}

// joinTokens are files of credentials that belong to one cluster: a token that was written down for
// this node's own must not open the one that it joins.
var joinTokens = []string{
	"cluster-tokens.txt", "persistent-cluster-tokens.txt", tokenstore.PersistentFile, "certs-request-tokens.txt", "callback-tokens.txt",
}

// storeAddress is where this node's member of the datastore is to listen.
func (s *joinRun) storeAddress(a *answer) string {
	return join(a.Address, storedir.Dir(s.backendAside()).Port())
}

// joinDatastore starts this node's member, which joins the others, and waits until it is one.
func (s *joinRun) joinDatastore(ctx context.Context) error {
	a, err := s.answer()
	if err != nil || a.EtcdServers != "" {
		return err
	}
	if err := s.setBackendAside(); err != nil {
		return err
	}
	own, live := s.storeAddress(a), s.Env.BackendLive()
	files := fileaccess.For(s.Env)
	dir := storedir.Dir(live)
	if list, _ := dir.Members(); !dir.Has(storedir.InitFile) && len(list) == 0 {
		if err := files.SharedDir(live); err != nil {
			return err
		}
		for _, name := range []string{storedir.TuningFile, storedir.FailureDomainFile} {
			data, err := os.ReadFile(filepath.Join(s.backendAside(), name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = files.WriteShared(dir.File(name), data)
			}
			if err != nil {
				return err
			}
		}
		if err := files.WriteShared(dir.File(storedir.CertFile), []byte(a.ClusterCert)); err != nil {
			return err
		}
		if err := files.WriteSecret(dir.File(storedir.KeyFile), []byte(a.ClusterKey)); err != nil {
			return err
		}
		if a.ServerArguments != nil {
			if key := a.ServerArguments.Encryption(); key != nil && s.ownKeyFile(key) {
				if err := files.WriteSecret(filepath.Join(live, encryption.FileName), []byte(key.Content)); err != nil {
					return err
				}
			}
		}
		// Last: it makes the directory one that joins.
		if err := dir.Begin(storedir.Init{Address: own, Cluster: a.Voters}, files.WriteShared); err != nil {
			return err
		}
	}
	if err := s.Services.Start(ctx, service.Datastore); err != nil {
		return fmt.Errorf("cannot start the datastore: %w", err)
	}
	return s.whileAnswering(ctx, func(ctx context.Context) error {
		return waitFor(ctx, storeWait, func(ctx context.Context) error { return s.serves(ctx, own) })
	})
}

// serves fails while this node's member is not one of the datastore's, or does not serve.
func (s *joinRun) serves(ctx context.Context, own string) error {
	list, err := peers.Members(ctx, s.Env.BackendLive())
	if err != nil {
		return fmt.Errorf("%w%s", err, s.lastWords(service.Datastore))
	}
	if !slices.ContainsFunc(list, func(m peers.Member) bool { return m.Address == own }) {
		return errors.New("this node is not a member of the datastore yet")
	}
	conn, err := net.DialTimeout("unix", s.Env.DatastoreSocket(), time.Second)
	if err != nil {
		return fmt.Errorf("the datastore does not serve yet: %w", err)
	}
	return conn.Close()
}

// storeWait is how long this node's member may take to copy the data and become one.
const storeWait = 2 * time.Minute

// lastWords is what a service said last, for an error about it; "" where that is not known.
func (n *Node) lastWords(name string) string {
	if n.Env.Snapd {
		return ""
	}
	if line := service.LastLine(n.Env.ServiceLog(name)); line != "" {
		return " (last log line: " + line + ")"
	}
	return ""
}

// leaveDatastore undoes joinDatastore, also on the cluster's side.
func (s *joinRun) leaveDatastore(ctx context.Context) error {
	a, err := s.answer()
	if err != nil || a.EtcdServers != "" {
		return err
	}
	if err := s.Services.Stop(ctx, service.Datastore); err != nil {
		return fmt.Errorf("cannot stop the datastore: %w", err)
	}
	own, live := s.storeAddress(a), s.Env.BackendLive()
	if _, err := os.Lstat(s.backendAside()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var id uint64 // 0: it never got one, or not yet
	if m := ownMember(live); m.Address == own {
		id = m.ID
	}
	others := slices.DeleteFunc(slices.Concat(storedir.Dir(live).Addresses(), a.Voters), func(m string) bool { return m == own }) // its daemon is stopped
	if err := s.removeMember(ctx, s.patience(ctx, s.removeWait), live, id, own, others); err != nil && !errors.Is(err, peers.ErrReplaced) {
		s.Say("WARNING: this node could not be taken out of the datastore's list of members (%v); on a node of the cluster run: microk8s remove-node %s --force", err, s.Self)
	} else if err := s.deleteNodeObject(ctx, a, s.Self); err != nil {
		s.Log.Warn("cannot delete the Node object", "err", err)
	}
	return s.takeBackendBack()
}

// removeMember takes a member out of the datastore, asking those at the given addresses with the
// key pair of the directory until the limit is over. With an id only the member that has it is
// removed: the error wraps peers.ErrReplaced where another one has its address. One that is no
// member is in order.
func (n *Node) removeMember(ctx context.Context, limit time.Duration, storage string, id uint64, address string, ask []string) error {
	dial, err := n.memberDial(storage)
	if err != nil {
		return nil //nolint:nilerr // without the pair it never became a member
	}
	store := dqlite.NewInmemNodeStore()
	var list []dqlite.NodeInfo
	for _, m := range slices.Compact(slices.Sorted(slices.Values(ask))) {
		list = append(list, dqlite.NodeInfo{Address: m})
	}
	if err := store.Set(ctx, list); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := peers.RemoveID(ctx, store, dial, id, address); err != nil && !errors.Is(err, peers.ErrNotMember) {
		return err
	}
	return nil
}

// memberDial makes connections to members of the datastore with the key pair of a directory.
func (n *Node) memberDial(storage string) (dqlite.DialFunc, error) {
	_, config, err := peers.KeyPair(storage, tls.VersionTLS12, 0)
	if err != nil {
		return nil, err
	}
	return dqlite.DialFuncWithTLS(func(ctx context.Context, address string) (net.Conn, error) { return n.Dial(ctx, "tcp", address) }, config), nil
}

// ownMember is this node's member of the datastore, the zero value where it has none.
func ownMember(storage string) storedir.Member {
	own, err := storedir.Dir(storage).Self()
	if err != nil {
		return storedir.Member{}
	}
	return own
}
