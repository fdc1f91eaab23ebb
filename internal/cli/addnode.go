package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"microk8s/internal/hostinfo"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/pki"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// tokenWait bounds how long add-node waits for the API server.
const tokenWait = 20 * time.Second

// noTTL is upstream's default of --token-ttl: one use, without an end. Where the flag is not
// set, the token is good for one node within [tokenLife].
const noTTL = -1

// tokenLife is how long a token is good for where nothing else is asked for: long enough to walk
// to the other machine, short enough that a line in a chat or a shell's history is worth nothing.
const tokenLife = time.Hour

// never is the value of --expires for a token without an end.
const never = "never"

// maxTTL, in seconds, is a hundred years; durations have an end.
const maxTTL = 100 * 365 * 24 * 3600

type addNodeFlags struct {
	ttl          int
	ttlSet       bool
	expires      string
	token        string
	format       string
	worker, list bool
	name, revoke string
	out          *output
}

func (a *App) newAddNode() *cobra.Command {
	f := addNodeFlags{}
	cmd := &cobra.Command{
		Use:   "add-node [--worker] [--expires DURATION|never] [-l|--token-ttl SECONDS] [-t|--token TOKEN] [--name NODE] [--format FORMAT | -o json|yaml]",
		Short: "Make a token for another machine, and print how it joins",
		Long: `Make a token with which another machine joins this cluster, and print what to type there.

The token is good for one node and for one hour; --expires changes how long. With --token-ttl,
any number of nodes may join until it expires. A token is used up when a join is done, not when
one fails, and every control plane node knows it.

Whoever has a token made without --worker can join as a control plane node, and gets the keys
of the whole cluster. Make a token with --worker for machines that only carry workloads.

A token proves to the joining machine that it talks to this cluster, one that you choose
yourself too. It must be random for that, such as what openssl rand -hex 16 prints, and joins
with HOST:PORT/TOKEN, without the fingerprint that machines of another version want.

    microk8s add-node --worker           only for machines without a control plane
    microk8s add-node --name n2          only for the machine n2, also when it was reinstalled
    microk8s add-node --expires 72h      one machine, within three days
    microk8s add-node --token-ttl 600    any number of machines, within ten minutes
    microk8s add-node --list             the tokens there are, without the secret part
    microk8s add-node --revoke ID        revoke one`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case !slices.Contains([]string{"pretty", "short", "token", "token-check", "json", "yaml"}, f.format):
				return &usageError{cmd, fmt.Errorf("invalid value of --format: %s (choose from pretty, short, token, token-check, json, yaml)", f.format)}
			case f.list && f.revoke != "":
				return &usageError{cmd, errors.New("--list and --revoke cannot be used together")}
			case f.list:
				return a.listTokens(cmd.Context(), f)
			case cmd.Flags().Changed("revoke"):
				return a.revokeToken(cmd.Context(), f.revoke)
			case f.expires != "" && cmd.Flags().Changed("token-ttl"):
				return &usageError{cmd, errors.New("--expires and --token-ttl cannot be used together: --expires is for one node, --token-ttl for any number")}
			}
			f.ttlSet = cmd.Flags().Changed("token-ttl")
			return a.addNode(cmd.Context(), f)
		},
	}
	set := cmd.Flags()
	set.IntVarP(&f.ttl, "token-ttl", "l", noTTL, "lifetime in seconds, for any number of nodes; -1: for one node, without expiry")
	set.Lookup("token-ttl").DefValue = "0" // not shown: without the flag it is one node and an hour
	set.StringVar(&f.expires, "expires", "", "lifetime for one node, such as 30m or 72h, or never (default 1h)")
	set.StringVarP(&f.token, "token", "t", "", "use this token, of at least 32 characters, instead of a generated one")
	set.StringVar(&f.format, "format", "pretty", "pretty, short, token, token-check, or json or yaml as upstream prints it")
	f.out = addOutput(cmd, "pretty")
	completeFlag(cmd, "format", "pretty", "short", "token", "token-check", "json", "yaml")
	set.BoolVar(&f.worker, "worker", false, "the token joins workers only")
	set.StringVar(&f.name, "name", "", "the token joins the node of this name only")
	set.BoolVar(&f.list, "list", false, "list the tokens instead")
	set.StringVar(&f.revoke, "revoke", "", "revoke the token with this id instead")
	_ = cmd.RegisterFlagCompletionFunc("revoke", a.tokenIDs)
	return cmd
}

