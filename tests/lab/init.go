package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// Names under which a program that imports this package is started again as one of the lab's
// own processes.
const (
	argvSwitch = "microk8s-lab-switch" // holds the switch's network namespace
	argvInit   = "microk8s-lab-init"   // PID 1 of a host
	argvCopy   = "microk8s-lab-copy"   // moves a host's data to or from its disk image
)

const (
	statusReady = "ready"
	configEnv   = "MICROK8S_LAB_INIT"
)

// initConfig is what a host's init process is told.
type initConfig struct {
	Name    string
	Root    string
	Snap    string
	Cgroups []hierarchy
	Aliases map[string]string // symbolic links beside the hierarchies
	Image   string            // file system for /var/snap, or ""
}

// init turns this program into one of the lab's processes when it is started as such. It runs
// before main and before other threads are of importance, on the main thread.
func init() {
	if len(os.Args) == 0 {
		return
	}
	var run func() error
	switch os.Args[0] {
	case argvSwitch:
		run = switchMain
	case argvInit:
		run = initMain
	case argvCopy:
		run = copyMain
	default:
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// switchMain lives as long as the switch.
func switchMain() error {
	word := make([]byte, 2)
	if _, err := io.ReadFull(os.NewFile(3, "go"), word); err != nil {
		return errors.New("nobody recorded this process")
	}
	os.NewFile(3, "go").Close()
	surviveSignals()
	for {
		_ = unix.Pause()
	}
}

// surviveSignals lets only SIGKILL end this process. The signals are caught, not ignored: that
// would be inherited by what it starts.
func surviveSignals() {
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM)
}

// initMain is a host's PID 1. It first waits until it is recorded and connected, then starts
// itself over in a cgroup namespace (which is a property of a thread, and only a new program
// has it in all threads), sets up the file systems, and reaps.
func initMain() error {
	status := os.NewFile(4, "status")
	encoded, second := os.LookupEnv(configEnv)
	if !second {
		data, err := io.ReadAll(os.NewFile(3, "config"))
		if err != nil || len(data) == 0 {
			return errors.New("nobody recorded this process")
		}
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return report(status, fmt.Errorf("cannot create a cgroup namespace: %w", err))
		}
		unix.CloseOnExec(3)
		if _, err := unix.FcntlInt(4, unix.F_SETFD, 0); err != nil {
			return report(status, err)
		}
		return report(status, unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), configEnv+"="+string(data))))
	}
	unix.CloseOnExec(4)
	_ = os.Unsetenv(configEnv)
	var cfg initConfig
	if err := json.Unmarshal([]byte(encoded), &cfg); err != nil {
		return report(status, err)
	}
	if err := setUpHost(cfg); err != nil {
		return report(status, err)
	}
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	surviveSignals()
	if err := startProduct(); err != nil {
		fmt.Fprintln(os.Stderr, err) // the host itself is up, as a real one would be
	}
	if _, err := io.WriteString(status, statusReady); err != nil {
		return err
	}
	status.Close()
	for range children {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 && !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
	return nil
}

func report(status *os.File, err error) error {
	if err != nil {
		fmt.Fprintln(status, err)
	}
	return err
}

// enabledFile exists while the product is meant to run: its start command creates it and its
// stop command removes it.
const enabledFile = "/var/snap/microk8s/common/var/supervisor.enabled"

// startProduct does what a distribution's boot does for an enabled service.
func startProduct() error {
	if _, err := os.Stat(enabledFile); err != nil {
		return nil
	}
	out, err := os.OpenFile("/var/log/microk8s-supervise.log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("cannot start the product: %w", err)
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fmt.Errorf("cannot start the product: %w", err)
	}
	defer null.Close()
	const program = "/snap/microk8s/current/bin/microk8s"
	_, err = os.StartProcess(program, []string{program, "supervise", "--boot"}, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=" + Path, "HOME=/root", "USER=root", "LANG=C.UTF-8"},
		Files: []*os.File{null, out, out},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("cannot start the product: %w", err)
	}
	return nil
}

