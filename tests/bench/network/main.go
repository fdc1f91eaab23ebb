// Command network measures the pod network beside a build from before it had policies and put back what others
// remove: two clusters of two nodes in the lab, in turns, in one run. It prints a table; nothing fails because
// of a figure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"microk8s/tests/bench/report"
)

func main() {
	var o options
	flag.StringVar(&o.now, "build", "build", "the folder of `make build`")
	flag.StringVar(&o.before, "before", "", "that of a worktree from before, such as of commit "+start+"; without it there is nothing to compare with")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each is measured, in turns")
	flag.DurationVar(&o.during, "during", 4*time.Second, "how long each figure is measured")
	flag.IntVar(&o.policies, "policies", 1000, "the larger number of policies")
	flag.IntVar(&o.services, "services", 5000, "Services")
	flag.IntVar(&o.pods, "pods", 200, "pods, for the time until a policy is in force")
	flag.IntVar(&o.changes, "changes", 50, "how often a policy is changed")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long idle CPU is measured")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o, *page); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// start is the last commit without what is measured here.
const start = "25eb063"

type options struct {
	now, before                               string
	rounds, policies, services, pods, changes int
	during, idle                              time.Duration
}

// rulesEach is how many rules a policy has.
const rulesEach = 10

// figures are of one round: what [flow.name] has.
type figures map[string]float64

// bench collects the figures of each state: before, now, now with policies.
type bench struct {
	options
	rows   [][]string
	rounds map[string][]figures
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "measuring: "+format+"\n", args...) }

func run(ctx context.Context, o options, page string) (err error) {
	b := &bench{options: o, rounds: map[string][]figures{}}
	say("clusters are started")
	now, err := newCluster(ctx, "benchnetnow", o.now, "version: 0.2.0\nextraCNIEnv: {IPv4_SERVICE_CIDR: 10.152.0.0/16}\n")
	defer func() { err = errors.Join(err, now.down(ctx)) }()
	if err != nil {
		return err
	}
	var before *cluster
	if o.before != "" {
		before, err = newCluster(ctx, "benchnetbefore", o.before, "")
		defer func() { err = errors.Join(err, before.down(ctx)) }()
		if err != nil {
			return err
		}
	}
	for _, step := range []func(context.Context, *cluster, *cluster) error{b.traffic, b.changed, b.load} {
		if err := step(ctx, before, now); err != nil {
			return err
		}
	}
	return b.table().Write(os.Stdout, page)
}

// The states in which traffic is measured.
const (
	stateBefore = "before"
	stateNow    = "now"
)

func policiesName(n int) string { return fmt.Sprintf("%d policies", n) }

