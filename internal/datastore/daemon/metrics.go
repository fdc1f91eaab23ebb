package daemon

import (
	"context"
	"strings"
	"time"

	"microk8s/internal/datastore/replica"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec
}

func newMetrics(rep *replica.Replica) *metrics {
	e := rep.Engine()
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gauge := func(name, help string, fn func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "k8s_dqlite", Name: name, Help: help}, fn))
	}
	counter := func(name, help string, fn func() float64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "k8s_dqlite", Name: name, Help: help}, fn))
	}
	truth := func(fn func() bool) func() float64 {
		return func() float64 {
			if fn() {
				return 1
			}
			return 0
		}
	}
	st := e.Stats()
	gauge("revision", "Committed revision.", func() float64 { return float64(e.Rev()) })
	gauge("compacted_revision", "Revision of the last compaction.", func() float64 { return float64(max(e.Compacted(), 0)) })
	gauge("keys", "Live keys.", func() float64 { return float64(e.Keys()) })
	gauge("watches", "Open watches.", func() float64 { return float64(e.Hub().Len()) })
	gauge("db_size_bytes", "Size of the database.", func() float64 { n, _ := rep.Size(); return float64(n) })
	gauge("data_bytes", "Bytes of all versions that can be read, which the quota limits.", func() float64 { return float64(rep.Space().Bytes) })
	gauge("quota_bytes", "The quota, 0: none.", func() float64 { return float64(rep.Space().Quota) })
	gauge("alarms", "Alarms that stand.", func() float64 { return float64(len(rep.Space().Alarms)) })
	gauge("leads", "1 if this member leads.", truth(e.Leads))
	gauge("has_leader", "1 if this member knows a leader.", truth(rep.HasLeader))
	counter("write_groups_total", "Statements that committed a group of transactions.", func() float64 { return float64(st.Groups.Load()) })
	counter("write_rows_total", "Rows committed.", func() float64 { return float64(st.Rows.Load()) })
	counter("write_bytes_total", "Bytes of keys and values committed.", func() float64 { return float64(st.Bytes.Load()) })
	counter("write_failures_total", "Statements that failed.", func() float64 { return float64(st.Failures.Load()) })
	counter("write_seconds_total", "Seconds spent in committing.", func() float64 { return time.Duration(st.GroupSeconds.Load()).Seconds() })
	calls := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "k8s_dqlite", Name: "call_seconds", Help: "Duration of calls of the etcd API.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
	}, []string{"method", "code"})
	r.MustRegister(calls)
	return &metrics{registry: r, calls: calls}
}

func (m *metrics) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := next(ctx, req)
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	m.calls.WithLabelValues(method, status.Code(err).String()).Observe(time.Since(start).Seconds())
	return resp, err
}
