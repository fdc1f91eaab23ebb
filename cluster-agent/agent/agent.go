// Package agent is the program cluster-agent: its flags, and the wiring of the HTTPS server with
// the duties that go on beside it.
package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/cluster-agent/addons"
	"microk8s/cluster-agent/agreement"
	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/broker"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/fanout"
	"microk8s/cluster-agent/launchconf"
	"microk8s/cluster-agent/limit"
	"microk8s/cluster-agent/node"
	"microk8s/cluster-agent/remount"
	"microk8s/cluster-agent/renewal"
	"microk8s/cluster-agent/server"
	"microk8s/cluster-agent/worker"
	"microk8s/internal/archive/schedule"
	"microk8s/internal/certs"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/nodecopy"
	"microk8s/internal/noderegistry"
	"microk8s/internal/podledger"
	"microk8s/internal/snapenv"
	"microk8s/internal/tokenstore"
	"microk8s/internal/turn"
)

// Flags are the program's (cluster-agent.md 1.1).
type Flags struct {
	Bind, CertFile, KeyFile string
	Timeout                 time.Duration
	Metrics                 bool
	MinTLS                  uint16
	Launch                  bool // watch for launch configurations
}

// Parse reads the command line. Help goes to out, with the error pflag.ErrHelp.
func Parse(argv []string, out io.Writer) (Flags, error) {
	var f Flags
	var seconds int
	var minTLS string
	set := pflag.NewFlagSet("cluster-agent", pflag.ContinueOnError)
	set.SetOutput(out)
	set.StringVar(&f.Bind, "bind", nodeconfig.DefaultAgentBind, "address and port to listen on")
	set.StringVar(&f.CertFile, "certfile", "", "serving certificate")
	set.StringVar(&f.KeyFile, "keyfile", "", "its key")
	set.IntVar(&seconds, "timeout", 240, "seconds that one call may take")
	set.BoolVar(&f.Metrics, "enable-metrics", false, "serve /metrics")
	set.StringVar(&minTLS, "min-tls-version", "tls12", "tls12 or tls13")
	set.BoolVar(&f.Launch, "launch-configurations-enable", true, "apply the launch configurations that appear in $SNAP_COMMON/etc/launcher")
	set.Duration("launch-configurations-interval", 5*time.Second, "has no effect: new launch configurations are noticed at once")
	if err := set.Parse(argv); errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintf(out, "\nLaunch configurations are applied by: cluster-agent %s --config-file FILE\n", InitCommand)
		return f, err
	} else if err != nil {
		return f, fmt.Errorf("%w; see cluster-agent --help, and for launch configurations cluster-agent %s --help", err, InitCommand)
	}
	f.Timeout = time.Duration(seconds) * time.Second
	versions := map[string]uint16{"tls12": tls.VersionTLS12, "tls13": tls.VersionTLS13}
	f.MinTLS = versions[minTLS]
	switch {
	case set.NArg() > 0:
		return f, fmt.Errorf("unknown argument %q; see cluster-agent --help, and for launch configurations cluster-agent %s --help", set.Arg(0), InitCommand)
	case f.MinTLS == 0:
		return f, fmt.Errorf("cannot use --min-tls-version=%s: only tls12 and tls13 are safe", minTLS)
	case seconds < 1:
		return f, fmt.Errorf("cannot use --timeout=%d: it is at least 1 second", seconds)
	case f.CertFile == "" || f.KeyFile == "":
		return f, errors.New("--certfile and --keyfile are needed")
	}
	if _, _, err := net.SplitHostPort(f.Bind); err != nil {
		return f, fmt.Errorf("cannot use --bind=%s: %w", f.Bind, err)
	}
	return f, nil
}

// Restarter restarts services of this node.
type Restarter interface {
	Restart(ctx context.Context, names ...string) error
}

// memoryLimit is from where on the garbage collector works harder, in bytes. What strangers can
// make the agent hold is far below it (cluster-agent/server); the rest is for lists of nodes.
const memoryLimit = 40 << 20

