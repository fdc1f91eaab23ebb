// Command proxy measures the API server proxy side by side with HAProxy, both real processes on
// this machine in front of the same servers, in one run, and prints every figure with the ratio
// to HAProxy's. The measurements take turns, so that what else the machine does meets both.
//
// Nothing fails because of a figure.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"microk8s/internal/kubeconfig"
	"microk8s/tests/bench/report"
)

// serverVar makes this program a server at that address.
const (
	serverVar = "BENCH_PROXY_SERVER"
	certVar   = "BENCH_PROXY_CERTIFICATE" // and its key, in one file
)

func main() {
	if address := os.Getenv(serverVar); address != "" {
		fmt.Fprintln(os.Stderr, serve(address, os.Getenv(certVar)))
		os.Exit(1)
	}
	build := flag.String("build", "build", "the folder of `make build` and `make peers`")
	during := flag.Duration("during", 2*time.Second, "how long each measurement of each round lasts")
	rounds := flag.Int("rounds", 3, "how many rounds; the median of each figure counts")
	only := flag.String("only", "", "measure only the lines whose name contains this")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := measure(ctx, *build, *page, *only, *during, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const servers = 3

// target is a way to the servers.
type target struct {
	name    string
	address string
	pid     int // 0 for the direct way
}

func measure(ctx context.Context, build, page, only string, during time.Duration, rounds int) (err error) {
	dir, err := os.MkdirTemp("", "bench-proxy-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var started []*exec.Cmd
	defer func() {
		for _, c := range started {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	}()
	start := func(address string, env []string, argv ...string) (*exec.Cmd, error) {
		c := exec.CommandContext(ctx, argv[0], argv[1:]...)
		c.Env = append(os.Environ(), env...)
		log, err := os.Create(filepath.Join(dir, strings.ReplaceAll(address, ":", "-")+".log"))
		if err != nil {
			return nil, err
		}
		defer log.Close()
		c.Stdout, c.Stderr = log, log
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := c.Start(); err != nil {
			return nil, err
		}
		started = append(started, c)
		for limit := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				return c, conn.Close()
			}
			if time.Now().After(limit) {
				text, _ := os.ReadFile(log.Name())
				return nil, fmt.Errorf("%s does not listen on %s: %w\n%s", argv[0], address, err, text)
			}
		}
	}
	if err := certificate(dir); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	b := &bench{ctx: ctx, during: during}
	for i := range servers {
		a, err := free(fmt.Sprintf("127.0.0.%d", i+2))
		if err != nil {
			return err
		}
		b.servers = append(b.servers, a)
		b.start = append(b.start, func() (*exec.Cmd, error) {
			return start(a, []string{serverVar + "=" + a, certVar + "=" + filepath.Join(dir, "server.pem")}, self)
		})
		c, err := b.start[i]()
		if err != nil {
			return err
		}
		b.processes = append(b.processes, c)
	}
	ours, err := free("127.0.0.1")
	if err != nil {
		return err
	}
	static := filepath.Join(dir, "traefik.yaml")
	provider := filepath.Join(dir, "provider.yaml")
	list := "tcp:\n  services:\n    kube-apiserver:\n      loadBalancer:\n        servers:\n"
	backend := ""
	for i, a := range b.servers {
		list += "        - address: " + a + "\n"
		backend += fmt.Sprintf("  server s%d %s check check-ssl verify none inter 1s fall 2 rise 1 on-marked-down shutdown-sessions\n", i, a)
	}
	theirs, err := free("127.0.0.1")
	if err != nil {
		return err
	}
	for path, text := range map[string]string{
		static:   fmt.Sprintf("entryPoints: {apiserver: {address: %q}}\nproviders: {file: {filename: %q}}\n", ours, provider),
		provider: list,
		filepath.Join(dir, "haproxy.cfg"): fmt.Sprintf("global\n  maxconn 8000\ndefaults\n  mode tcp\n  timeout connect 3s\n  timeout client 1h\n  timeout server 1h\n  timeout check 1s\n"+
			"  retries 3\n  option redispatch 1\n  option httpchk GET /readyz\nlisten api\n  bind %s\n  balance roundrobin\n%s", theirs, backend),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	proxy, err := start(ours, nil, filepath.Join(build, "bin/apiserver-proxy"), "--traefik-config", static, "--kubeconfig", filepath.Join(dir, "kubelet.config"), "--refresh-interval", "0")
	if err != nil {
		return err
	}
	haproxy, err := start(theirs, nil, filepath.Join(build, "haproxy/haproxy"), "-db", "-f", filepath.Join(dir, "haproxy.cfg"))
	if err != nil {
		return err
	}
	targets := []target{{"direct", b.servers[0], 0}, {"apiserver-proxy", ours, proxy.Process.Pid}, {"HAProxy", theirs, haproxy.Process.Pid}}

	type row struct {
		what, unit string
		higher     bool // is better
		f          func(target) (float64, error)
		once       bool
		direct     bool
	}
	rows := []row{
		{"bulk, 1 connection", "MB/s", true, func(t target) (float64, error) { return b.bulk(t, 1) }, false, true},
		{"bulk, 16 connections", "MB/s", true, func(t target) (float64, error) { return b.bulk(t, 16) }, false, true},
		{"question and answer, 1 caller, p50", "µs", false, func(t target) (float64, error) { return b.answers(t, 1, 50) }, false, true},
		{"question and answer, 1 caller, p99", "µs", false, func(t target) (float64, error) { return b.answers(t, 1, 99) }, false, true},
		{"questions answered, 64 callers", "/s", true, func(t target) (float64, error) { return b.answers(t, 64, 0) }, false, true},
		{"new TLS connection, 1 caller, p50", "µs", false, func(t target) (float64, error) { return b.connects(t, 1, 50) }, false, true},
		{"new TLS connections, 16 callers", "/s", true, func(t target) (float64, error) { return b.connects(t, 16, 0) }, false, true},
		{"resident memory with 500 connections", "MiB", false, b.memory, true, false},
		{"server killed: longest gap of 8 clients", "ms", false, func(t target) (float64, error) { return b.gap(t, syscall.SIGKILL) }, true, false},
		{"server frozen: longest gap of 8 clients", "ms", false, func(t target) (float64, error) { return b.gap(t, syscall.SIGSTOP) }, true, false},
	}
	rows = slices.DeleteFunc(rows, func(r row) bool { return !strings.Contains(r.what, only) })
	figures := map[string][]float64{}
	for round := range rounds {
		for _, r := range rows {
			if r.once && round != rounds-1 {
				continue
			}
			for _, t := range targets {
				if t.pid == 0 && !r.direct {
					continue
				}
				fmt.Fprintf(os.Stderr, "round %d: %s, %s\n", round+1, r.what, t.name)
				v, err := r.f(t)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", r.what, t.name, err)
				}
				figures[r.what+t.name] = append(figures[r.what+t.name], v)
			}
		}
	}
	table := &report.Table{
		Title: "The API server proxy beside HAProxy", Part: "proxy", Head: []string{"what", "direct", "apiserver-proxy", "HAProxy", "ratio", "wanted"},
		About: fmt.Sprintf("Medians of %d rounds. The ratio is the proxy's figure by HAProxy's.", rounds),
	}
	for _, r := range rows {
		cell := map[string]string{}
		middle := map[string]float64{}
		for _, t := range targets {
			all := figures[r.what+t.name]
			if len(all) == 0 {
				continue
			}
			slices.Sort(all)
			middle[t.name] = all[len(all)/2]
			cell[t.name] = fmt.Sprintf("%.0f %s", middle[t.name], r.unit)
		}
		wanted := "≤ 1"
		if r.higher {
			wanted = "≥ 1"
		}
		ratio := fmt.Sprintf("%.2f", middle["apiserver-proxy"]/middle["HAProxy"])
		table.Rows = append(table.Rows, []string{r.what, cell["direct"], cell["apiserver-proxy"], cell["HAProxy"], ratio, wanted})
	}
	return table.Write(os.Stdout, page)
}

func free(host string) (string, error) {
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// certificate makes that of the servers, and a kubeconfig with which the proxy checks them.
func certificate(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(filepath.Join(dir, "server.pem"), append(cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...), 0o600); err != nil {
		return err
	}
	config, err := kubeconfig.Config{CA: cert, Server: "https://127.0.0.1:1", User: "bench"}.Encode()
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "kubelet.config"), config, 0o600)
}

// The first byte of a connection says what the server does: a TLS greeting gets a TLS server
// that answers questions, 'b' bytes without end, anything else its questions back. A question is
// 128 bytes.
const question = 128

func serve(address, pemFile string) error {
	pair, err := tls.LoadX509KeyPair(pemFile, pemFile)
	if err != nil {
		return err
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			first := make([]byte, 1)
			if _, err := io.ReadFull(conn, first); err != nil {
				return
			}
			switch first[0] {
			case 'b':
				buf := make([]byte, 1<<20)
				for {
					if _, err := conn.Write(buf); err != nil {
						return
					}
				}
			case 22:
				answer(tls.Server(&again{conn, first}, config))
			default:
				answer(&again{conn, first})
			}
		}()
	}
}