// strongToken says how to make a token that is not guessed.
const strongToken = "use a random one: openssl rand -hex 16, or leave --token out"

// tokens returns the cluster's tokens.
func (a *App) tokens() *tokenstore.Store {
	core := func() (*kube.Core, error) { return kube.FromFile(a.Env.AdminKubeconfig()) }
	return tokenstore.Open(a.Env, core)
}

func explainTokens(err error) error {
	if errors.Is(err, tokenstore.ErrUnavailable) {
		return failf("see what is wrong with: microk8s status", "%w", err)
	}
	return err
}

func (a *App) addNode(ctx context.Context, f addNodeFlags) error {
	tok := token.New()
	if f.token != "" {
		given, err := token.Parse(f.token)
		if errors.Is(err, token.ErrLength) {
			fmt.Fprintln(a.Out, "Invalid token size.  It must be 32 characters long.")
			fmt.Fprintln(a.Err, "  make one with: openssl rand -hex 16")
			return exitError(ExitError)
		}
		if err != nil {
			return err
		}
		if err := given.Guessable(); err != nil {
			return failf(strongToken, "cannot use this token: %w", err)
		}
		tok = given
	}
	c, opts, err := a.makeToken(ctx, a.tokens(), tok, f)
	if err != nil {
		return err
	}
	if f.out.document() {
		return a.print(f.out, c.document(opts, a.Now()))
	}
	if err := c.print(a.Out, f.format); err != nil {
		return err
	}
	if a.Term && f.format == "pretty" { // scripts read the rest
		fmt.Fprintln(a.Err, "\n"+opts.describe())
	}
	return nil
}

