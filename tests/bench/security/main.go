// Command security measures what the audit log and encryption at rest cost: one node in the lab, the
// same build, in turns without and with both, in one run. It prints a table of ratios; nothing fails
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
	rounds := flag.Int("rounds", 3, "how often both are switched on, between times without")
	during := flag.Duration("during", 15*time.Second, "how long each figure is measured")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *build, *page, *rounds, *during); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const (
	host    = "n1"
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

// figures are of one round: writes a second; milliseconds; milliseconds of CPU that kubelite takes for a write
// of many callers, which other work on the machine changes least.
type figures struct{ rate, median, p99, cpu float64 }

func run(ctx context.Context, build, page string, rounds int, during time.Duration) (err error) {
	l, err := lab.New(lab.Config{Instance: "benchsecurity", Snap: filepath.Join(build, "snap")})
	if err != nil {
		return err
	}
	if err := l.Down(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Down(context.WithoutCancel(ctx))) }()
	if err := l.Up(ctx, host, lab.Options{}); err != nil {
		return err
	}
	if _, err := l.Output(ctx, host, "microk8s", "start"); err != nil {
		return err
	}
	var without, with []figures
	for i := range 2*rounds + 1 { // it begins and ends without: drifts show
		script, list := off, &without
		if i%2 == 1 {
			script, list = on, &with
		}
		if _, err := l.Output(ctx, host, "sh", "-c", script+"\n"+restart); err != nil {
			return err
		}
		client, err := connect(ctx, l)
		if err != nil {
			return err
		}
		f, err := write(ctx, client, during, func() (float64, error) { return used(ctx, l) })
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "round %d (%s): %.0f writes/s, median %.2f ms, p99 %.2f ms, CPU %.3f ms a write\n", i, map[bool]string{false: "without", true: "with"}[i%2 == 1], f.rate, f.median, f.p99, f.cpu)
		*list = append(*list, f)
	}
	row := func(what, unit string, of func(figures) float64) []string {
		a, b := middle(without, of), middle(with, of)
		low, high := spread(without, of)
		return []string{what, fmt.Sprintf("%.2f %s", a, unit), fmt.Sprintf("%.2f %s", b, unit), fmt.Sprintf("%+.1f %%", 100*(b/a-1)), fmt.Sprintf("%+.1f to %+.1f %%", 100*(low/a-1), 100*(high/a-1))}
	}
	table := &report.Table{
		Title: "What the audit log and encryption at rest cost", Part: "security",
		Head:  []string{"what", "without both", "with both", "difference", "rounds without among themselves"},
		About: fmt.Sprintf("Updates of ConfigMaps of %d bytes on one node, in %d rounds with both between %d without, %v for each figure; medians of the rounds. Wanted: at most 5 %%.", size, rounds, rounds+1, during),
		Rows: [][]string{
			row(fmt.Sprintf("writes, %d callers", callers), "/s", func(f figures) float64 { return f.rate }),
			row("latency of one caller, median", "ms", func(f figures) float64 { return f.median }),
			row("latency of one caller, 99 %", "ms", func(f figures) float64 { return f.p99 }),
			row("CPU of kubelite for one of those writes", "ms", func(f figures) float64 { return f.cpu }),
		},
	}
	return table.Write(os.Stdout, page)
}

func values(list []figures, of func(figures) float64) (out []float64) {
	for _, f := range list {
		out = append(out, of(f))
	}
	slices.Sort(out)
	return out
}

func middle(list []figures, of func(figures) float64) float64 { return values(list, of)[len(list)/2] }

func spread(list []figures, of func(figures) float64) (low, high float64) {
	v := values(list, of)
	return v[0], v[len(v)-1]
}

func connect(ctx context.Context, l *lab.Lab) (*kubernetes.Clientset, error) {
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
func used(ctx context.Context, l *lab.Lab) (float64, error) {
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

// write updates ConfigMaps: with one caller for the latency, then with many for the rate.
func write(ctx context.Context, client *kubernetes.Clientset, during time.Duration, used func() (float64, error)) (figures, error) {
	objects := make([]*corev1.ConfigMap, callers)
	maps := client.CoreV1().ConfigMaps("default")
	for i := range objects {
		name := fmt.Sprintf("bench-%d", i)
		if err := maps.Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !strings.Contains(err.Error(), "not found") {
			return figures{}, err
		}
		made, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"x": strings.Repeat("x", size)}}, metav1.CreateOptions{})
		if err != nil {
			return figures{}, err
		}
		objects[i] = made
	}
	update := func(i, n int) error {
		objects[i].Data["x"] = fmt.Sprintf("%0*d", size, n)
		next, err := maps.Update(ctx, objects[i], metav1.UpdateOptions{})
		if err == nil {
			objects[i] = next
		}
		return err
	}
	var took []float64
	warm := time.Now().Add(during / 3)
	for end := time.Now().Add(during/3 + during); time.Now().Before(end); {
		began := time.Now()
		if err := update(0, len(took)); err != nil {
			return figures{}, err
		}
		if began.After(warm) {
			took = append(took, float64(time.Since(began))/float64(time.Millisecond))
		}
	}
	if len(took) == 0 {
		return figures{}, errors.New("not one write was done in time; measure longer, with -during")
	}
	slices.Sort(took)
	before, err := used()
	if err != nil {
		return figures{}, err
	}
	var count atomic.Int64
	var first atomic.Pointer[error]
	var group sync.WaitGroup
	end := time.Now().Add(during)
	for i := range objects {
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
	after, err := used()
	if err != nil {
		return figures{}, err
	}
	writes := float64(count.Load())
	return figures{writes / during.Seconds(), took[len(took)/2], took[len(took)*99/100], (after - before) / writes}, nil
}
