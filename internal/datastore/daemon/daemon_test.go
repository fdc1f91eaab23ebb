package daemon

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"microk8s/internal/datastore/server"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/grpclog"
)

// The test binary is also the daemon, for tests that kill it.
func TestMain(m *testing.M) {
	switch os.Getenv("TEST_K8S_DQLITE") {
	case "1":
		var faults Faults
		if err := json.Unmarshal([]byte(cmp.Or(os.Getenv("TEST_FAULTS"), "{}")), &faults); err != nil {
			panic(err)
		}
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, os.Getenv, faults.into))
	case "tool":
		os.Exit(Tool(os.Args[1:], os.Stdout, os.Stderr))
	case "ask":
		if err := askNode(os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Clients that outlive their daemon complain at length.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	os.Exit(m.Run())
}

// Faults are what tests do to a daemon, to see that they find it.
type Faults struct {
	NoBarrier bool // reads are answered without a round
	Twice     bool // what is put is put twice
	FromOwn   bool // see member.Options; no fault
}

func (f Faults) into(c *Config) {
	c.fromOwn = f.FromOwn
	c.backend = func(b server.Backend) server.Backend { return faulty{b, f} }
}

// faulty is a datastore with faults.
type faulty struct {
	server.Backend
	faults Faults
}

func (f faulty) Barrier(ctx context.Context) error {
	if f.faults.NoBarrier {
		return nil
	}
	return f.Backend.Barrier(ctx)
}

func (f faulty) Txn(ctx context.Context, r *pb.TxnRequest, size int) (*pb.TxnResponse, error) {
	resp, err := f.Backend.Txn(ctx, r, size)
	if err == nil && resp.Succeeded && f.faults.Twice {
		again := &pb.TxnRequest{}
		for _, op := range r.Success {
			if op.GetRequestPut() != nil {
				again.Success = append(again.Success, op)
			}
		}
		if len(again.Success) > 0 {
			_, _ = f.Backend.Txn(ctx, again, size)
		}
	}
	return resp, err
}

// writeKeyPair makes the pair that a setup would have made, with a quicker kind of key.
func writeKeyPair(t testing.TB, dir string, dnsNames ...string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "k8s"}, DNSNames: dnsNames,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "cluster.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
	writeFile(t, filepath.Join(dir, "cluster.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// newDir makes the storage directory of a new first member.
func newDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	writeKeyPair(t, dir, "node")
	writeFile(t, filepath.Join(dir, "init.yaml"), []byte("Address: "+freeAddress(t)+"\n"))
	return dir
}

// process is a daemon inside the test.
type process struct {
	t      testing.TB
	cfg    *Config
	log    *lockedBuffer
	cancel context.CancelFunc
	done   chan error
	client *clientv3.Client
}

type lockedBuffer struct {
	mu  chan struct{}
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu <- struct{}{}
	defer func() { <-b.mu }()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu <- struct{}{}
	defer func() { <-b.mu }()
	return b.buf.String()
}

func config(dir string) *Config {
	return &Config{
		StorageDir: dir, Listen: "unix://" + filepath.Join(dir, "kine.sock:12379"), EnableTLS: true,
		ProgressInterval: 100 * time.Millisecond, StorageAction: "none",
	}
}

// start runs a daemon on the directory until stop or the end of the test.
func start(t testing.TB, dir string) *process {
	t.Helper()
	return startConfig(t, config(dir))
}

func startConfig(t testing.TB, cfg *Config) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{t: t, cfg: cfg, log: &lockedBuffer{mu: make(chan struct{}, 1)}, cancel: cancel, done: make(chan error, 1)}
	ready := make(chan struct{})
	go func() {
		p.done <- Run(ctx, p.cfg, "", slog.New(slog.NewTextHandler(p.log, nil)), func() { close(ready) })
	}()
	select {
	case <-ready:
	case err := <-p.done:
		t.Fatalf("the daemon did not start: %v\n%s", err, p.log)
	}
	p.client = dial(t, p.cfg.Listen)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", p.log)
		}
		p.stop()
	})
	return p
}

func (p *process) stop() {
	if p.cancel == nil {
		return
	}
	p.client.Close()
	p.cancel()
	p.cancel = nil
	if err := <-p.done; err != nil {
		p.t.Errorf("the daemon ended with an error: %v", err)
	}
}

func clientConfig(listen string) clientv3.Config {
	return clientv3.Config{
		Endpoints: []string{listen}, DialTimeout: 10 * time.Second, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())},
	}
}

