// Command security measures what the audit log and encryption at rest cost: two nodes in the lab, of the
// same build, one with and one without both, in turns, in one run. It prints a table of ratios; nothing fails
// because of a figure.
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
	"sync/atomic"
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
	pairs := flag.Int("pairs", 16, "how many pairs of turns there are")
	during := flag.Duration("during", 4*time.Second, "how long each figure of a turn is measured")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *build, *page, *pairs, *during); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const (
	callers = 32   // of the write rate
	size    = 1000 // bytes of each ConfigMap
)

// The switches. Without encryption new data is written as it is, and what is encrypted can be read.
const (
	off = `set -e
d=/var/snap/microk8s/current
cp -n $d/args/kube-apiserver /root/kube-apiserver.on; cp -n $d/var/kubernetes/backend/encryption.yaml /root/encryption.on
grep -v -e '^--audit-' /root/kube-apiserver.on >$d/args/kube-apiserver
sed -e '/identity: {}/d' -e 's/^- providers:/&\n  - identity: {}/' /root/encryption.on >$d/var/kubernetes/backend/encryption.yaml`
	on = `set -e
d=/var/snap/microk8s/current
cp /root/kube-apiserver.on $d/args/kube-apiserver; cp /root/encryption.on $d/var/kubernetes/backend/encryption.yaml`
	restart = `microk8s stop && microk8s start && microk8s status --wait-ready --timeout 180`
)

// figures are of one turn: writes a second; milliseconds; milliseconds of CPU that kubelite takes for a write
// of many callers, which other work on the machine changes least.
type figures struct{ rate, median, p99, cpu float64 }

// pair is two turns that follow each other.
type pair struct{ without, with figures }

// run measures on two nodes of one machine, of which one has both switched off. They take turns of seconds, so
// that what else the machine does meets both alike, and change their parts half way, so that what differs
// between the nodes counts for nothing.
func run(ctx context.Context, build, page string, pairs int, during time.Duration) (err error) {
	l, err := lab.New(lab.Config{Instance: "benchsecurity", Snap: filepath.Join(build, "snap")})
	if err != nil {
		return err
	}
	if err := l.Down(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Down(context.WithoutCancel(ctx))) }()
	hosts := []string{"n1", "n2"}
	for _, host := range hosts {
		if err := l.Up(ctx, host, lab.Options{}); err != nil {
			return err
		}
		if _, err := l.Output(ctx, host, "microk8s", "start"); err != nil {
			return err
		}
	}
	var all []pair
	for half := range 2 {
		without, with := hosts[half], hosts[1-half]
		var turns [2]*turn
		for i, host := range []string{without, with} {
			script := off
			if i == 1 {
				script = off + "\n" + on
			}
			if _, err := l.Output(ctx, host, "sh", "-c", script+"\n"+restart); err != nil {
				return err
			}
			if turns[i], err = begin(ctx, l, host); err != nil {
				return err
			}
		}
		for n := -1; n < (pairs+half)/2; n++ { // the first pair is to warm up
			var got [2]figures
			for i := range got {
				if n%2 != 0 { // without first, then with first
					i = 1 - i
				}
				if got[i], err = turns[i].write(ctx, during); err != nil {
					return err
				}
			}
			fmt.Fprintf(os.Stderr, "%s without: %.0f writes/s, median %.2f ms, CPU %.3f ms a write; %s with: %.0f, %.2f, %.3f\n",
				without, got[0].rate, got[0].median, got[0].cpu, with, got[1].rate, got[1].median, got[1].cpu)
			if n >= 0 {
				all = append(all, pair{got[0], got[1]})
			}
		}
	}
	row := func(what, unit string, of func(figures) float64) []string {
		var a, b, ratios []float64
		for _, p := range all {
			a, b, ratios = append(a, of(p.without)), append(b, of(p.with)), append(ratios, 100*(of(p.with)/of(p.without)-1))
		}
		return []string{what, fmt.Sprintf("%.2f %s", at(a, 2), unit), fmt.Sprintf("%.2f %s", at(b, 2), unit), fmt.Sprintf("%+.1f %%", at(ratios, 2)), fmt.Sprintf("%+.1f to %+.1f %%", at(ratios, 1), at(ratios, 3))}
	}
	table := &report.Table{
		Title: "What the audit log and encryption at rest cost", Part: "security",
		Head: []string{"what", "without both", "with both", "difference in a pair", "half of the pairs"},
		About: fmt.Sprintf("Updates of ConfigMaps of %d bytes on two nodes of one machine, which take turns of %v for each figure: one has both, the other neither, and after half of the %d pairs they change parts. "+
			"Medians; the difference is the median of those within the pairs. Wanted: at most 5 %%.", size, during, len(all)),
		Rows: [][]string{
			row(fmt.Sprintf("writes, %d callers", callers), "/s", func(f figures) float64 { return f.rate }),
			row("latency of one caller, median", "ms", func(f figures) float64 { return f.median }),
			row("latency of one caller, 99 %", "ms", func(f figures) float64 { return f.p99 }),
			row("CPU of kubelite for one of those writes", "ms", func(f figures) float64 { return f.cpu }),
		},
	}
	return table.Write(os.Stdout, page)
}