// setUpHost builds the host's view of its file systems and makes it the root.
func setUpHost(cfg initConfig) error {
	// Nothing mounted from here on may reach the machine.
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	root := cfg.Root
	in := func(path string) string { return filepath.Join(root, path) }
	if err := mount(root, root, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	for _, dir := range systemDirs {
		st, err := os.Lstat(dir)
		if err != nil || !st.IsDir() {
			continue // a symbolic link is part of the root
		}
		if err := bindReadOnly(dir, in(dir)); err != nil {
			return err
		}
	}
	if cfg.Snap != "" {
		if err := bindReadOnly(cfg.Snap, in("/snap/microk8s/current")); err != nil {
			return err
		}
	}
	if cfg.Image != "" {
		if err := mountImage(cfg.Image, in("/var/snap")); err != nil {
			return err
		}
	}
	steps := []func() error{
		func() error {
			return mount("proc", in("/proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		},
		func() error {
			return mount("sysfs", in("/sys"), "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		},
		func() error { return mountCgroups(in(cgroupMount), cfg) },
		func() error { return makeDev(in("/dev")) },
		func() error { return mount("tmpfs", in("/tmp"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777") },
		func() error { return mount("tmpfs", in("/run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755") },
		func() error { return os.MkdirAll(in("/run/lock"), 0o1777) },
		func() error { return ownSysctls(in("/proc/sys"), in("/run/lab/sysctl")) },
		func() error { return ownBoot(in("/proc/sys/kernel/random/boot_id"), in("/run/lab/boot_id")) },
		func() error { return unix.Sethostname([]byte(cfg.Name)) },
		func() error { return changeRoot(root) },
		// Pods may ask for mount propagation in both directions.
		func() error { return mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	for _, y := range cfg.Cgroups {
		if y.pureV2() {
			if err := leaveRootCgroup(); err != nil {
				return err
			}
		}
	}
	return raiseLimits()
}

// leaveRootCgroup frees the top of a pure v2 hierarchy from processes, which it must not have
// if its children are to have controllers.
func leaveRootCgroup() error {
	dir := filepath.Join(cgroupMount, leaf)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot create cgroup: %w", err)
	}
	if err := writeFile(filepath.Join(dir, "cgroup.procs"), "0"); err != nil {
		return err
	}
	enableControllers(cgroupMount)
	return nil
}

// raiseLimits lifts the soft limit of open files to the hard one, as service starters do.
func raiseLimits() error {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return fmt.Errorf("cannot read the limit of open files: %w", err)
	}
	lim.Cur = lim.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return fmt.Errorf("cannot raise the limit of open files: %w", err)
	}
	return nil
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("cannot mount %s on %s: %w", cmpOr(fstype, source), target, err)
	}
	return nil
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// bindReadOnly shows a directory of the machine, with all that is mounted in it, read-only.
func bindReadOnly(source, target string) error {
	if err := mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	err := unix.MountSetattr(-1, target, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if errors.Is(err, unix.ENOSYS) { // before Linux 5.12: the top only
		err = unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	if err != nil {
		return fmt.Errorf("cannot make %s read-only: %w", target, err)
	}
	return nil
}

// mountCgroups mounts the machine's hierarchies again; the cgroup namespace makes the host's own
// cgroup their root.
func mountCgroups(dir string, cfg initConfig) error {
	for _, y := range cfg.Cgroups {
		if y.pureV2() {
			return mount("cgroup2", dir, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}
	}
	if err := mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755"); err != nil {
		return err
	}
	for _, y := range cfg.Cgroups {
		target := filepath.Join(dir, y.Dir)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return fmt.Errorf("cannot create %s: %w", target, err)
		}
		fstype := "cgroup"
		if y.V2 {
			fstype = "cgroup2"
		}
		if err := mount(fstype, target, fstype, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, y.Options); err != nil {
			return err
		}
	}
	for name, target := range cfg.Aliases {
		_ = os.Symlink(target, filepath.Join(dir, name))
	}
	return nil
}

// devices of a host; one that the machine does not have is left out. Disks are not among them.
var devices = []string{"null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse", "net/tun", "kvm", "vhost-net"}

func makeDev(dir string) error {
	if err := mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755"); err != nil {
		return err
	}
	for _, name := range devices {
		var st unix.Stat_t
		if err := unix.Stat("/dev/"+name, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
			continue
		}
		node := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(node), 0o755); err != nil {
			return fmt.Errorf("cannot create %s: %w", node, err)
		}
		if err := unix.Mknod(node, st.Mode, int(st.Rdev)); err != nil {
			return fmt.Errorf("cannot create device %s: %w", node, err)
		}
		if err := os.Chmod(node, os.FileMode(st.Mode&0o777)); err != nil {
			return fmt.Errorf("cannot create device %s: %w", node, err)
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("cannot create /dev/%s: %w", name, err)
		}
	}
	for _, m := range []struct{ name, fstype, data string }{
		{"pts", "devpts", "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{"shm", "tmpfs", "mode=1777"},
		{"mqueue", "mqueue", ""},
	} {
		target := filepath.Join(dir, m.name)
		if err := os.Mkdir(target, 0o755); err != nil {
			return fmt.Errorf("cannot create %s: %w", target, err)
		}
		err := mount(m.fstype, target, m.fstype, unix.MS_NOSUID|unix.MS_NOEXEC, m.data)
		if err != nil && m.name != "mqueue" { // a kernel may lack message queues
			return err
		}
	}
	return nil
}

// Settings of the kernel that are not per namespace and that the product sets. Each host gets
// files of its own in their place, so that it reads what it wrote and the machine keeps its
// values. (What they control is the machine's: the limits of fs.* are shared by all hosts.)
var globalSysctls = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "vm/max_map_count", "vm/swappiness",
	"kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	"fs/aio-max-nr", "fs/file-max", "fs/nr_open",
	"fs/inotify/max_user_instances", "fs/inotify/max_user_watches", "fs/inotify/max_queued_events",
}

func ownSysctls(sys, store string) error {
	for _, name := range globalSysctls {
		value, err := os.ReadFile(filepath.Join(sys, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot read sysctl %s: %w", name, err)
		}
		own := filepath.Join(store, strings.ReplaceAll(name, "/", "."))
		if err := os.MkdirAll(store, 0o755); err != nil {
			return fmt.Errorf("cannot keep sysctls: %w", err)
		}
		if err := os.WriteFile(own, value, 0o644); err != nil {
			return fmt.Errorf("cannot keep sysctl %s: %w", name, err)
		}
		if err := mount(own, filepath.Join(sys, name), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// ownBoot gives each boot of a host an ID of its own, by which a cluster tells machines and boots apart.
func ownBoot(path, store string) error {
	if err := os.WriteFile(store, []byte(uuid.NewString()+"\n"), 0o444); err != nil {
		return fmt.Errorf("cannot make the ID of this boot: %w", err)
	}
	return mount(store, path, "", unix.MS_BIND, "")
}

func changeRoot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("cannot enter %s: %w", root, err)
	}
	// The old root is stacked on the new one and taken off again: no directory is needed for it.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot change the root to %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot leave the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("cannot enter the new root: %w", err)
	}
	return nil
}

// mountImage mounts a disk image. The loop device frees itself when the last mount of it goes.
func mountImage(image, target string) error {
	out, err := exec.Command("mount", "--no-mtab", "-t", "ext4", "-o", "loop", image, target).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot mount disk image %s: %w: %s", image, err, strings.TrimSpace(string(out)))
	}
	return nil
}
