package status

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// askHA asks this node's datastore daemon for the members and who of them lives. Where it does
// not answer, the files of [readHA] say who the members are.
func askHA(ctx context.Context, env snapenv.Env) HA {
	ha := readHA(env)
	if !ha.Datastore {
		return ha
	}
	list, err := peers.Members(ctx, env.BackendLive())
	if err != nil || len(list) == 0 {
		return ha
	}
	ha = HA{Datastore: true, Asked: true}
	voters, alive := 0, 0
	for _, m := range list {
		if m.Self {
			ha.space, ha.memory = m.Space, m.Memory
		}
		ha.Nodes = append(ha.Nodes, Member{Address: m.Address, Role: m.Role, Alive: m.Online, full: m.DiskFull})
		if m.Role == storedir.Voter {
			voters++
			if m.Online {
				alive++
			}
		}
	}
	// What counts is who lives: one more may be lost as long as the rest is a majority.
	ha.Enabled = voters >= highlyAvailable && alive-1 > voters/2
	ha.Quorum = alive > voters/2
	return ha
}

// highlyAvailable is how many voters it takes to lose one.
const highlyAvailable = 3

// readHA reads what the datastore's own files say of its members. Missing files give no
// members, never an error: the node may be about to start for the first time.
func readHA(env snapenv.Env) HA {
	c := nodeconfig.Load(env)
	if c.Datastore.Owner == nodeconfig.ExternalEtcd {
		return HA{Endpoints: c.Datastore.Endpoints}
	}
	if !c.HA || c.Worker {
		return HA{}
	}
	ha := HA{Datastore: true}
	voters := 0
	for _, m := range storedir.Dir(env.Backend()).Known() {
		if m.Role == storedir.Voter {
			voters++
		}
		ha.Nodes = append(ha.Nodes, Member{Address: m.Address, Role: m.Role})
	}
	ha.Enabled = voters >= highlyAvailable
	return ha
}

// haProblems says which members are silent, and what may still be lost.
func (r *Report) haProblems() {
	if !r.HA.Asked {
		return
	}
	var silent, name []string
	for _, n := range r.HA.Nodes {
		if !n.Alive {
			silent = append(silent, n.RoleName()+" "+n.Address)
			host, _, err := net.SplitHostPort(n.Address)
			if err != nil {
				host = n.Address
			}
			name = append(name, host)
		}
	}
	if len(silent) > 0 {
		what, them := "the datastore's "+silent[0]+" does not answer", "that node"
		if len(silent) > 1 {
			what, them = "of the datastore "+strings.Join(silent, ", ")+" do not answer", "those nodes"
		}
		if !r.HA.Quorum {
			r.add("datastore.majority", "%s, and without a majority of the voters nothing can be read or written", what)("start " + them + ", or if they are gone for good see what is left with: sudo microk8s recover --dry-run")
			return
		}
		r.add("datastore.members", "%s", what)("start " + them + ", or if gone for good run: microk8s remove-node " + name[0] + " --force")
	}
	voters, space := 0, 0
	var full []string
	for _, n := range r.HA.Nodes {
		if n.full {
			full = append(full, n.Address)
		}
		if n.Role == storedir.Voter {
			voters++
			if !n.full {
				space++
			}
		}
	}
	if len(full) > 0 {
		what := "the disk with the datastore is full at " + strings.Join(full, ", ")
		if space <= voters/2 {
			what += ", and nothing can be written"
		}
		r.add("datastore.disk", "%s", what)("free some space there (10 MiB or more); nothing has to be restarted")
	}
	r.spaceProblems()
}

// nearlyFull is the part of a limit from which on it is a problem, in percent.
const nearlyFull = 80