// makeToken keeps a token, and returns how it is used.
func (a *App) makeToken(ctx context.Context, store *tokenstore.Store, tok token.Token, f addNodeFlags) (connection, tokenUse, error) {
	opts, err := f.options()
	if err != nil {
		return connection{}, tokenUse{}, err
	}
	if f.name != "" {
		if err := nodeconfig.CheckNodeName(f.name); err != nil {
			return connection{}, tokenUse{}, failf("give the host name of the joining machine, in lower case", "cannot use --name %s: %w", f.name, err)
		}
	}
	check, err := a.fingerprint(tok)
	if err != nil {
		return connection{}, tokenUse{}, err
	}
	all, err := joinAddresses()
	if err != nil {
		return connection{}, tokenUse{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, tokenWait)
	defer cancel()
	if _, err := store.Add(ctx, tok, opts.Options); err != nil {
		return connection{}, tokenUse{}, explainTokens(err)
	}
	first := "none"
	if addr := defaultAddress(); addr.IsValid() {
		first = addr.String()
	}
	return connection{token: tok.Reveal(), check: check, port: strconv.Itoa(nodeconfig.Load(a.Env).AgentPort), first: first, all: all, worker: f.worker, ha: a.state().HA}, opts, nil
}

// options returns what the token may be used for.
func (f addNodeFlags) options() (tokenUse, error) {
	use := tokenUse{tokenstore.Options{Worker: f.worker, Name: f.name, Uses: 1, TTL: tokenLife}}
	switch {
	case f.ttlSet && f.ttl == noTTL, f.expires == never:
		use.TTL = 0
	case f.ttlSet && (f.ttl <= 0 || f.ttl > maxTTL):
		return use, failf("use a number of seconds, or leave it out for a token that is good for one node", "cannot use --token-ttl %d", f.ttl)
	case f.ttlSet:
		use.TTL = time.Duration(f.ttl) * time.Second
		if f.name == "" {
			use.Uses = tokenstore.Unlimited
		}
	case f.expires != "":
		d, err := time.ParseDuration(f.expires)
		if err != nil || d < time.Second || d > maxTTL*time.Second {
			return use, failf("use a duration such as 30m or 72h, or never", "cannot use --expires %s", f.expires)
		}
		use.TTL = d
	}
	return use, nil
}

// tokenUse is what a new token may be used for.
type tokenUse struct{ tokenstore.Options }

// describe returns one sentence for the person that made the token.
func (u tokenUse) describe() string {
	who, end := "one node", "without an end"
	if u.Uses == tokenstore.Unlimited {
		who = "any number of nodes"
	}
	if u.Name != "" {
		who = "the node " + u.Name
	}
	if u.Worker {
		who += ", as a worker"
	}
	if u.TTL > 0 {
		end = "for " + duration.HumanDuration(u.TTL)
	}
	return fmt.Sprintf("The token is good for %s, %s. List and revoke tokens with: microk8s add-node --list", who, end)
}

// fingerprint returns the digits of the agent's certificate that go into a connection string:
// 12 for a generated token, all 64 for chosen ones, which machines of another version cannot prove.
func (a *App) fingerprint(tok token.Token) (string, error) {
	data, err := os.ReadFile(a.Env.Cert("server.crt"))
	if err != nil {
		return "", failf("issue it again with: sudo microk8s refresh-certs -e server.crt", "cannot read the certificate of the cluster agent: %w", err)
	}
	cert, err := pki.ParseCert(data)
	if err != nil {
		return "", failf("issue it again with: sudo microk8s refresh-certs -e server.crt", "cannot read the certificate of the cluster agent: %w", err)
	}
	sum := sha256.Sum256(cert.Raw)
	digits := hex.EncodeToString(sum[:])
	if tok.Generated() {
		return digits[:12], nil
	}
	return digits, nil
}

// joinAddresses lists the addresses under which another machine may reach this one.
func joinAddresses() ([]string, error) {
	ips, err := hostinfo.Joinable()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, ip := range ips {
		if !slices.Contains(out, ip.String()) {
			out = append(out, ip.String())
		}
	}
	if len(out) == 0 {
		out = []string{"none"}
	}
	return out, nil
}

// connection is what add-node prints.
type connection struct {
	token, check, port string
	first              string   // the default address
	all                []string // addresses, the default one included
	worker, ha         bool
}

func (c connection) url(address string) string {
	if address != "none" {
		address = net.JoinHostPort(address, c.port)
	} else {
		address += ":" + c.port
	}
	return address + "/" + c.token + "/" + c.check
}

func (c connection) command(address string) string {
	cmd := "microk8s join " + c.url(address)
	if c.worker {
		cmd += " --worker"
	}
	return cmd
}

// print writes one of the forms of cli.md 2.5, to the letter.
func (c connection) print(w io.Writer, format string) error {
	var urls []string
	for _, a := range c.all {
		urls = append(urls, c.url(a))
	}
	switch format {
	case "token":
		fmt.Fprintln(w, c.token)
	case "token-check":
		fmt.Fprintln(w, c.token+"/"+c.check)
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(struct {
			Token string   `json:"token"`
			URLs  []string `json:"urls"`
		}{c.token + "/" + c.check, urls})
	case "yaml":
		fmt.Fprintf(w, "token: %s\nurls:\n", c.token+"/"+c.check)
		for _, u := range urls {
			if strings.HasPrefix(u, "[") {
				u = "'" + u + "'"
			}
			fmt.Fprintf(w, "- %s\n", u)
		}
		fmt.Fprintln(w)
	case "short":
		fmt.Fprintln(w, c.command(c.first))
		for _, a := range c.all {
			if a != c.first {
				fmt.Fprintln(w, c.command(a))
			}
		}
	default:
		fmt.Fprintln(w, "From the node you wish to join to this cluster, run the following:")
		fmt.Fprintln(w, c.command(c.first))
		fmt.Fprintln(w)
		if c.ha && !c.worker {
			fmt.Fprintln(w, "Use the '--worker' flag to join a node as a worker not running the control plane, eg:")
			fmt.Fprintln(w, c.command(c.first)+" --worker")
			fmt.Fprintln(w)
		}
		fmt.Fprintln(w, "If the node you are adding is not reachable through the default interface you can use one of the following:")
		for _, a := range c.all {
			fmt.Fprintln(w, c.command(a))
		}
	}
	return nil
}

// listedToken is one token of --list --format json, and one item of the kind JoinTokenList.
type listedToken struct {
	ID      string   `json:"id"`
	Role    string   `json:"role"`
	Node    string   `json:"node,omitempty"`
	Uses    string   `json:"uses"`
	Expires string   `json:"expires,omitempty"`
	State   string   `json:"state"`
	Nodes   []string `json:"nodes,omitempty"` // that joined with it
}

func listed(r tokenstore.Record, now time.Time) listedToken {
	l := listedToken{ID: r.ID.String(), Role: "control-plane", Node: r.Name, Uses: fmt.Sprint(r.Uses), State: "valid", Nodes: r.SpentBy}
	if r.Worker {
		l.Role = "worker"
	}
	if r.Uses == tokenstore.Unlimited {
		l.Uses = "unlimited"
	}
	if !r.Expires.IsZero() {
		l.Expires = r.Expires.UTC().Format(time.RFC3339)
	}
	for _, h := range r.Holds {
		if now.Before(h.Until) {
			l.State = "joining " + h.Name
		}
	}
	switch err := r.Over(now); {
	case errors.Is(err, tokenstore.ErrRevoked):
		l.State = "revoked"
	case errors.Is(err, tokenstore.ErrExpired):
		l.State = "expired"
	case errors.Is(err, tokenstore.ErrUsed):
		l.State = "used"
		if len(r.SpentBy) > 0 {
			l.State = "used by " + strings.Join(r.SpentBy, ",")
		}
	}
	return l
}

// joinTokenDocument is the kind JoinToken.
type joinTokenDocument struct {
	documentMeta
	Token       string `json:"token"`
	Fingerprint string `json:"fingerprint"` // of the agent's certificate, the first digits or all 64
	Role        string `json:"role"`
	Node        string `json:"node,omitempty"`
	Expires     string `json:"expires,omitempty"`
	// Commands are what is typed on the joining machine, one for each address of this node, that of
	// the default route first; Connections are their connection strings.
	Connections []string `json:"connections"`
	Commands    []string `json:"commands"`
}

func (c connection) document(use tokenUse, now time.Time) joinTokenDocument {
	d := joinTokenDocument{documentMeta: documentOf("JoinToken"), Token: c.token, Fingerprint: c.check, Role: "control-plane", Node: use.Name}
	if c.worker {
		d.Role = "worker"
	}
	if use.TTL > 0 {
		d.Expires = now.Add(use.TTL).UTC().Format(time.RFC3339)
	}
	for _, address := range append([]string{c.first}, c.all...) {
		if u := c.url(address); address != "none" && !slices.Contains(d.Connections, u) {
			d.Connections = append(d.Connections, u)
			d.Commands = append(d.Commands, c.command(address))
		}
	}
	return d
}

func (a *App) listTokens(ctx context.Context, f addNodeFlags) error {
	ctx, cancel := context.WithTimeout(ctx, tokenWait)
	defer cancel()
	records, err := a.tokens().List(ctx)
	if err != nil {
		return explainTokens(err)
	}
	all := []listedToken{}
	for _, r := range records {
		all = append(all, listed(r, a.Now()))
	}
	if f.out.document() {
		return a.print(f.out, listOf("JoinTokenList", all))
	}
	if f.format == "json" {
		enc := json.NewEncoder(a.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(all)
	}
	if len(all) == 0 {
		fmt.Fprintln(a.Err, "There are no tokens. Make one with: microk8s add-node")
		return nil
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tROLE\tNODE\tUSES\tEXPIRES\tSTATE")
	dash := func(s string) string {
		if s == "" {
			return "-"
		}
		return s
	}
	for _, l := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", l.ID, l.Role, dash(l.Node), l.Uses, dash(l.Expires), l.State)
	}
	return w.Flush()
}

func (a *App) revokeToken(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, tokenWait)
	defer cancel()
	r, err := a.tokens().Revoke(ctx, id)
	if err != nil {
		return explainTokens(err)
	}
	fmt.Fprintf(a.Err, "Token %s is revoked.\n", r.ID)
	return nil
}