// traffic measures all flows in each state, in turns.
func (b *bench) traffic(ctx context.Context, before, now *cluster) error {
	few := b.policies / 10
	for round := range b.options.rounds {
		for _, state := range []struct {
			name     string
			c        *cluster
			policies int
		}{{stateBefore, before, 0}, {stateNow, now, 0}, {policiesName(few), now, few}, {policiesName(b.policies), now, b.policies}} {
			if state.c == nil {
				continue
			}
			if err := state.c.havePolicies(ctx, state.policies); err != nil {
				return err
			}
			f := figures{}
			for _, flow := range flows {
				if err := state.c.measure(ctx, flow, b.during, f); err != nil {
					return fmt.Errorf("%s: %s: %w", state.name, flow.name, err)
				}
			}
			say("round %d, %s: %v", round+1, state.name, f)
			b.rounds[state.name] = append(b.rounds[state.name], f)
		}
		if err := now.havePolicies(ctx, 0); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) values(state, what string) (out []float64) {
	for _, f := range b.rounds[state] {
		out = append(out, f[what])
	}
	slices.Sort(out)
	return out
}

// cell is the median of a state, with how far it is from another one.
func (b *bench) cell(state, than, what string, scale float64) string {
	v := b.values(state, what)
	if len(v) == 0 {
		return "–"
	}
	text := fmt.Sprintf("%.1f", v[len(v)/2]/scale)
	if base := b.values(than, what); than != "" && len(base) > 0 {
		text += fmt.Sprintf(" (%+.1f %%)", 100*(v[len(v)/2]/base[len(base)/2]-1))
	}
	return text
}

// spread is how far the rounds of a state are from their median.
func (b *bench) spread(state, what string) string {
	v := b.values(state, what)
	if len(v) == 0 {
		return "–"
	}
	middle := v[len(v)/2]
	return fmt.Sprintf("%+.1f to %+.1f %%", 100*(v[0]/middle-1), 100*(v[len(v)-1]/middle-1))
}

func (b *bench) table() *report.Table {
	few := policiesName(b.policies / 10)
	all := policiesName(b.policies)
	t := &report.Table{
		Title: "The pod network", Part: "network",
		Head: []string{"what", "before", "now", few, all, "wanted", "rounds of now among themselves"},
		About: fmt.Sprintf("Two clusters of two nodes on this machine, one of the build before the network was done over (%s), in turns: %d rounds, %v for each figure, medians. "+
			"In brackets: beside before, and with policies beside none. Each policy selects the pod that is asked and has %d rules. "+
			"On two cores the client, the server and the clusters' daemons share the processor.", start, b.options.rounds, b.during, rulesEach),
	}
	for _, f := range flows {
		for _, m := range f.measures() {
			t.Rows = append(t.Rows, []string{
				m.title, b.cell(stateBefore, "", m.key, m.scale), b.cell(stateNow, stateBefore, m.key, m.scale),
				b.cell(few, stateNow, m.key, m.scale), b.cell(all, stateNow, m.key, m.scale), m.wanted, b.spread(stateNow, m.key),
			})
		}
	}
	t.Rows = append(t.Rows, b.rows...)
	return t
}

// row adds a line that has no policies beside none.
func (b *bench) row(what, before, now, all, wanted string) {
	b.rows = append(b.rows, []string{what, before, now, "", all, wanted, ""})
}

// percentile is of durations that are sorted here, in milliseconds.
func percentile(list []time.Duration, percent int) string {
	if len(list) == 0 {
		return "–"
	}
	slices.Sort(list)
	return fmt.Sprintf("%.0f ms", float64(list[min(len(list)*percent/100, len(list)-1)])/float64(time.Millisecond))
}

// changed measures the time until a changed policy and a new pod are judged by.
func (b *bench) changed(ctx context.Context, _, now *cluster) error {
	say("%d pods are started", b.pods)
	if err := now.crowd(ctx, b.pods); err != nil {
		return err
	}
	say("policies are changed")
	closed, opened, err := now.toggle(ctx, b.changes)
	if err != nil {
		return err
	}
	pods, err := now.newPods(ctx, b.changes/2)
	if err != nil {
		return err
	}
	for _, r := range []struct {
		what   string
		took   []time.Duration
		wanted string
	}{
		{fmt.Sprintf("a policy forbids, %d pods", b.pods), closed, "p99 250 ms"},
		{fmt.Sprintf("a policy allows, %d pods", b.pods), opened, "p99 250 ms"},
		{fmt.Sprintf("a new pod is let in, %d pods", b.pods), pods, ""},
	} {
		n := len(r.took)
		b.row(fmt.Sprintf("%s: p50, p99 (%d times)", r.what, n), "–", percentile(r.took, 50)+", "+percentile(r.took, 99), "", r.wanted)
	}
	return now.crowd(ctx, 0)
}

// load measures CPU, memory and repairs: at rest beside before, then with policies and Services.
func (b *bench) load(ctx context.Context, before, now *cluster) error {
	say("CPU and memory at rest")
	time.Sleep(b.idle / 2)
	cpu, memory, err := atRest(ctx, b.idle, before, now)
	if err != nil {
		return err
	}
	healed, err := heal(ctx, before, now)
	if err != nil {
		return err
	}
	say("%d policies and %d Services", b.policies, b.services)
	usedBefore, err := now.used(ctx)
	if err != nil {
		return err
	}
	if err := now.havePolicies(ctx, b.policies); err != nil {
		return err
	}
	if err := now.haveServices(ctx, b.services); err != nil {
		return err
	}
	time.Sleep(b.idle / 2)
	usedAfter, err := now.used(ctx)
	if err != nil {
		return err
	}
	loadedCPU, loadedMemory, err := atRest(ctx, b.idle, nil, now)
	if err != nil {
		return err
	}
	loadedHealed, err := heal(ctx, nil, now)
	if err != nil {
		return err
	}
	with := fmt.Sprintf("with %d policies and %d Services", b.policies, b.services)
	b.row("idle CPU of a node, of one core; last but one column: "+with, cpu[0], cpu[1], loadedCPU[1], "not above before")
	b.row("kubelite's memory (PSS); as above", memory[0], memory[1], loadedMemory[1], "")
	b.row("CPU of kubelite for these policies and Services", "–", "–", fmt.Sprintf("%.1f s", (usedAfter-usedBefore).Seconds()), "")
	b.row("nft flush ruleset → a Service answers; as above", healed[0], healed[1], loadedHealed[1], "5 s")
	return nil
}

// first is the first line of a text.
func first(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}
