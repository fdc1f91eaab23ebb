package main

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"microk8s/internal/pki"
)

// target is one datastore under measurement: one process, or several that are one cluster.
type target struct {
	name    string
	members []*member
	// commits and commitTime are its metrics of how many times it has written its log, and of
	// the seconds that took; "" where it has none.
	commits, commitTime string
	clients             [][]*clientv3.Client // for each member
}

// member is one process of a target.
type member struct {
	endpoint string
	metrics  string // URL; "" where there are none
	dir      string
	argv     []string
	cmd      *exec.Cmd
	exited   chan struct{} // closed when cmd has ended
}

// connections to each member: an API server has several, and one alone would be the limit.
const connections = 4

// startLimit bounds the wait for a process that was started.
const startLimit = 2 * time.Minute

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// pair writes the key pair with which members of a target talk to each other.
func pair(certFile, keyFile string) error {
	var maker pki.Maker
	key, err := maker.Key(2048)
	if err != nil {
		return err
	}
	cert, err := maker.Issue(pki.Request{
		Subject: pkix.Name{CommonName: "k8s"}, DNSNames: []string{"bench"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)},
		Days: 1, ServerAuth: true, ClientAuth: true,
	}, key.Public(), nil, key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(certFile, pki.EncodeCert(cert), 0o600); err != nil {
		return err
	}
	return os.WriteFile(keyFile, pki.EncodeKey(key), 0o600)
}

// newOurs prepares n daemons in folders below dir. The members trust the one key pair that they share.
func newOurs(program, dir string, n int) (*target, error) {
	t := &target{name: "k8s-dqlite", commits: "k8s_dqlite_write_groups_total", commitTime: "k8s_dqlite_write_seconds_total"}
	first := ""
	for i := range n {
		m := &member{dir: filepath.Join(dir, "ours-"+strconv.Itoa(i))}
		peer, err := freeAddress()
		if err != nil {
			return nil, err
		}
		if m.endpoint, err = freeAddress(); err != nil {
			return nil, err
		}
		init := "Address: " + peer + "\n"
		if i == 0 {
			first = peer
		} else {
			init += "Cluster: [" + strconv.Quote(first) + "]\n"
		}
		if err := os.MkdirAll(m.dir, 0o700); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(m.dir, "init.yaml"), []byte(init), 0o600); err != nil {
			return nil, err
		}
		if i > 0 {
			for _, name := range []string{"cluster.crt", "cluster.key"} {
				if err := os.Link(filepath.Join(t.members[0].dir, name), filepath.Join(m.dir, name)); err != nil {
					return nil, err
				}
			}
		} else if err := pair(filepath.Join(m.dir, "cluster.crt"), filepath.Join(m.dir, "cluster.key")); err != nil {
			return nil, err
		}
		metrics, err := freeAddress()
		if err != nil {
			return nil, err
		}
		m.metrics = "http://" + metrics + "/metrics"
		m.argv = []string{program, "--storage-dir=" + m.dir, "--listen=tcp://" + m.endpoint, "--metrics", "--metrics-listen=" + metrics}
		t.members = append(t.members, m)
	}
	return t, nil
}

// newEtcd prepares n members of etcd, which syncs every write, as ours does. Its members use TLS
// with each other, as ours do, and as kubeadm sets it up.
func newEtcd(program, dir string, n int) (*target, error) {
	t := &target{name: "etcd", commits: "etcd_disk_wal_fsync_duration_seconds", commitTime: "etcd_disk_wal_fsync_duration_seconds"}
	var cluster []string
	peers := make([]string, n)
	cert, key := filepath.Join(dir, "etcd.crt"), filepath.Join(dir, "etcd.key")
	if err := pair(cert, key); err != nil {
		return nil, err
	}
	for i := range n {
		m := &member{dir: filepath.Join(dir, "etcd-"+strconv.Itoa(i))}
		var err error
		if peers[i], err = freeAddress(); err != nil {
			return nil, err
		}
		if m.endpoint, err = freeAddress(); err != nil {
			return nil, err
		}
		cluster = append(cluster, fmt.Sprintf("m%d=https://%s", i, peers[i]))
		t.members = append(t.members, m)
	}
	for i, m := range t.members {
		m.metrics = "http://" + m.endpoint + "/metrics"
		m.argv = []string{
			program, "--name=m" + strconv.Itoa(i), "--data-dir=" + m.dir, "--log-level=error",
			"--listen-client-urls=http://" + m.endpoint, "--advertise-client-urls=http://" + m.endpoint,
			"--listen-peer-urls=https://" + peers[i], "--initial-advertise-peer-urls=https://" + peers[i],
			"--peer-cert-file=" + cert, "--peer-key-file=" + key, "--peer-trusted-ca-file=" + cert, "--peer-client-cert-auth",
			"--initial-cluster=" + strings.Join(cluster, ","), "--initial-cluster-state=new",
			"--quota-backend-bytes=8589934592",
		}
	}
	return t, nil
}

// newKine prepares kine on SQLite, whose default it is to acknowledge before a write is on disk.
func newKine(program, dir string) (*target, error) {
	m := &member{dir: filepath.Join(dir, "kine")}
	var err error
	if m.endpoint, err = freeAddress(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return nil, err
	}
	m.argv = []string{program, "--listen-address=tcp://" + m.endpoint, "--metrics-bind-address=0",
		"--endpoint=sqlite://" + filepath.Join(m.dir, "state.db") + "?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate"}
	return &target{name: "kine", members: []*member{m}}, nil
}

