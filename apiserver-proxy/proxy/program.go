package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"microk8s/apiserver-proxy/config"
	"microk8s/apiserver-proxy/endpoints"
	"microk8s/internal/snapenv"
)

// Flags are those of args/apiserver-proxy (cluster-agent.md 5.2).
type Flags struct {
	TraefikConfig string
	Kubeconfig    string
	Refresh       time.Duration // 0: the list of servers is kept by hand
}

// minRefresh is the shortest refresh interval.
const minRefresh = 15 * time.Second

// Parse reads the command line. Help goes to out, with the error pflag.ErrHelp.
func Parse(env snapenv.Env, argv []string, out io.Writer) (Flags, error) {
	var f Flags
	set := pflag.NewFlagSet("apiserver-proxy", pflag.ContinueOnError)
	set.SetOutput(out)
	set.StringVar(&f.TraefikConfig, "traefik-config", config.StaticFile(env), "where to listen, and which file lists the API servers")
	set.StringVar(&f.Kubeconfig, "kubeconfig", env.Credential("kubelet.config"), "credentials for health checks and for learning of new API servers")
	set.DurationVar(&f.Refresh, "refresh-interval", 30*time.Second, "how late a changed list of API servers may arrive, at least 15s; 0 leaves the list to you")
	if err := set.Parse(argv); err != nil {
		return f, err
	}
	switch {
	case set.NArg() > 0:
		return f, fmt.Errorf("unknown argument %q", set.Arg(0))
	case f.Refresh < 0:
		return f, fmt.Errorf("cannot use --refresh-interval=%s: it is 0 or more", f.Refresh)
	}
	return f, nil
}

// Program is the proxy of one worker. Env, Flags and Log are needed.
//
// It listens where traefik.yaml says, and serves from the list in provider.yaml: as it is at the
// start, as people change it (while traefik.yaml has watch: true), and as the cluster's
// endpoints change, which it also writes there. A list that cannot be used is reported and
// changes nothing: the last good one stays in use, and survives restarts in a file of its own.
type Program struct {
	Env   snapenv.Env
	Flags Flags
	Log   *slog.Logger

	Times    Times                               // zero values: DefaultTimes
	Min      time.Duration                       // shortest refresh interval; 15 s by default
	Listener net.Listener                        // instead of the address of traefik.yaml; for tests
	Updated  func(addresses []string, by string) // called when a list was applied; for tests

	provider string
	balancer *Balancer

	mu      sync.Mutex // one list at a time
	damaged bool       // provider.yaml cannot be used
	told    string     // what was said of it last
}

// Run serves until ctx ends. An error means that it cannot listen.
func (p *Program) Run(ctx context.Context) error {
	static, err := config.LoadStatic(p.Flags.TraefikConfig)
	if err != nil {
		static = config.Static{Address: config.DefaultAddress, Watch: true}
		p.Log.Error("using the defaults", "err", err, "address", static.Address)
	}
	if static.Ignored != nil {
		p.Log.Warn("only a subset of traefik's configuration is supported; the rest has no effect", "file", p.Flags.TraefikConfig, "err", static.Ignored)
	}
	p.provider = static.ProviderFile
	if p.provider == "" {
		p.provider = config.DefaultProviderFile(p.Env.Data)
	}
	if p.Listener == nil {
		p.Listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", static.Address)
		if err != nil {
			return fmt.Errorf("cannot listen on %s: %w; another program has the port, or set another address in %s",
				static.Address, err, config.TemplateFile(p.Env))
		}
	}
	address := p.Listener.Addr().(*net.TCPAddr).AddrPort()
	p.Log.Info("listening", "address", address.String())
	if !address.Addr().IsLoopback() {
		p.Log.Warn("other machines can reach this address too; 127.0.0.1 is enough", "address", address.String(), "file", config.TemplateFile(p.Env))
	}

	prober := NewReadyProber(p.Flags.Kubeconfig, func(err error) { p.Log.Warn("API servers are only checked for an open port", "err", err) })
	p.balancer = NewBalancer(prober, p.Times, p.Log)
	defer p.balancer.Close()
	p.fromFile()
	if len(p.balancer.Addresses()) == 0 {
		p.fromLastGood()
	}

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.balancer.Serve(ctx, p.Listener, connections()) })
	if static.Watch {
		group.Go(func() error {
			if err := watchFile(ctx, p.provider, p.fromFile); err != nil {
				p.Log.Error("changes made by hand need a restart of the service", "file", p.provider, "err", err)
			}
			return nil
		})
	}
	if interval := p.interval(); interval > 0 {
		group.Go(func() error {
			source := &endpoints.Source{Kubeconfig: p.Flags.Kubeconfig, Interval: interval, Log: p.Log}
			source.Run(ctx, p.fromCluster)
			return nil
		})
	}
	return group.Wait()
}

