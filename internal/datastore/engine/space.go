package engine

import (
	"context"
	"errors"
	"maps"
	"slices"

	dslog "microk8s/internal/datastore/log"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// DefaultQuota is etcd's --quota-backend-bytes.
const DefaultQuota = 2 << 30

// Errors of alarms, as etcd has them: with NOSPACE nothing is written that may grow the data, with CORRUPT
// nothing at all.
var (
	ErrNoSpace = errors.New("database space exceeded")
	ErrCorrupt = errors.New("corrupt cluster")
)

// Space is how much of the quota is used.
type Space struct {
	Bytes  int64         // see state.State.Bytes
	Quota  int64         // 0: there is none
	Alarms []dslog.Alarm // that stand, where they are known: on the member that leads
}

// Space returns how much of the quota is used.
func (e *Engine) Space() Space {
	e.mu.RLock()
	defer e.mu.RUnlock()
	s := Space{Quota: max(e.opt.Quota, 0), Alarms: e.sortedAlarms()}
	if e.st != nil {
		s.Bytes = e.st.Bytes()
	}
	return s
}

// sortedAlarms returns the alarms. The caller holds the lock.
func (e *Engine) sortedAlarms() []dslog.Alarm {
	return slices.SortedFunc(maps.Keys(e.alarms), func(a, b dslog.Alarm) int {
		if a.Type != b.Type {
			return int(a.Type) - int(b.Type)
		}
		if a.Member < b.Member {
			return -1
		}
		return 1
	})
}

func (e *Engine) raised(t pb.AlarmType) bool {
	for a := range e.alarms {
		if a.Type == t {
			return true
		}
	}
	return false
}

// admit decides whether a request may be staged that etcd charges with cost. The caller holds the lock.
func (t *term) admit(cost int64) error {
	switch {
	case t.raised(pb.AlarmType_CORRUPT):
		return ErrCorrupt
	case cost == 0:
		return nil
	case t.raised(pb.AlarmType_NOSPACE):
		return ErrNoSpace
	case t.opt.Quota > 0 && t.st.Bytes()+cost >= t.opt.Quota:
		t.overQuota = true
		return ErrNoSpace
	}
	return nil
}

// raise raises the alarm for a request that admit has refused. Whoever writes calls it.
func (t *term) raise(ctx context.Context) {
	if !t.overQuota {
		return
	}
	t.overQuota = false
	a := dslog.Alarm{Member: t.opt.Member, Type: pb.AlarmType_NOSPACE}
	if err := t.setAlarm(ctx, a, true); err != nil {
		t.opt.Logger.Error("the alarm cannot be raised; the next write that is refused tries again", "err", err)
		return
	}
	t.opt.Logger.Error("writes are refused: the datastore has reached its quota (--quota-backend-bytes); delete what is not needed, "+
		"then run: microk8s dbctl disarm", "bytes", t.st.Bytes(), "quota", t.opt.Quota)
}

func (t *term) setAlarm(ctx context.Context, a dslog.Alarm, on bool) error {
	if t.opt.Full() {
		return errFull
	}
	if err := t.log.SetAlarm(ctx, a, on); err != nil {
		return t.broken(ctx, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if on {
		t.alarms[a] = struct{}{}
	} else {
		delete(t.alarms, a)
	}
	return nil
}

// readAlarms takes over the alarms of the log.
func (t *term) readAlarms(ctx context.Context) error {
	list, err := t.log.Alarms(ctx)
	if err != nil {
		return err
	}
	alarms := make(map[dslog.Alarm]struct{}, len(list))
	for _, a := range list {
		alarms[a] = struct{}{}
	}
	t.mu.Lock()
	t.alarms = alarms
	t.mu.Unlock()
	return nil
}

// Alarm lists, raises or ends alarms, as etcd does. Only the leader knows.
func (e *Engine) Alarm(ctx context.Context, r *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	resp := &pb.AlarmResponse{}
	err := e.do(ctx, &job{alone: func(ctx context.Context, t *term) error {
		a := dslog.Alarm{Member: r.MemberID, Type: r.Alarm}
		_, stands := e.alarms[a]
		list := []dslog.Alarm{a}
		switch r.Action {
		case pb.AlarmRequest_GET:
			list = slices.DeleteFunc(e.sortedAlarms(), func(o dslog.Alarm) bool { return r.Alarm != pb.AlarmType_NONE && o.Type != r.Alarm })
		case pb.AlarmRequest_ACTIVATE:
			if r.Alarm == pb.AlarmType_NONE {
				return nil
			}
			if !stands {
				if err := t.setAlarm(ctx, a, true); err != nil {
					return err
				}
			}
		case pb.AlarmRequest_DEACTIVATE:
			if !stands {
				return nil
			}
			if err := t.setAlarm(ctx, a, false); err != nil {
				return err
			}
			e.opt.Logger.Info("an alarm was ended", "alarm", r.Alarm.String())
		default:
			return nil
		}
		for _, a := range list {
			resp.Alarms = append(resp.Alarms, &pb.AlarmMember{MemberID: a.Member, Alarm: a.Type})
		}
		return nil
	}})
	return resp, err
}
