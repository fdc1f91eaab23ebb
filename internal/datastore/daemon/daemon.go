// Package daemon is the program k8s-dqlite: flags, start order, listening, signals, metrics
// and the check for free space. What it starts is in the packages beside it.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	rpprof "runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"time"

	"microk8s/internal/datastore/dqlitetool"
	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/replica"
	"microk8s/internal/datastore/server"
	"microk8s/internal/datastore/state"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/snapenv"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/grpclog"
)

// HealthKey and HealthValue are what the API server's probe reads.
const (
	HealthKey   = "/registry/health"
	HealthValue = `{"health":"true"}`
)

const shutdownTimeout = 30 * time.Second

// sameFile says that two paths lead to the same directory.
func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// Main runs the program and returns its exit status.
func Main(args []string, stdout, stderr io.Writer, getenv func(string) string) int {
	return run(args, stdout, stderr, getenv, nil)
}

func run(args []string, stdout, stderr io.Writer, getenv func(string) string, change func(*Config)) int {
	// SIGPWR is what lxd sends to containers.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGPWR)
	defer stop()
	// What gRPC says of connections that fail is said by the callers, with the reason.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	cmd := NewCommand(args, func(cmd *cobra.Command, c *Config) error {
		if change != nil {
			change(c)
		}
		log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.Level}))
		c.snapRevision = getenv("SNAP_REVISION")
		if env := snapenv.FromEnviron(getenv); sameFile(c.StorageDir, env.BackendLive()) {
			c.marker = env.BackendMarker()
		}
		return live(cmd.Context(), c, getenv("SNAP_INSTANCE_NAME"), log, nil)
	}, versions)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	if err := cmd.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(stderr, "k8s-dqlite: "+err.Error())
		return 1
	}
	return 0
}

// Tool runs the program dqlite and returns its exit status.
func Tool(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	cmd := dqlitetool.NewCommand(member.Reconfigure)
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	if err := cmd.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(stderr, "Error: "+err.Error())
		return 1
	}
	return 0
}

func versions() []string {
	out := []string{"go " + strings.TrimPrefix(runtime.Version(), "go")}
	for i, v := range member.Versions() {
		out = append(out, []string{"sqlite ", "dqlite ", "libuv "}[i]+v)
	}
	return out
}

// Run is the daemon's life: it returns after ctx has ended and everything is closed, or when
// something cannot be started or goes wrong for good. ready, if not nil, is called when the
// API is being served. No address is listened on before the data is usable.
func Run(ctx context.Context, c *Config, snapInstance string, log *slog.Logger, ready func()) (err error) {
	for _, w := range c.Warnings {
		log.Warn(w)
	}
	if c.ProfilingDir != "" {
		stop, err := cpuProfile(c.ProfilingDir)
		if err != nil {
			return err
		}
		defer stop()
	}
	if err := replica.Recall(ctx, c.StorageDir, c.MinTLSVersion, !c.EnableTLS, log); err != nil {
		return err
	}
	m, err := member.Start(member.Options{
		Dir: c.StorageDir, Logger: log, MinTLSVersion: c.MinTLSVersion, TLSSessionCache: c.TLSCache,
		DisableTLS: !c.EnableTLS, SnapInstance: snapInstance, FromOwn: c.fromOwn,
		Marker: c.marker, SnapRevision: c.snapRevision,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	r := replica.Start(replica.Options{Member: m, Logger: log, ClusterID: member.BootstrapID, Quota: c.Quota})
	defer r.Close()
	e := r.Engine()
	serving, stopServing := context.WithCancel(context.Background())
	defer stopServing()
	mem := findMemory("/")
	waitMembers, err := peers.Serve(serving, c.StorageDir, log, func() []peers.Member {
		members := r.Members()
		for i := range members {
			if members[i].Self {
				members[i].Memory = mem.usage()
			}
		}
		return members
	})
	if err != nil {
		return err
	}
	defer waitMembers()
	var watching sync.WaitGroup
	watching.Go(func() { mem.watch(serving, log) })
	defer watching.Wait()
	defer stopServing()
	begin := time.Now()
	if err := r.Ready(ctx); err != nil {
		return err
	}
	if err := createHealthKey(ctx, r); err != nil {
		return fmt.Errorf("the datastore takes no writes: %w", err)
	}
	if err := storedir.Dir(c.StorageDir).SettleDamage(time.Now().UTC()); err != nil {
		log.Warn("cannot write down that the files are in order", "err", err)
	}
	log.Info("data loaded", "revision", e.Rev(), "keys", e.Keys(), "seconds", time.Since(begin).Seconds())

	metrics := newMetrics(r)
	id := m.Node().ID
	backend := server.Backend(r)
	if c.backend != nil {
		backend = c.backend(r)
	}
	s := server.New(server.Options{
		Engine: e, Backend: backend, Logger: log, ClusterID: member.BootstrapID, MemberID: id, ClientURL: c.Listen,
		ProgressInterval: c.ProgressInterval,
	})
	g := s.GRPC(grpc.ChainUnaryInterceptor(metrics.unary))
	listener, err := listen(c.Listen)
	if err != nil {
		return err
	}
	// What ends by itself ends the daemon, with the reason.
	fatal := make(chan error, 8)
	var wg sync.WaitGroup
	background := func(name string, fn func() error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := fn(); err != nil {
				fatal <- fmt.Errorf("%s: %w", name, err)
			}
		}()
	}
	run, stop := context.WithCancel(ctx)
	defer func() {
		stop()
		done := make(chan struct{})
		go func() {
			s.Close()
			g.GracefulStop()
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(shutdownTimeout / 3):
			g.Stop() // a client that does not read its stream
		}
		wg.Wait()
		// Whoever can serve goes on without a pause.
		give, cancel := context.WithTimeout(context.Background(), shutdownTimeout/2)
		defer cancel()
		if err := r.Handover(give); err != nil {
			log.Warn("role and leadership stay with this member", "err", err)
		}
	}()
	background("cannot serve the etcd API", func() error { return g.Serve(listener) })
	if c.Metrics {
		mux := http.NewServeMux()
		mux.Handle("/metrics", promhttp.HandlerFor(metrics.registry, promhttp.HandlerOpts{}))
		if err := serveHTTP(run, background, "metrics", c.MetricsListen, mux); err != nil {
			return err
		}
	}
	if c.Profiling {
		mux := http.NewServeMux()
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
		if err := serveHTTP(run, background, "profiling", c.ProfilingListen, mux); err != nil {
			return err
		}
	}
	if c.ScrubInterval > 0 {
		background("the datastore's files", func() error { return scrub(run, c, log, r) })
	}
	if c.StorageInterval > 0 {
		background("low storage", func() error { return watchStorage(run, c, log, m, r) })
	}
	log.Info("serving", "listen", c.Listen, "member", m.Node().Address, "id", id)
	if ready != nil {
		ready()
	}
	select {
	case <-ctx.Done():
		log.Info("shutting down")
		return nil
	case err := <-r.Fatal():
		return err
	case err := <-fatal:
		if errors.Is(err, errTerminate) {
			log.Warn("stopping", "reason", err)
			return nil
		}
		return err
	}
}

// createHealthKey makes the key if it is missing. It waits for a leader as long as it takes.
func createHealthKey(ctx context.Context, r *replica.Replica) error {
	// Beyond the quota not even this transaction is taken, which would change nothing.
	exists := false
	_ = r.Engine().View(func(st *state.State) error {
		got, err := st.Range(&pb.RangeRequest{Key: []byte(HealthKey), CountOnly: true})
		exists = err == nil && got.Count > 0
		return nil
	})
	if exists {
		return nil
	}
	create := &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte(HealthKey), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(HealthKey), Value: []byte(HealthValue)}}}},
	}
	for {
		attempt, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := r.Txn(attempt, create, 0)
		cancel()
		if err == nil || ctx.Err() != nil || errors.Is(err, dslog.ErrNoSpace) {
			return err
		}
		select {
		case err := <-r.Fatal():
			return err
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond): // an outcome that is not known may be asked for again
		}
	}
}