func (p *Program) interval() time.Duration {
	least := p.Min
	if least == 0 {
		least = minRefresh
	}
	switch f := p.Flags.Refresh; {
	case f == 0:
		p.Log.Info("Will not auto-refresh list of control plane endpoints")
		return 0
	case f < least:
		p.Log.Warn("the refresh interval is too short", "wanted", f, "used", least)
		return least
	default:
		return f
	}
}

// connections is how many are served at a time: each takes two descriptors, and more for a moment
// while several servers are dialled.
func connections() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 128
	}
	return int(min(8192, max(16, (l.Cur-min(l.Cur, 64))/4)))
}

// fromFile applies the list in provider.yaml.
func (p *Program) fromFile() {
	p.mu.Lock()
	defer p.mu.Unlock()
	good, bad, err := loadProvider(p.provider)
	if err == nil {
		good, bad, err = p.others(good, bad)
	}
	p.damaged = err != nil
	said := fmt.Sprint(bad, err)
	if said != p.told {
		p.told = said
		if err != nil {
			p.Log.Error("the list of API servers stays as it was", "err", err)
		} else {
			for _, b := range bad {
				p.Log.Error("an entry is skipped", "file", p.provider, "err", b)
			}
		}
	}
	if err == nil {
		p.apply(good, p.provider)
	}
}

// fromLastGood is for a start without a list.
func (p *Program) fromLastGood() {
	p.mu.Lock()
	defer p.mu.Unlock()
	good, bad, err := loadProvider(config.LastGood(p.provider))
	if err == nil {
		good, _, err = p.others(good, bad)
	}
	switch {
	case err == nil:
		p.apply(good, config.LastGood(p.provider))
	case errors.Is(err, fs.ErrNotExist):
		p.Log.Error("no API server is known; write the list by hand, or join the cluster again", "file", p.provider)
	default:
		p.Log.Error("no API server is known; write the list by hand, or join the cluster again", "file", p.provider, "err", err)
	}
}

// fromCluster applies the list that the cluster has, and writes it to provider.yaml.
func (p *Program) fromCluster(list []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	good, bad := config.Addresses(list)
	good, bad, err := p.others(good, bad)
	for _, b := range bad {
		p.Log.Warn("an endpoint of the cluster is skipped", "err", b)
	}
	if err != nil {
		p.Log.Warn("warning: empty list of endpoints, skipping update", "err", err)
		return
	}
	if !p.damaged && slices.Equal(good, p.balancer.Addresses()) {
		return
	}
	p.Log.Info("updating endpoints", "endpoints", good)
	if err := config.WriteProvider(p.provider, good); err != nil {
		p.Log.Error("using the new list of API servers, but cannot save it", "err", err)
	} else {
		p.damaged = false
	}
	p.apply(good, "cluster")
}

// apply puts a list in use. mu is held.
func (p *Program) apply(addresses []string, by string) {
	if !slices.Equal(addresses, p.balancer.Addresses()) {
		p.Log.Info("using API servers", "endpoints", addresses, "from", by)
		p.balancer.Set(addresses)
		if err := config.WriteProvider(config.LastGood(p.provider), addresses); err != nil {
			p.Log.Warn("the list of API servers is not kept for a start without one", "err", err)
		}
	}
	if p.Updated != nil {
		p.Updated(addresses, by)
	}
}

// others takes out of a list what is the proxy itself, which would connect to itself for ever.
func (p *Program) others(list []string, bad []error) ([]string, []error, error) {
	var out []string
	for _, a := range list {
		if self(p.Listener.Addr().(*net.TCPAddr).AddrPort(), a) {
			bad = append(bad, fmt.Errorf("cannot use the server address %q: it is the proxy's own", a))
			continue
		}
		out = append(out, a)
	}
	if len(out) == 0 {
		return nil, bad, errors.Join(append([]error{errors.New("there is no server that can be used")}, bad...)...)
	}
	return out, bad, nil
}

// self reports whether connections to address reach the listener.
func self(listener netip.AddrPort, address string) bool {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port != strconv.Itoa(int(listener.Port())) {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	own := listener.Addr().Unmap()
	if ip == own {
		return true
	}
	if !own.IsUnspecified() {
		return false
	}
	if ip.IsLoopback() {
		return true
	}
	mine, _ := net.InterfaceAddrs()
	return slices.ContainsFunc(mine, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(net.IP(ip.AsSlice()))
	})
}
