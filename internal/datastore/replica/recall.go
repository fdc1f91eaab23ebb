package replica

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	recallLimit   = 1500 * time.Millisecond // for all others; who is not there does not hold a start up
	progressEvery = 5 * time.Second         // a member looks at its files
	seenEvery     = time.Second             // what was seen of others is written down, if it is new
)

// Recall asks the other members, before the one of a storage directory starts, what they know of it. The error is a
// [*member.Damage] where they have seen it further than its files are: the machine was put back, and the member has forgotten
// what it acknowledged. It is another one where the datastore was recovered without the member.
func Recall(ctx context.Context, dir string, minTLS uint16, plain bool, log *slog.Logger) error {
	members, err := storedir.Dir(dir).Members()
	if err != nil || len(members) < 2 {
		return nil //nolint:nilerr // the start says so
	}
	self, now, ok := member.ProgressOf(dir)
	if !ok {
		return nil
	}
	var config *tls.Config
	if !plain {
		if _, config, err = peers.KeyPair(dir, minTLS, 0); err != nil {
			return nil //nolint:nilerr // the start says so
		}
		config.NextProtos = []string{storedir.Protocol}
	}
	ctx, cancel := context.WithTimeout(ctx, recallLimit)
	defer cancel()
	found := make([]error, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		if m.ID == self.ID || m.Address == self.Address {
			continue
		}
		wg.Go(func() {
			a, err := recall(ctx, m.Address, config, self.ID)
			switch {
			case err != nil:
				log.Debug("a member does not say what it knows of this one", "member", m.Address, "err", err)
			case a.Recovered != nil:
				found[i] = fmt.Errorf("the datastore was recovered without this member on %s, by the one at %s: what this one has must not be used; run here: microk8s leave --force --yes, and then the line with which it joins again, of microk8s add-node there",
					a.Recovered.At.Format(time.RFC3339), a.Recovered.By)
			case now.Behind(a.Progress):
				found[i] = member.PutBack(dir, m.Address, now, a.Progress)
			}
		})
	}
	wg.Wait()
	for _, err := range found {
		if err != nil {
			return err
		}
	}
	return nil
}

func recall(ctx context.Context, address string, config *tls.Config, id uint64) (*recallAnswer, error) {
	c, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) {
			if config == nil {
				return (&net.Dialer{}).DialContext(ctx, "tcp", a)
			}
			return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", a)
		}))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return call[recallAnswer](ctx, c, "Recall", &recallRequest{ID: id})
}

func (r *Replica) serveRecall(_ context.Context, q *recallRequest) (*recallAnswer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return &recallAnswer{Progress: r.seen[q.ID], Recovered: r.m.Recovered(q.ID)}, nil
}

// sees notes how far another member has come. The caller holds the lock.
func (r *Replica) sees(id uint64, p member.Progress) {
	was := r.seen[id]
	p = member.Progress{Version: max(p.Version, was.Version), Term: max(p.Term, was.Term), Index: max(p.Index, was.Index)}
	if id == 0 || p == was || !slices.ContainsFunc(r.members, func(m storedir.Member) bool { return m.ID == id }) {
		return
	}
	r.seen[id], r.seenNew = p, true
}

// keepSeen looks at the own files from time to time, and writes down how far others have come.
func (r *Replica) keepSeen() {
	t := time.NewTicker(seenEvery)
	defer t.Stop()
	var looked time.Time
	for {
		if time.Since(looked) >= progressEvery {
			looked = time.Now()
			p := r.m.Progress()
			r.progress.Store(&p)
		}
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		}
		r.mu.Lock()
		changed := r.seenNew
		r.seenNew = false
		if changed && len(r.members) > 0 { // who has left is forgotten
			maps.DeleteFunc(r.seen, func(id uint64, _ member.Progress) bool {
				return !slices.ContainsFunc(r.members, func(m storedir.Member) bool { return m.ID == id })
			})
		}
		seen := maps.Clone(r.seen)
		r.mu.Unlock()
		if !changed {
			continue
		}
		if err := r.m.WriteSeen(seen); err != nil {
			r.log.Warn("cannot write down how far the other members have come", "err", err)
		}
	}
}