// listen binds --listen. A stale socket is removed, one that answers is not.
func listen(where string) (net.Listener, error) {
	network, address, err := splitListen(where)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		if conn, err := net.DialTimeout("unix", address, time.Second); err == nil {
			conn.Close()
			return nil, fmt.Errorf("cannot listen on %s: another datastore answers there", address)
		}
		if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("cannot remove the stale socket: %w", err)
		}
		// Created with its mode: there is no moment at which others may connect.
		defer syscall.Umask(syscall.Umask(0o177))
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s (from --listen): %w", address, err)
	}
	return l, nil
}

func serveHTTP(ctx context.Context, background func(string, func() error), name, address string, h http.Handler) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("cannot serve %s: %w; change --%s-listen", name, err, name)
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { srv.Close() })
	background("cannot serve "+name, func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	return nil
}

func cpuProfile(dir string) (stop func(), err error) {
	f, err := os.Create(filepath.Join(dir, "cpu_profile.raw"))
	if err != nil {
		return nil, fmt.Errorf("cannot write a profile: %w", err)
	}
	if err := rpprof.StartCPUProfile(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot profile: %w", err)
	}
	return func() { rpprof.StopCPUProfile(); f.Close() }, nil
}

var errTerminate = errors.New("free space is below --watch-storage-available-size-min-bytes")

// watchStorage takes the chosen action while free space is low.
func watchStorage(ctx context.Context, c *Config, log *slog.Logger, m *member.Member, r *replica.Replica) error {
	t := time.NewTicker(c.StorageInterval)
	defer t.Stop()
	low := false
	for {
		if free, err := m.Free(); err != nil {
			log.Warn("cannot read the free space", "directory", c.StorageDir, "err", err)
		} else {
			was := low
			low = free < c.StorageMin
			switch {
			case low && c.StorageAction == "terminate":
				return errTerminate
			case low && !was:
				r.LowDisk(true)
				log.Error("the disk is nearly full", "directory", c.StorageDir, "free", free, "action", c.StorageAction)
			case was && !low:
				r.LowDisk(false)
				log.Info("the disk has space again", "directory", c.StorageDir, "free", free)
			}
			if low && c.StorageAction == "handover" { // again, if leadership came back
				give, cancel := context.WithTimeout(ctx, shutdownTimeout/3)
				if err := r.Yield(give); err != nil && !was {
					log.Warn("leadership stays here", "err", err)
				}
				cancel()
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}