// again is a connection whose first byte has been read.
type again struct {
	net.Conn
	first []byte
}

func (a *again) Read(p []byte) (int, error) {
	if len(a.first) > 0 {
		n := copy(p, a.first)
		a.first = a.first[n:]
		return n, nil
	}
	return a.Conn.Read(p)
}

func answer(conn net.Conn) {
	buf := make([]byte, question)
	if _, err := io.ReadFull(conn, buf[:4]); err != nil {
		return
	}
	if string(buf[:4]) == "GET " { // a health check
		_, _ = conn.Read(buf)
		_, _ = fmt.Fprint(conn, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
		return
	}
	if _, err := io.ReadFull(conn, buf[4:]); err != nil {
		return
	}
	if _, err := conn.Write(buf); err != nil {
		return
	}
	for {
		if _, err := io.ReadFull(conn, buf); err != nil {
			return
		}
		if _, err := conn.Write(buf); err != nil {
			return
		}
	}
}

type bench struct {
	ctx       context.Context
	during    time.Duration
	servers   []string
	processes []*exec.Cmd
	start     []func() (*exec.Cmd, error)
}

// bulk returns megabytes a second, over all connections.
func (b *bench) bulk(t target, connections int) (float64, error) {
	var wg sync.WaitGroup
	var total atomic.Int64
	errs := make(chan error, connections)
	began := time.Now()
	for range connections {
		wg.Go(func() {
			conn, err := net.Dial("tcp", t.address)
			if err != nil {
				errs <- err
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(began.Add(b.during))
			if _, err := conn.Write([]byte("b")); err != nil {
				errs <- err
				return
			}
			buf := make([]byte, 256<<10)
			for {
				n, err := conn.Read(buf)
				total.Add(int64(n))
				if errors.Is(err, os.ErrDeadlineExceeded) {
					return
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return 0, err
	default:
	}
	return float64(total.Load()) / 1e6 / time.Since(began).Seconds(), nil
}

// ask sends one question and waits for the answer.
func ask(conn net.Conn, buf []byte) error {
	if _, err := conn.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, buf)
	return err
}

// repeat runs f in so many goroutines until the time is up, and gives the percentile of its
// times in microseconds, or with 0 how often it ran in a second.
func (b *bench) repeat(callers, percentile int, f func(caller int) error) (float64, error) {
	var wg sync.WaitGroup
	times := make([][]time.Duration, callers)
	errs := make([]error, callers)
	began := time.Now()
	for i := range callers {
		wg.Go(func() {
			for time.Since(began) < b.during && b.ctx.Err() == nil {
				one := time.Now()
				if errs[i] = f(i); errs[i] != nil {
					return
				}
				times[i] = append(times[i], time.Since(one))
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	all := slices.Concat(times...)
	if err := errors.Join(append(errs, b.ctx.Err())...); err != nil {
		return 0, err
	}
	if percentile == 0 {
		return float64(len(all)) / took.Seconds(), nil
	}
	slices.Sort(all)
	return float64(all[len(all)*percentile/100].Nanoseconds()) / 1e3, nil
}

func (b *bench) answers(t target, callers, percentile int) (float64, error) {
	conns := make([]net.Conn, callers)
	for i := range conns {
		conn, err := net.Dial("tcp", t.address)
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		conns[i] = conn
	}
	return b.repeat(callers, percentile, func(i int) error { return ask(conns[i], make([]byte, question)) })
}

var insecure = &tls.Config{InsecureSkipVerify: true, ClientSessionCache: nil} // its own servers, on this machine

func (b *bench) connects(t target, callers, percentile int) (float64, error) {
	return b.repeat(callers, percentile, func(int) error {
		conn, err := tls.Dial("tcp", t.address, insecure)
		if err != nil {
			return err
		}
		defer conn.Close()
		return ask(conn, make([]byte, question))
	})
}

// memory returns the resident memory of the proxy while 500 connections are open.
func (b *bench) memory(t target) (float64, error) {
	for range 500 {
		conn, err := net.Dial("tcp", t.address)
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		if err := ask(conn, make([]byte, question)); err != nil {
			return 0, err
		}
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			var kB float64
			_, err := fmt.Sscan(v, &kB)
			return kB / 1024, err
		}
	}
	return 0, errors.New("the kernel does not say how much memory the process has")
}

// gap returns the longest time in which a client got no answer, while one of the servers is hit
// by a signal. Clients ask all the time, and connect again when their connection ends.
func (b *bench) gap(t target, sig syscall.Signal) (float64, error) {
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	var wg sync.WaitGroup
	var longest atomic.Int64
	var ready sync.WaitGroup
	for i := range 8 {
		ready.Add(1)
		wg.Go(func() {
			var conn net.Conn
			told := false
			last := time.Now()
			for ctx.Err() == nil {
				if conn == nil {
					c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", t.address, insecure)
					if err != nil {
						continue
					}
					conn = c
				}
				buf := make([]byte, question)
				binary.BigEndian.PutUint64(buf, uint64(i))
				_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
				if err := ask(conn, buf); err != nil {
					conn.Close()
					conn = nil
					continue
				}
				if !told {
					told = true
					ready.Done()
				} else {
					g := int64(time.Since(last))
					for old := longest.Load(); g > old && !longest.CompareAndSwap(old, g); old = longest.Load() {
					}
				}
				last = time.Now()
				time.Sleep(time.Millisecond)
			}
			if conn != nil {
				conn.Close()
			}
		})
	}
	ready.Wait()
	longest.Store(0)
	if err := b.processes[1].Process.Signal(sig); err != nil {
		return 0, err
	}
	select {
	case <-time.After(15 * time.Second):
	case <-ctx.Done():
	}
	cancel()
	if sig == syscall.SIGSTOP {
		if err := b.processes[1].Process.Signal(syscall.SIGCONT); err != nil {
			return 0, err
		}
	} else {
		_ = b.processes[1].Wait()
		c, err := b.start[1]()
		if err != nil {
			return 0, err
		}
		b.processes[1] = c
	}
	wg.Wait()
	select {
	case <-time.After(3 * time.Second): // both proxies find it well again
	case <-b.ctx.Done():
	}
	return float64(longest.Load()) / 1e6, b.ctx.Err()
}
