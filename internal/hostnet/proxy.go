package hostnet

import (
	"cmp"
	"context"
	"fmt"
	"sync"

	"microk8s/internal/hostwatch"
)

// proxyProgram is what the kernel calls the nft that kube-proxy runs: scripts/components/nft gives it that name, and a
// host's own is called nft.
const proxyProgram = "microk8s-nft"

// proxyWatch knows whether somebody else wrote to kube-proxy's tables (ADR 38).
type proxyWatch struct {
	resync func() error

	mu      sync.Mutex
	wrote   bool   // kube-proxy did, with an nft that can be told from others
	touched string // what the transaction that is being read changed in them first
	dropped bool   // it deletes a whole table, which kube-proxy never does
	foreign string // what somebody else changed, and who; "" for nothing
}

// ProxyOwner keeps the tables of kube-proxy (mode nftables), which alone knows what is in them: resync has it write all
// rules again, after any change by another program. Also what was added goes: kube-proxy's tables are its own.
func ProxyOwner(resync func() error) hostwatch.Owner {
	p := &proxyWatch{resync: resync}
	return hostwatch.Owner{Name: "Services", Concerns: p.concerns, Sync: p.sync}
}

func (p *proxyWatch) concerns(c hostwatch.Change) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case c.Kind == hostwatch.Lost:
		p.touched, p.dropped = "", false
		if p.wrote {
			p.foreign = "unknown: events were lost"
		}
	case c.Kind == hostwatch.Transaction:
		touched, dropped := p.touched, p.dropped
		p.touched, p.dropped = "", false
		switch {
		case touched == "":
		case c.Program == proxyProgram && !dropped:
			p.wrote = true
		case p.wrote && c.Program != "": // without a name: a kernel that does not say
			p.foreign = fmt.Sprintf("%s by %s", touched, c.Program)
			return true
		}
	case c.Nftables() && c.Table == proxyTable:
		p.touched = cmp.Or(p.touched, c.Object)
		p.dropped = p.dropped || c.Kind == hostwatch.Table && c.Deleted
	}
	return false
}

func (p *proxyWatch) sync(context.Context) ([]string, error) {
	p.mu.Lock()
	foreign := p.foreign
	p.foreign = ""
	p.mu.Unlock()
	if foreign == "" {
		return nil, nil
	}
	if err := p.resync(); err != nil {
		p.mu.Lock()
		p.foreign = cmp.Or(p.foreign, foreign)
		p.mu.Unlock()
		return nil, fmt.Errorf("kube-proxy's rules were changed (%s), and it cannot be told: %w", foreign, err)
	}
	return []string{"kube-proxy's rules, all written again (" + foreign + ")"}, nil
}
