// Command bench measures one node in the lab beside the budgets of the design and prints a
// table. Its figures are for people: nothing here passes or fails.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/tests/bench/report"
	"microk8s/tests/lab"
)

const host = "n1"

func main() {
	build := flag.String("build", "build", "where `make build` left its results")
	idle := flag.Duration("idle", time.Minute, "how long to measure idle CPU")
	settle := flag.Duration("settle", 30*time.Second, "how long to let the node come to rest before that")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *build, *page, *settle, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// row is one line of the table.
type row struct{ what, measured, budget string }

func run(ctx context.Context, build, page string, settle, idle time.Duration) (err error) {
	l, err := lab.New(lab.Config{Instance: "bench", Snap: filepath.Join(build, "snap")})
	if err != nil {
		return err
	}
	if err := l.Down(ctx); err != nil {
		return err
	}
	defer func() {
		if derr := l.Down(context.WithoutCancel(ctx)); err == nil {
			err = derr
		}
	}()
	if err := l.Up(ctx, host, lab.Options{}); err != nil {
		return err
	}
	b := &bench{lab: l}
	steps := []struct {
		what string
		f    func(context.Context) error
	}{
		{"first start", b.firstStart},
		{"stop", func(ctx context.Context) error { _, err := b.timed(ctx, "microk8s", "stop"); return err }},
		{"forget the product's files", func(context.Context) error { return forget(filepath.Join(build, "snap")) }},
		{"start again", func(ctx context.Context) error { return b.start(ctx, "services started → node Ready") }},
		{"status", b.status},
		{"memory", func(ctx context.Context) error { return b.memory(ctx, settle) }},
		{"idle CPU", func(ctx context.Context) error { return b.cpu(ctx, idle) }},
		{"addons", func(ctx context.Context) error { return b.addons(ctx, settle) }},
		{"status, API down", b.statusDown},
	}
	for _, s := range steps {
		fmt.Fprintln(os.Stderr, "measuring:", s.what)
		if err := s.f(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	table := &report.Table{Title: "A node", Part: "node", Head: []string{"what", "measured", "budget"}}
	for _, r := range b.rows {
		table.Rows = append(table.Rows, []string{r.what, r.measured, r.budget})
	}
	return table.Write(os.Stdout, page)
}

// forget takes the files of the product out of the page cache, so that the node starts as after a boot.
// Files that were just written are there in pages of up to 2 MiB, each of which counts as a whole for the
// process that uses a byte of it. A squashfs, where the product is on a machine with snapd, has pages of 4 KiB.
func forget(tree string) error {
	return filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Sync(); err != nil { // pages that are not on the disk stay
			return err
		}
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}

type bench struct {
	lab  *lab.Lab
	rows []row
}

func (b *bench) add(what, measured, budget string) {
	b.rows = append(b.rows, row{what, measured, budget})
}

func (b *bench) timed(ctx context.Context, args ...string) (time.Duration, error) {
	var out bytes.Buffer
	began := time.Now()
	err := b.lab.Exec(ctx, host, lab.Command{Args: args, Stdout: &out, Stderr: &out})
	took := time.Since(began)
	if err != nil {
		return took, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, &out)
	}
	return took, nil
}

// firstStart goes on until cluster DNS answers for the first time. Later starts are measured to
// Ready only: what the Deployment says then may be from before.
func (b *bench) firstStart(ctx context.Context) error {
	began := time.Now()
	if err := b.start(ctx, "first start → node Ready (makes certificates)"); err != nil {
		return err
	}
	// Available means that its readiness probe was answered.
	if _, err := b.timed(ctx, "microk8s", "kubectl", "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s"); err != nil {
		return err
	}
	b.add("  … and cluster DNS available", fmt.Sprintf("%.1f s", time.Since(began).Seconds()), "15 s")
	return nil
}

func (b *bench) start(ctx context.Context, what string) error {
	began := time.Now()
	if _, err := b.timed(ctx, "microk8s", "start"); err != nil {
		return err
	}
	if _, err := b.timed(ctx, "microk8s", "status", "--wait-ready", "--timeout", "120"); err != nil {
		return err
	}
	b.add(what, fmt.Sprintf("%.1f s", time.Since(began).Seconds()), "")
	return nil
}

// statusTimes runs status often enough to tell the usual from the worst.
func (b *bench) statusTimes(ctx context.Context, what string) error {
	const runs = 20
	empty := make([]time.Duration, 0, runs)
	var times []time.Duration
	for range runs {
		took, _ := b.timed(ctx, "microk8s", "status") // exits 1 when the node is not ready
		times = append(times, took)
		// What entering the host costs is the lab's, not the command's.
		nothing, err := b.timed(ctx, "true")
		if err != nil {
			return err
		}
		empty = append(empty, nothing)
	}
	slices.Sort(times)
	slices.Sort(empty)
	enter := empty[runs/2]
	b.add(what, fmt.Sprintf("%d ms (worst of %d: %d ms)", (times[runs/2]-enter).Milliseconds(), runs, (times[runs-1]-enter).Milliseconds()), "100 ms")
	return nil
}

func (b *bench) status(ctx context.Context) error { return b.statusTimes(ctx, "status, API up") }

func (b *bench) statusDown(ctx context.Context) error {
	if _, err := b.timed(ctx, "nft", "add table inet bench; add chain inet bench in { type filter hook input priority -100; }; add rule inet bench in tcp dport 16443 drop"); err != nil {
		return err
	}
	return b.statusTimes(ctx, "status, API unreachable")
}

// proc is one process of the host.
type proc struct {
	name  string
	pss   int // kB
	ticks int // user and system CPU time, in clock ticks
}

func (b *bench) processes(ctx context.Context) (map[string]proc, error) {
	// One shell in the host reads all of them, so that they are read at one time.
	const script = `for p in /proc/[0-9]*; do
		pss=$(awk '/^Pss:/{print $2}' $p/smaps_rollup 2>/dev/null) || continue
		[ -n "$pss" ] && echo "${p#/proc/} $(cat $p/comm) $pss $(sed 's/.*) //' $p/stat | cut -d' ' -f12,13)"
	done`
	out, err := b.lab.Output(ctx, host, "sh", "-c", script)
	if err != nil {
		return nil, err
	}
	procs := map[string]proc{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		n := len(f)
		pss, _ := strconv.Atoi(f[n-3])
		user, _ := strconv.Atoi(f[n-2])
		system, _ := strconv.Atoi(f[n-1])
		procs[f[0]] = proc{strings.Join(f[1:n-3], " "), pss, user + system}
	}
	return procs, nil
}

// ours are the programs of the product, by the names that the kernel shows (15 characters).
var ours = []string{"kubelite", "k8s-dqlite", "containerd", "containerd-shim", "cluster-agent", "apiserver-proxy", "supervisor", "microk8s", "pause", "coredns"}

func (b *bench) memory(ctx context.Context, settle time.Duration) error {
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return ctx.Err()
	}
	procs, err := b.processes(ctx)
	if err != nil {
		return err
	}
	sum := 0
	for _, name := range ours {
		one, n := 0, 0
		for _, p := range procs {
			if p.name == name {
				one, n = one+p.pss, n+1
			}
		}
		sum += one
		if n > 0 {
			b.add(fmt.Sprintf("  PSS of %s (%d)", name, n), fmt.Sprintf("%d MB", one/1024), "")
		}
	}
	b.add("idle memory, all our processes", fmt.Sprintf("%d MB", sum/1024), "600 MB")
	return nil
}

// addons takes the addons on, one after the other, until their pods are ready, and tells the
// memory of all processes that came with each. dns is on already: it is taken off first.
func (b *bench) addons(ctx context.Context, settle time.Duration) error {
	if _, err := b.timed(ctx, "microk8s", "disable", "dns"); err != nil {
		return err
	}
	began := time.Now()
	if _, err := b.timed(ctx, "microk8s", "enable", "--no-wait", "dns"); err != nil {
		return err
	}
	if err := b.firstAnswer(ctx); err != nil {
		return err
	}
	b.add("enable dns → first answer", fmt.Sprintf("%.1f s", time.Since(began).Seconds()), "")
	before, err := b.allMemory(ctx, settle)
	if err != nil {
		return err
	}
	all := time.Duration(0)
	for _, name := range []string{"hostpath-storage", "metrics-server", "ingress", "registry", "host-access"} {
		took, err := b.timed(ctx, "microk8s", "enable", name)
		if err != nil {
			return err
		}
		all += took
		after, err := b.allMemory(ctx, settle)
		if err != nil {
			return err
		}
		b.add("  enable "+name, fmt.Sprintf("%.1f s, %+d MB", took.Seconds(), (after-before)/1024), "")
		before = after
	}
	b.add("enable of all of these", fmt.Sprintf("%.1f s", all.Seconds()), "")
	return nil
}

// firstAnswer asks the DNS service from inside the host until it answers.
func (b *bench) firstAnswer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return b.lab.Dial(ctx, host, network, "10.152.183.10:53")
	}}
	for {
		try, done := context.WithTimeout(ctx, time.Second)
		_, err := resolver.LookupHost(try, "kubernetes.default.svc.cluster.local.")
		done()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// allMemory is the PSS of every process in the host, in kB, when it has come to rest.
func (b *bench) allMemory(ctx context.Context, settle time.Duration) (int, error) {
	select {
	case <-time.After(settle / 2):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	procs, err := b.processes(ctx)
	sum := 0
	for _, p := range procs {
		sum += p.pss
	}
	return sum, err
}

func (b *bench) cpu(ctx context.Context, idle time.Duration) error {
	before, err := b.processes(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-time.After(idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := b.processes(ctx)
	if err != nil {
		return err
	}
	const ticksPerSecond = 100 // USER_HZ, the same on every Linux architecture we build for
	used := map[string]int{}
	sum := 0
	for pid, p := range after {
		if old, ok := before[pid]; ok && slices.Contains(ours, p.name) {
			used[p.name] += p.ticks - old.ticks
			sum += p.ticks - old.ticks
		}
	}
	percent := func(ticks int) string {
		return fmt.Sprintf("%.1f %%", float64(ticks)/ticksPerSecond/time.Since(began).Seconds()*100)
	}
	for _, name := range ours {
		if t, ok := used[name]; ok {
			b.add("  CPU of "+name, percent(t), "")
		}
	}
	b.add(fmt.Sprintf("idle CPU over %s, of one core", idle), percent(sum), "5 %")
	return nil
}