// Run serves, and keeps certificates in order, until ctx ends. Whether the node is a worker is
// read once: who changes it restarts the agent.
func Run(ctx context.Context, env snapenv.Env, f Flags, services Restarter, log *slog.Logger) error {
	if debug.SetMemoryLimit(-1) == math.MaxInt64 { // else GOMEMLIMIT is set, in args/cluster-agent-env
		debug.SetMemoryLimit(memoryLimit)
	}
	config := nodeconfig.Load(env)
	if err := config.Err(nodeconfig.PartName); err != nil {
		return err
	}
	isWorker, name := config.Worker, config.NodeName
	if isWorker {
		f.CertFile, f.KeyFile = servingPair(env, f)
	}
	srv, err := server.New(server.Options{
		CertFile: f.CertFile, KeyFile: f.KeyFile, MinTLS: f.MinTLS, Timeout: f.Timeout, Metrics: f.Metrics, Log: log,
	})
	if err != nil {
		return fmt.Errorf("%w; issue it again with: sudo microk8s refresh-certs -e server.crt", err)
	}
	limiter := &limit.Limiter{}
	core := (&kube.File{Path: env.AdminKubeconfig()}).Core
	registry := noderegistry.Registry{Core: core}
	here := &node.Node{Env: env, Services: services, Limit: limiter, Log: log, Run: node.Runner(env)}
	here.Remove = func(ctx context.Context, address string) error { return peers.Remove(ctx, env.Backend(), address) }
	here.Examine = func(ctx context.Context) (*peers.Examined, error) { return examine(ctx, env) }
	store := certs.New(env, certs.Options{Log: log})
	here.Certificates = store.List
	remote := &worker.Controller{Env: env, Node: name, Restart: services.Restart, Log: log}
	here.ChangeCertificates = func(ctx context.Context, change api.CertificateChange) error {
		if isWorker {
			return remote.Change(ctx, change)
		}
		return changeCertificates(ctx, store, change)
	}
	here.Fresh = remote.Callback
	if !isWorker {
		here.Fresh = func(ctx context.Context) ([]string, error) {
			key, err := callback.Keys{Env: env, Core: core}.Get(ctx)
			if err != nil {
				return nil, err
			}
			record, err := registry.Get(ctx, name)
			if err != nil {
				return nil, err
			}
			return []string{key.Secret(*record), key.Legacy(name)}, nil
		}
	}
	defer here.Wait()
	here.Register(srv, !isWorker)
	var joins *broker.Broker
	if !isWorker {
		joins = &broker.Broker{
			Nodes: registry,
			Env:   env, Services: services, Limit: limiter, Log: log, Version: kubernetesVersion(env),
			Cluster: apiServer{env, core},
			Live:    func(ctx context.Context) ([]peers.Member, error) { return peers.Members(ctx, env.Backend()) },
			Remove: func(ctx context.Context, id uint64, address string) error {
				return peers.RemoveMember(ctx, env.Backend(), id, address)
			},
			Tokens: tokenstore.Open(env, core),
		}
		joins.Register(srv)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", f.Bind)
	if err != nil {
		return fmt.Errorf("cannot listen on %s: %w; another program has the port, or set --bind in %s", f.Bind, err, env.Args("cluster-agent"))
	}
	log.Info("listening", "address", listener.Addr().String())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return srv.Serve(ctx, listener) })
	group.Go(func() error {
		keeper := &renewal.Controller{Env: env, Store: store, Restart: services.Restart, Log: log}
		return keeper.Run(ctx)
	})
	if f.Launch {
		group.Go(func() error {
			return (&launchconf.Applier{Env: env, Services: services, Run: node.Runner(env), Log: log}).Watch(ctx)
		})
	}
	group.Go(func() error {
		kubelet := (&kube.File{Path: env.Credential("kubelet.config")}).Core
		return (&remount.Controller{Env: env, Node: name, Core: kubelet, Log: log}).Run(ctx)
	})
	group.Go(func() error { return (&nodecopy.Controller{Env: env, Node: name, Log: log}).Run(ctx) })
	group.Go(func() error {
		if err := podledger.Run(ctx, env); err != nil { // the node works without; its removal leaves more behind
			log.Warn("the pods of this node are not written down any more", "err", err)
		}
		return nil
	})
	if isWorker {
		group.Go(func() error { return remote.Run(ctx) })
	} else {
		group.Go(func() error {
			keeper := &callback.Controller{Env: env, Keys: callback.Keys{Env: env, Core: core}, Nodes: registry, Node: name, Log: log}
			keeper.Connected = func(ctx context.Context) error {
				if err := (apiServer{env, core}).adopt(ctx, joins.Members, time.Now().UTC()); err != nil {
					return err
				}
				return tokenstore.Adopt(ctx, env, tokenstore.Secret{Core: core}, time.Now().UTC())
			}
			return keeper.Run(ctx)
		})
		group.Go(func() error {
			return (&schedule.Controller{
				Node: name, Core: core, Exec: node.Runner(env), Command: []string{env.Bin("microk8s"), "backup", "run"}, Newest: env.NewestArchive(), Log: log,
			}).Run(ctx)
		})
		group.Go(func() error {
			host, err := os.Hostname()
			if err != nil {
				return err
			}
			return (&addons.Controller{
				Env: env, Host: host, Config: func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", env.AdminKubeconfig()) },
				Exec: node.Runner(env), Command: []string{env.Bin("microk8s"), "addons", "carry-out"}, Log: log,
			}).Run(ctx)
		})
		group.Go(func() error { return (&turn.Ender{Lease: turn.Lease{Core: core}, Node: name, Log: log}).Run(ctx) })
		group.Go(func() error { return (&agreement.Controller{Env: env, Node: name, Nodes: registry, Log: log}).Run(ctx) })
		group.Go(func() error {
			return (&fanout.Controller{Cluster: &fanout.Cluster{Env: env, Core: core}, Log: log}).Run(ctx)
		})
		group.Go(func() error {
			return (&fanout.PackController{Cluster: &fanout.Cluster{Env: env, Core: core}, Node: name, Log: log}).Run(ctx)
		})
	}
	return group.Wait()
}

