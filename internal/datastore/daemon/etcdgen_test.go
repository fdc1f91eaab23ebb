package daemon

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// generator makes random requests of etcd's API, about one in five of them invalid.
type generator struct {
	rand      *rand.Rand
	rev       int64 // of the store
	compacted int64
	alarms    map[string]*pb.AlarmRequest // that stand
}

// learn takes over where the store is.
func (g *generator) learn(r request, answer proto.Message) {
	if a, ok := answer.(interface{ GetHeader() *pb.ResponseHeader }); ok {
		g.rev = max(g.rev, a.GetHeader().GetRevision())
	}
	if q, ok := r.msg.(*pb.CompactionRequest); ok {
		g.compacted = q.Revision
	}
	if q, ok := r.msg.(*pb.AlarmRequest); ok && q.Alarm != pb.AlarmType_NONE {
		k := fmt.Sprint(q.MemberID, q.Alarm)
		switch q.Action {
		case pb.AlarmRequest_ACTIVATE:
			g.alarms[k] = q
		case pb.AlarmRequest_DEACTIVATE:
			delete(g.alarms, k)
		}
	}
}

// one returns true once in n times.
func (g *generator) one(n int) bool { return g.rand.IntN(n) == 0 }

func (g *generator) key() []byte {
	if g.one(40) {
		return nil
	}
	return []byte(string(rune('a'+g.rand.IntN(6))) + []string{"", "", "", "1", "2", "/x"}[g.rand.IntN(6)])
}

func (g *generator) end() []byte {
	switch g.rand.IntN(8) {
	case 0:
		return []byte{0}
	case 1, 2, 3:
		return nil
	}
	return g.key()
}

func (g *generator) value() []byte {
	if g.one(400) { // around the limits of a request and of a message
		return make([]byte, []int{1 << 20, 1600 << 10, 3 << 20}[g.rand.IntN(3)])
	}
	return []byte(fmt.Sprint(g.rand.IntN(20)))
}

// anyRev is a revision, of which most can be read.
func (g *generator) anyRev() int64 {
	switch g.rand.IntN(12) {
	case 0:
		return g.rev + g.rand.Int64N(3)
	case 1:
		return g.compacted + g.rand.Int64N(3) - 1
	case 2:
		return []int64{-1, -7, math.MaxInt64, math.MinInt64, 1}[g.rand.IntN(5)]
	}
	return max(g.compacted, g.rev-g.rand.Int64N(30))
}

func (g *generator) rng() *pb.RangeRequest {
	r := &pb.RangeRequest{Key: g.key(), RangeEnd: g.end(), Serializable: g.one(8), KeysOnly: g.one(5), CountOnly: g.one(8)}
	if g.one(3) {
		r.Revision = g.anyRev()
	}
	if g.one(3) {
		r.Limit = g.rand.Int64N(6) - 1
	}
	if g.one(4) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.rand.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.rand.IntN(5))
	}
	if g.one(60) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.rand.IntN(9) - 2)
		r.SortTarget = pb.RangeRequest_SortTarget(g.rand.IntN(12) - 2)
	}
	if g.one(6) {
		r.MinModRevision, r.MaxModRevision = g.filter(), g.filter()
	}
	if g.one(6) {
		r.MinCreateRevision, r.MaxCreateRevision = g.filter(), g.filter()
	}
	return r
}

func (g *generator) filter() int64 {
	if g.one(2) {
		return 0
	}
	return g.anyRev()
}

func (g *generator) put() *pb.PutRequest {
	r := &pb.PutRequest{Key: g.key(), Value: g.value(), PrevKv: g.one(3)}
	if g.one(4) {
		r.Lease = g.lease()
	}
	if g.one(10) {
		r.IgnoreValue = true
		if !g.one(4) {
			r.Value = nil
		}
	}
	if g.one(10) {
		r.IgnoreLease = true
		if !g.one(4) {
			r.Lease = 0
		}
	}
	return r
}

func (g *generator) del() *pb.DeleteRangeRequest {
	return &pb.DeleteRangeRequest{Key: g.key(), RangeEnd: g.end(), PrevKv: g.one(2)}
}

func (g *generator) lease() int64 { return g.rand.Int64N(8) }

func (g *generator) compare() *pb.Compare {
	c := &pb.Compare{
		Key: g.key(), Result: pb.Compare_CompareResult(g.rand.IntN(4)), Target: pb.Compare_CompareTarget(g.rand.IntN(5)),
	}
	if g.one(5) {
		c.RangeEnd = g.end()
	}
	if g.one(60) {
		c.Result, c.Target = pb.Compare_CompareResult(g.rand.IntN(9)-2), pb.Compare_CompareTarget(g.rand.IntN(9)-2)
	}
	target := c.Target
	if g.one(20) {
		target = pb.Compare_CompareTarget(g.rand.IntN(6)) // of another target, or none
	}
	switch target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: g.rand.Int64N(4)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: g.filter()}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: g.filter()}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: g.value()}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: g.lease()}
	}
	return c
}

