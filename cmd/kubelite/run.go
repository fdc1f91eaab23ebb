package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/component-base/version"
	"k8s.io/klog/v2"

	"microk8s/cmd/kubelite/daemons"
	"microk8s/cmd/kubelite/network"
	"microk8s/internal/addon"
	"microk8s/internal/args"
	"microk8s/internal/backoff"
	"microk8s/internal/bootstrap"
	"microk8s/internal/hostnet"
	"microk8s/internal/hostprobe"
	"microk8s/internal/hostwatch"
	"microk8s/internal/images"
	"microk8s/internal/ingressrights"
	"microk8s/internal/kube"
	"microk8s/internal/kubelitestate"
	"microk8s/internal/manifests"
	"microk8s/internal/netpolicy/enforcer"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/ranges"
	"microk8s/internal/snapenv"
	"microk8s/internal/workingset"
)

const (
	// apiServerStart is how long the API server may take to become ready (cli.md 7.2): a
	// first start on a slow disk, or a datastore that waits for its quorum.
	apiServerStart = 360 * time.Second
	// stopGrace is how long daemons may take to end in good order; service managers kill
	// after 30 s.
	stopGrace = 15 * time.Second
	// unreadyGrace is the same while the API server is not ready, or has lost its datastore: it
	// may wait for that without heeding anything, and nobody can be served.
	unreadyGrace = time.Second
)

// flags of kubelite, one file of arguments for each daemon (cli.md 6.3).
type flags struct {
	files             map[string]*string
	kubeconfig        string
	startControlPlane bool
}

func parseFlags(argv []string, env snapenv.Env, stderr io.Writer) (*flags, error) {
	f := &flags{files: map[string]*string{}}
	fs := pflag.NewFlagSet("kubelite", pflag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.SortFlags = false
	for _, d := range []struct{ flag, daemon string }{
		{"apiserver-args-file", daemons.APIServer},
		{"controller-manager-args-file", daemons.ControllerManager},
		{"scheduler-args-file", daemons.Scheduler},
		{"kubelet-args-file", daemons.Kubelet},
		{"proxy-args-file", daemons.Proxy},
	} {
		f.files[d.daemon] = fs.String(d.flag, env.Args(d.daemon), "arguments of "+d.daemon+", one flag a line")
	}
	fs.StringVar(&f.kubeconfig, "kubeconfig-file", env.AdminKubeconfig(), "kubeconfig with which the API server's readiness is checked")
	fs.BoolVar(&f.startControlPlane, "start-control-plane", true, "run the API server, controller manager and scheduler as well (false on a worker)")
	fs.Usage = func() {
		fmt.Fprintf(stderr, "kubelite runs all of Kubernetes that a node needs in one process.\n\nUsage:\n  kubelite [flags]\n  kubelite check [flags]    read all arguments, and start nothing\n  kubelite kubectl [kubectl's arguments]\n  kubelite version\n\nFlags:\n%s", fs.FlagUsages())
	}
	if err := fs.Parse(argv); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q; see kubelite --help", fs.Arg(0))
	}
	return f, nil
}

// exitArguments is how `kubelite check` ends where a daemon does not take its arguments.
const exitArguments = 3

// check parses the arguments of all daemons as a start would, and starts nothing: for programs that change
// argument files. It returns the exit code: 0, exitArguments with the reason on stderr, or 1 where it could not find out.
func check(env snapenv.Env, argv []string, stderr io.Writer) int {
	f, err := parseFlags(argv, env, stderr)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	if err == nil {
		config := nodeconfig.Load(env)
		f.startControlPlane = f.startControlPlane && !config.Worker
		var words map[string][]string
		words, _, err = readArgs(env, config.NodeName, f, hostprobe.Probe(env.Host), slog.New(slog.DiscardHandler))
		if err == nil {
			if _, err = daemons.Parse(words); err != nil {
				fmt.Fprintln(stderr, err)
				return exitArguments
			}
			return 0
		}
	}
	fmt.Fprintln(stderr, err)
	return 1
}

