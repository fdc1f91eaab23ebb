// Package nft puts the model of package netpolicy into the kernel, as one nftables table, and
// takes it out again. Only what differs from what is there is changed, in one transaction, so
// that no packet meets half a rule set; what nothing refers to any more is removed after it,
// since kernels may refuse to remove a chain in the transaction that removes the last reference
// to it. The table stays when the process ends.
//
// It uses sigs.k8s.io/knftables, as kube-proxy does, which runs the program nft.
package nft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"sigs.k8s.io/knftables"

	"microk8s/internal/hostnet"
	"microk8s/internal/netpolicy"
)

// priority of the base chains: behind the translation of Services and host ports (dstnat), so
// that real addresses are judged, and before the host's own filters.
const priority = "filter - 10"

// Table is the table of policies on this host. Its methods may be called at the same time.
type Table struct {
	log *slog.Logger
	mu  sync.Mutex
	nft knftables.Interface
	// model is what was last asked for, there what is in the kernel as far as is known: nil
	// when nothing is known.
	model *netpolicy.Model
	there *ruleset
}

// New returns the table of this network namespace. An error says that nft does not work here.
func New(log *slog.Logger) (*Table, error) {
	n, err := knftables.New(knftables.InetFamily, hostnet.PolicyTable)
	if err != nil {
		return nil, fmt.Errorf("cannot use nftables for network policies: %w", err)
	}
	return newTable(n, log), nil
}

func newTable(n knftables.Interface, log *slog.Logger) *Table { return &Table{nft: n, log: log} }

// Close makes sure that there is a table: where there is none yet (made), one that allows nothing
// to and from pods with addresses in closed. One that an earlier process has left stays as it is,
// since it is right for the pods that run.
func (t *Table) Close(ctx context.Context, closed []netip.Prefix) (made bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, err := t.nft.List(ctx, "chains"); err == nil {
		return false, nil
	} else if !knftables.IsNotFound(err) {
		return false, fmt.Errorf("cannot look for the table of network policies: %w", err)
	}
	t.model = &netpolicy.Model{Closed: closed}
	_, err = t.apply(ctx, t.model)
	return err == nil, err
}

// Apply makes the table say what the model does. tightened reports whether something may be
// forbidden now that was not before, so that connections have to be looked at ([Cut]).
func (t *Table) Apply(ctx context.Context, m *netpolicy.Model) (tightened bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.model = m
	return t.apply(ctx, m)
}

// Restore writes the whole table again, after somebody has removed it or some of it. Before the
// first Apply it does nothing.
func (t *Table) Restore(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.model == nil {
		return nil
	}
	t.there = nil
	_, err := t.apply(ctx, t.model)
	return err
}

// Remove takes the table away.
func (t *Table) Remove(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.model, t.there = nil, nil
	tx := t.nft.NewTransaction()
	tx.Add(&knftables.Table{}) // so that there is one to delete
	tx.Delete(&knftables.Table{})
	return t.nft.Run(ctx, tx)
}

func (t *Table) apply(ctx context.Context, m *netpolicy.Model) (tightened bool, err error) {
	want := render(m)
	if t.there != nil {
		tx := t.nft.NewTransaction()
		stale, tightened := difference(tx, *t.there, want)
		if tx.NumOperations() == 0 && len(stale.chains)+len(stale.sets) == 0 {
			return false, nil
		}
		err := run(ctx, t.nft, tx)
		if err == nil {
			t.there = &want
			t.collect(ctx, stale)
			return tightened, nil
		}
		t.log.Warn("the table of network policies is not as it was left, and is written again", "err", err)
		t.there = nil
	}
	tx := t.nft.NewTransaction()
	table := &knftables.Table{Comment: knftables.PtrTo("NetworkPolicies, enforced by MicroK8s")}
	tx.Add(table)
	tx.Delete(table)
	tx.Add(table)
	difference(tx, ruleset{}, want)
	if err := run(ctx, t.nft, tx); err != nil {
		return false, fmt.Errorf("cannot write the table of network policies: %w", err)
	}
	t.there = &want
	return true, nil
}

// run leaves out transactions that do nothing, which nft does not like.
func run(ctx context.Context, n knftables.Interface, tx *knftables.Transaction) error {
	if tx.NumOperations() == 0 {
		return nil
	}
	return n.Run(ctx, tx)
}

