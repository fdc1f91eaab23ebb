// Package flood is a load of slow, huge and many requests on a cluster agent, from many sources
// at once, with honest calls beside it. The attack suite and the bench run it against the real
// program; nothing of the product imports it.
package flood

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/internal/certs"
	"microk8s/internal/snapenv"
)

// Agent is a running cluster-agent of a control-plane node whose API server does not run.
type Agent struct {
	Address string // host:port on the loopback
	Secret  string // the callback secret of its node
	cmd     *exec.Cmd
	log     string // file
}

// Start runs the program below dir, which must be empty and is not removed. Stop ends it.
func Start(ctx context.Context, program, dir string) (*Agent, error) {
	env := snapenv.Under(dir)
	for _, d := range []string{env.LocksDir(), env.ArgsDir(), env.CredentialsDir(), env.Backend(), env.LaunchDir()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if _, err := certs.New(env, certs.Options{}).Ensure(ctx); err != nil {
		return nil, err
	}
	a := &Agent{Secret: strings.Repeat("5e", 32), log: filepath.Join(dir, "agent.log")}
	if err := os.WriteFile(env.Credential(callback.FileName), []byte(a.Secret), 0o600); err != nil {
		return nil, err
	}
	port, err := freePort(ctx)
	if err != nil {
		return nil, err
	}
	a.Address = net.JoinHostPort("127.0.0.1", port)
	log, err := os.Create(a.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	a.cmd = exec.Command(program, "--bind", a.Address, "--certfile", env.Cert("server.crt"), "--keyfile", env.Cert("server.key"))
	a.cmd.Env = env.Environ(os.Environ())
	a.cmd.Stdout, a.cmd.Stderr = log, log
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	for ctx.Err() == nil { // the program says nothing when it is ready
		if _, err := a.Honest(ctx); err == nil {
			return a, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	text, _ := os.ReadFile(a.log)
	a.Stop()
	return nil, fmt.Errorf("the agent does not answer: %w\n%s", ctx.Err(), text)
}

// Stop ends the program.
func (a *Agent) Stop() {
	_ = a.cmd.Process.Kill()
	_ = a.cmd.Wait()
}

func freePort(ctx context.Context) (string, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

// Memory returns the resident memory of the program in bytes, now and at its peak.
func (a *Agent) Memory() (now, peak int64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		if to := map[string]*int64{"VmRSS": &now, "VmHWM": &peak}[name]; to != nil {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, 0, err
			}
			*to = n << 10
		}
	}
	return now, peak, lines.Err()
}

// honestTimeout bounds one honest call; it is far above what a call takes.
const honestTimeout = 15 * time.Second

// Honest makes a new connection, asks for the agent's health and calls configure with the right
// secret. It returns how long the slower of the two took.
func (a *Agent) Honest(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, honestTimeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DialContext:     from(netip.MustParseAddr("127.0.0.1")).DialContext,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // a load, and no check of certificates
	}}
	defer client.CloseIdleConnections()
	body, err := json.Marshal(api.ConfigureRequest{Callback: a.Secret})
	if err != nil {
		return 0, err
	}
	var slowest time.Duration
	for _, call := range []struct {
		method, path string
		body         []byte
	}{{http.MethodGet, api.PathHealth, nil}, {http.MethodPost, api.PathConfigure, body}} {
		began := time.Now()
		req, err := http.NewRequestWithContext(ctx, call.method, "https://"+a.Address+call.path, bytes.NewReader(call.body))
		if err != nil {
			return 0, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return 0, err
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("%s: %d %s (%v)", call.path, resp.StatusCode, answer, fmt.Sprint(err))
		}
		slowest = max(slowest, time.Since(began))
	}
	return slowest, nil
}

func from(source netip.Addr) *net.Dialer {
	return &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0)), Timeout: 5 * time.Second}
}

