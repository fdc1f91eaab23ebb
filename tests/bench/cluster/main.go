// Command cluster measures a cluster of three control plane nodes and a worker in the lab:
// joining, and how long clients wait when a node or an API server dies. It prints a table beside
// the budgets of the design; nothing fails because of a figure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/tests/bench/report"
	"microk8s/tests/lab"
)

func main() {
	build := flag.String("build", "build", "the folder of `make build`")
	rounds := flag.Int("rounds", 3, "how often a leader and each API server is killed")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *build, *page, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// The hosts; the first three are the control plane.
var (
	control = []string{"n1", "n2", "n3"}
	worker  = "w1"
)

// limit bounds every wait for the cluster to be well again.
const limit = 3 * time.Minute

type bench struct {
	lab  *lab.Lab
	rows [][3]string // what, figure, budget
}

func (b *bench) add(what, figure, budget string) {
	b.rows = append(b.rows, [3]string{what, figure, budget})
}

func run(ctx context.Context, build, page string, rounds int) (err error) {
	l, err := lab.New(lab.Config{Instance: "benchcluster", Snap: filepath.Join(build, "snap")})
	if err != nil {
		return err
	}
	if err := l.Down(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Down(context.WithoutCancel(ctx))) }()
	b := &bench{lab: l}
	for _, host := range append(slices.Clone(control), worker) {
		if err := l.Up(ctx, host, lab.Options{}); err != nil {
			return err
		}
		if _, err := l.Output(ctx, host, "microk8s", "start"); err != nil {
			return err
		}
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"joins", func() error { return b.joins(ctx) }},
		{"the leader's node is switched off", func() error { return b.leaders(ctx, rounds) }},
		{"an API server is killed", func() error { return b.apiServers(ctx, rounds) }},
	} {
		fmt.Fprintln(os.Stderr, "measuring:", step.what)
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	table := &report.Table{
		Title: "A cluster", Part: "cluster", Head: []string{"what", "measured", "budget"},
		About: "Three control-plane nodes and a worker, all on this machine.",
	}
	for _, r := range b.rows {
		table.Rows = append(table.Rows, r[:])
	}
	return table.Write(os.Stdout, page)
}

// join types the line that add-node prints.
func (b *bench) join(ctx context.Context, host string, flags ...string) (time.Duration, error) {
	out, err := b.lab.Output(ctx, control[0], append([]string{"microk8s", "add-node", "--format", "short"}, flags...)...)
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(out, "\n")
	began := time.Now()
	_, err = b.lab.Output(ctx, host, strings.Fields(line)...)
	return time.Since(began), err
}