// at returns a quarter of sorted values: 2 is the median.
func at(values []float64, quarter int) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[(len(sorted)-1)*quarter/4]
}

func connect(ctx context.Context, l *lab.Lab, host string) (*kubernetes.Clientset, error) {
	text, err := l.Output(ctx, host, "microk8s", "config", "--use-loopback")
	if err != nil {
		return nil, err
	}
	cfg, err := clientcmd.RESTConfigFromKubeConfig([]byte(text))
	if err != nil {
		return nil, err
	}
	cfg.QPS = -1
	cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return l.Dial(ctx, host, network, address)
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	return kubernetes.NewForConfig(cfg)
}

// used returns the CPU time that kubelite has taken, in milliseconds.
func used(ctx context.Context, l *lab.Lab, host string) (float64, error) {
	text, err := l.Output(ctx, host, "sh", "-c", "cat /proc/$(pidof -s kubelite)/stat; getconf CLK_TCK")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(text, ") ") // behind the name: the state is the third field (proc_pid_stat(5))
	f := strings.Fields(rest)
	if len(f) < 14 {
		return 0, fmt.Errorf("kubelite's times: %q", text)
	}
	var user, system, hertz float64
	if _, err := fmt.Sscan(strings.Join([]string{f[11], f[12], f[len(f)-1]}, " "), &user, &system, &hertz); err != nil {
		return 0, err
	}
	return (user + system) / hertz * 1000, nil
}

// turn is a node that takes turns.
type turn struct {
	client  *kubernetes.Clientset
	used    func() (float64, error)
	objects []*corev1.ConfigMap
}

// begin makes the ConfigMaps that are updated.
func begin(ctx context.Context, l *lab.Lab, host string) (*turn, error) {
	client, err := connect(ctx, l, host)
	if err != nil {
		return nil, err
	}
	t := &turn{client: client, used: func() (float64, error) { return used(ctx, l, host) }}
	maps := client.CoreV1().ConfigMaps("default")
	for i := range callers {
		name := fmt.Sprintf("bench-%d", i)
		if err := maps.Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !strings.Contains(err.Error(), "not found") {
			return nil, err
		}
		made, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"x": strings.Repeat("x", size)}}, metav1.CreateOptions{})
		if err != nil {
			return nil, err
		}
		t.objects = append(t.objects, made)
	}
	return t, nil
}

// write updates them: with one caller for the latency, then with many for the rate.
func (t *turn) write(ctx context.Context, during time.Duration) (figures, error) {
	maps := t.client.CoreV1().ConfigMaps("default")
	update := func(i, n int) error {
		t.objects[i].Data["x"] = fmt.Sprintf("%0*d", size, n)
		next, err := maps.Update(ctx, t.objects[i], metav1.UpdateOptions{})
		if err == nil {
			t.objects[i] = next
		}
		return err
	}
	var took []float64
	for end := time.Now().Add(during); time.Now().Before(end); {
		began := time.Now()
		if err := update(0, len(took)); err != nil {
			return figures{}, err
		}
		took = append(took, float64(time.Since(began))/float64(time.Millisecond))
	}
	if len(took) == 0 {
		return figures{}, errors.New("not one write was done in time; measure longer, with -during")
	}
	slices.Sort(took)
	before, err := t.used()
	if err != nil {
		return figures{}, err
	}
	var count atomic.Int64
	var first atomic.Pointer[error]
	var group sync.WaitGroup
	end := time.Now().Add(during)
	for i := range t.objects {
		group.Go(func() {
			for n := 0; time.Now().Before(end); n++ {
				if err := update(i, n); err != nil {
					first.CompareAndSwap(nil, &err)
					return
				}
				count.Add(1)
			}
		})
	}
	group.Wait()
	if err := first.Load(); err != nil {
		return figures{}, *err
	}
	after, err := t.used()
	if err != nil {
		return figures{}, err
	}
	writes := float64(count.Load())
	return figures{writes / during.Seconds(), took[len(took)/2], took[len(took)*99/100], (after - before) / writes}, nil
}