func run(argv []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if len(argv) == 1 && argv[0] == "version" {
		fmt.Fprintln(stdout, "Kubernetes", version.Get().GitVersion)
		return 0
	}
	env := snapenv.FromEnviron(getenv)
	if len(argv) > 0 && argv[0] == "check" {
		return check(env, argv[1:], stderr)
	}
	f, err := parseFlags(argv, env, stderr)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	if err == nil {
		err = serve(env, f, log)
	}
	if err != nil {
		klog.Flush()
		log.Error("kubelite ends", "err", err)
		return 1
	}
	log.Info("kubelite stopped")
	return 0
}

// serve runs the node's daemons until a signal asks it to stop (nil) or one of them ends.
func serve(env snapenv.Env, f *flags, log *slog.Logger) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()

	host := hostprobe.Probe(env.Host)
	for _, note := range host.Notes() {
		log.Info("this host: " + note)
	}
	config := nodeconfig.Load(env)
	if err := config.Err(nodeconfig.PartName); err != nil {
		return err
	}
	host.Pods = config.ClusterCIDRs
	if pods := host.Pods; len(pods) == 0 && config.APIServer.ServiceCIDRs[0].Addr().Is6() {
		host.Address = "" // it is one of IPv4
	}
	words, kubeletArgs, err := readArgs(env, config.NodeName, f, host, log)
	if err != nil {
		return err
	}
	parsed, err := daemons.Parse(words)
	if err != nil {
		return fmt.Errorf("invalid arguments in %s: %w; fix the file and run: microk8s start", env.ArgsDir(), err)
	}

	dropAPIAddress(env, !f.startControlPlane, log)
	group := daemons.NewGroup(ctx, log)
	state := kubelitestate.NewWriter(env, log)
	group.Go("image import", func(ctx context.Context) error {
		if err := loadImages(ctx, env, log); err != nil && ctx.Err() == nil {
			return err
		}
		images.Sideload(ctx, env, log)
		return nil
	})
	var admin *rest.Config // of control-plane nodes
	if f.startControlPlane {
		group.Start(parsed[daemons.APIServer])
		admin, err = clientcmd.BuildConfigFromFlags("", f.kubeconfig)
		if err != nil {
			return fmt.Errorf("cannot read the kubeconfig of the local API server: %w", err)
		}
		if err := waitReady(group, admin, log); err != nil {
			if ctx.Err() != nil { // asked to stop before it was up
				return group.Wait(unreadyGrace)
			}
			return err
		}
		if err := ranges.MarkStarted(env); err != nil {
			return err
		}
		releaseOwnLeases(ctx, admin, log)
		group.StartAlone(parsed[daemons.ControllerManager], state)
		group.StartAlone(parsed[daemons.Scheduler], state)
		group.Go("shipped objects", untilDone(func(ctx context.Context) error {
			return applyManifests(ctx, admin, env, log)
		}))
		files := &manifests.Controller{Env: env, Config: admin, Log: log, Report: state.Manifests}
		group.Go("files in args/manifests", files.Run)
		group.Go("DNS servers", func(ctx context.Context) error {
			return keepDNS(ctx, admin, env, log)
		})
		group.Go("rights of the ingress controller", func(ctx context.Context) error {
			return ingressrights.Run(ctx, admin, log)
		})
	} else {
		group.Go("membership", func(ctx context.Context) error {
			return watchMembership(ctx, config.NodeName, kubeletKubeconfig(env, kubeletArgs), state, log)
		})
		group.Go("name servers of this node", func(ctx context.Context) error {
			return keepOwnDNS(ctx, config.NodeName, kubeletKubeconfig(env, kubeletArgs), env, log)
		})
	}
	watch := hostwatch.New(log)
	group.Go("watch of the host's network", func(ctx context.Context) error {
		proxy := watch.Register(ctx, hostnet.ProxyOwner(daemons.ResyncProxy))
		defer proxy.Close()
		watch.Run(ctx)
		return nil
	})
	group.Start(parsed[daemons.Proxy]) // the watch has to see its first transaction
	if admin != nil {
		group.Go("address of the API", func(ctx context.Context) error {
			return keepAPIAddress(ctx, env, admin, config.NodeName, watch, log)
		})
	}
	policies := newPolicies(ctx, env, config.NodeName, state, log) // closes pods before the kubelet can start any
	var moved atomic.Bool
	addresses, err := nodeAddresses(kubeletArgs)
	for _, address := range addresses {
		if err != nil || address.IsUnspecified() {
			continue // runNetwork has the error
		}
		group.Go("the node's address "+address.String(), func(ctx context.Context) error {
			err := followAddress(ctx, env, config, address, watch, log)
			if errors.Is(err, errAddress) {
				moved.Store(true)
			}
			return err
		})
	}
	group.Go("pod network", func(ctx context.Context) error {
		return runNetwork(ctx, env, config, kubeletArgs, watch, policies, log)
	})
	group.Start(parsed[daemons.Kubelet])
	group.Go("memory of the start", untilDone(func(ctx context.Context) error {
		workingset.TrimAfterStart(ctx)
		return nil
	}))
	return group.WaitFor(func() time.Duration {
		// snapd stops services by their names, the datastore before this one; without it the
		// API server's good order is to wait for what cannot come, until leases are lost.
		// Connections to an address that the host has no more end by no good order, either.
		if moved.Load() || f.startControlPlane && datastoreGone(env) {
			return unreadyGrace
		}
		return stopGrace
	})
}