func (g *generator) ops(depth int) (ops []*pb.RequestOp) {
	n := g.rand.IntN(4)
	if g.one(100) {
		n = 120 + g.rand.IntN(12)
	}
	for i := range n {
		op := &pb.RequestOp{}
		switch k := g.rand.IntN(20); {
		case k < 6:
			r := g.rng()
			if !g.one(6) {
				r.Revision = 0
			}
			op.Request = &pb.RequestOp_RequestRange{RequestRange: r}
		case k < 13:
			p := g.put()
			if n > 100 {
				p.Key = []byte(fmt.Sprint("m", i))
			}
			op.Request = &pb.RequestOp_RequestPut{RequestPut: p}
		case k < 16:
			op.Request = &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: g.del()}
		case k < 19 && depth > 0:
			op.Request = &pb.RequestOp_RequestTxn{RequestTxn: g.txn(depth - 1)}
		case k == 19 && g.one(3):
			// an empty operation
		default:
			op.Request = &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")}}
		}
		ops = append(ops, op)
	}
	return ops
}

// deadly reports whether a transaction may put and delete a key in a way that etcd overlooks, and of which
// it ends later: by a delete without end, or by two inner transactions. The daemon refuses those.
func deadly(r *pb.TxnRequest) bool {
	puts, deletes, endless := false, false, false
	var look func(r *pb.TxnRequest) (inner int)
	look = func(r *pb.TxnRequest) int {
		most := 0
		for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
			n := 0
			for _, op := range ops {
				puts = puts || op.GetRequestPut() != nil
				if d := op.GetRequestDeleteRange(); d != nil {
					deletes, endless = true, endless || string(d.RangeEnd) == "\x00"
				}
				if t := op.GetRequestTxn(); t != nil {
					n++
					most = max(most, look(t))
				}
			}
			most = max(most, n)
		}
		return most
	}
	inner := look(r)
	return puts && (endless || deletes && inner > 1)
}

func (g *generator) txn(depth int) *pb.TxnRequest {
	r := &pb.TxnRequest{Success: g.ops(depth), Failure: g.ops(depth)}
	for range g.rand.IntN(3) {
		r.Compare = append(r.Compare, g.compare())
	}
	return r
}

// alarm makes a request about alarms. Those that stand end soon, because they make writes fail.
func (g *generator) alarm() *pb.AlarmRequest {
	if g.alarms == nil {
		g.alarms = map[string]*pb.AlarmRequest{}
	}
	r := &pb.AlarmRequest{
		Action: pb.AlarmRequest_AlarmAction(g.rand.IntN(3)), MemberID: uint64(g.rand.IntN(3)), Alarm: pb.AlarmType(g.rand.IntN(3)),
	}
	if g.one(2) {
		r.Alarm = pb.AlarmType_NOSPACE
	}
	for _, k := range slices.Sorted(maps.Keys(g.alarms)) {
		if g.one(2) {
			a := g.alarms[k]
			return &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: a.MemberID, Alarm: a.Alarm}
		}
	}
	return r
}

// next makes a request that is not a watch.
func (g *generator) next() request {
	if g.one(80) || len(g.alarms) > 0 && g.one(12) {
		return request{msg: g.alarm()}
	}
	switch k := g.rand.IntN(100); {
	case k < 24:
		return request{msg: g.rng()}
	case k < 29:
		r := g.rng()
		if r.SortOrder == pb.RangeRequest_NONE {
			r.SortTarget = pb.RangeRequest_KEY // see notOffered
		}
		return request{r, true}
	case k < 50:
		return request{msg: g.put()}
	case k < 57:
		return request{msg: g.del()}
	case k < 80:
		for {
			if r := g.txn(2); !deadly(r) {
				return request{msg: r}
			}
		}
	case k < 82:
		r := &pb.CompactionRequest{Revision: g.anyRev(), Physical: g.one(2)}
		if g.one(2) {
			r.Revision = max(g.compacted+1, g.rev-g.rand.Int64N(40))
		}
		return request{msg: r}
	case k < 86:
		r := &pb.LeaseGrantRequest{ID: g.lease(), TTL: []int64{100, 1000, 5000, 9000000000, 9000000001, math.MaxInt64}[g.rand.IntN(6)]}
		if r.ID == 0 {
			r.TTL = []int64{100, 0, 1, 2, 3, -1, math.MinInt64}[g.rand.IntN(7)]
		}
		return request{msg: r}
	case k < 88:
		return request{msg: &pb.LeaseRevokeRequest{ID: g.lease()}}
	case k < 90:
		return request{msg: &pb.LeaseKeepAliveRequest{ID: g.lease()}}
	case k < 94:
		return request{msg: &pb.LeaseTimeToLiveRequest{ID: g.lease(), Keys: g.one(2)}}
	case k < 96:
		return request{msg: &pb.LeaseLeasesRequest{}}
	case k < 98:
		return request{msg: &pb.StatusRequest{}}
	case k < 99:
		return request{msg: &pb.MemberListRequest{Linearizable: g.one(2)}}
	}
	return request{msg: &pb.PutRequest{Key: []byte("big" + strings.Repeat("k", g.rand.IntN(3000))), Value: g.value()}}
}

func (g *generator) watchID() int64 {
	if g.one(20) {
		return []int64{-2, math.MaxInt64}[g.rand.IntN(2)]
	}
	return g.rand.Int64N(5)
}

// create makes the request of a watch.
func (g *generator) create() *pb.WatchCreateRequest {
	r := &pb.WatchCreateRequest{
		Key: g.key(), RangeEnd: g.end(), PrevKv: g.one(2), Fragment: g.one(4), WatchId: g.watchID(),
	}
	if g.one(2) {
		r.WatchId = 0
	}
	if g.one(2) {
		r.StartRevision = g.anyRev()
	}
	for range g.rand.IntN(2) {
		r.Filters = append(r.Filters, pb.WatchCreateRequest_FilterType(g.rand.IntN(3)))
	}
	return r
}
