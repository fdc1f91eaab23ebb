// Package replica makes one datastore of the daemons of several members. One daemon leads: the
// one whose dqlite node leads. The others follow its stream of changes, forward writes to it,
// and ask it before they answer reads. It also joins nodes to the cluster, keeps the members'
// roles and knows which of them live.
//
// Who leads is dqlite's decision. This package never makes it, and is wrong about it only for
// moments in which writes fail and reads wait:
//
//   - A daemon leads through one connection to its own node (package log), which ends for good
//     with the node's leadership. Before it serves, it reads what the log holds beyond its state.
//   - A read is answered after a round that began after it came: a majority of the voters'
//     daemons look whom their own nodes name, which is this one, and then it is seen to lead still
//     (engine.Confirm). So no other leader can have committed anything before the read came that
//     is not in the state. Followers ask for the leader's revision and wait until they have it.
//   - A write whose compare fails is a read: it is answered after such a round, too, unless it
//     shared a statement with a write that was committed.
//   - A write is forwarded once. When its outcome is not known, the client is told so.
package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"microk8s/internal/datastore/engine"
	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/server"
	"microk8s/internal/datastore/storedir"

	"github.com/canonical/go-dqlite/v3/client"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

const (
	pingEvery   = 500 * time.Millisecond
	pingLimit   = 1200 * time.Millisecond
	onlineFor   = 2 * time.Second // after its last answer a member counts as online
	shownFor    = 3 * time.Second // the same, for who asks from outside
	lostAfter   = 5 * time.Second // offline for so long, a member is replaced
	lookEvery   = 100 * time.Millisecond
	reportEvery = 10 * time.Second
	askLimit    = 2 * time.Second // for a question to another daemon
	deadAfter   = 30              // looks, one with each ping, at an own node that knows of no leader
)

// Options of a Replica.
type Options struct {
	Member *member.Member
	Logger *slog.Logger

	// ClusterID goes into the headers of answers to other daemons.
	ClusterID uint64

	// Quota is --quota-backend-bytes (see engine.Options).
	Quota int64
}

// Replica is this daemon's part of the datastore. Its methods may be called from any goroutine.
type Replica struct {
	opt Options
	log *slog.Logger
	m   *member.Member
	e   *engine.Engine

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	grpc   *grpc.Server
	kv     pb.KVServer // of what others forward
	fatal  chan error
	ready  chan struct{}

	following atomic.Pointer[following]
	alone     atomic.Bool // this node leads and is the only voter
	stopping  atomic.Bool
	removed   atomic.Bool // the others do not list this member any more
	lowDisk   atomic.Bool // the disk is nearly full, as the daemon's flags say
	full      atomic.Bool // the disk has no space for the log to grow
	noRoom    atomic.Bool // so do the disks of too many voters
	yielding  atomic.Bool
	confirms  rounds
	rolesMu   sync.Mutex // one change of roles at a time
	kick      chan struct{}

	largestMu sync.Mutex
	largest   []peers.Prefix
	largestAt time.Time

	mu      sync.Mutex
	members []storedir.Member    // as the last leader named them
	peers   map[string]*peer     // by address, without this one
	turn    chan struct{}        // closed when who leads changes
	why     string               // nothing can be served yet
	weight  uint64               // of this node, as dqlite keeps it
	pinged  map[uint64]time.Time // when other members asked last, by id
	seen    member.Seen          // how far they have come
	seenNew bool                 // it is not written down yet

	progress atomic.Pointer[member.Progress] // of this member's files
}

// following is a stream from the daemon that leads.
type following struct {
	address string
	conn    *grpc.ClientConn
	ctx     context.Context
	barrier rounds // gives a confirmed revision
	// compacted is up to where the leader had compacted at the last round of barrier.
	compacted atomic.Int64
	latest    rounds // returns the revision that the leader has
	writes    forwarding
}

var _ server.Backend = (*Replica)(nil)