// collect removes what nothing refers to any more. What cannot be removed yet is tried again with
// the next change.
func (t *Table) collect(ctx context.Context, stale ruleset) {
	chains := slices.Sorted(maps.Keys(stale.chains))
	tx := t.nft.NewTransaction()
	for _, name := range chains {
		tx.Flush(&knftables.Chain{Name: name})
	}
	for _, name := range slices.Sorted(maps.Keys(stale.sets)) {
		if stale.sets[name].verdicts {
			tx.Delete(&knftables.Map{Name: name})
		} else {
			tx.Delete(&knftables.Set{Name: name})
		}
	}
	if err := run(ctx, t.nft, tx); err != nil {
		t.log.Debug("rules that nothing uses any more stay for now", "err", err)
		maps.Copy(t.there.chains, stale.chains)
		maps.Copy(t.there.sets, stale.sets)
		return
	}
	tx = t.nft.NewTransaction()
	for _, name := range chains {
		tx.Delete(&knftables.Chain{Name: name})
	}
	if err := run(ctx, t.nft, tx); err != nil {
		t.log.Debug("chains that nothing uses any more stay for now", "err", err)
		for _, name := range chains {
			t.there.chains[name] = chain{} // it is empty
		}
	}
}

// difference adds to tx what makes have into want, except for removing whole chains and sets,
// which it returns. tightened is false when there are only additions, which allow more than
// before or concern pods that could do nothing before.
func difference(tx *knftables.Transaction, have, want ruleset) (stale ruleset, tightened bool) {
	chains, sets := slices.Sorted(maps.Keys(want.chains)), slices.Sorted(maps.Keys(want.sets))
	for _, name := range chains {
		if _, ok := have.chains[name]; !ok {
			tx.Add(chainObject(name, want.chains[name].hook))
		}
	}
	for _, name := range sets {
		if _, ok := have.sets[name]; !ok {
			addSet(tx, name, want.sets[name])
		}
	}
	for _, name := range chains {
		old, ok := have.chains[name]
		if ok && slices.Equal(old.rules, want.chains[name].rules) {
			continue
		}
		if ok {
			tx.Flush(&knftables.Chain{Name: name})
			tightened = true
		}
		for _, rule := range want.chains[name].rules {
			tx.Add(&knftables.Rule{Chain: name, Rule: rule})
		}
	}
	for _, name := range sets {
		old, s := have.sets[name], want.sets[name]
		for _, key := range slices.Sorted(maps.Keys(old.elements)) {
			if verdict, ok := s.elements[key]; !ok || verdict != old.elements[key] {
				tx.Delete(element(name, s, key, old.elements[key]))
				tightened = true
			}
		}
		for _, key := range slices.Sorted(maps.Keys(s.elements)) {
			if verdict, ok := old.elements[key]; !ok || verdict != s.elements[key] {
				tx.Add(element(name, s, key, s.elements[key]))
			}
		}
	}
	stale = ruleset{chains: map[string]chain{}, sets: map[string]set{}}
	for name, c := range have.chains {
		if _, ok := want.chains[name]; !ok {
			stale.chains[name] = c
		}
	}
	for name, s := range have.sets {
		if _, ok := want.sets[name]; !ok {
			stale.sets[name] = s
		}
	}
	return stale, tightened
}

func chainObject(name, hook string) *knftables.Chain {
	c := &knftables.Chain{Name: name}
	if hook != "" {
		c.Type, c.Hook = knftables.PtrTo(knftables.FilterType), knftables.PtrTo(knftables.BaseChainHook(hook))
		c.Priority = knftables.PtrTo(knftables.BaseChainPriority(priority))
	}
	return c
}

func addSet(tx *knftables.Transaction, name string, s set) {
	var flags []knftables.SetFlag
	if s.interval {
		flags = append(flags, knftables.IntervalFlag)
	}
	if s.verdicts {
		tx.Add(&knftables.Map{Name: name, Type: s.keyType + " : verdict", Flags: flags})
	} else {
		tx.Add(&knftables.Set{Name: name, Type: s.keyType, Flags: flags})
	}
}

func element(name string, s set, key, verdict string) *knftables.Element {
	e := &knftables.Element{Key: strings.Split(key, " . ")}
	if s.verdicts {
		e.Map, e.Value = name, []string{verdict}
	} else {
		e.Set = name
	}
	return e
}

// ErrNoTable is what [Table.Check] returns when somebody has removed the table.
var ErrNoTable = errors.New("the table of network policies is gone")

// Check reports whether the chains are there that were written, with as many rules: nil, or what
// is missing. What is in the sets is not looked at.
func (t *Table) Check(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.there == nil {
		return nil
	}
	names, err := t.nft.List(ctx, "chains")
	if knftables.IsNotFound(err) {
		return ErrNoTable
	}
	if err != nil {
		return fmt.Errorf("cannot list the table of network policies: %w", err)
	}
	rules, err := t.nft.ListRules(ctx, "")
	if err != nil {
		return fmt.Errorf("cannot list the table of network policies: %w", err)
	}
	count := map[string]int{}
	for _, r := range rules {
		count[r.Chain]++
	}
	for name, c := range t.there.chains {
		switch {
		case !slices.Contains(names, name):
			return fmt.Errorf("the table of network policies lacks the chain %s", name)
		case count[name] != len(c.rules):
			return fmt.Errorf("the chain %s of network policies has %d rules, not %d", name, count[name], len(c.rules))
		}
	}
	return nil
}