func (b *bench) joins(ctx context.Context) error {
	for i, host := range control[1:] {
		took, err := b.join(ctx, host)
		if err != nil {
			return err
		}
		what := fmt.Sprintf("join of control plane node %d → Ready", i+2)
		if i == 1 { // two members have one voter
			began := time.Now()
			if err := b.available(ctx); err != nil {
				return err
			}
			b.add(what+" and three voters", seconds(took+time.Since(began)), "20 s")
			continue
		}
		b.add(what, seconds(took), "20 s")
	}
	took, err := b.join(ctx, worker, "--worker")
	b.add("join of a worker → Ready", seconds(took), "8 s")
	return err
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// available waits until the cluster tolerates the loss of a node.
func (b *bench) available(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		out, err := b.lab.Output(ctx, control[0], "microk8s", "status")
		if strings.Contains(out, "high-availability: yes") && strings.Contains(out, "the loss of any one node is tolerated") {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the cluster does not become highly available: %w\n%s", err, out)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// client is the administrator's, whose connections begin in a host.
func (b *bench) client(host string) (*kubernetes.Clientset, error) {
	kubeconfig, err := os.ReadFile(filepath.Join(b.lab.Root(control[0]), "var/snap/microk8s/current/credentials/client.config"))
	if err != nil {
		return nil, err
	}
	cfg, err := clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	cfg.Timeout = 10 * time.Second
	cfg.QPS = -1
	cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return b.lab.Dial(ctx, host, network, address)
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	return kubernetes.NewForConfig(cfg)
}

// leader returns the host whose datastore leads.
func (b *bench) leader(ctx context.Context, ask string) (string, error) {
	const backend = "/var/snap/microk8s/current/var/kubernetes/backend/"
	out, err := b.lab.Output(ctx, ask, "/snap/microk8s/current/bin/dqlite", "-s", "file://"+backend+"cluster.yaml",
		"-c", backend+"cluster.crt", "-k", backend+"cluster.key", "-f", "json", "k8s", ".leader")
	if err != nil {
		return "", err
	}
	for _, host := range control {
		ip, err := b.lab.IP(host)
		if err != nil {
			return "", err
		}
		if strings.Contains(out, ip+":") {
			return host, nil
		}
	}
	return "", fmt.Errorf("no host is the leader %q", out)
}

// leaders switches the node of the leader off, and measures until a write through another
// node is answered.
func (b *bench) leaders(ctx context.Context, rounds int) error {
	var gaps []time.Duration
	for round := range rounds {
		leader, err := b.leader(ctx, control[round%len(control)])
		if err != nil {
			return err
		}
		gap, err := b.writeGap(ctx, leader, round)
		if err != nil {
			return err
		}
		gaps = append(gaps, gap)
		if err := b.lab.Start(ctx, leader); err != nil {
			return err
		}
		if err := b.available(ctx); err != nil {
			return err
		}
	}
	slices.Sort(gaps)
	b.add("leader's node off → next write through another", fmt.Sprintf("%s (worst of %d: %s)", seconds(gaps[len(gaps)/2]), rounds, seconds(gaps[len(gaps)-1])), "3 s")
	return nil
}

// writeGap kills a host while writes go to the others, and gives the time from then until the
// first write is answered that began after it.
func (b *bench) writeGap(ctx context.Context, leader string, round int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	type write struct{ began, answered time.Time }
	answered := make(chan write, 1024)
	var wg sync.WaitGroup
	defer wg.Wait()
	writing, stop := context.WithCancel(ctx)
	defer stop()
	for _, host := range control {
		if host == leader {
			continue
		}
		c, err := b.client(host)
		if err != nil {
			return 0, err
		}
		wg.Go(func() {
			for n := 0; writing.Err() == nil; n++ {
				w := write{began: time.Now()}
				_, err := c.CoreV1().ConfigMaps("default").Create(writing, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
					Name: fmt.Sprintf("write-%d-%s-%d", round, host, n)}}, metav1.CreateOptions{})
				if w.answered = time.Now(); err == nil {
					select {
					case answered <- w:
					case <-writing.Done():
					}
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	for range 20 { // they flow
		select {
		case <-answered:
		case <-ctx.Done():
			return 0, errors.New("no writes are answered")
		}
	}
	killed := time.Now()
	if err := b.lab.Kill(ctx, leader); err != nil {
		return 0, err
	}
	for {
		select {
		case w := <-answered:
			// An answer may have been on its way when the host died.
			if w.began.After(killed) && w.answered.Sub(killed) > 200*time.Millisecond {
				return w.answered.Sub(killed), nil
			}
		case <-ctx.Done():
			return 0, errors.New("no write was answered after the leader's death")
		}
	}
}

// apiServers kills the process of each API server in turn, and measures the longest time for
// which a client on the worker, behind the proxy, waits for an answer.
func (b *bench) apiServers(ctx context.Context, rounds int) error {
	c, err := b.client(worker)
	if err != nil {
		return err
	}
	var stalls []time.Duration
	failed := 0
	for round := range rounds {
		host := control[round%len(control)]
		watching, stop := context.WithTimeout(ctx, 15*time.Second)
		last, worst := time.Now(), time.Duration(0)
		killed := false
		began := time.Now()
		for watching.Err() == nil {
			_, err := c.CoreV1().Namespaces().Get(watching, "default", metav1.GetOptions{})
			if err == nil {
				worst = max(worst, time.Since(last))
				last = time.Now()
			} else if watching.Err() == nil {
				failed++
			}
			if !killed && time.Since(began) > time.Second {
				killed = true
				if _, err := b.lab.Output(ctx, host, "pkill", "-KILL", "-x", "kubelite"); err != nil {
					stop()
					return err
				}
			}
			time.Sleep(10 * time.Millisecond)
		}
		stop()
		stalls = append(stalls, max(worst, time.Since(last)))
		if err := b.nodesReady(ctx); err != nil {
			return err
		}
	}
	slices.Sort(stalls)
	b.add("API server killed → stall of a client behind the proxy", fmt.Sprintf("%s (worst of %d: %s; %d failed requests)",
		seconds(stalls[len(stalls)/2]), rounds, seconds(stalls[len(stalls)-1]), failed), "3 s")
	return nil
}

// nodesReady waits until all nodes are Ready and their API servers answer.
func (b *bench) nodesReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for _, host := range control {
		c, err := b.client(host)
		if err != nil {
			return err
		}
		for {
			_, err := c.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
			if err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("the API server of %s: %w", host, err)
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
	return nil
}
