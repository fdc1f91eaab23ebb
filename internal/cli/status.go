package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"microk8s/internal/addon"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/service"
	"microk8s/internal/status"
)

type statusOptions struct {
	format    string
	waitReady bool
	timeout   int
	addon     string
	yaml      bool
	out       *output
}

// notRunning is what scripts look for.
const notRunning = "microk8s is not running. Use microk8s inspect for a deeper inspection."

// slow stands in its place where the node's processes run and do not answer: nobody knows then
// whether the node can be used.
const slow = "microk8s is slow to answer. Wait for it with microk8s status --wait-ready, or see microk8s inspect."

// headline is the first line of a report.
func headline(r status.Report) string {
	switch {
	case r.Ready:
		return "microk8s is running"
	case r.Slow:
		return slow
	}
	return notRunning
}

func (a *App) newStatus() *cobra.Command {
	o := statusOptions{}
	cmd := &cobra.Command{
		Use:   "status [-o json|yaml] [--format pretty|yaml|short|json] [-w|--wait-ready] [-t|--timeout SECONDS] [-a|--addon NAME]",
		Short: "Show the status of this node",
		Long: `Show the status of this node, and if something is wrong, what, and what to do about it. It answers
within 100 ms when everything does; what is slow is waited for, up to a second in all, and then
named. Each problem has the next step, and in brackets the check that found it, by a name that never
changes, and what it looked at just now. What could not be looked at is listed too.

With --addon NAME it prints enabled, disabled or unknown: the last when the cluster, which has the
answer, did not answer. A name that no addon has is disabled, as upstream has it; that there is none
is said on stderr.

Exit codes: 0 the node can be used, 1 it cannot, or nobody knows, 2 the command was not understood.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"pretty", "yaml", "short", "json"}, o.format) {
				return &usageError{cmd, fmt.Errorf("argument --format: invalid choice: '%s' (choose from 'pretty', 'yaml', 'short', 'json')", o.format)}
			}
			if o.out.document() && (o.addon != "all" || o.yaml || cmd.Flags().Changed("format")) {
				return &usageError{cmd, errors.New("-o does not go together with --format, --yaml and --addon")}
			}
			if o.timeout < 0 {
				return &usageError{cmd, fmt.Errorf("argument -t/--timeout: %d is not a time in seconds", o.timeout)}
			}
			return a.status(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	o.out = addOutput(cmd, "pretty")
	f.StringVar(&o.format, "format", "pretty", "layout: pretty, short, or yaml or json as upstream prints it")
	f.BoolVarP(&o.waitReady, "wait-ready", "w", false, "wait until the node can be used")
	f.IntVarP(&o.timeout, "timeout", "t", 0, "seconds to wait with --wait-ready; 0 waits forever")
	f.StringVarP(&o.addon, "addon", "a", "all", "print only whether one addon is enabled")
	f.BoolVar(&o.yaml, "yaml", false, "short yaml layout (deprecated, use --format yaml)")
	completeFlag(cmd, "format", "pretty", "yaml", "short", "json")
	_ = cmd.RegisterFlagCompletionFunc("addon", a.addonNames)
	return cmd
}

// budgetVar sets how long status waits for answers, as in MICROK8S_STATUS_BUDGET=1s, for
// machines that are too slow for the default and tests that must not depend on speed.
const budgetVar = "MICROK8S_STATUS_BUDGET"

func (a *App) prober() *status.Prober {
	budget, _ := time.ParseDuration(a.getenv(budgetVar)) // 0 where it is not a time: the default
	return &status.Prober{Env: a.Env, Manager: a.Services, Now: a.Now, Budget: max(budget, 0)}
}

func (a *App) status(ctx context.Context, o statusOptions) error {
	p := a.prober()
	var r status.Report
	if o.waitReady {
		wait := ctx
		if o.timeout > 0 {
			var cancel context.CancelFunc
			wait, cancel = context.WithTimeout(ctx, time.Duration(o.timeout)*time.Second)
			defer cancel()
		}
		if r = p.WaitReady(wait); !r.Ready && ctx.Err() == nil {
			r = p.Probe(ctx) // the last answers of the wait were cut short
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	} else {
		r = p.Probe(ctx)
	}
	if o.out.document() {
		if err := a.print(o.out, statusDocument{documentOf("NodeStatus"), jsonOf(r)}); err != nil {
			return err
		}
	} else if err := printStatus(a.Out, r, o); err != nil {
		return err
	}
	if o.addon != "all" {
		a.adviseAddon(r, o.addon)
	}
	if !r.Ready {
		return exitError(ExitError)
	}
	return nil
}

// refusedStatus is the document of a node of which status says nothing else: it is stopped, a worker,
// too small, or not the caller's to see.
func (a *App) refusedStatus(format, why string) error {
	doc := statusDocument{documentMeta: documentOf("NodeStatus")}
	doc.MicroK8s.Message = strings.Join(strings.Fields(why), " ")
	if a.state().Worker {
		doc.MicroK8s.Worker = true
		ctx, cancel := context.WithTimeout(context.Background(), status.Budget)
		defer cancel()
		states, err := a.Services.Status(ctx)
		doc.MicroK8s.Running = err == nil && slices.ContainsFunc(states, func(s service.State) bool { return s.Name == service.Kubelite && s.Phase == service.Running })
	}
	return a.print(&output{value: format}, doc)
}

// printStatus writes a report in the layout asked for (cli.md 1.1).
func printStatus(w io.Writer, r status.Report, o statusOptions) error {
	switch {
	case o.addon != "all":
		return printAddon(w, r, o.addon)
	case o.format == "yaml":
		return printYAML(w, fullDocument(r))
	case o.format == "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(jsonOf(r))
	case o.format == "short":
		return printShort(w, r)
	case o.yaml:
		return printYAML(w, shortDocument(r))
	}
	return printPretty(w, r)
}

// addons returns the addons with the enabled ones first, each part by repository and name.
func addons(r status.Report) []status.Addon {
	return slices.SortedFunc(slices.Values(r.Addons), func(x, y status.Addon) int {
		switch {
		case x.Enabled != y.Enabled:
			if x.Enabled {
				return -1
			}
			return 1
		case x.Repository != y.Repository:
			return strings.Compare(x.Repository, y.Repository)
		}
		return strings.Compare(x.Name, y.Name)
	})
}

func state(enabled bool) string {
	if enabled {
		return "enabled"
	}
	return "disabled"
}

func printAddon(w io.Writer, r status.Report, name string) error {
	repo, short, full := strings.Cut(name, "/")
	on := slices.ContainsFunc(r.Addons, func(x status.Addon) bool {
		if full {
			return x.Enabled && x.Repository == repo && x.Name == short
		}
		return x.Enabled && x.Name == name
	})
	answer := state(on)
	if !on && !r.AddonsKnown { // they are in the cluster, which did not answer
		answer = "unknown"
	}
	_, err := fmt.Fprintln(w, answer)
	return err
}

// adviseAddon says, to a person and not to the scripts that read "disabled", that no addon has this name.
func (a *App) adviseAddon(r status.Report, name string) {
	all := make([]addon.Addon, 0, len(r.Addons))
	for _, x := range r.Addons {
		all = append(all, addon.Addon{Name: x.Name, Repository: x.Repository})
	}
	var several *addon.AmbiguousError
	if _, _, err := addon.Find(all, name); err != nil && !errors.As(err, &several) && len(all) > 0 {
		_ = a.refuseAddon(err)
	}
}

func printPretty(w io.Writer, r status.Report) error {
	var b strings.Builder
	b.WriteString(headline(r) + "\n")
	printHA(&b, r.HA)
	if r.Ready {
		if p := r.NetworkPolicy; !p.Enforced {
			b.WriteString("network policy: " + p.Why + "\n")
		}
		if k := r.Backup; k.Known {
			newest := "no archive was proven yet"
			if k.Name != "" {
				newest = "newest proven archive " + status.Short(k.Age) + " old"
			}
			if k.Scheduled {
				newest += ", one every " + status.Short(k.Every)
			}
			b.WriteString("backup: " + newest + "\n")
		}
		b.WriteString("addons:\n")
		printed := ""
		for _, x := range addons(r) {
			if s := state(x.Enabled); s != printed {
				fmt.Fprintf(&b, "  %s:\n", s)
				printed = s
			}
			fmt.Fprintf(&b, "    %-20s # (%s) %s\n", x.Name, x.Repository, x.Description)
		}
	}
	printProblems(&b, r)
	_, err := io.WriteString(w, b.String())
	return err
}

// printHA writes the block of the datastore; a node about to start for the first time has none.
func printHA(b *strings.Builder, ha status.HA) {
	list := func(role storedir.Role) string {
		var out []string
		for _, n := range ha.Nodes {
			if n.Role == role {
				out = append(out, n.Address)
			}
		}
		if len(out) == 0 {
			return "none"
		}
		return strings.Join(out, " ")
	}
	switch {
	case ha.Datastore:
		yes := "no"
		if ha.Enabled {
			yes = "yes"
		}
		fmt.Fprintf(b, "high-availability: %s\n", yes)
		fmt.Fprintf(b, "  datastore master nodes: %s\n", list(storedir.Voter))
		fmt.Fprintf(b, "  datastore standby nodes: %s\n", list(storedir.StandBy))
		if t := ha.Tolerates(); t != "" {
			fmt.Fprintf(b, "  note: %s\n", t)
		}
	case len(ha.Endpoints) > 0:
		b.WriteString("  datastore endpoints:\n")
		for _, e := range ha.Endpoints {
			fmt.Fprintf(b, "    %s\n", e)
		}
	}
}

// printProblems writes what could not be looked at and then what is wrong, where a person's eye ends.
func printProblems(b *strings.Builder, r status.Report) {
	if len(r.Unseen) > 0 {
		b.WriteString("not looked at:\n")
		for _, u := range r.Unseen {
			fmt.Fprintf(b, "  - %s (%s): %s\n", u.Looked(), u.ID, u.Why)
		}
	}
	if len(r.Problems) == 0 {
		return
	}
	b.WriteString("problems:\n")
	for _, p := range r.Problems {
		fmt.Fprintf(b, "  - %s\n", p.What)
		if p.Do != "" {
			fmt.Fprintf(b, "    %s\n", p.Do)
		}
		fmt.Fprintf(b, "    (%s: from %s)\n", p.ID, p.Looked())
	}
}

func printShort(w io.Writer, r status.Report) error {
	var b strings.Builder
	if !r.Ready {
		b.WriteString(headline(r) + "\n")
		printProblems(&b, r)
	} else {
		b.WriteString("microk8s is running\naddons:\n")
		for _, x := range addons(r) {
			fmt.Fprintf(&b, "%s/%s: %s\n", x.Repository, x.Name, state(x.Enabled))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// The forms of --format json; yaml has the same keys.
type statusJSON struct {
	MicroK8s      runningJSON   `json:"microk8s"`
	HA            haJSON        `json:"high-availability"`
	NetworkPolicy policyJSON    `json:"network-policy"`
	Backup        *backupJSON   `json:"backup,omitempty"` // left out where no archive was ever wanted
	Addons        []addonJSON   `json:"addons,omitempty"`
	Problems      []problemJSON `json:"problems,omitempty"`
	NotLookedAt   []unseenJSON  `json:"not-looked-at,omitempty"`
	// Differences are arguments in which control-plane nodes must agree and do not.
	Differences []differenceJSON `json:"argument-differences,omitempty"`
}

// backupJSON is what the cluster knows of its archives.
type backupJSON struct {
	Scheduled  bool       `json:"scheduled"`
	Name       string     `json:"name,omitempty"` // of the newest proven one
	Created    *time.Time `json:"created,omitempty"`
	AgeSeconds int64      `json:"ageSeconds,omitempty"`
}

type differenceJSON struct {
	Argument string      `json:"argument"`
	Values   []valueJSON `json:"values"`
}

// valueJSON is nodes with the same value. The value itself is not known here.
type valueJSON struct {
	Nodes      []string `json:"nodes"`
	Set        bool     `json:"set"`
	Unreadable bool     `json:"unreadable,omitempty"` // its file
}

// statusDocument is the kind NodeStatus.
type statusDocument struct {
	documentMeta
	statusJSON
}

type runningJSON struct {
	Running bool   `json:"running"`
	Worker  bool   `json:"worker,omitempty"` // of documents: whether it is Ready the control plane knows
	Message string `json:"message,omitempty"`
	Slow    bool   `json:"slow,omitempty"` // it runs and does not answer
}

type haJSON struct {
	Enabled   bool         `json:"enabled"`
	Nodes     []memberJSON `json:"nodes,omitempty"`
	Endpoints []string     `json:"endpoints,omitempty"`
}

type memberJSON struct {
	Address string `json:"address"`
	Role    string `json:"role"`
	Alive   bool   `json:"alive"`
}

type policyJSON struct {
	Enforced bool   `json:"enforced"`
	Why      string `json:"why,omitempty"` // not
}

type addonJSON struct {
	Name        string `json:"name"`
	Repository  string `json:"repository"`
	Description string `json:"description"`
	Version     string `json:"version"`
	Status      string `json:"status"`
}

type problemJSON struct {
	ID     string `json:"id"` // of the check, the same for ever
	What   string `json:"what"`
	Do     string `json:"do,omitempty"`
	Looked string `json:"looked-at"`
}

// unseenJSON is a check that could not be made.
type unseenJSON struct {
	ID     string `json:"id"`
	Looked string `json:"looked-at"`
	Why    string `json:"why"`
}

func jsonOf(r status.Report) statusJSON {
	out := statusJSON{MicroK8s: runningJSON{Running: r.Ready}, HA: haJSON{Enabled: r.HA.Enabled, Endpoints: r.HA.Endpoints}}
	if k := r.Backup; k.Known {
		out.Backup = &backupJSON{Scheduled: k.Scheduled, Name: k.Name}
		if k.Name != "" {
			out.Backup.Created, out.Backup.AgeSeconds = &k.Created, int64(k.Age/time.Second)
		}
	}
	out.NetworkPolicy = policyJSON{Enforced: r.NetworkPolicy.Enforced, Why: r.NetworkPolicy.Why}
	for _, n := range r.HA.Nodes {
		out.HA.Nodes = append(out.HA.Nodes, memberJSON{n.Address, n.RoleName(), n.Alive})
	}
	if r.Ready {
		for _, x := range addons(r) {
			out.Addons = append(out.Addons, addonJSON{x.Name, x.Repository, x.Description, x.Version, state(x.Enabled)})
		}
	} else {
		out.MicroK8s.Message, out.MicroK8s.Slow = headline(r), r.Slow
	}
	for _, p := range r.Problems {
		out.Problems = append(out.Problems, problemJSON{p.ID, p.What, p.Do, p.Looked()})
	}
	for _, u := range r.Unseen {
		out.NotLookedAt = append(out.NotLookedAt, unseenJSON{u.ID, u.Looked(), u.Why})
	}
	for _, d := range r.Differences {
		x := differenceJSON{Argument: "--" + d.Argument}
		for _, g := range d.Groups {
			x.Values = append(x.Values, valueJSON(g))
		}
		out.Differences = append(out.Differences, x)
	}
	return out
}

// The yaml forms are built as nodes: upstream writes True and False, and scripts look for
// these words.

func yamlMap(pairs ...any) *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for i := 0; i+1 < len(pairs); i += 2 {
		value, ok := pairs[i+1].(*yaml.Node)
		if !ok {
			value = yamlScalar(pairs[i+1])
		}
		n.Content = append(n.Content, yamlScalar(pairs[i]), value)
	}
	return n
}

func yamlScalar(v any) *yaml.Node {
	if b, ok := v.(bool); ok {
		word := "False"
		if b {
			word = "True"
		}
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: word}
	}
	n := &yaml.Node{}
	n.SetString(fmt.Sprint(v))
	return n
}

func yamlList(items []*yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.SequenceNode, Content: items}
}

func fullDocument(r status.Report) *yaml.Node {
	j := jsonOf(r)
	running := yamlMap("running", j.MicroK8s.Running)
	if j.MicroK8s.Message != "" {
		running = yamlMap("running", j.MicroK8s.Running, "message", j.MicroK8s.Message)
	}
	ha := yamlMap("enabled", j.HA.Enabled)
	var items []*yaml.Node
	for _, n := range j.HA.Nodes {
		items = append(items, yamlMap("address", n.Address, "role", n.Role, "alive", n.Alive))
	}
	if len(items) > 0 {
		ha.Content = append(ha.Content, yamlScalar("nodes"), yamlList(items))
	}
	policy := yamlMap("enforced", j.NetworkPolicy.Enforced)
	if j.NetworkPolicy.Why != "" {
		policy = yamlMap("enforced", j.NetworkPolicy.Enforced, "why", j.NetworkPolicy.Why)
	}
	doc := yamlMap("microk8s", running, "high-availability", ha, "network-policy", policy)
	if k := j.Backup; k != nil {
		made := yamlMap("scheduled", k.Scheduled)
		if k.Created != nil {
			made = yamlMap("scheduled", k.Scheduled, "name", k.Name, "created", k.Created.UTC().Format(time.RFC3339), "ageSeconds", k.AgeSeconds)
		}
		doc.Content = append(doc.Content, yamlScalar("backup"), made)
	}
	items = nil
	for _, x := range j.Addons {
		items = append(items, yamlMap("name", x.Name, "repository", x.Repository, "description", x.Description, "version", x.Version, "status", x.Status))
	}
	if len(items) > 0 {
		doc.Content = append(doc.Content, yamlScalar("addons"), yamlList(items))
	}
	items = nil
	for _, p := range j.Problems {
		items = append(items, yamlMap("id", p.ID, "what", p.What, "do", p.Do, "looked-at", p.Looked))
	}
	if len(items) > 0 {
		doc.Content = append(doc.Content, yamlScalar("problems"), yamlList(items))
	}
	items = nil
	for _, u := range j.NotLookedAt {
		items = append(items, yamlMap("id", u.ID, "looked-at", u.Looked, "why", u.Why))
	}
	if len(items) > 0 {
		doc.Content = append(doc.Content, yamlScalar("not-looked-at"), yamlList(items))
	}
	items = nil
	for _, d := range j.Differences {
		var values []*yaml.Node
		for _, v := range d.Values {
			var nodes []*yaml.Node
			for _, n := range v.Nodes {
				nodes = append(nodes, yamlScalar(n))
			}
			values = append(values, yamlMap("nodes", yamlList(nodes), "set", v.Set))
		}
		items = append(items, yamlMap("argument", d.Argument, "values", yamlList(values)))
	}
	if len(items) > 0 {
		doc.Content = append(doc.Content, yamlScalar("argument-differences"), yamlList(items))
	}
	return doc
}

func shortDocument(r status.Report) *yaml.Node {
	if !r.Ready {
		return yamlMap("microk8s", yamlMap("running", false, "message", headline(r)))
	}
	list := yamlMap()
	for _, x := range addons(r) {
		list.Content = append(list.Content, yamlScalar(x.Repository+"/"+x.Name), yamlScalar(state(x.Enabled)))
	}
	return yamlMap("microk8s", yamlMap("running", true), "addons", list)
}

func printYAML(w io.Writer, doc *yaml.Node) error {
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(doc); err != nil {
		return err
	}
	return enc.Close()
}
