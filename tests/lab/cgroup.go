package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchy is one mounted cgroup hierarchy of the machine.
type hierarchy struct {
	Mount   string // where the machine has it
	Dir     string // below /sys/fs/cgroup; "" is /sys/fs/cgroup itself
	V2      bool
	Options string // v1: controllers or name=…, as mount options
}

// pureV2 says that this hierarchy is the only one and has the controllers, so that processes
// may live in its leaves only.
func (y hierarchy) pureV2() bool { return y.V2 && y.Dir == "" }

// leaf is where the processes of a host live in a pure v2 hierarchy, below the host's cgroup.
const leaf = "init"

const cgroupMount = "/sys/fs/cgroup"

// hierarchies lists the machine's cgroup hierarchies and the aliases (symbolic links, such as
// cpu → cpu,cpuacct) beside them.
func hierarchies() (list []hierarchy, aliases map[string]string, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, nil, fmt.Errorf("cannot find the cgroup hierarchies: %w", err)
	}
	list, err = parseHierarchies(data)
	if err != nil {
		return nil, nil, err
	}
	aliases = map[string]string{}
	entries, _ := os.ReadDir(cgroupMount)
	for _, e := range entries {
		if e.Type()&fs.ModeSymlink != 0 {
			if target, err := os.Readlink(filepath.Join(cgroupMount, e.Name())); err == nil {
				aliases[e.Name()] = target
			}
		}
	}
	return list, aliases, nil
}

func parseHierarchies(mountinfo []byte) ([]hierarchy, error) {
	// Super block options that are no controllers.
	skip := []string{"rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "nsdelegate",
		"memory_recursiveprot", "memory_localevents", "memory_hugetlb_accounting", "favordynmods", "nofavordynmods", "seclabel"}
	var list []hierarchy
	lines := bufio.NewScanner(bytes.NewReader(mountinfo))
	for lines.Scan() {
		left, right, ok := strings.Cut(lines.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 3 || (r[0] != "cgroup" && r[0] != "cgroup2") {
			continue
		}
		mount := l[4]
		dir, err := filepath.Rel(cgroupMount, mount)
		if err != nil || strings.HasPrefix(dir, "..") {
			continue // somebody's private mount
		}
		if dir == "." {
			dir = ""
		}
		y := hierarchy{Mount: mount, Dir: dir, V2: r[0] == "cgroup2"}
		if !y.V2 {
			var opts []string
			for _, o := range strings.Split(r[2], ",") {
				if !slices.Contains(skip, o) && !strings.HasPrefix(o, "release_agent=") {
					opts = append(opts, o)
				}
			}
			y.Options = strings.Join(opts, ",")
		}
		if !slices.ContainsFunc(list, func(o hierarchy) bool { return o.Mount == y.Mount }) {
			list = append(list, y)
		}
	}
	if len(list) == 0 {
		return nil, errors.New("cannot find a cgroup hierarchy below /sys/fs/cgroup; mount one (cgroup2 on /sys/fs/cgroup) and try again")
	}
	return list, nil
}

// cgroupName is the lab's cgroup in each hierarchy.
func (l *Lab) cgroupName() string { return "microk8s-lab-" + l.instance }

// switchGroup cannot be the name of a host.
const switchGroup = ".switch"

// makeCgroups creates the cgroup of a host (or the switch) in every hierarchy.
func (l *Lab) makeCgroups(name string) ([]hierarchy, error) {
	list, _, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for _, y := range list {
		dir := y.Mount
		for _, part := range []string{l.cgroupName(), name} {
			if y.pureV2() {
				enableControllers(dir)
			}
			parent := dir
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, fmt.Errorf("cannot create cgroup %s: %w", dir, err)
			}
			if !y.V2 {
				if err := inheritCpuset(parent, dir); err != nil {
					return nil, err
				}
			}
		}
	}
	return list, nil
}

// inheritCpuset fills a fresh v1 cpuset, which is empty and accepts no process before.
func inheritCpuset(parent, dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(parent, file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // not the cpuset hierarchy
		}
		if err != nil {
			return fmt.Errorf("cannot read %s: %w", file, err)
		}
		if err := writeFile(filepath.Join(dir, file), strings.TrimSpace(string(value))); err != nil {
			return err
		}
	}
	return nil
}

