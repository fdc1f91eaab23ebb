package cli

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/certs"
	"microk8s/internal/console"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/status"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// dashboardPort is upstream's.
const dashboardPort = 10443

type dashboardOptions struct {
	address string
	port    int
	open    bool
}

func (a *App) newDashboardProxy() *cobra.Command {
	o := dashboardOptions{}
	cmd := &cobra.Command{
		Use:   "dashboard-proxy [--address ADDRESS] [--port PORT] [--open]",
		Short: "Serve the console, the cluster in a browser, until interrupted",
		Long: `Serve the console, the cluster in a browser, until interrupted (Ctrl-C). It prints the address, and a token
to log in with, which has the administrator's rights and is worth nothing when the command has ended.
People with other rights log in with their own token or kubeconfig, such as one of
microk8s config --user; everything is then done as that person.

It works while the API server is down too, and shows what this node knows.

The browser warns of the certificate, which the cluster's own CA has signed, until it knows that CA.

    microk8s dashboard-proxy                        from all machines that reach this one
    microk8s dashboard-proxy --address 127.0.0.1    from this machine only
    microk8s dashboard-proxy --open                 and open a browser here
    microk8s enable dashboard                       the same console in the cluster, all the time`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if net.ParseIP(o.address) == nil {
				return &usageError{cmd, fmt.Errorf("invalid value of --address: %s is not an IP address", o.address)}
			}
			if o.port < 0 || o.port > 65535 {
				return &usageError{cmd, fmt.Errorf("invalid value of --port: %d (choose from 1 to 65535, or 0 for any that is free)", o.port)}
			}
			return a.dashboardProxy(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.address, "address", "0.0.0.0", "IP address to serve on")
	cmd.Flags().IntVar(&o.port, "port", dashboardPort, "TCP port to serve on")
	cmd.Flags().BoolVar(&o.open, "open", false, "open the address in a browser on this machine")
	return cmd
}

// dashboardProxy serves the console with the rights of the caller until ctx ends.
func (a *App) dashboardProxy(ctx context.Context, o dashboardOptions) error {
	if !console.Built() {
		return failf("on the machine that builds it: make console, then make build", "this program was built without the page of the console")
	}
	certificate := func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(a.Env.Cert("server.crt"), a.Env.Cert("server.key"))
		return &pair, err
	}
	if _, err := certificate(nil); err != nil {
		return failf("issue it again with: sudo microk8s refresh-certs -e server.crt", "cannot use the node's certificate: %w", err)
	}
	listen := net.JoinHostPort(o.address, strconv.Itoa(o.port))
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return failf("use another port with: microk8s dashboard-proxy --port PORT", "cannot serve on %s: %w", listen, err)
	}
	own := func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", a.Env.AdminKubeconfig()) }
	code := rand.Text() // 130 bits
	server := console.New(console.Options{
		Certificate: certificate,
		API: func() (*rest.Config, error) {
			cfg, err := own()
			if err != nil {
				return nil, err
			}
			return rest.AnonymousClientConfig(cfg), nil
		},
		Code: code, Own: own,
		Node: &consoleNode{a: a, prober: a.prober()},
		Log:  a.consoleLog(),
		Now:  a.Now,
	})
	address := a.sayDashboard(l.Addr(), code)
	if o.open {
		a.openBrowser(ctx, address)
	}
	return server.Serve(ctx, l)
}