// Source returns the address of the n-th source, in 127.66.0.0/16.
func Source(n int) netip.Addr { return netip.AddrFrom4([4]byte{127, 66, byte(n >> 8), byte(n)}) }

// attacker is one source.
type attacker struct {
	address string
	dialer  *net.Dialer
	huge    tls.Certificate
	tries   *atomic.Int64
}

// Attack loads the agent from so many sources until ctx ends, then returns how many times
// something was tried.
func Attack(ctx context.Context, address string, sources int) (tries int64, err error) {
	huge, err := hugeCertificate()
	if err != nil {
		return 0, err
	}
	var count atomic.Int64
	var group sync.WaitGroup
	for n := range sources {
		a := attacker{address: address, dialer: from(Source(n + 1)), huge: huge, tries: &count}
		for _, kind := range []func(context.Context) error{
			a.silent, a.silent, a.silent, a.slowHeaders, a.slowHeaders, a.slowBody, a.slowBody, a.slowBody,
			a.hugeBody, a.endlessBody, a.hugeHeaders, a.hugeHandshake, a.wrongSecrets, a.wrongImports, a.manyCalls, a.newConnections,
		} {
			group.Go(func() {
				for ctx.Err() == nil {
					count.Add(1)
					_ = kind(ctx) // refused is what it should be
					select {      // one machine plays all sources: leave it time for the agent
					case <-ctx.Done():
					case <-time.After(200 * time.Millisecond):
					}
				}
			})
		}
	}
	group.Wait()
	return count.Load(), nil
}

func (a attacker) tls(ctx context.Context, cert ...tls.Certificate) (*tls.Conn, func(), error) {
	d := &tls.Dialer{NetDialer: a.dialer, Config: &tls.Config{InsecureSkipVerify: true, Certificates: cert}} // an attacker
	raw, err := d.DialContext(ctx, "tcp", a.address)
	if err != nil {
		return nil, nil, err
	}
	conn := raw.(*tls.Conn)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return conn, func() { stop(); conn.NetConn().Close() }, nil
}

// silent connects and says nothing.
func (a attacker) silent(ctx context.Context) error {
	conn, err := a.dialer.DialContext(ctx, "tcp", a.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err = conn.Read(make([]byte, 1))
	return err
}

// trickle writes a byte from time to time until the other side has enough.
func trickle(ctx context.Context, conn net.Conn) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			if _, err := conn.Write([]byte("x")); err != nil {
				return err
			}
		}
	}
}

func (a attacker) slowHeaders(ctx context.Context) error {
	conn, end, err := a.tls(ctx)
	if err != nil {
		return err
	}
	defer end()
	if _, err := fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: x\r\nX-A: %s", strings.Repeat("a", 15<<10)); err != nil {
		return err
	}
	return trickle(ctx, conn)
}

// bomb is a body of n bytes that takes forty times as much when it is decoded.
func bomb(n int) string {
	const open, end = `{"callback":"x","service":[{}`, `]}`
	return open + strings.Repeat(",{}", (n-len(open)-len(end))/3) + end
}

func (a attacker) slowBody(ctx context.Context) error {
	conn, end, err := a.tls(ctx)
	if err != nil {
		return err
	}
	defer end()
	const size = 64 << 10
	if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", api.PathConfigure, size, bomb(size-1000)); err != nil {
		return err
	}
	return trickle(ctx, conn)
}

// post sends one request on a new connection and reads the answer.
func (a attacker) post(ctx context.Context, path string, body io.Reader, length int, header ...string) error {
	conn, end, err := a.tls(ctx)
	if err != nil {
		return err
	}
	defer end()
	if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n", path, length, strings.Join(append(header, ""), "\r\n")); err != nil {
		return err
	}
	if _, err := io.Copy(conn, body); err != nil {
		return err
	}
	_, err = io.ReadAll(conn)
	return err
}