// enableControllers passes on to the children of a v2 cgroup all controllers it has. One that
// cannot be passed on (held by a real-time process, for example) is left out.
func enableControllers(dir string) {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(have)) {
		_ = writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+"+c)
	}
}

// writeFile writes a control file: one write, no creation.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	_, err = f.WriteString(value)
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return fmt.Errorf("cannot write %q to %s: %w", value, path, err)
	}
	return nil
}

// joinCgroups puts the calling thread into the v1 cgroups of name, so that a process forked by
// it is born there, and gives the v2 cgroup to be born in (nil if there is none; the caller
// closes it).
func (l *Lab) joinCgroups(name string, booting bool) (*os.File, error) {
	list, _, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var v2 *os.File
	for _, y := range list {
		dir := filepath.Join(y.Mount, l.cgroupName(), name)
		if y.V2 {
			if y.pureV2() && !booting && name != switchGroup {
				dir = filepath.Join(dir, leaf)
			}
			if v2, err = os.Open(dir); err != nil {
				return nil, fmt.Errorf("cannot enter cgroup: %w", err)
			}
			continue
		}
		if err := writeFile(filepath.Join(dir, "tasks"), strconv.Itoa(unix.Gettid())); err != nil {
			v2.Close()
			return nil, fmt.Errorf("cannot enter cgroup: %w", err)
		}
	}
	return v2, nil
}

func (l *Lab) cgroupExists(name string) bool {
	list, _, _ := hierarchies()
	return slices.ContainsFunc(list, func(y hierarchy) bool {
		_, err := os.Lstat(filepath.Join(y.Mount, l.cgroupName(), name))
		return err == nil
	})
}

// removeCgroups kills what is left in the cgroups of a host (name "": of the whole lab) and
// removes them with all those nested in them.
func (l *Lab) removeCgroups(ctx context.Context, name string) error {
	list, _, err := hierarchies()
	if err != nil {
		return err
	}
	var last error
	for wait := time.Millisecond; ; wait *= 2 {
		last = nil
		// First kill everywhere, then remove: a process is in every hierarchy.
		for _, y := range list {
			killCgroup(filepath.Join(y.Mount, l.cgroupName(), name), y)
		}
		for _, y := range list {
			if err := rmdirs(filepath.Join(y.Mount, l.cgroupName(), name)); err != nil {
				last = err
			}
		}
		if last == nil {
			return nil
		}
		if wait > 4*time.Second || pause(ctx, wait) != nil {
			return fmt.Errorf("cannot remove cgroup: %w", last)
		}
	}
}

// subgroups lists dir and the cgroups below it, children first.
func subgroups(dir string) []string {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	return dirs
}

func rmdirs(dir string) error {
	var first error
	for _, d := range subgroups(dir) {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) && first == nil {
			first = fmt.Errorf("%s: %w", d, err)
		}
	}
	return first
}

// killCgroup kills every process in and below a cgroup and thaws it: a frozen process of v1
// dies only then. A thread of a lab program may be in a host's cgroup for a moment (see
// onThread); such a program is recognised by its PID namespace and spared.
func killCgroup(dir string, y hierarchy) {
	own, _ := os.Readlink("/proc/self/ns/pid")
	spare := filepath.Base(dir) != switchGroup
	dirs := subgroups(dir)
	for _, d := range dirs {
		data, err := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(f)
			if err != nil || pid <= 1 || pid == os.Getpid() {
				continue
			}
			if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); spare && err == nil && ns == own && filepath.Base(d) != switchGroup {
				continue
			}
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	for _, d := range dirs {
		freezeDir(d, y, false)
	}
}

// freezeDir freezes or thaws one cgroup; false if this hierarchy cannot.
func freezeDir(dir string, y hierarchy, frozen bool) bool {
	file, value := "freezer.state", "THAWED"
	if frozen {
		value = "FROZEN"
	}
	if y.V2 {
		file, value = "cgroup.freeze", "0"
		if frozen {
			value = "1"
		}
	}
	return writeFile(filepath.Join(dir, file), value) == nil
}