// datastoreGone says that the node's own datastore runs no more; one elsewhere is not looked at.
func datastoreGone(env snapenv.Env) bool {
	conn, err := net.DialTimeout("unix", env.DatastoreSocket(), time.Second)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// readArgs reads the argument file of each daemon to be run, and adds what this host needs unless the
// user set the flag. kube-proxy gets the name of the node, which it would take from its own flag only.
func readArgs(env snapenv.Env, node string, f *flags, host hostprobe.Host, log *slog.Logger) (words map[string][]string, kubelet *args.File, err error) {
	names := []string{daemons.Kubelet, daemons.Proxy}
	if f.startControlPlane {
		names = append(names, daemons.APIServer, daemons.ControllerManager, daemons.Scheduler)
	}
	lookup := func(name string) (string, bool) {
		if v, ok := env.Lookup(name); ok {
			return v, true
		}
		return os.LookupEnv(name)
	}
	words = map[string][]string{}
	files := map[string]*args.File{}
	var errs []error
	for _, name := range names {
		file, err := args.Load(*f.files[name], args.GrammarA)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if name == daemons.Proxy {
			if err := file.Set("hostname-override", node); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		added, err := host.Apply(name, file)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, o := range added {
			log.Info("this host needs an argument", "daemon", name, "flag", "--"+o.Flag+"="+o.Value, "why", o.Why)
		}
		if name == daemons.Kubelet {
			if err := completeNodeIP(file, host.Pods, log); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		files[name] = file
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, err
	}
	kubelet = files[daemons.Kubelet]
	if _, err := defaultKubeletConfig(kubelet, slices.Collect(maps.Values(files)), env.KubeletConfig()); err != nil {
		return nil, nil, err
	}
	for name, file := range files {
		words[name] = file.Words(lookup)
	}
	return words, kubelet, nil
}

// untilDone makes a daemon of a job that ends: when the job is done the daemon stays until
// its context ends, when it fails the daemon does.
func untilDone(job func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := job(ctx); err != nil && ctx.Err() == nil {
			return err
		}
		<-ctx.Done()
		return nil
	}
}

// imageRetry is the pause before images are loaded again that had no room.
const imageRetry = 10 * time.Second

// loadImages loads the product's images. A full disk is waited out: it must not take the API
// server away.
func loadImages(ctx context.Context, env snapenv.Env, log *slog.Logger) error {
	for {
		err := images.Load(ctx, env, log)
		if err == nil || !strings.Contains(err.Error(), syscall.ENOSPC.Error()) { // containerd's errors are texts
			return err
		}
		log.Warn("the disk is full", "err", err, "retry_in", imageRetry)
		select {
		case <-time.After(imageRetry):
		case <-ctx.Done():
			return nil
		}
	}
}

// waitReady returns when the local API server is ready. Readiness has no event to wait for,
// so it is asked for, often at first since a start takes a few seconds.
func waitReady(group *daemons.Group, admin *rest.Config, log *slog.Logger) error {
	cfg := rest.CopyConfig(admin)
	cfg.Timeout = 5 * time.Second
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(group.Context(), apiServerStart)
	defer cancel()
	began := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil {
			log.Info("API server is ready", "after", time.Since(began).Round(time.Millisecond))
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if err := group.Context().Err(); err != nil {
				return err
			}
			return fmt.Errorf("%s is not ready after %s: %w", daemons.APIServer, apiServerStart, err)
		}
		if err := group.Failed(); err != nil {
			return err
		}
	}
}

// applyManifests applies the shipped objects, and tries again while the API server refuses.
func applyManifests(ctx context.Context, admin *rest.Config, env snapenv.Env, log *slog.Logger) error {
	waits := backoff.New(time.Second, time.Minute)
	for {
		err := bootstrap.Apply(ctx, admin, env.Manifests(), log, bootstrap.Absent(env)...)
		if _, missing := os.Stat(env.CNIManifest()); err == nil && missing == nil {
			err = bootstrap.ApplyFile(ctx, admin, env.CNIManifest(), log) // the user's own pod network
		}
		if err == nil {
			err = reconcileAddons(ctx, admin, env, log)
		}
		if err == nil {
			return nil
		}
		wait := waits.Step()
		log.Warn("cannot apply the shipped objects yet", "dir", env.Manifests(), "err", err, "retry_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// reconcileAddons brings the addons in line with what is written down in the cluster. It is
// here, and not in a command, that the default addons of a new cluster are enabled: this runs
// whoever starts the services, and is tried until it is done.
func reconcileAddons(ctx context.Context, admin *rest.Config, env snapenv.Env, log *slog.Logger) error {
	set, err := addon.Open(env, admin, log)
	if err != nil {
		return err
	}
	return set.Reconcile(ctx)
}

// keepOwnDNS has a worker's DNS server replaced when the worker gets other name servers.
func keepOwnDNS(ctx context.Context, name, kubeconfig string, env snapenv.Env, log *slog.Logger) error {
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	core, err := kube.New(cfg)
	if err != nil {
		return err
	}
	if err := addon.FollowOwnResolvers(ctx, core, name, log, env.HostPath("etc/resolv.conf"), env.HostPath("run/systemd/resolve/resolv.conf")); err != nil {
		log.Warn("a change of this node's name servers will not be noticed", "err", err)
	}
	return nil
}

// keepDNS has a second DNS server started when there is a second node, and all of them started
// again when the host gets other name servers.
func keepDNS(ctx context.Context, admin *rest.Config, env snapenv.Env, log *slog.Logger) error {
	set, err := addon.Open(env, admin, log)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		set.KeepSpread(ctx)
	}()
	err = set.FollowResolvers(ctx, env.HostPath("etc/resolv.conf"), env.HostPath("run/systemd/resolve/resolv.conf"))
	if err != nil {
		log.Warn("a change of the host's name servers will not be noticed", "err", err)
	}
	<-done
	return nil
}

// newPolicies returns what enforces network policies; nil where the user's own pod network does, and
// where this host cannot, which status reports.
func newPolicies(ctx context.Context, env snapenv.Env, node string, state *kubelitestate.Writer, log *slog.Logger) *enforcer.Enforcer {
	if _, err := os.Stat(env.CNIManifest()); err == nil {
		return nil
	}
	policies, err := enforcer.New(ctx, enforcer.Options{Env: env, NodeName: node, Log: log, Report: state.Policies})
	if err != nil {
		log.Error("network policies are not enforced on this node", "err", err)
		return nil
	}
	return policies
}

func runNetwork(ctx context.Context, env snapenv.Env, config nodeconfig.Config, kubelet *args.File, watch *hostwatch.Watcher, policies *enforcer.Enforcer, log *slog.Logger) error {
	if err := config.Err(nodeconfig.PartNodeIP); err != nil {
		return err
	}
	nodeIPs, err := nodeAddresses(kubelet)
	if err != nil {
		return fmt.Errorf("--node-ip in %s: %w", env.Args(daemons.Kubelet), err)
	}
	for _, nodeIP := range nodeIPs {
		routes := watch.Register(ctx, hostnet.ServiceRoutesOwner(config.APIServer.ServiceCIDRs, nodeIP))
		defer routes.Close()
	}
	options, err := podNetworkOptions(env)
	if err != nil {
		return err
	}
	options.Kubeconfig = kubeletKubeconfig(env, kubelet)
	options.NodeName = config.NodeName
	options.NodeIPs = nodeIPs
	options.ClusterCIDR = nodeconfig.JoinPrefixes(config.ClusterCIDRs)
	options.Env, options.Log, options.Watch, options.Policies = env, log, watch, policies
	options.EndSandbox = func(ctx context.Context, id string) error { return images.EndSandbox(ctx, env, id) }
	return network.Run(ctx, options)
}

// nodeAddresses are the kubelet's --node-ip, one or one of each family; none where it is not set. They are
// those of the arguments in use and not of the file: the host may have added them.
func nodeAddresses(kubelet *args.File) (out []netip.Addr, err error) {
	v, ok := kubelet.Get("node-ip")
	if !ok {
		return nil, nil
	}
	for text := range strings.SplitSeq(v, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(text))
		if err != nil {
			return nil, err
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}

// completeNodeIP adds the address of the other family where pods have both and --node-ip names one: a join writes the one by which
// the cluster saw the node. It is taken from the same interface, since the pod network uses one for both.
func completeNodeIP(kubelet *args.File, pods []netip.Prefix, log *slog.Logger) error {
	known, err := nodeAddresses(kubelet)
	if err != nil || len(known) != 1 || len(pods) != 2 || known[0].IsUnspecified() {
		return nil //nolint:nilerr // runNetwork has the error
	}
	other, ok, err := hostnet.OtherFamily(known[0])
	if err != nil || !ok {
		log.Warn("this node has pods of both families and one address: its pods get none of the other one", "address", known[0], "err", err)
		return nil
	}
	both := []netip.Addr{known[0], other}
	if pods[0].Addr().Is4() != both[0].Is4() {
		slices.Reverse(both)
	}
	log.Info("the node has an address of both families", "node_ip", fmt.Sprint(both))
	return kubelet.Set("node-ip", both[0].String()+","+both[1].String())
}

// kubeletKubeconfig is the file with the kubelet's credentials.
func kubeletKubeconfig(env snapenv.Env, kubelet *args.File) string {
	path, ok := kubelet.Get("kubeconfig")
	if !ok {
		return env.Credential("kubelet.config")
	}
	return os.Expand(path, func(k string) string { v, _ := env.Lookup(k); return v })
}

// podNetworkOptions reads args/pod-network; where there is none, defaults hold.
func podNetworkOptions(env snapenv.Env) (o network.Options, err error) {
	path := env.Args("pod-network")
	file, err := args.Load(path, args.GrammarFor("pod-network"))
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil
	}
	if err != nil {
		return o, err
	}
	flags := pflag.NewFlagSet("pod-network", pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.Backend, "backend", network.BackendVXLAN, "")
	flags.StringVar(&o.Interface, "interface", "", "")
	flags.IntVar(&o.MTU, "mtu", 0, "")
	if err := flags.Parse(file.Words(env.Lookup)); err != nil {
		return o, fmt.Errorf("%s: %w; the flags are --backend, --interface and --mtu", path, err)
	}
	return o, nil
}
