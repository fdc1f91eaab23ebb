package hostnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"

	"microk8s/internal/hostwatch"
)

const (
	// proxyServices is the map from Services' addresses to their chains; it is never empty, since there is a
	// Service for the API server.
	proxyServices = "service-ips"
	// proxyPatience is how long kube-proxy may take to write its rules again; it makes pauses of a second.
	proxyPatience = 15 * time.Second
)

// proxyWatch knows what kube-proxy's tables had.
type proxyWatch struct {
	resync func() error

	mu  sync.Mutex
	had map[nftables.TableFamily]map[string]bool // what had something in it, by table: chains of its own, and proxyServices
}

// ProxyOwner keeps the tables of kube-proxy (mode nftables), which alone knows what is in them: resync has it write all
// rules again. What counts as lost are tables, chains that every packet passes, all of a chain's rules, and all Services; single
// rules of single Services come back with kube-proxy's own hourly sync.
func ProxyOwner(resync func() error) hostwatch.Owner {
	p := &proxyWatch{resync: resync, had: map[nftables.TableFamily]map[string]bool{}}
	return hostwatch.Owner{Name: "Services", Concerns: p.concerns, Sync: p.sync}
}

// perService reports whether a chain belongs to one Service; such chains come and go. Their names have the Service's in them.
func perService(chain string) bool { return strings.Contains(chain, "/") }

func (p *proxyWatch) concerns(c hostwatch.Change) bool {
	if c.Table != proxyTable {
		return false
	}
	switch c.Kind {
	case hostwatch.Table:
		return true // also a new one: it is looked at when it is filled
	case hostwatch.Chain, hostwatch.Rule:
		return c.Deleted && !perService(c.Object)
	case hostwatch.Element:
		return c.Deleted && c.Object == proxyServices
	}
	return false
}

func (p *proxyWatch) sync(ctx context.Context) ([]string, error) {
	lost, err := p.look()
	if err != nil || len(lost) == 0 {
		return nil, err
	}
	if err := p.resync(); err != nil {
		return nil, fmt.Errorf("kube-proxy's rules are gone (%s): %w", strings.Join(lost, ", "), err)
	}
	for deadline := time.Now().Add(proxyPatience); time.Now().Before(deadline); {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
		if left, err := p.look(); err != nil || len(left) == 0 {
			return lost, err
		}
	}
	left, err := p.look()
	if err != nil || slices.ContainsFunc(left, func(l string) bool { return strings.HasPrefix(l, "table ") }) {
		return nil, errors.Join(err, errors.New("kube-proxy does not write its rules again: "+strings.Join(lost, ", ")))
	}
	// It wrote all it wants, and what is missing is not among it any more.
	p.mu.Lock()
	clear(p.had)
	p.mu.Unlock()
	_, err = p.look()
	return nil, err
}

// look returns what had something in it and has not any more, and notes what has.
func (p *proxyWatch) look() (lost []string, err error) {
	now := map[nftables.TableFamily]map[string]bool{}
	h, err := readHost()
	if err != nil {
		return nil, err
	}
	for _, c := range h.chains {
		if c.Table.Name != proxyTable || perService(c.Name) {
			continue
		}
		family := c.Table.Family
		if now[family] == nil {
			now[family] = map[string]bool{}
			set, err := h.conn.GetSetByName(c.Table, proxyServices)
			if err == nil {
				elements, err := h.conn.GetSetElements(set)
				now[family]["map "+proxyServices] = err == nil && len(elements) > 0
			}
		}
		rules, err := h.rules(c)
		if err != nil {
			return nil, err
		}
		now[family]["chain "+c.Name] = len(rules) > 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for family, had := range p.had {
		if len(now[family]) == 0 && len(had) > 0 {
			lost = append(lost, "table "+familyName(family)+" "+proxyTable)
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(had)) {
			if had[name] && !now[family][name] {
				lost = append(lost, name)
			}
		}
	}
	if len(lost) == 0 {
		p.had = now
	}
	return lost, nil
}