// consoleLog has who logged in and who was refused.
func (a *App) consoleLog() *slog.Logger {
	level := slog.LevelInfo
	if a.getenv("MICROK8S_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
}

// sayDashboard prints what upstream does, to the letter, and returns the address for this machine.
func (a *App) sayDashboard(at net.Addr, code string) string {
	addr, _ := netip.ParseAddrPort(at.String())
	host, port := addr.Addr().Unmap(), strconv.Itoa(int(addr.Port()))
	here := host.String()
	if host.IsUnspecified() {
		here = "127.0.0.1"
	}
	address := "https://" + net.JoinHostPort(here, port)
	fmt.Fprintf(a.Out, "Dashboard will be available at %s\n", address)
	fmt.Fprintf(a.Out, "Use the following token to login:\n%s\n", code)
	if far := defaultAddress(); host.IsUnspecified() && far.IsValid() {
		fmt.Fprintf(a.Err, "From other machines: https://%s\n", net.JoinHostPort(far.String(), port))
	}
	fmt.Fprintln(a.Err, "It serves until it is interrupted: press Ctrl-C.")
	return address
}

// openBrowser opens an address, as the person who ran sudo where the caller is root. Failing to is no
// failure: the address has been printed.
func (a *App) openBrowser(ctx context.Context, address string) {
	argv := []string{"xdg-open", address}
	if user := a.getenv("SUDO_USER"); user != "" && a.UID == 0 {
		argv = append([]string{"sudo", "-u", user, "-E"}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...) //nolint:gosec // nothing of it comes from a stranger
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(a.Err, "no browser could be opened here (%v); open the address yourself\n", err)
		return
	}
	go func() { _ = cmd.Wait() }() // it may go on for longer than this
}

// consoleNode is this node as the console shows it.
type consoleNode struct {
	a      *App
	prober *status.Prober
}

// consoleFacts is the state of the node. What changes all the time is not in it, since each change is sent.
type consoleFacts struct {
	Node     string `json:"node"`
	Version  string `json:"version"`
	Headline string `json:"headline"`
	// Tolerates says what may still be lost, in the words of status.
	Tolerates    string           `json:"tolerates,omitempty"`
	Status       statusJSON       `json:"status"`
	Members      []consoleMember  `json:"members,omitempty"`
	Space        *peers.Space     `json:"space,omitempty"`
	Services     []consoleService `json:"services,omitempty"`
	Certificates []listedCert     `json:"certificates,omitempty"`
}

type consoleMember struct {
	Address  string `json:"address"`
	Role     string `json:"role"`
	Online   bool   `json:"online"`
	Leader   bool   `json:"leader"`
	Self     bool   `json:"self"`
	DiskFull bool   `json:"diskFull,omitempty"`
}

type consoleService struct {
	Name     string    `json:"name"`
	Phase    string    `json:"phase"`
	Since    time.Time `json:"since,omitzero"`
	Restarts int       `json:"restarts,omitempty"`
	LastExit string    `json:"lastExit,omitempty"`
}

// membersWait bounds the question for the datastore's members.
const membersWait = time.Second

// Facts implements console.Node.
func (n *consoleNode) Facts(ctx context.Context) any {
	r := n.prober.Probe(ctx)
	version, _ := Version(n.a.Env)
	f := consoleFacts{Version: version, Headline: headline(r), Tolerates: r.HA.Tolerates(), Status: jsonOf(r)}
	f.Node = nodeconfig.Load(n.a.Env).NodeName
	if n.a.state().Stopped {
		f.Headline = stoppedText
	}
	if len(f.Status.Addons) == 0 { // also while the node is not Ready
		for _, x := range addons(r) {
			s := state(x.Enabled)
			if !r.AddonsKnown {
				s = "unknown"
			}
			f.Status.Addons = append(f.Status.Addons, addonJSON{x.Name, x.Repository, x.Description, x.Version, s})
		}
	}
	ask, cancel := context.WithTimeout(ctx, membersWait)
	defer cancel()
	if list, err := peers.Members(ask, n.a.Env.BackendLive()); err == nil {
		for _, m := range list {
			f.Members = append(f.Members, consoleMember{m.Address, m.Role.String(), m.Online, m.Leader, m.Self, m.DiskFull})
			if m.Self && m.Space != nil {
				f.Space = &peers.Space{Bytes: m.Space.Bytes >> 16 << 16, Quota: m.Space.Quota, Refused: m.Space.Refused, Largest: m.Space.Largest}
			}
		}
		slices.SortFunc(f.Members, func(x, y consoleMember) int { return strings.Compare(x.Address, y.Address) })
	}
	for _, s := range r.Services {
		if s.Phase != service.Stopped || status.Expected(n.a.Env, s.Name) {
			f.Services = append(f.Services, consoleService{s.Name, fmt.Sprint(s.Phase), s.Since, s.Restarts, s.LastExit})
		}
	}
	store := certs.New(n.a.Env, certs.Options{})
	for _, c := range refreshable {
		name := strings.TrimSuffix(c.file, ".crt")
		end, err := store.Expiry(name)
		if err != nil {
			continue // the problems say so
		}
		days, err := store.DaysLeft(name)
		if err == nil {
			f.Certificates = append(f.Certificates, listedCert{File: c.file, Title: c.title, DaysLeft: days, Expires: end.UTC().Format(time.RFC3339)})
		}
	}
	return f
}

// as returns the cluster's tokens with somebody's rights.
func (n *consoleNode) as(core *kube.Core) *tokenstore.Store {
	return tokenstore.Open(n.a.Env, func() (*kube.Core, error) { return core, nil })
}

// NewToken implements console.Node. The document is that of add-node -o json.
func (n *consoleNode) NewToken(ctx context.Context, core *kube.Core, want console.TokenRequest) (any, error) {
	f := addNodeFlags{worker: want.Worker, name: want.Name, expires: want.Expires}
	if want.Many {
		d, err := time.ParseDuration(cmp.Or(want.Expires, "1h"))
		if err != nil {
			return nil, errors.New("a token for any number of nodes has an end: use a duration such as 1h")
		}
		f.expires, f.ttl, f.ttlSet = "", int(d.Seconds()), true
	}
	c, use, err := n.a.makeToken(ctx, n.as(core), token.New(), f)
	if err != nil {
		return nil, err
	}
	return c.document(use, n.a.Now()), nil
}

// Tokens implements console.Node.
func (n *consoleNode) Tokens(ctx context.Context, core *kube.Core) (any, error) {
	records, err := n.as(core).List(ctx)
	if err != nil {
		return nil, explainTokens(err)
	}
	all := []listedToken{}
	for _, r := range records {
		all = append(all, listed(r, n.a.Now()))
	}
	return listOf("JoinTokenList", all), nil
}

// RevokeToken implements console.Node.
func (n *consoleNode) RevokeToken(ctx context.Context, core *kube.Core, id string) error {
	_, err := n.as(core).Revoke(ctx, id)
	return explainTokens(err)
}
