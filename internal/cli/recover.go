package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"microk8s/cluster-agent/fanout"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/datastore/survivors"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/token"
)

// exitNotRecovered is how recover ends where it refuses (cli.md 1.15).
const exitNotRecovered = 3

type recoverOptions struct {
	dirs              []string
	gone, lose, force bool
	dryRun, yes       bool
	out               *output
}

func (a *App) newRecover() *cobra.Command {
	var o recoverOptions
	cmd := &cobra.Command{
		Use:   "recover [DIRECTORY...] [--others-are-gone] [--dry-run] [-y] [-o json|yaml]",
		Short: "Go on after the majority of the datastore's voters is lost for good",
		Long: `Go on after the majority of the datastore's voters is lost for good.

Run it on any control-plane node that is left. It asks the other ones, through their agents, how
far their copies of the datastore have come, looks at its own, and at each DIRECTORY that is named
(a copy of a lost machine's, for instance). It says which is the newest and what may be lost at most.

It refuses while a majority could still come back, where another copy is newer, and where the only
newer one is damaged. Members that do not answer may come back: say with --others-are-gone that
they never do. Then this node's datastore is saved, its member becomes the only one, and the node
is started. Workloads go on running meanwhile. Every other node has to leave and join again, also
those that come back later.

See first what it finds, with --dry-run. Interrupted at any moment, it goes on when run again.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, dir := range args {
				full, err := filepath.Abs(dir)
				if err != nil {
					return err
				}
				if st, err := os.Stat(full); err != nil || !st.IsDir() {
					return &usageError{cmd, fmt.Errorf("%s is not a directory: name a copy of another member's", dir)}
				}
				o.dirs = append(o.dirs, full)
			}
			return a.recoverDatastore(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.gone, "others-are-gone", false, "members that do not answer never come back")
	cmd.Flags().BoolVar(&o.lose, "lose-damaged", false, "what only damaged copies have may be lost")
	cmd.Flags().BoolVar(&o.force, "force", false, "do it although a majority of the voters is there")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show what there is and what would be done; change nothing")
	addYes(cmd.Flags(), &o.yes)
	o.out = addOutput(cmd, "text")
	return cmd
}

// foundCopy is a copy in the document.
type foundCopy struct {
	Where    string `json:"where"`
	Member   string `json:"member"` // its ID, hexadecimal
	Address  string `json:"address"`
	Local    bool   `json:"local,omitempty"`
	Term     uint64 `json:"term"`
	Index    uint64 `json:"index"`
	Revision int64  `json:"revision,omitempty"`
	Damaged  string `json:"damaged,omitempty"`
}

// recoveryPlan is the kind RecoveryPlan.
type recoveryPlan struct {
	documentMeta
	Copies  []foundCopy `json:"copies"` // the newest first
	Voters  []string    `json:"voters"`
	Missing []string    `json:"missing"` // voters of which no usable copy was found
	Silent  []silent    `json:"silent"`
	Use     string      `json:"use,omitempty"`
	Loss    string      `json:"loss"`
	Refused string      `json:"refused,omitempty"`
}

// silent is a member whose agent did not say how far it has come.
type silent struct {
	Address string `json:"address"`
	Why     string `json:"why"`
}

func (a *App) recoverDatastore(ctx context.Context, o recoverOptions) error {
	node, j, err := a.change()
	if err != nil {
		return err
	}
	defer j.Close()
	node.Datastore = a.datastoreTool
	if !o.dryRun {
		found, err := node.ResumeRecover(ctx, j)
		if err != nil {
			return a.changeFailure(&Failure{Err: err}, err)
		}
		if found {
			a.recovered(ctx)
			return nil
		}
	}
	live := a.Env.BackendLive()
	self, err := storedir.Dir(live).Self()
	if !nodeconfig.Load(a.Env).Datastore.Own() || err != nil {
		return &Failure{Err: errors.New("this node has no copy of the datastore"), Code: exitNotRecovered, Hints: []string{"run it on a control-plane node: sudo microk8s recover", "or bring an archive back: microk8s restore --help"}}
	}
	members, err := storedir.Dir(live).Members()
	if err != nil || len(members) < 2 && len(o.dirs) == 0 {
		return &Failure{Err: errors.New("this node's datastore has no other member: there is no majority that could be lost"), Code: exitNotRecovered,
			Hints: []string{"start it with: microk8s start; if its files are damaged, bring an archive back: microk8s restore --help"}}
	}
	if list, err := peers.Members(ctx, live); err == nil && !o.force {
		for _, m := range list {
			if m.Leader {
				return &Failure{Err: fmt.Errorf("the datastore works: %s leads it", m.Address), Code: exitNotRecovered, Hints: []string{"take nodes that are lost out of it with: microk8s remove-node NAME --force", "nothing was changed"}}
			}
		}
	}
	copies, quiet, known, err := a.findCopies(ctx, self, members, o.dirs)
	if err != nil {
		return err
	}
	d, why := survivors.Decide(known, copies, survivors.Told{Gone: o.gone, Lose: o.lose})
	if why == nil && !o.force {
		why = a.majorityThere(d)
	}
	if err := a.showRecovery(d, quiet, why, o.out); err != nil {
		return err
	}
	if why != nil {
		return recoveryRefused(d, why)
	}
	if !d.Use.Local {
		return &Failure{Err: fmt.Errorf("the newest copy is that of %s, and not this node's", d.Use.Where), Code: exitNotRecovered, Hints: a.useOther(d)}
	}
	if o.dryRun || o.out.document() {
		if !o.out.document() {
			fmt.Fprintln(a.Out, "Nothing was changed. To do it: sudo microk8s recover --others-are-gone")
		}
		return nil
	}
	if err := a.confirm("This node's member becomes the only one of the datastore; "+d.Loss()+".", o.yes, ""); err != nil {
		return err
	}
	var compare []string
	for _, dir := range o.dirs {
		if slices.ContainsFunc(copies, func(c survivors.Copy) bool { return c.Where == dir && c.Damaged == "" }) {
			compare = append(compare, dir)
		}
	}
	if _, err := node.Recover(ctx, j, compare); err != nil {
		return a.changeFailure(&Failure{Err: fmt.Errorf("cannot recover: %w", err)}, err)
	}
	a.recovered(ctx)
	return nil
}

// recovered says what the other nodes have to do: those that were members before, as the directory that
// was saved last has them.
func (a *App) recovered(ctx context.Context) {
	saved, err := filepath.Glob(a.Env.BackendLive() + ".before-recover-*")
	if err != nil || len(saved) == 0 {
		return
	}
	before := storedir.Dir(saved[len(saved)-1]) // by their dates
	fmt.Fprintf(a.Out, "This node's member is the only one of the datastore now. Its directory as it was is kept in %s\n", string(before))
	self, err := before.Self()
	if err != nil {
		return
	}
	members, err := before.Members()
	if err != nil {
		return
	}
	names := map[string]string{} // by address
	if core, err := kube.FromFile(a.Env.AdminKubeconfig()); err == nil {
		nodes, err := core.Nodes(ctx)
		if err != nil {
			fmt.Fprintf(a.Err, "the API server does not say the names of the other nodes yet: %v\n", err)
		}
		for _, n := range nodes {
			for _, address := range n.Status.Addresses {
				if address.Type == corev1.NodeInternalIP {
					names[address.Address] = n.Name
				}
			}
		}
	}
	fmt.Fprintln(a.Out, "Each other control-plane node has lost its place. When its machine is back, it starts over and joins again; what is on its volumes stays:")
	for _, m := range members {
		if m.ID == self.ID {
			continue
		}
		name := names[m.Host()]
		line := "sudo microk8s join LINE, where LINE is of: microk8s add-node"
		if name != "" {
			line += " --name " + name
			if c, _, err := a.makeToken(ctx, a.tokens(), token.New(), addNodeFlags{name: name, expires: rejoinLife}); err == nil {
				line = "sudo " + c.command(c.first)
			}
		}
		fmt.Fprintf(a.Out, "  on %s (%s):\n    sudo microk8s leave --force --yes\n    %s\n", cmp.Or(name, "the node"), m.Host(), line)
	}
	fmt.Fprintf(a.Out, "The lines are good for %s; they are taken when the cluster calls the node NotReady, a minute after it stopped. Machines that never come back: microk8s remove-node NAME --force\nWorkers go on by themselves.\n", rejoinLife)
}

// rejoinLife is how long the lines are good with which the other nodes join again.
const rejoinLife = "72h"

// findCopies looks at this node's copy, at those of the other members through their agents, and at
// directories. members are those that the newest copy knows.
func (a *App) findCopies(ctx context.Context, self storedir.Member, members []storedir.Member, dirs []string) (copies []survivors.Copy, quiet []silent, known []storedir.Member, err error) {
	p := a.progress()
	examined := map[string]*peers.Examined{} // by where
	add := func(where string, local bool, x *peers.Examined) {
		examined[where] = x
		copies = append(copies, survivors.Copy{Where: where, Local: local, Member: storedir.Member{ID: x.Member.ID, Address: x.Member.Address}, Term: x.Term, Index: x.Index, Revision: x.Revision, Damaged: x.Damaged})
	}
	look := func(dir string) (*peers.Examined, error) {
		out, err := a.datastoreTool(ctx, "examine", "--storage-dir", dir)
		if err != nil {
			return nil, err
		}
		var x peers.Examined
		return &x, json.Unmarshal(out, &x)
	}
	err = p.step("Look at this node's copy of the datastore", func() error {
		x, err := look(a.Env.BackendLive())
		if err == nil {
			add("this node", true, x)
		}
		return err
	})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("cannot look at this node's datastore: %w", err)
	}
	for _, dir := range dirs {
		err := p.step("Look at "+dir, func() error {
			x, err := look(dir)
			if err == nil {
				add(dir, false, x)
			}
			return err
		})
		if err != nil {
			return nil, nil, nil, &Failure{Err: fmt.Errorf("cannot look at %s: %w", dir, err), Code: ExitUsage, Hints: []string{"a directory is a copy of " + a.Env.BackendLive() + " of another machine; see microk8s recover --help"}}
		}
	}
	_ = p.step("Ask the other members, through their agents", func() error {
		var mu sync.Mutex
		var wg sync.WaitGroup
		port := strconv.Itoa(nodeconfig.Load(a.Env).AgentPort)
		for _, m := range members {
			if m.ID == self.ID || m.Address == self.Address {
				continue
			}
			wg.Go(func() {
				x, err := (&fanout.Cluster{Env: a.Env}).Examine(ctx, net.JoinHostPort(m.Host(), port))
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					quiet = append(quiet, silent{m.Address, err.Error()})
					return
				}
				add(m.Host(), false, x)
			})
		}
		wg.Wait()
		return nil
	})
	if ctx.Err() != nil {
		return nil, nil, nil, ctx.Err()
	}
	slices.SortFunc(quiet, func(x, y silent) int { return strings.Compare(x.Address, y.Address) })
	known = members
	best := copies[0]
	for _, c := range copies {
		if c.Term > best.Term || c.Term == best.Term && c.Index > best.Index {
			best = c
		}
	}
	if list := examined[best.Where].Members; len(list) > 0 {
		known = list
	}
	return copies, quiet, known, nil
}

// errMajority says that enough voters are on machines that answer.
var errMajority = errors.New("a majority of the datastore's voters is on machines that answer, with copies that can be used")

// majorityThere refuses where the machines that answer could go on by themselves.
func (a *App) majorityThere(d survivors.Decision) error {
	there := 0
	for _, v := range d.Voters {
		if slices.ContainsFunc(d.Copies, func(c survivors.Copy) bool {
			return c.Member.ID == v.ID && c.Damaged == "" && !filepath.IsAbs(c.Where)
		}) {
			there++
		}
	}
	if there >= len(d.Voters)/2+1 {
		return errMajority
	}
	return nil
}

func recoveryRefused(d survivors.Decision, why error) error {
	f := &Failure{Err: why, Code: exitNotRecovered}
	switch {
	case errors.Is(why, errMajority):
		f.Hints = []string{"start the node on each of them, and see that they reach each other: microk8s start; microk8s status", "if they cannot go on all the same, run the same command with --force"}
	case errors.Is(why, survivors.ErrMayReturn):
		f.Hints = []string{"bring them back, or name copies of their directories: microk8s recover DIRECTORY...", "if they are gone for good, run the same command with --others-are-gone: they must never start again with their old data"}
	case errors.Is(why, survivors.ErrNewerDamaged):
		f.Hints = []string{"get a copy of it that is whole, or bring an archive back: microk8s backup list --from PLACE", "to go on without what only it has, run the same command with --lose-damaged"}
	case errors.Is(why, survivors.ErrNone):
		f.Hints = []string{"bring an archive back: microk8s restore --help"}
	}
	f.Hints = append(f.Hints, "nothing was changed")
	return f
}

// useOther says how to go on with a copy that is not this node's.
func (a *App) useOther(d survivors.Decision) []string {
	if filepath.IsAbs(d.Use.Where) {
		return []string{
			"it is of the member at " + d.Use.Member.Address + ": run the same command on that machine, with the directory in the place of " + a.Env.BackendLive(),
			"nothing was changed",
		}
	}
	return []string{"run it there, on " + d.Use.Where + ": sudo microk8s recover --others-are-gone", "nothing was changed"}
}

func (a *App) showRecovery(d survivors.Decision, quiet []silent, why error, out *output) error {
	plan := recoveryPlan{documentMeta: documentOf("RecoveryPlan"), Copies: []foundCopy{}, Voters: []string{}, Missing: []string{}, Silent: quiet, Use: d.Use.Where, Loss: d.Loss()}
	if why != nil {
		plan.Refused = why.Error()
	}
	if plan.Silent == nil {
		plan.Silent = []silent{}
	}
	for _, v := range d.Voters {
		plan.Voters = append(plan.Voters, v.Address)
	}
	for _, v := range d.Missing {
		plan.Missing = append(plan.Missing, v.Address)
	}
	for _, c := range d.Copies {
		plan.Copies = append(plan.Copies, foundCopy{c.Where, strconv.FormatUint(c.Member.ID, 16), c.Member.Address, c.Local, c.Term, c.Index, c.Revision, c.Damaged})
	}
	if out.document() {
		return a.print(out, plan)
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "COPY\tMEMBER\tTERM\tENTRY\tREVISION\tSTATE")
	for i, c := range plan.Copies {
		state := "usable"
		switch {
		case c.Damaged != "":
			state = "damaged: " + c.Damaged
		case i == 0:
			state = "newest"
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%s\n", c.Where, c.Address, c.Term, c.Index, c.Revision, state)
	}
	for _, s := range quiet {
		fmt.Fprintf(w, "%s\t%s\t-\t-\t-\tno answer: %s\n", "-", s.Address, s.Why)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, m := range d.Clones {
		fmt.Fprintf(a.Out, "WARNING: there are several copies of the member at %s that differ: a machine was cloned, or put back from a snapshot. The newest of them counts.\n", m.Address)
	}
	if d.Use.Where != "" {
		fmt.Fprintf(a.Out, "at most: %s\n", plan.Loss)
	}
	return nil
}
