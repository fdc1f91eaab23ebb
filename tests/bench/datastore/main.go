// Command datastore measures k8s-dqlite side by side with etcd and with kine on SQLite, each a
// real process on this machine, in one run, and prints every figure with its ratio to etcd's.
// The measurements take turns, so that what else the machine does meets all of them.
//
// Nothing fails because of a figure: the ratios that are wanted stand in the table.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/grpclog"

	"microk8s/tests/bench/report"
)

func main() {
	build := flag.String("build", "build", "the folder of `make build` and `make peers`")
	during := flag.Duration("during", 2*time.Second, "how long each measurement of each round lasts")
	rounds := flag.Int("rounds", 3, "how many rounds; the median of each figure counts")
	members := flag.Int("members", 1, "members of each datastore; kine has one only and is left out of others, and where it is not built")
	large := flag.Bool("large", true, "also measure with 100,000 objects")
	only := flag.String("only", "", "measure only what matches this regular expression, and what cannot be left out")
	page := report.Flag()
	flag.Parse()
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	pattern, err := regexp.Compile(*only)
	if err == nil {
		err = measure(ctx, *build, *page, *during, *rounds, *members, *large, pattern)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// row is one line of the table: what is measured, and what is wanted of the ratio to etcd.
type row struct {
	what   string // "" for what is done and not measured
	unit   string // of value; empty where rate, p50 and p99 count
	wanted float64
	f      func(*run) func(context.Context) (figure, error)
	once   bool // in the last round only
}

func rows(members int) []row {
	plain := func(f func(*run, context.Context) (figure, error)) func(*run) func(context.Context) (figure, error) {
		return func(r *run) func(context.Context) (figure, error) {
			return func(ctx context.Context) (figure, error) { return f(r, ctx) }
		}
	}
	var out []row
	out = append(out, row{what: "", f: plain((*run).begin)})
	for _, n := range []int{1, 16, 64} {
		wanted := 0.9
		if n == 64 {
			wanted = 1
		}
		out = append(out,
			row{what: fmt.Sprintf("create, %d callers", n), wanted: wanted, f: func(r *run) func(context.Context) (figure, error) { return r.createN(n, false) }},
			row{what: fmt.Sprintf("delete, %d callers", n), wanted: wanted, f: plain((*run).deleteN)},
			row{what: fmt.Sprintf("update, %d callers", n), wanted: wanted, f: func(r *run) func(context.Context) (figure, error) { return r.updateN(n) }},
		)
	}
	if members > 1 {
		out = append(out, row{what: "create, 64 callers on all members", wanted: 1, f: func(r *run) func(context.Context) (figure, error) { return r.createN(64, true) }})
	}
	out = append(out,
		row{what: "update of one key, 16 callers", wanted: 0.9, f: plain((*run).contended)},
		row{what: "get, 1 caller", wanted: 0.9, f: func(r *run) func(context.Context) (figure, error) { return r.getN(1, 0) }},
		row{what: "get, 16 callers", wanted: 0.9, f: func(r *run) func(context.Context) (figure, error) { return r.getN(16, 0) }},
		row{what: "list of 5000 by 500", wanted: 0.9, f: plain((*run).list)},
		row{what: "count of 5000", wanted: 0.9, f: plain((*run).count)},
		row{what: "write answered → event", wanted: 0.9, f: func(r *run) func(context.Context) (figure, error) { return r.events(0) }},
		row{what: "progress after a write", wanted: 0.9, f: func(r *run) func(context.Context) (figure, error) { return r.progress(0) }},
	)
	if members > 1 {
		out = append(out,
			row{what: "get on another member, 16 callers", wanted: 0.9, f: func(r *run) func(context.Context) (figure, error) { return r.getN(16, 1) }},
			row{what: "write answered → event on another member", wanted: 0.9, f: func(r *run) func(context.Context) (figure, error) { return r.events(1) }},
			row{what: "progress after a write, another member", wanted: 0.9, f: func(r *run) func(context.Context) (figure, error) { return r.progress(1) }},
		)
	}
	out = append(out,
		row{what: "of a create by 1 caller, one write of the log (mean)", unit: "ms", f: plain((*run).commit), once: true},
		row{what: "lease ends late by", f: plain((*run).lease), once: true},
		row{what: "disk written for a write of 1 KiB", unit: "KiB", f: plain((*run).perWrite), once: true},
		row{what: "CPU at 100 writes/s and 100 reads/s, 60 watches", unit: "%", f: func(r *run) func(context.Context) (figure, error) { return r.steady(100) }, once: true},
		row{what: "idle CPU, 60 watches", unit: "%", wanted: 1, f: func(r *run) func(context.Context) (figure, error) { return r.steady(0) }, once: true},
		row{what: "", f: plain((*run).compact), once: true},
		row{what: "resident memory after this and a compaction", unit: "MiB", f: plain((*run).resident), once: true},
	)
	return out
}

// largeRows are measured with new datastores that hold nothing else.
func largeRows() []row {
	return []row{
		{what: "resident memory, 5,000 objects of 1 KiB written", unit: "MiB", wanted: 1, f: func(r *run) func(context.Context) (figure, error) {
			return func(ctx context.Context) (figure, error) {
				if err := r.fill(ctx, listPrefix, listed); err != nil {
					return figure{}, err
				}
				return r.resident(ctx)
			}
		}},
		{what: "resident memory, 100,000 objects of 1 KiB written", unit: "MiB", f: func(r *run) func(context.Context) (figure, error) {
			return func(ctx context.Context) (figure, error) {
				if err := r.fillMany(ctx); err != nil {
					return figure{}, err
				}
				return r.resident(ctx)
			}
		}},
		{what: "start with them", unit: "s", f: func(r *run) func(context.Context) (figure, error) { return r.restart }},
		{what: "resident memory after that start", unit: "MiB", f: func(r *run) func(context.Context) (figure, error) { return r.resident }},
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func measure(ctx context.Context, build, page string, during time.Duration, rounds, members int, large bool, only *regexp.Regexp) error {
	table := slices.DeleteFunc(rows(members), func(r row) bool { return r.what != "" && !only.MatchString(r.what) })
	names, figures, err := measureRows(ctx, build, table, during, rounds, members)
	if err != nil {
		return err
	}
	if large {
		_, more, err := measureRows(ctx, build, largeRows(), during, 1, members)
		if err != nil {
			return err
		}
		table, figures = append(table, largeRows()...), append(figures, more...)
	}
	out := tabulate(table, names, figures, members, rounds)
	var disk []string
	for _, size := range []int{4 << 10, 16 << 10} {
		f, err := syncedWrites(ctx, build, size, during)
		if err != nil {
			return err
		}
		disk = append(disk, fmt.Sprintf("The disk by itself, synced writes of %d KiB: %s", size>>10, show(f, "")))
	}
	out.Notes = strings.Join(disk, "\n\n")
	return out.Write(os.Stdout, page)
}

// measureRows starts new datastores and gives their names, and the figures by row, datastore and
// round.
func measureRows(ctx context.Context, build string, table []row, during time.Duration, rounds, members int) (names []string, figures [][][]figure, err error) {
	dir, err := os.MkdirTemp(build, "bench-datastore-")
	if err != nil {
		return nil, nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, nil, err
	}
	ours, err := newOurs(filepath.Join(build, "bin/k8s-dqlite"), dir, members)
	if err != nil {
		return nil, nil, err
	}
	etcd, err := newEtcd(filepath.Join(build, "peers/etcd"), dir, members)
	if err != nil {
		return nil, nil, err
	}
	targets := []*target{etcd, ours}
	if program := filepath.Join(build, "peers/kine"); members == 1 && exists(program) {
		kine, err := newKine(program, dir)
		if err != nil {
			return nil, nil, err
		}
		targets = append(targets, kine)
	}
	defer func() {
		for _, t := range targets {
			err = errors.Join(err, t.stop())
		}
		if err == nil { // the logs are of use otherwise
			err = os.RemoveAll(dir)
		}
	}()
	var runs []*run
	for _, t := range targets {
		if err := t.start(ctx); err != nil {
			return nil, nil, err
		}
		runs = append(runs, &run{target: t, during: during, val: value()})
		names = append(names, t.name)
	}
	figures = make([][][]figure, len(table))
	for i := range figures {
		figures[i] = make([][]figure, len(runs))
	}
	for round := range rounds {
		for i, row := range table {
			if row.once && round < rounds-1 {
				continue
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, rounds, cmp.Or(row.what, "preparing"))
			for j, r := range runs {
				r.round = round
				f, err := row.f(r)(ctx)
				if err != nil {
					return nil, nil, fmt.Errorf("%s, %s: %w", r.name, row.what, err)
				}
				figures[i][j] = append(figures[i][j], f)
			}
		}
	}
	return names, figures, nil
}

// median gives, for each number of the figures by itself, the middle one.
func median(figures []figure) figure {
	middle := func(get func(figure) float64) float64 {
		all := make([]float64, len(figures))
		for i, f := range figures {
			all[i] = get(f)
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	return figure{
		rate:  middle(func(f figure) float64 { return f.rate }),
		p50:   time.Duration(middle(func(f figure) float64 { return float64(f.p50) })),
		p99:   time.Duration(middle(func(f figure) float64 { return float64(f.p99) })),
		value: middle(func(f figure) float64 { return f.value }),
	}
}

// noise is the shortest time that is told from nothing in a ratio.
const noise = 20 * time.Microsecond

// ratios compares with etcd's figure; above 1 is better than etcd.
func ratios(f, etcd figure, unit string) []string {
	ratio := func(a, b float64) string {
		if b == 0 {
			return "–"
		}
		return fmt.Sprintf("%.2f", a/b)
	}
	if unit != "" {
		return []string{ratio(etcd.value, f.value)}
	}
	var out []string
	if f.rate > 0 {
		out = append(out, ratio(f.rate, etcd.rate))
	}
	return append(out,
		ratio(float64(max(noise, etcd.p50)), float64(max(noise, f.p50))),
		ratio(float64(max(noise, etcd.p99)), float64(max(noise, f.p99))))
}

func show(f figure, unit string) string {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond)) }
	switch {
	case unit != "":
		if f.value == 0 {
			return "–"
		}
		digits := 1
		if f.value < 1 {
			digits = 3
		}
		return fmt.Sprintf("%.*f %s", digits, f.value, unit)
	case f.rate > 0:
		return fmt.Sprintf("%.0f/s %s %s ms", f.rate, ms(f.p50), ms(f.p99))
	}
	return fmt.Sprintf("%s %s ms", ms(f.p50), ms(f.p99))
}

func tabulate(table []row, names []string, figures [][][]figure, members, rounds int) *report.Table {
	out := &report.Table{Title: fmt.Sprintf("The datastore beside etcd, %d member(s) each", members), Part: "datastore", About: fmt.Sprintf(
		"Medians of %d round(s). Rates by all callers together, then p50 and p99; the ratios to etcd are in the same order, above 1 is better than etcd.", rounds)}
	head := []string{"what", "wanted"}
	for i, name := range names {
		head = append(head, name)
		if i > 0 {
			head = append(head, "ratio")
		}
	}
	out.Head = head
	for i, row := range table {
		if row.what == "" {
			continue
		}
		cells := []string{row.what, "–"}
		if row.wanted > 0 {
			cells[1] = fmt.Sprintf("%.1f", row.wanted)
		}
		etcd := median(figures[i][0])
		for j := range names {
			f := median(figures[i][j])
			cells = append(cells, show(f, row.unit))
			if j > 0 {
				cells = append(cells, strings.Join(ratios(f, etcd, row.unit), " "))
			}
		}
		out.Rows = append(out.Rows, cells)
	}
	return out
}