func (a attacker) hugeBody(ctx context.Context) error {
	body := bomb(1 << 20)
	return a.post(ctx, api.PathConfigure, strings.NewReader(body), len(body))
}

func (a attacker) endlessBody(ctx context.Context) error {
	return a.post(ctx, api.PathJoin, io.LimitReader(blanks{}, 8<<20), 1<<40)
}

func (a attacker) hugeHeaders(ctx context.Context) error {
	conn, end, err := a.tls(ctx)
	if err != nil {
		return err
	}
	defer end()
	if _, err := fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: x\r\nX-A: %s", strings.Repeat("a", 1<<20)); err != nil {
		return err
	}
	return trickle(ctx, conn)
}

// hugeHandshake shows a certificate of 200 kB.
func (a attacker) hugeHandshake(ctx context.Context) error {
	conn, end, err := a.tls(ctx, a.huge)
	if err != nil {
		return err
	}
	defer end()
	return trickle(ctx, conn)
}

func (a attacker) wrongSecrets(ctx context.Context) error {
	body := bomb(60 << 10)
	return a.post(ctx, api.PathConfigure, strings.NewReader(body), len(body))
}

func (a attacker) wrongImports(ctx context.Context) error {
	return a.post(ctx, api.PathImageImport, io.LimitReader(blanks{}, 4<<20), 4<<20, api.HeaderCallback+": x")
}

// manyCalls asks over one connection as fast as it is answered.
func (a attacker) manyCalls(ctx context.Context) error {
	conn, end, err := a.tls(ctx)
	if err != nil {
		return err
	}
	defer end()
	answers := bufio.NewReader(conn)
	for ctx.Err() == nil {
		a.tries.Add(1)
		if _, err := io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	return ctx.Err()
}

// newConnections makes handshakes only.
func (a attacker) newConnections(ctx context.Context) error {
	for range 10 {
		a.tries.Add(1)
		_, end, err := a.tls(ctx)
		if err != nil {
			return err
		}
		end()
	}
	return nil
}

// blanks is a body that JSON allows without an end.
type blanks struct{}

func (blanks) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func hugeCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Value: make([]byte, 200<<10)}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// Report is what a load did to an agent.
type Report struct {
	Before, Peak time.Duration // the median of honest calls without the load, and the slowest under it
	Median       time.Duration // under it
	Honest       int           // calls under it
	Failed       []error       // honest calls that were not answered as they should be
	Tries        int64         // of the attackers
	Idle, Most   int64         // resident memory before, and at the peak, in bytes
}

// Run loads an agent from so many sources for a time while honest calls go on.
func Run(ctx context.Context, a *Agent, sources int, during time.Duration) (r Report, err error) {
	var quiet []time.Duration
	for range 10 {
		d, err := a.Honest(ctx)
		if err != nil {
			return r, fmt.Errorf("before the load: %w", err)
		}
		quiet = append(quiet, d)
	}
	r.Before = median(quiet)
	if r.Idle, _, err = a.Memory(); err != nil {
		return r, err
	}
	load, cancel := context.WithTimeout(ctx, during)
	defer cancel()
	attacked := make(chan error, 1)
	go func() {
		var err error
		r.Tries, err = Attack(load, a.Address, sources)
		attacked <- err
	}()
	var took []time.Duration
	for load.Err() == nil {
		d, err := a.Honest(ctx)
		if err != nil {
			r.Failed = append(r.Failed, err)
		} else {
			took = append(took, d)
		}
		select {
		case <-load.Done():
		case <-time.After(250 * time.Millisecond): // within what one source may do
		}
	}
	if err := <-attacked; err != nil {
		return r, err
	}
	r.Honest = len(took) + len(r.Failed)
	if len(took) > 0 {
		r.Median, r.Peak = median(took), slices.Max(took)
	}
	_, r.Most, err = a.Memory()
	if errors.Is(err, os.ErrNotExist) {
		err = errors.New("the agent ended under the load")
	}
	return r, err
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
