package replica

import (
	"context"
	"errors"
	"fmt"
	"time"

	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	rolesEvery    = time.Second      // the local node is asked for the members; it cannot tell by itself
	assignLimit   = 60 * time.Second // a promotion waits until the data is there
	handoverLimit = 10 * time.Second
	joinEvery     = time.Second
)

// keepRoles keeps the list of members and their roles while this daemon leads.
func (r *Replica) keepRoles(ctx context.Context) {
	began := time.Now()
	t := time.NewTicker(rolesEvery)
	defer t.Stop()
	failed := time.Time{}
	for {
		if err := r.refresh(ctx); err == nil && time.Since(failed) > 2*time.Second {
			for r.step(ctx, began, &failed) {
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-r.kick:
		case <-t.C:
		}
	}
}

// refresh takes over the members of the local node, which leads.
func (r *Replica) refresh(ctx context.Context) error {
	r.rolesMu.Lock()
	defer r.rolesMu.Unlock()
	return r.refreshLocked(ctx)
}

func (r *Replica) refreshLocked(ctx context.Context) error {
	ask, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	infos, err := r.m.Cluster(ask)
	if err != nil || ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	r.learn(nodesOf(infos))
	voters, self := 0, false
	for _, n := range infos {
		if n.Role == client.Voter {
			voters++
			self = self || n.ID == r.m.Node().ID
		}
	}
	// Only while leading: what the node says then is the latest, and changes go through here.
	r.alone.Store(voters == 1 && self && r.e.Leads())
	if w, err := r.m.Weight(ask); err == nil {
		r.mu.Lock()
		r.weight = w
		r.mu.Unlock()
	}
	return nil
}

// step makes one change of a role, if one is due. A daemon that gives its own role away makes none
// beside that: of two members it would take the vote back that it has just given.
func (r *Replica) step(ctx context.Context, began time.Time, failed *time.Time) bool {
	if r.stopping.Load() {
		return false
	}
	c, ok := plan(r.m.Node().ID, r.candidates(began))
	if !ok || ctx.Err() != nil {
		return false
	}
	if err := r.assign(ctx, c); err != nil {
		*failed = time.Now()
		if ctx.Err() == nil {
			r.log.Warn("a member's role cannot be changed, trying again", "id", c.ID, "role", c.Role.String(), "err", err)
		}
		return false
	}
	return true
}

func (r *Replica) assign(ctx context.Context, c change) error {
	r.rolesMu.Lock()
	defer r.rolesMu.Unlock()
	r.alone.Store(false) // from here on there may be another voter
	r.log.Info("changing a member's role", "id", c.ID, "role", c.Role.String())
	ask, cancel := context.WithTimeout(ctx, assignLimit)
	defer cancel()
	err := r.m.Change(ask, func(d *client.Client) error { return d.Assign(ask, c.ID, client.NodeRole(c.Role)) })
	if err == nil {
		r.log.Info("a member's role was changed", "id", c.ID, "role", c.Role.String())
	}
	return errors.Join(err, r.refreshLocked(ctx))
}

// candidates is the members as the choice of roles sees them. Nobody is lost before this
// daemon has had the time to hear of it.
func (r *Replica) candidates(began time.Time) []candidate {
	own := r.m.Node()
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []candidate
	for _, n := range r.members {
		c := candidate{ID: n.ID, Role: n.Role}
		if n.ID == own.ID {
			c.Online, c.Domain, c.Weight = true, r.m.FailureDomain(), r.weight
		} else if p := r.peers[n.Address]; p != nil {
			c.Online = p.online(onlineFor) && p.last.ID == n.ID && !p.last.Stopping
			c.Domain, c.Weight = p.last.Domain, p.last.Weight
			last := p.seen
			if last.Before(began) {
				last = began
			}
			c.Lost = !c.Online && time.Since(last) > lostAfter || p.last.Stopping
		}
		out = append(out, c)
	}
	return out
}

// join asks the members again and again to add this node, until it is one of them.
func (r *Replica) join() {
	own := r.m.Node()
	var reported time.Time
	for {
		var reasons []string
		for _, n := range r.m.Known() {
			conn := r.connTo(n.Address)
			if conn == nil {
				continue
			}
			a, err := callTimed[joinAnswer](r.ctx, handoverLimit, conn, "Join", &joinRequest{ID: own.ID, Address: own.Address})
			if err == nil {
				if err = r.m.Joined(a.Members); err == nil {
					r.setMembers(a.Members)
					r.log.Info("this node has joined the cluster", "address", own.Address, "id", own.ID, "members", len(a.Members))
					return
				}
			}
			reasons = append(reasons, n.Address+": "+describe(err))
		}
		if r.ctx.Err() != nil {
			return
		}
		r.because(fmt.Errorf("this node was not added to the cluster yet: %q", reasons))
		if time.Since(reported) >= reportEvery {
			reported = time.Now()
			r.log.Warn("cannot join the cluster yet, trying again", "address", own.Address, "id", own.ID, "asked", reasons)
		}
		select {
		case <-r.ctx.Done():
			return
		case <-time.After(joinEvery):
		}
	}
}

func (r *Replica) serveJoin(ctx context.Context, q *joinRequest) (*joinAnswer, error) {
	if !r.e.Leads() {
		t := r.target()
		if conn := r.connTo(t.address); !q.Forwarded && conn != nil {
			q.Forwarded = true
			return call[joinAnswer](ctx, conn, "Join", q)
		}
		return nil, notLeading
	}
	r.rolesMu.Lock()
	defer r.rolesMu.Unlock()
	infos, err := r.m.Cluster(ctx)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	for _, n := range infos {
		switch {
		case n.ID == q.ID && n.Address == q.Address:
			return &joinAnswer{Members: nodesOf(infos)}, nil // asked again
		case n.ID == q.ID || n.Address == q.Address:
			return nil, status.Errorf(codes.AlreadyExists, "%s is the address or the id of a member already; if that one is gone for good, run microk8s remove-node for it first", q.Address)
		}
	}
	r.log.Info("adding a member", "address", q.Address, "id", q.ID)
	err = r.m.Change(ctx, func(c *client.Client) error {
		return c.Add(ctx, client.NodeInfo{ID: q.ID, Address: q.Address, Role: client.Spare})
	})
	if err != nil {
		return nil, status.Error(codes.Unavailable, "cannot add the member: "+err.Error())
	}
	if err := r.refreshLocked(ctx); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	r.wake() // it may be needed as a voter
	r.mu.Lock()
	defer r.mu.Unlock()
	return &joinAnswer{Members: r.members}, nil
}

// Handover gives leadership and role to others before this daemon stops. What cannot be given
// within ctx stays.
func (r *Replica) Handover(ctx context.Context) error {
	r.mu.Lock()
	n := len(r.members)
	r.mu.Unlock()
	if n < 2 || r.m.Joining() {
		return nil
	}
	r.stopping.Store(true)
	if r.e.Leads() {
		if err := r.transfer(ctx, true); err != nil {
			return err
		}
	}
	// The new leader knows better who can replace this member. Where the others are gone there
	// will be none.
	own := r.m.Node()
	elected := time.After(electionWait)
	for !r.removed.Load() { // a removed one has nothing to hand over
		turn := r.now()
		if f := r.following.Load(); f != nil {
			_, err := call[empty](ctx, f.conn, "Handover", &handoverRequest{ID: own.ID})
			if err == nil || !isNotLeading(err) {
				return err
			}
		}
		select {
		case <-turn:
		case <-time.After(retryEvery):
		case <-elected:
			if r.following.Load() == nil {
				return errors.New("nobody leads")
			}
		case <-ctx.Done():
			return fmt.Errorf("no new leader in time: %w", ctx.Err())
		}
	}
	return nil
}

// electionWait is how long a daemon that ends waits for somebody to lead.
const electionWait = 5 * time.Second

// transfer gives leadership to another voter that is online. If there is none, the best other
// member becomes one, where promote allows that.
func (r *Replica) transfer(ctx context.Context, promote bool) error {
	own := r.m.Node()
	r.mu.Lock()
	low, full := map[uint64]bool{}, map[uint64]bool{}
	for _, p := range r.peers {
		low[p.last.ID], full[p.last.ID] = p.last.LowDisk, p.last.Full
	}
	r.mu.Unlock()
	var to, lowToo []candidate
	all := r.candidates(time.Now())
	for _, c := range all {
		switch {
		case c.ID == own.ID || !c.Online || c.Lost || c.Role != storedir.Voter || full[c.ID]:
		case low[c.ID]:
			lowToo = append(lowToo, c)
		default:
			to = append(to, c)
		}
	}
	if r.full.Load() {
		to = append(to, lowToo...)
	}
	if len(to) == 0 && promote {
		if from := candidates(own.ID, all, storedir.Voter, map[uint64]int{}); len(from) > 0 {
			if err := r.assign(ctx, change{from[0].ID, storedir.Voter}); err != nil {
				return fmt.Errorf("cannot make another member a voter: %w", err)
			}
			to = from[:1]
		}
	}
	err := errors.New("no other member is online that could lead")
	for _, c := range to {
		r.log.Info("handing leadership over", "to", c.ID)
		err = r.m.Change(ctx, func(d *client.Client) error { return d.Transfer(ctx, c.ID) })
		if err == nil {
			return nil
		}
		if !r.m.Leads() {
			return nil // it is given away all the same
		}
	}
	return fmt.Errorf("cannot hand leadership over: %w", err)
}

func (r *Replica) serveHandover(ctx context.Context, q *handoverRequest) (*empty, error) {
	if !r.e.Leads() {
		return nil, notLeading
	}
	if err := r.refresh(ctx); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	r.mu.Lock()
	known := false
	for _, n := range r.members {
		if p := r.peers[n.Address]; n.ID == q.ID && p != nil {
			p.last.Stopping, known = true, true
		}
	}
	r.mu.Unlock()
	if !known {
		return &empty{}, nil
	}
	var failed time.Time
	for r.step(ctx, time.Now(), &failed) {
	}
	return &empty{}, nil
}