// Start begins to take part. Ready tells when there is data.
func Start(opt Options) *Replica {
	r := &Replica{
		opt: opt, log: opt.Logger, m: opt.Member,
		fatal: make(chan error, 1), ready: make(chan struct{}), kick: make(chan struct{}, 1),
		peers: map[string]*peer{}, pinged: map[uint64]time.Time{}, turn: make(chan struct{}), why: "nobody leads yet",
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.seen = r.m.ReadSeen()
	r.progress.Store(&member.Progress{})
	r.e = engine.New(engine.Options{Logger: r.log, Alone: r.alone.Load, Confirm: r.confirm, Full: r.noRoom.Load, Compacted: r.turned, Trim: member.Trim, Quota: opt.Quota, Member: r.m.Node().ID})
	r.confirms.run = func(ctx context.Context) (int64, error) {
		ctx, cancel := context.WithTimeout(ctx, askLimit)
		defer cancel()
		return 0, r.e.Confirm(ctx, r.askVoters)
	}
	r.setMembers(r.m.Known())
	r.grpc = grpc.NewServer(
		grpc.ForceServerCodec(codec{}), grpc.MaxRecvMsgSize(16<<20),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	r.grpc.RegisterService(&serviceDesc, r)
	s := server.New(server.Options{Engine: r.e, Backend: leader{r, notLeading}, Logger: r.log, ClusterID: opt.ClusterID, MemberID: r.m.Node().ID})
	r.kv = s
	pb.RegisterKVServer(r.grpc, s)
	pb.RegisterLeaseServer(r.grpc, s)
	pb.RegisterMaintenanceServer(r.grpc, s)
	r.spawn(func() {
		if err := r.grpc.Serve(r.m.Peers()); err != nil && r.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
			r.fail(fmt.Errorf("cannot serve other members: %w", err))
		}
	})
	r.spawn(r.run)
	r.spawn(r.watchDisk)
	r.spawn(r.watchNode)
	r.spawn(r.keepSeen)
	if r.m.Joining() {
		r.spawn(r.join)
	}
	return r
}

func (r *Replica) spawn(fn func()) {
	r.wg.Add(1)
	go func() { defer r.wg.Done(); fn() }()
}

// Close ends everything. Handover comes before, where it is wanted.
func (r *Replica) Close() {
	r.cancel()
	r.grpc.Stop()
	r.mu.Lock()
	for _, p := range r.peers {
		p.stop()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

// Engine is where reads and watches go.
func (r *Replica) Engine() *engine.Engine { return r.e }

// Fatal returns the reason why the daemon cannot go on.
func (r *Replica) Fatal() <-chan error { return r.fatal }

func (r *Replica) fail(err error) {
	select {
	case r.fatal <- err:
	default:
	}
}

// Ready waits until there is data and somebody leads, and says every ten seconds why not.
func (r *Replica) Ready(ctx context.Context) error {
	t := time.NewTicker(reportEvery)
	defer t.Stop()
	for {
		select {
		case <-r.ready:
			return nil
		case err := <-r.fatal:
			return err
		case <-ctx.Done():
			return fmt.Errorf("the datastore did not become usable: %w", ctx.Err())
		case <-t.C:
			n := r.m.Node()
			r.mu.Lock()
			tried := make([]string, 0, len(r.peers))
			for _, p := range r.peers {
				state := "online"
				if p.err != "" {
					state = p.err
				}
				tried = append(tried, p.address+" ("+state+")")
			}
			why := r.why
			r.mu.Unlock()
			slices.Sort(tried)
			r.log.Warn("the datastore is not usable yet", "address", n.Address, "id", n.ID, "reason", why, "others", strings.Join(tried, ", "))
		}
	}
}

func (r *Replica) because(err error) {
	r.mu.Lock()
	r.why = describe(err)
	r.mu.Unlock()
}

// turned tells everybody that who leads has changed. now is closed at the next change.
func (r *Replica) turned() {
	r.mu.Lock()
	close(r.turn)
	r.turn = make(chan struct{})
	r.mu.Unlock()
}

func (r *Replica) now() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.turn
}

func (r *Replica) isReady() {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.ready:
	default:
		close(r.ready)
	}
}

// target is who leads, as far as this daemon knows.
type target struct {
	id      uint64
	address string
	self    bool
}

func (r *Replica) target() target {
	if l := r.m.Leader(); l.ID != 0 {
		return target{l.ID, l.Address, l.ID == r.m.Node().ID}
	}
	// A spare's node hears of no leader, but the daemons do.
	r.mu.Lock()
	defer r.mu.Unlock()
	var claims []*peer
	for _, p := range r.peers {
		if p.online(onlineFor) && p.last.Leads {
			claims = append(claims, p)
		}
	}
	if len(claims) == 0 {
		return target{}
	}
	// One that has just lost leadership may still say so.
	p := slices.MaxFunc(claims, func(a, b *peer) int { return a.since.Compare(b.since) })
	return target{p.last.ID, p.address, false}
}

// run leads or follows, whichever is right.
func (r *Replica) run() {
	var cur target
	var cancel context.CancelFunc
	var done chan struct{}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	end := func() {
		cancel()
		<-done
		done, cur = nil, target{}
	}
	for {
		want := r.target()
		if done != nil && want != cur && (want != target{} || cur.self && !r.alone.Load()) {
			end()
		}
		if done == nil && (want != target{}) {
			ctx, c := context.WithCancel(r.ctx)
			cur, cancel, done = want, c, make(chan struct{})
			go func() {
				defer close(done)
				if cur.self {
					r.lead(ctx)
				} else {
					r.follow(ctx, cur.address)
				}
			}()
		}
		select {
		case <-r.ctx.Done():
			if done != nil {
				end()
			}
			return
		case <-done:
			cancel()
			done, cur = nil, target{}
			select { // whatever ended it needs a moment
			case <-r.ctx.Done():
			case <-tick.C:
			}
		case <-r.m.Changed():
		case <-tick.C:
		}
	}
}

// lead leads until ctx ends.
func (r *Replica) lead(ctx context.Context) {
	l, err := r.m.OpenLog(ctx)
	if err != nil {
		if ctx.Err() == nil {
			r.fail(err)
		}
		return
	}
	defer l.Close()
	defer r.alone.Store(false)
	begin := time.Now()
	var keeper sync.WaitGroup
	defer keeper.Wait()
	err = r.e.Lead(ctx, l, func() {
		r.log.Info("this member leads", "revision", r.e.Rev(), "keys", r.e.Keys(), "seconds", time.Since(begin).Seconds())
		keeper.Add(1)
		go func() { defer keeper.Done(); r.keepRoles(ctx) }()
		r.turned()
		r.isReady()
	})
	r.turned()
	if err == nil || ctx.Err() != nil {
		return
	}
	r.because(err)
	if r.m.Leads() && l.Check() == nil {
		r.fail(fmt.Errorf("cannot load the data: %w", err)) // and not because leadership was lost meanwhile
	}
}

// Members returns the members of the cluster, and which of them live. It never waits.
func (r *Replica) Members() []peers.Member {
	own := r.m.Node()
	t := r.target()
	leads := r.e.Leads()
	space := r.space()
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []peers.Member
	for _, n := range r.members {
		m := peers.Member{ID: n.ID, Address: n.Address, Role: n.Role}
		if n.Address == own.Address {
			m.ID, m.Self, m.Online, m.LastSeen = own.ID, true, true, time.Now()
			m.Leader, m.DiskFull, m.Space = leads, r.full.Load(), space
		} else if p := r.peers[n.Address]; p != nil {
			m.Online, m.LastSeen = p.online(shownFor), p.seen
			m.Leader = m.Online && (t.address == n.Address || p.last.Leads)
			m.DiskFull = m.Online && p.last.Full
		}
		out = append(out, m)
	}
	return out
}

// setMembers takes over a list of members.
func (r *Replica) setMembers(nodes []storedir.Member) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members = nodes
	own := r.m.Node().Address
	listed := map[string]bool{}
	for _, n := range nodes {
		listed[n.Address] = true
		if n.Address != own && r.peers[n.Address] == nil && r.ctx.Err() == nil {
			r.peers[n.Address] = r.newPeer(n.Address)
		}
	}
	for a, p := range r.peers {
		if !listed[a] {
			p.stop()
			delete(r.peers, a)
		}
	}
}