// spaceProblems says how near the datastore is to its limits.
func (r *Report) spaceProblems() {
	if s := r.HA.space; s != nil {
		var most []string
		for i, p := range s.Largest {
			if i == 3 || i > 0 && p.Bytes < 1<<20 {
				break
			}
			most = append(most, fmt.Sprintf("%s (%d MiB in %d keys)", p.Prefix, p.Bytes>>20, p.Keys))
		}
		what := fmt.Sprintf("%d of %d MiB, most of it in %s", s.Bytes>>20, s.Quota>>20, strings.Join(most, ", "))
		const larger = "set a larger --quota-backend-bytes in args/k8s-dqlite of each control-plane node and restart it"
		switch {
		case s.Refused:
			r.add("datastore.limit", "the datastore has reached its limit and refuses what would make it larger: it holds %s", what)(
				"delete what is not needed, or " + larger + "; then run: microk8s dbctl disarm")
		case s.Quota > 0 && s.Bytes >= s.Quota/100*nearlyFull:
			r.add("datastore.limit", "the datastore is near its limit: it holds %s", what)("delete what is not needed, or " + larger)
		}
	}
	if m := r.HA.memory; m != nil && m.Low {
		r.add("datastore.memory", "the datastore on this node is near its memory limit, at which the kernel kills it: it uses %d of %d MiB", m.Used>>20, m.Limit>>20)(
			"raise MemoryMax= of the service, or delete what is not needed")
	}
}

// elsewhere is the address of this node's member of the datastore where this host does not have it.
type elsewhere struct {
	address string // host:port, "" where it is in order
	taken   bool   // somebody answers there
	none    bool   // the host has no address at all
}

// memberElsewhere looks whether the host, whose addresses are own, has its member's address.
func memberElsewhere(env snapenv.Env, own []net.IP) elsewhere {
	self, err := storedir.Dir(env.BackendLive()).Self()
	if err != nil {
		return elsewhere{}
	}
	if len(own) == 0 && self.Host() != storedir.Loopback {
		return elsewhere{address: self.Address, none: true}
	}
	ip := net.ParseIP(self.Host())
	if ip == nil || slices.ContainsFunc(own, ip.Equal) {
		return elsewhere{}
	}
	return elsewhere{address: self.Address}
}

// ask finds out whether somebody has the address, in half of the time that ctx leaves.
func (e elsewhere) ask(ctx context.Context) elsewhere {
	if e.address == "" || e.none {
		return e
	}
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/2)
		defer cancel()
	}
	if conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", e.address); err == nil {
		e.taken = true
		conn.Close()
	}
	return e
}

// addressProblem says that a member of a cluster does not have the address that the others know.
// (A node that is alone moves its datastore by itself.)
func (r *Report) addressProblem(e elsewhere) {
	if len(r.HA.Nodes) < 2 || e.address == "" {
		return
	}
	ip, _, _ := net.SplitHostPort(e.address)
	if e.none {
		r.add("datastore.address", "this host has no address but the loopback's: its network is down, and the other nodes, which know it as %s, cannot reach it", ip)(
			"bring the interface up that had " + ip + ", and see: ip address")
		return
	}
	if e.taken {
		r.add("datastore.address", "the cluster's member %s runs on another machine: this disk is a copy of that machine's, or that machine has taken this one's address", ip)(
			"if this is the copy, make it a node of its own with microk8s leave, which leaves the other machine alone")
		return
	}
	r.add("datastore.address", "the other nodes know this one as %s, which is not an address of this host any more", ip)(
		"give the host that address back, or run microk8s leave --force here and join again; the member " + ip +
			" then stays in the cluster: if no other machine is to have it, run microk8s remove-node " + ip + " --force on another node")
}

// Tolerates says in a sentence what may be lost, "" where there is nothing to say: on a single
// node, where that is plain, and where it is not known.
func (h HA) Tolerates() string {
	if !h.Asked || len(h.Nodes) < 2 {
		return ""
	}
	voters, alive := 0, 0
	for _, n := range h.Nodes {
		if n.Role == storedir.Voter {
			voters++
			if n.Alive {
				alive++
			}
		}
	}
	switch {
	case !h.Quorum:
		return "the datastore has lost its majority"
	case h.Enabled:
		return "the loss of any one node is tolerated"
	case len(h.Nodes) == 2:
		return "two nodes do not tolerate a loss: with a third control-plane node the loss of any one is tolerated"
	case alive < voters:
		return "no further loss is tolerated until every voter answers"
	}
	return "no loss is tolerated until there are three voters"
}
