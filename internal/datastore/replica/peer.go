package replica

import (
	"context"
	"errors"
	"net"
	"slices"
	"time"

	"microk8s/internal/datastore/storedir"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// peer is the daemon of another member.
type peer struct {
	address string
	stop    context.CancelFunc

	// Guarded by the replica's lock.
	conn  *grpc.ClientConn
	seen  time.Time // when it answered last
	since time.Time // when it began to say what it says of leading
	err   string    // of the last ping, "" if it answered
	last  pingAnswer
}

func (p *peer) online(limit time.Duration) bool {
	return p.err == "" && !p.seen.IsZero() && time.Since(p.seen) < limit
}

// newPeer begins to watch a member. The caller holds the lock.
func (r *Replica) newPeer(address string) *peer {
	ctx, cancel := context.WithCancel(r.ctx)
	p := &peer{address: address, stop: cancel, err: "it has not answered yet", conn: r.connect(address)}
	r.spawn(func() { r.watch(ctx, p) })
	return p
}

// connect makes a connection, which is opened when it is used. The port is dqlite's: TLS is
// the member's business.
func (r *Replica) connect(address string) *grpc.ClientConn {
	c, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return r.m.DialPeer(ctx, a) }),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxBatch), grpc.MaxCallSendMsgSize(maxBatch)),
	)
	if err != nil { // only a malformed target, and addresses are checked when they are read
		panic(err)
	}
	return c
}

// watch asks a member again and again whether it lives.
func (r *Replica) watch(ctx context.Context, p *peer) {
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	defer func() {
		r.mu.Lock()
		p.conn.Close()
		r.mu.Unlock()
	}()
	own := r.m.Node()
	silent := 0
	for {
		r.mu.Lock()
		conn := p.conn
		r.mu.Unlock()
		begin := time.Now()
		a, err := callTimed[pingAnswer](ctx, pingLimit, conn, "Ping", &pingRequest{ID: own.ID, Address: own.Address, Progress: *r.progress.Load()})
		if ctx.Err() != nil {
			return
		}
		r.mu.Lock()
		was := p.err == ""
		if err != nil {
			p.err = describe(err)
			if status.Code(err) == codes.DeadlineExceeded {
				// What a broken network has swallowed may come much later, or never.
				if silent++; silent%2 == 0 {
					conn.Close()
					p.conn = r.connect(p.address)
				}
			}
		} else {
			silent = 0
			if a.Leads != p.last.Leads || p.since.IsZero() {
				p.since = begin
			}
			p.err, p.seen, p.last = "", begin, *a
		}
		r.mu.Unlock()
		if was != (err == nil) {
			r.log.Info("a member's state changed", "member", p.address, "online", err == nil, "reason", p.reason(err))
			r.wake()
		}
		if err == nil && a.Leads {
			r.learn(a.Members)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

func (*peer) reason(err error) string {
	if err == nil {
		return ""
	}
	return describe(err)
}

// wake makes the keeper of roles look again.
func (r *Replica) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// connTo returns the connection to a member.
func (r *Replica) connTo(address string) *grpc.ClientConn {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.peers[address]; p != nil {
		return p.conn
	}
	return nil
}

func (r *Replica) servePing(_ context.Context, q *pingRequest) (*pingAnswer, error) {
	r.mu.Lock()
	r.pinged[q.ID] = time.Now()
	r.sees(q.ID, q.Progress)
	r.mu.Unlock()
	n := r.m.Node()
	a := &pingAnswer{ID: n.ID, Domain: r.m.FailureDomain(), Stopping: r.stopping.Load(), LowDisk: r.lowDisk.Load(), Full: r.full.Load()}
	if l := r.m.Leader(); l.ID != 0 {
		a.LeaderID, a.LeaderAddress = l.ID, l.Address
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	a.Weight = r.weight
	if a.Leads = r.e.Leads(); a.Leads {
		a.Members = r.members
		a.Size, a.InUse = r.e.Size()
		a.Alarms = r.e.Space().Alarms
	}
	return a, nil
}

func (r *Replica) serveWho(context.Context, *empty) (*whoAnswer, error) {
	return &whoAnswer{ID: r.m.Node().ID, LeaderID: r.m.Leader().ID}, nil
}

// watchNode ends the daemon when its node takes no part any more. A node of libdqlite that could
// not write its term or vote is of no use until it is started again (src/raft/recv.c,
// convertToUnavailable), and says nothing: it knows of no leader. That alone may be the network's
// fault. But when the leader and this daemon hear each other on the same port, the node is dead.
func (r *Replica) watchNode() {
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	looks := 0
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		}
		if !r.leftOut() {
			looks = 0
		} else if looks++; looks == deadAfter {
			r.fail(errors.New("the local dqlite node has dropped out of Raft and must be restarted; most likely it could not write to its disk"))
		}
	}
}

// leftOut reports whether another member leads that sees this daemon and has this node among its
// voters, and this node knows nothing of it.
func (r *Replica) leftOut() bool {
	if r.m.Leader().ID != 0 {
		return false
	}
	own := r.m.Node().ID
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.peers {
		if p.online(onlineFor) && p.last.Leads && time.Since(r.pinged[p.last.ID]) < onlineFor {
			return slices.ContainsFunc(p.last.Members, func(n storedir.Member) bool { return n.ID == own && n.Role == storedir.Voter })
		}
	}
	return false
}