func dial(t testing.TB, listen string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientConfig(listen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestRefusesToStart(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		want    []string
	}{
		{"no key pair", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "cluster.key")) }, []string{"cluster.key", "microk8s start"}},
		{"no DNS name", func(t *testing.T, dir string) { writeKeyPair(t, dir) }, []string{"cluster.crt", "DNS"}},
		{"another pair's key", func(t *testing.T, dir string) {
			crt, _ := os.ReadFile(filepath.Join(dir, "cluster.crt"))
			writeKeyPair(t, dir, "node")
			writeFile(t, filepath.Join(dir, "cluster.crt"), crt)
		}, []string{"not a key pair"}},
		{"nothing says who it is", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "init.yaml")) }, []string{"init.yaml", "info.yaml"}},
		{"empty address", func(t *testing.T, dir string) { writeFile(t, filepath.Join(dir, "init.yaml"), []byte("Address: \n")) }, []string{"init.yaml", "Address"}},
		{"foreign file", func(t *testing.T, dir string) { writeFile(t, filepath.Join(dir, "open-1"), nil) }, []string{"open-1", "init.yaml"}},
		{"half identity", func(t *testing.T, dir string) {
			os.Rename(filepath.Join(dir, "init.yaml"), filepath.Join(dir, "info.yaml"))
			writeFile(t, filepath.Join(dir, "info.yaml"), []byte("ID: 1\nAddress: 127.0.0.1:1\nRole: 0\n"))
		}, []string{"inconsistent info.yaml and cluster.yaml"}},
		{"several members", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "init.yaml"))
			writeFile(t, filepath.Join(dir, "info.yaml"), []byte("ID: 1\nAddress: 127.0.0.1:1\nRole: 0\n"))
			writeFile(t, filepath.Join(dir, "cluster.yaml"), []byte("- ID: 1\n  Address: 127.0.0.1:1\n  Role: 0\n- ID: 2\n  Address: 127.0.0.1:2\n  Role: 0\n"))
			writeFile(t, filepath.Join(dir, "update.yaml"), []byte("Address: 127.0.0.1:3\n"))
		}, []string{"2 members"}},
		{"bad tuning", func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, "tuning.yaml"), []byte("snapshot: {trailing: 7}\n"))
		}, []string{"tuning.yaml", "512"}},
		{"bad failure domain", func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, "failure-domain"), []byte("rack"))
		}, []string{"failure-domain"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := newDir(t)
			tc.prepare(t, dir)
			err := Run(testContext(t), config(dir), "", slog.New(slog.DiscardHandler), nil)
			if err == nil {
				t.Fatal("it started")
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not name %q", err, w)
				}
			}
			if _, err := os.Stat(filepath.Join(dir, "kine.sock:12379")); err == nil {
				t.Error("it listens")
			}
		})
	}
}

func TestAddressChange(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	p := start(t, dir)
	ctx := testContext(t)
	put, err := p.client.Put(ctx, "/a", "1")
	if err != nil {
		t.Fatal(err)
	}
	p.stop()
	address := freeAddress(t)
	writeFile(t, filepath.Join(dir, "update.yaml"), []byte("Address: "+address+"\n"))
	p = start(t, dir)
	for _, name := range []string{"info.yaml", "cluster.yaml"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !strings.Contains(string(data), address) {
			t.Errorf("%s does not name the new address: %q, %v", name, data, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "update.yaml")); err == nil {
		t.Error("update.yaml is still there")
	}
	got, err := p.client.Get(ctx, "/a")
	if err != nil || len(got.Kvs) != 1 || got.Kvs[0].ModRevision != put.Header.Revision {
		t.Fatalf("after the change: %v, %v", got, err)
	}
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal("it does not listen on the new address")
	}
	conn.Close()
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		args    string
		listen  string
		warning string
		err     string
	}{
		{args: "", listen: "tcp://127.0.0.1:12379"},
		{args: "--listen=", listen: "unix://kine.sock"},
		{args: "--listen unix:///x/kine.sock:12379", listen: "unix:///x/kine.sock:12379"},
		{args: "--listen=http://x", err: "--listen"},
		{args: "--min-tls-version=ssl3", err: "--min-tls-version"},
		{args: "--log-level=loud", warning: "--log-level"},
		{args: "--low-available-storage-action=panic", err: "--low-available-storage-action"},
		{args: "--low-available-storage-action=handover"},
		{args: "--disk-mode", err: "--disk-mode"},
		{args: "--otel --otel-dir=/x --otel-listen=a:1 --otel-span-name-filter=f --otel-span-min-duration-filter=1s", warning: "--otel"},
		{args: "--datastore-max-idle-connections=1 --datastore-max-open-connections=1 --datastore-connection-max-lifetime=1s --datastore-connection-max-idle-time=1s --watch-query-timeout=1s", warning: "--watch-query-timeout"},
		{args: "--admission-control-policy limit --admission-control-policy-tx-max-concurrent=5 --debug", warning: "--admission-control-policy"},
		{args: "--metrics --metrics-listen=:1 --profiling --profiling-listen=:2 --profiling-dir=/x --enable-tls=false --tls-client-session-cache-size=3 --watch-storage-available-size-interval=1s --watch-storage-available-size-min-bytes=5 --watch-progress-notify-interval=1s"},
		{args: "--no-such-flag", err: "no-such-flag"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			var got *Config
			cmd := NewCommand(strings.Fields(tc.args), func(_ *cobra.Command, c *Config) error { got = c; return nil }, nil)
			err := cmd.Execute()
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v does not name %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if tc.listen != "" && got.Listen != tc.listen {
				t.Errorf("listens on %s", got.Listen)
			}
			if joined := strings.Join(got.Warnings, "\n"); !strings.Contains(joined, tc.warning) || tc.warning == "" && joined != "" {
				t.Errorf("warnings: %q", joined)
			}
		})
	}
}

func TestSocketModeAndStaleSocket(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	path := filepath.Join(dir, "kine.sock:12379")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	p := start(t, dir)
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("the socket: %v, %v", fi, err)
	}
	if _, err := listen(p.cfg.Listen); err == nil || !strings.Contains(err.Error(), "another datastore") {
		t.Errorf("a socket in use was taken: %v", err)
	}
}