// learn takes over the list of a leader, and writes it down.
func (r *Replica) learn(nodes []storedir.Member) {
	if len(nodes) == 0 || r.m.Joining() {
		return
	}
	r.mu.Lock()
	same := slices.Equal(r.members, nodes)
	r.mu.Unlock()
	if same {
		return
	}
	own := r.m.Node()
	if !slices.ContainsFunc(nodes, func(n storedir.Member) bool { return n.ID == own.ID }) {
		// The list is kept: with it this node can ask to join again, or be put right.
		r.because(errRemoved)
		if !r.removed.Swap(true) {
			r.log.Error(errRemoved.Error(), "address", own.Address, "id", own.ID)
		}
		return
	}
	r.removed.Store(false)
	r.setMembers(nodes)
	if err := r.m.Remember(nodes); err != nil {
		r.log.Warn("cannot write the list of members", "err", err)
	}
}

var errRemoved = errors.New("this node was removed from the cluster's datastore; run microk8s leave on it, then join again to add it back")

func nodesOf(infos []client.NodeInfo) []storedir.Member {
	out := make([]storedir.Member, len(infos))
	for i, n := range infos {
		out[i] = storedir.Member{ID: n.ID, Address: n.Address, Role: storedir.Role(n.Role)}
	}
	return out
}
