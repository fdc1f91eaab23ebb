// Command addons measures the core addons on one node of the lab, one after the other: the size of their
// images and where they travel, how long enable and disable take, and the memory of their pods. It prints a
// table; nothing fails because of a figure.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"microk8s/internal/addon"
	"microk8s/internal/pack"
	"microk8s/internal/snapenv"
	"microk8s/tests/bench/report"
	"microk8s/tests/lab"
)

func main() {
	build := flag.String("build", "build", "the folder of `make build addons`")
	settle := flag.Duration("settle", 30*time.Second, "how long pods run before their memory is read")
	page := report.Flag()
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *build, *page, *settle); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const host = "n1"

func run(ctx context.Context, build, page string, settle time.Duration) (err error) {
	catalogue, _, err := addon.Catalogue(snapenv.Env{Snap: filepath.Join(build, "snap")})
	if err != nil {
		return err
	}
	l, err := lab.New(lab.Config{Instance: "benchaddons", Snap: filepath.Join(build, "snap")})
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
	m := measurement{lab: l, settle: settle}
	if _, err := m.microk8s(ctx, "start"); err != nil {
		return err
	}
	if _, err := m.microk8s(ctx, "status", "--wait-ready", "--timeout", "180"); err != nil {
		return err
	}
	packs, _ := pack.List(filepath.Join(build, "packs"))
	for _, p := range packs {
		if p.Name != pack.All {
			continue
		}
		data, err := os.ReadFile(p.Path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(l.Root(host), "pack.tar"), data, 0o644); err != nil {
			return err
		}
		if _, err := m.microk8s(ctx, "addons", "import", "/pack.tar"); err != nil {
			return err
		}
	}
	if _, err := m.microk8s(ctx, "disable", "dns"); err != nil {
		return err
	}
	table := &report.Table{
		Title: "The core addons", Part: "addons",
		Head:  []string{"addon", "images", "they travel in", "enable", "memory of its pods", "disable"},
		About: fmt.Sprintf("One node; each addon alone, with what it needs. Images as they travel, compressed; enable until its pods are ready and answer; memory is the working set %v later, as the kubelet reports it; disable until its pods have ended.", settle),
	}
	for _, a := range catalogue {
		if a.Builtin != "" || a.Alias != "" {
			continue
		}
		row, err := m.one(ctx, a)
		if err != nil {
			return fmt.Errorf("%s: %w", a.Name, err)
		}
		fmt.Fprintln(os.Stderr, strings.Join(row, "  "))
		table.Rows = append(table.Rows, row)
	}
	for _, p := range packs {
		fi, err := os.Stat(p.Path)
		if err != nil {
			return err
		}
		table.Rows = append(table.Rows, []string{"pack " + p.Name, megabytes(fi.Size()), filepath.Base(p.Path), "", "", ""})
	}
	return table.Write(os.Stdout, page)
}

type measurement struct {
	lab    *lab.Lab
	settle time.Duration
}

func (m measurement) microk8s(ctx context.Context, args ...string) (string, error) {
	return m.lab.Output(ctx, host, append([]string{"microk8s"}, args...)...)
}

// one measures an addon, and leaves the node without it.
func (m measurement) one(ctx context.Context, a addon.Addon) ([]string, error) {
	name := a.Name
	if a.Question() != "" {
		ip, err := m.lab.IP(host)
		if err != nil {
			return nil, err
		}
		net := ip[:strings.LastIndexByte(ip, '.')+1]
		name += ":" + net + "200-" + net + "220"
	}
	before, _, err := m.pods(ctx)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if _, err := m.microk8s(ctx, "enable", name); err != nil {
		return nil, err
	}
	enabled := time.Since(began)
	select {
	case <-time.After(m.settle):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	memory, images, err := m.pods(ctx)
	if err != nil {
		return nil, err
	}
	var used int64
	for pod, bytes := range memory {
		if _, there := before[pod]; !there {
			used += bytes
		}
	}
	size, err := m.size(ctx, images)
	if err != nil {
		return nil, err
	}
	began = time.Now()
	if _, err := m.microk8s(ctx, "disable", a.Name); err != nil {
		return nil, err
	}
	disabled := time.Since(began)
	for _, needed := range a.Needs(nil) {
		if _, err := m.microk8s(ctx, "disable", needed); err != nil {
			return nil, err
		}
	}
	travels := "the snap"
	if len(a.Images) > 0 {
		travels = "a pack"
	}
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
	return []string{a.Name, megabytes(size), travels, seconds(enabled), megabytes(used), seconds(disabled)}, nil
}

// pods returns the memory of each pod of the node, and the images that pods use.
func (m measurement) pods(ctx context.Context) (memory map[string]int64, images map[string]bool, err error) {
	text, err := m.microk8s(ctx, "kubectl", "get", "--raw", "/api/v1/nodes/"+host+"/proxy/stats/summary")
	if err != nil {
		return nil, nil, err
	}
	var summary struct {
		Pods []struct {
			PodRef struct{ UID string }
			Memory struct{ WorkingSetBytes int64 }
		}
	}
	if err := json.Unmarshal([]byte(text), &summary); err != nil {
		return nil, nil, err
	}
	memory, images = map[string]int64{}, map[string]bool{}
	for _, p := range summary.Pods {
		memory[p.PodRef.UID] = p.Memory.WorkingSetBytes
	}
	list, err := m.microk8s(ctx, "kubectl", "get", "pods", "-A", "-o", "jsonpath={.items[*].spec.containers[*].image}")
	if err != nil {
		return nil, nil, err
	}
	for _, image := range strings.Fields(list) {
		images[image] = true
	}
	return memory, images, nil
}

// size is that of images as they travel, in bytes.
func (m measurement) size(ctx context.Context, names map[string]bool) (size int64, err error) {
	text, err := m.microk8s(ctx, "images", "list", "-o", "json")
	if err != nil {
		return 0, err
	}
	var list struct {
		Items []struct {
			Name  string
			Bytes int64
		}
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return 0, err
	}
	for _, i := range list.Items {
		if names[i.Name] {
			size += i.Bytes
		}
	}
	return size, nil
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