// changeCertificates does what is asked of a control-plane node's certificates and keys.
func changeCertificates(ctx context.Context, store *certs.Store, change api.CertificateChange) error {
	if len(change.Leaves) > 0 {
		if _, err := store.ReplaceLeaves(ctx, change.Leaves); err != nil {
			return err
		}
	}
	if change.FrontProxy != "" {
		if err := store.FrontProxy(change.FrontProxy, change.FrontProxyOld); err != nil {
			return err
		}
	}
	if change.SigningKeys != "" {
		if err := store.SetSigningKeys([]byte(change.SigningKeys)); err != nil {
			return err
		}
	}
	if change.DatastoreCert != "" {
		return store.SetDatastorePair([]byte(change.DatastoreCert), []byte(change.DatastoreKey))
	}
	return nil
}

// examine asks k8s-dqlite how far this node's storage directory has come.
func examine(ctx context.Context, env snapenv.Env) (*peers.Examined, error) {
	var out, said bytes.Buffer
	cmd := exec.CommandContext(ctx, env.Bin("k8s-dqlite"), "examine", "--storage-dir", env.BackendLive())
	cmd.Env = env.Environ(os.Environ())
	cmd.Stdout, cmd.Stderr = &out, &said
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	var x peers.Examined
	if err := json.Unmarshal(out.Bytes(), &x); err != nil {
		return nil, fmt.Errorf("cannot read what k8s-dqlite says: %w", err)
	}
	return &x, nil
}

// servingPair is what a worker's agent serves: the kubelet's certificate, which is the one
// that the cluster's CA has signed. Its own server.crt is of a CA that nobody else knows.
func servingPair(env snapenv.Env, f Flags) (cert, key string) {
	cert, key = env.Cert("kubelet.crt"), env.Cert("kubelet.key")
	if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
		return f.CertFile, f.KeyFile
	}
	return cert, key
}

// kubernetesVersion reads what is inside from the bill of materials; "" where it cannot.
func kubernetesVersion(env snapenv.Env) string {
	data, err := os.ReadFile(env.BOM())
	if err != nil {
		return ""
	}
	var bom struct {
		Components []struct{ Name, Version string }
	}
	if err := json.Unmarshal(data, &bom); err != nil {
		return ""
	}
	for _, c := range bom.Components {
		if c.Name == "kubernetes" {
			return c.Version
		}
	}
	return ""
}