// start runs the processes and waits until each answers.
func (t *target) start(ctx context.Context) error {
	for _, m := range t.members {
		if err := m.start(); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	t.clients = nil
	for i, m := range t.members {
		if err := m.ready(ctx); err != nil {
			return fmt.Errorf("%s, member %d: %w", t.name, i, err)
		}
		var clients []*clientv3.Client
		for range connections {
			c, err := m.client()
			if err != nil {
				return err
			}
			clients = append(clients, c)
		}
		t.clients = append(t.clients, clients)
	}
	return t.firstLeads(ctx)
}

// firstLeads sees to it that the first member leads: what is measured on it is measured on the
// leader, for each target. The first of our daemons leads because it made the cluster, and the others
// join it; etcd is told.
func (t *target) firstLeads(ctx context.Context) error {
	if len(t.members) == 1 {
		return nil
	}
	first, err := t.client(0, 0).Status(ctx, t.members[0].endpoint)
	if err != nil {
		return fmt.Errorf("%s: %w", t.name, err)
	}
	for i, m := range t.members {
		s, err := t.client(i, 0).Status(ctx, m.endpoint)
		if err != nil {
			return fmt.Errorf("%s, member %d: %w", t.name, i, err)
		}
		if s.Header.MemberId != s.Leader {
			continue
		}
		if i == 0 {
			return nil
		}
		if _, err := t.client(i, 0).MoveLeader(ctx, first.Header.MemberId); err != nil {
			return fmt.Errorf("%s: the first member cannot be made the leader: %w", t.name, err)
		}
		return nil
	}
	return fmt.Errorf("%s: nobody leads", t.name)
}

func (m *member) start() error {
	log, err := os.OpenFile(m.dir+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	m.cmd = exec.Command(m.argv[0], m.argv[1:]...)
	m.cmd.Stdout, m.cmd.Stderr = log, log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return err
	}
	m.exited = make(chan struct{})
	go func() {
		defer close(m.exited)
		_ = m.cmd.Wait()
	}()
	return nil
}

// ready waits until a read is answered.
func (m *member) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	c, err := m.client()
	if err != nil {
		return err
	}
	defer c.Close()
	for {
		try, cancel := context.WithTimeout(ctx, time.Second)
		_, err := c.Get(try, "/ready")
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it does not answer: %w; its log is %s.log", err, m.dir)
		case <-m.exited:
			return fmt.Errorf("it ended; its log is %s.log", m.dir)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (m *member) client() (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Endpoints: []string{"http://" + m.endpoint}, DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
		MaxCallSendMsgSize: 16 << 20, MaxCallRecvMsgSize: 1 << 30})
}

// stop ends the processes in good order.
func (t *target) stop() error {
	for _, clients := range t.clients {
		for _, c := range clients {
			_ = c.Close()
		}
	}
	t.clients = nil
	var errs []error
	for _, m := range t.members {
		if m.cmd == nil {
			continue
		}
		_ = m.cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, m := range t.members {
		if m.cmd == nil {
			continue
		}
		select {
		case <-m.exited:
		case <-time.After(startLimit):
			errs = append(errs, fmt.Errorf("%s does not stop and is killed", t.name))
			_ = m.cmd.Process.Kill()
			<-m.exited
		}
		m.cmd = nil
	}
	return errors.Join(errs...)
}

// client returns the connection that caller n uses, on one member.
func (t *target) client(member, n int) *clientv3.Client {
	c := t.clients[member%len(t.clients)]
	return c[n%len(c)]
}

// usage is what the processes of a target have used.
type usage struct {
	cpu     time.Duration // user and system time of all members together
	rss     int64         // bytes, of the largest member
	written int64         // bytes to disk by all members
}

func (t *target) usage() (u usage, err error) {
	for _, m := range t.members {
		dir := filepath.Join("/proc", strconv.Itoa(m.cmd.Process.Pid))
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			return u, err
		}
		_, rest, _ := strings.Cut(string(stat), ") ") // the name may hold anything
		f := strings.Fields(rest)
		if len(f) < 13 {
			return u, fmt.Errorf("%s/stat is short", dir)
		}
		for _, ticks := range f[11:13] { // utime, stime (proc_pid_stat(5)), in 1/100 s
			n, _ := strconv.ParseInt(ticks, 10, 64)
			u.cpu += time.Duration(n) * 10 * time.Millisecond
		}
		u.rss = max(u.rss, field(dir+"/status", "VmRSS:")*1024)
		u.written += field(dir+"/io", "write_bytes:")
	}
	return u, nil
}

// committed asks the members how many times they have written their logs, and how long it took.
func (t *target) committed(ctx context.Context) (times, seconds float64, err error) {
	for _, m := range t.members {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.metrics, nil)
		if err != nil {
			return 0, 0, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, 0, err
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(resp.Body)
		resp.Body.Close()
		if err != nil {
			return 0, 0, fmt.Errorf("%s: %w", m.metrics, err)
		}
		one := func(name string, count bool) float64 {
			f := families[name]
			if f == nil || len(f.Metric) == 0 {
				return 0
			}
			switch h := f.Metric[0].GetHistogram(); {
			case h == nil:
				return f.Metric[0].GetCounter().GetValue()
			case count:
				return float64(h.GetSampleCount())
			default:
				return h.GetSampleSum()
			}
		}
		times += one(t.commits, true)
		seconds += one(t.commitTime, false)
	}
	return times, seconds, nil
}

// field returns the number behind a name in a file of /proc.
func field(path, name string) int64 {
	data, _ := os.ReadFile(path)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			if f := strings.Fields(rest); len(f) > 0 {
				n, _ := strconv.ParseInt(f[0], 10, 64)
				return n
			}
		}
	}
	return 0
}
