// Package hoststate compares a machine before and after a test that must leave no trace: its
// mounts, links, addresses, routes, netfilter rules, cgroups, loop devices, named network
// namespaces and the kernel settings that Kubernetes changes.
//
// It sees the namespaces of the calling process only, which is what it is for: nothing of a lab
// may appear there.
package hoststate

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// State is what a machine looks like: lines, sorted, by kind.
type State struct {
	lines map[string][]string
	ours  []string
}

// Take records the machine. With the names of the caller's labs given, those of other labs,
// whose tests may run at the same time, are left out.
//
//	before := hoststate.Take(t, l.Instance())
//	… up, down …
//	hoststate.Compare(t, before)
func Take(t testing.TB, ours ...string) State {
	t.Helper()
	s, err := take(ours)
	if err != nil {
		t.Fatalf("cannot record the state of the machine: %v", err)
	}
	return s
}

// Compare fails the test if the machine is not what it was. It gives the kernel some seconds to
// take away what it removes in the background.
func Compare(t testing.TB, before State) {
	t.Helper()
	var diff string
	for deadline := time.Now().Add(10 * time.Second); ; {
		after, err := take(before.ours)
		if err != nil {
			t.Fatalf("cannot record the state of the machine: %v", err)
		}
		if diff = cmp.Diff(before.lines, after.lines); diff == "" {
			return
		}
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("the machine is not as it was before (- before, + now):\n%s", diff)
}

func take(ours []string) (State, error) {
	s := State{lines: map[string][]string{}, ours: ours}
	for _, kind := range []struct {
		name string
		read func() ([]string, error)
	}{
		{"mounts", mounts}, {"links", links}, {"addresses", addresses}, {"routes", routes}, {"nft", nft},
		{"cgroups", cgroups}, {"loop devices", loops}, {"network namespaces", netnsNames}, {"sysctls", sysctls},
		{"lab processes", processes},
	} {
		lines, err := kind.read()
		if err != nil {
			return s, fmt.Errorf("%s: %w", kind.name, err)
		}
		kept := []string{} // never nil: a kind without lines is equal to itself
		for _, l := range lines {
			if !otherLab(l, ours) {
				kept = append(kept, l)
			}
		}
		if kind.name != "nft" { // its order is part of it
			slices.Sort(kept)
		}
		s.lines[kind.name] = kept
	}
	return s, nil
}

// otherLab reports whether a line is about a lab that is not the caller's.
func otherLab(line string, ours []string) bool {
	if len(ours) == 0 {
		return false
	}
	for _, mark := range []string{"/microk8s-lab-", "/microk8s-lab/"} {
		_, rest, found := strings.Cut(line, mark)
		if found {
			name, _, _ := strings.Cut(rest, "/")
			return !slices.Contains(ours, name)
		}
	}
	return false
}

func mounts() ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var lines []string
	scan := bufio.NewScanner(bytes.NewReader(data))
	for scan.Scan() {
		left, right, _ := strings.Cut(scan.Text(), " - ")
		f := strings.Fields(left)
		if len(f) < 6 {
			return nil, fmt.Errorf("cannot parse %q", scan.Text())
		}
		if f[4] == "/run/netns" {
			continue // the first namespace with a name brings it, whoever makes that; the names are compared
		}
		// Without the numbers, which are assigned again; with the propagation, but not its peers.
		var propagation []string
		for _, o := range f[6:] {
			kind, _, _ := strings.Cut(o, ":")
			propagation = append(propagation, kind)
		}
		lines = append(lines, fmt.Sprintf("%s %s %s %v %s", f[4], f[3], f[5], propagation, right))
	}
	return lines, scan.Err()
}

func links() ([]string, error) {
	list, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, l := range list {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("%d %s %s %s mtu %d master %d up %t", a.Index, a.Name, l.Type(), a.HardwareAddr, a.MTU, a.MasterIndex, a.RawFlags&unix.IFF_UP != 0))
	}
	return lines, nil
}

func addresses() ([]string, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, a := range list {
		lines = append(lines, fmt.Sprintf("%d %s", a.LinkIndex, a.IPNet))
	}
	return lines, nil
}

func routes() ([]string, error) {
	var lines []string
	// Every table, not just the main one.
	list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, err
	}
	for _, r := range list {
		lines = append(lines, fmt.Sprintf("table %d dst %v gw %v dev %d scope %s type %d", r.Table, r.Dst, r.Gw, r.LinkIndex, r.Scope, r.Type))
	}
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		lines = append(lines, r.String())
	}
	return lines, nil
}

func nft() ([]string, error) {
	if _, err := exec.LookPath("nft"); err != nil {
		return nil, nil
	}
	out, err := exec.Command("nft", "--stateless", "list", "ruleset").Output()
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n"), nil
}

// cgroups lists the top-level cgroups of each hierarchy, and all below those of labs and of
// Kubernetes. What an init system does below its own is its business.
func cgroups() ([]string, error) {
	tops, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, top := range tops {
		err := filepath.WalkDir(top.Mountpoint, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed meanwhile
			}
			if err != nil || !d.IsDir() {
				return err
			}
			lines = append(lines, path)
			rel, err := filepath.Rel(top.Mountpoint, path)
			if err == nil && rel != "." && !strings.HasPrefix(rel, "microk8s") && !strings.HasPrefix(rel, "kube") {
				return fs.SkipDir
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return lines, nil
}

func loops() ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	var lines []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			lines = append(lines, f+" "+strings.TrimSpace(string(b)))
		}
	}
	return lines, err
}

func netnsNames() ([]string, error) {
	entries, err := os.ReadDir("/run/netns")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var lines []string
	for _, e := range entries {
		lines = append(lines, e.Name())
	}
	return lines, err
}

func sysctls() ([]string, error) {
	var lines []string
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "vm/max_map_count", "vm/swappiness", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes", "kernel/hostname", "fs/aio-max-nr", "fs/file-max", "fs/nr_open",
		"fs/inotify/max_user_instances", "fs/inotify/max_user_watches", "net/ipv4/ip_forward", "net/ipv4/conf/all/route_localnet",
	} {
		b, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		lines = append(lines, name+" = "+strings.TrimSpace(string(b)))
	}
	return lines, nil
}

// processes lists what the lab keeps running, by the name it gives them.
func processes() ([]string, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	var lines []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		argv := strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
		if err == nil && len(argv) > 1 && strings.HasPrefix(argv[0], "microk8s-lab-") {
			// As a path, so that the names of other labs are recognised in it.
			lines = append(lines, "/microk8s-lab/"+strings.Join(argv[1:], "/")+" "+argv[0])
		}
	}
	return lines, err
}
