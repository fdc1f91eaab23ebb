package lab_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"microk8s/tests/lab"
	"microk8s/tests/lab/hoststate"
	"microk8s/tests/lab/labtest"
)

// upEnv makes this test program bring up one host of the lab named, for tests that kill it
// meanwhile.
const upEnv = "LAB_TEST_UP"

func TestMain(m *testing.M) {
	if instance := os.Getenv(upEnv); instance != "" {
		l, err := lab.New(lab.Config{Instance: instance})
		if err == nil {
			err = l.Up(context.Background(), "n1", lab.Options{})
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const soon = 30 * time.Second

// dial tries a TCP connection from one host to another's port 7.
func dial(t *testing.T, from labtest.Host, to string, limit time.Duration) error {
	t.Helper()
	ip, err := from.IP(to)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	conn, err := from.Dial(ctx, from.Name, "tcp", net.JoinHostPort(ip, "7"))
	if err != nil {
		return err
	}
	return conn.Close()
}

// answer listens on port 7 of a host; the kernel takes the connections.
func answer(t *testing.T, h labtest.Host) {
	t.Helper()
	listener, err := h.Listen(t.Context(), h.Name, "tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
}

func TestLabHostIsAMachineOfItsOwn(t *testing.T) {
	l := labtest.New(t, "")
	h := labtest.Node(t, l, "n1", lab.Options{})

	for _, tc := range []struct{ what, script, want string }{
		{"host name", "hostname", "n1"},
		{"name in /etc", "cat /etc/hostname", "n1"},
		{"PID 1", "tr '\\0' ' ' < /proc/1/cmdline", "microk8s-lab-init " + l.Instance() + " n1"},
		{"links", "ls /sys/class/net | sort | tr '\\n' ' '", "eth0 lo"},
		{"search path begins", "echo ${PATH%%:*}", "/snap/bin"},
		{"home", "pwd", "/root"},
		{"data links", "readlink /var/snap/microk8s/current", "x1"},
		{"product's command", "readlink /snap/bin/microk8s.kubectl || true", ""},
		{"machine's programs", "touch /usr/x 2>/dev/null && echo writable || echo read-only", "read-only"},
		{"own files", "touch /etc/x /var/x /opt/x && echo writable", "writable"},
		{"propagation of mounts", "awk '$5 == \"/\" { print $7 }' /proc/self/mountinfo | cut -d: -f1", "shared"},
		{"own copy of a global setting", "echo 1 > /proc/sys/vm/overcommit_memory; cat /proc/sys/vm/overcommit_memory", "1"},
		{"ID of its boot", "cmp /proc/sys/kernel/random/boot_id /run/lab/boot_id && echo its own", "its own"},
		{"layers of containers", "cd /var/snap/microk8s/common && mkdir l u w m && echo low > l/f && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none m && cat m/f", "low"},
		{"pod network", "ip link add flannel.1 type vxlan id 1 dev eth0 dstport 4789 && cat /sys/class/net/flannel.1/mtu; ip link del flannel.1", "1450"},
		{"terminals", "ls -l /dev/ptmx | sed 's/.*-> //'", "pts/ptmx"},
	} {
		if got := strings.TrimSpace(h.Run(t, "sh", "-c", tc.script)); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.what, got, tc.want)
		}
	}
	for line := range strings.Lines(h.Run(t, "cat", "/proc/1/cgroup")) {
		if path := strings.TrimSpace(line[strings.LastIndexByte(line, ':')+1:]); path != "/" && path != "/init" {
			t.Errorf("the host's own cgroup is not its root: %q", line)
		}
	}
	// A cgroup made in the host lies below the lab's name on the machine.
	h.Run(t, "sh", "-c", "for d in /sys/fs/cgroup/memory /sys/fs/cgroup/unified /sys/fs/cgroup; do [ -e $d/cgroup.procs ] && mkdir $d/below && break; done")
	var found bool
	for _, pattern := range []string{"/sys/fs/cgroup/*/microk8s-lab-%s/n1/below", "/sys/fs/cgroup/microk8s-lab-%s/n1/below"} {
		if m, _ := filepath.Glob(fmt.Sprintf(pattern, l.Instance())); len(m) == 1 {
			found = true
		}
	}
	if !found {
		t.Error("a cgroup made in the host is not below the lab's own")
	}
	if n := len(strings.Split(strings.TrimSpace(h.Run(t, "sh", "-c", "ls -d /proc/[0-9]*")), "\n")); n > 5 {
		t.Errorf("the host sees %d processes, want its own few", n)
	}
}

func TestLabExecPassesStreamsAndExitCode(t *testing.T) {
	h := labtest.Node(t, labtest.New(t, ""), "n1", lab.Options{})
	var out, errOut bytes.Buffer
	err := h.Exec(t.Context(), "n1", lab.Command{
		Args: []string{"sh", "-c", "cat; echo oops >&2; exit 7"}, Stdin: strings.NewReader("hello"), Stdout: &out, Stderr: &errOut,
	})
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || out.String() != "hello" || errOut.String() != "oops\n" {
		t.Errorf("got %v, %q, %q", err, out.String(), errOut.String())
	}
	if err := h.Exec(t.Context(), "n1", lab.Command{Args: []string{"no-such-command"}}); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("a missing command gives %v", err)
	}
	if err := h.Exec(t.Context(), "n2", lab.Command{Args: []string{"true"}}); !errors.Is(err, lab.ErrNoHost) {
		t.Errorf("a missing host gives %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cmd, err := h.Spawn(ctx, "n1", lab.Command{Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("a command outlived its context")
	}
}

func TestLabNetwork(t *testing.T) {
	l := labtest.New(t, "")
	n1, n2, n3 := labtest.Node(t, l, "n1", lab.Options{}), labtest.Node(t, l, "n2", lab.Options{}), labtest.Node(t, l, "n3", lab.Options{DefaultRoute: true})
	for _, h := range []labtest.Host{n1, n2, n3} {
		answer(t, h)
	}
	const short = 300 * time.Millisecond // only waited for in full when packets are dropped, as they shall be
	reach := func(what string, from, to labtest.Host, want bool) {
		t.Helper()
		if want {
			if err := dial(t, from, to.Name, soon); err != nil {
				t.Errorf("%s: %s does not reach %s: %v", what, from.Name, to.Name, err)
			}
		} else if dial(t, from, to.Name, short) == nil {
			t.Errorf("%s: %s reaches %s", what, from.Name, to.Name)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	reach("whole", n1, n2, true)
	reach("whole", n3, n1, true)

	do(l.Cut(t.Context(), "n2", "n1"))
	reach("n1 and n2 cut", n1, n2, false)
	reach("n1 and n2 cut", n2, n1, false)
	reach("n1 and n2 cut", n1, n3, true)
	if i, err := l.Info(t.Context(), "n1"); err != nil || fmt.Sprint(i.Cut) != "[n2]" {
		t.Errorf("info of n1 says cut from %v, %v", i.Cut, err)
	}
	// A cut stays when a host goes off and on.
	do(l.Kill(t.Context(), "n2"))
	do(l.Start(t.Context(), "n2"))
	answer(t, n2)
	reach("n2 on again", n1, n2, false)
	reach("n2 on again", n3, n2, true)

	do(l.Heal(t.Context()))
	reach("healed", n1, n2, true)

	do(l.Cut(t.Context(), "n3", ""))
	reach("n3 cut off", n3, n1, false)
	reach("n3 cut off", n2, n3, false)
	reach("n3 cut off", n2, n1, true)
	do(l.Heal(t.Context(), "n3"))
	reach("n3 healed", n3, n1, true)

	if err := l.Cut(t.Context(), "n1", "n1"); err == nil {
		t.Error("cut a host from itself")
	}
	if err := l.Cut(t.Context(), "n1", "nobody"); !errors.Is(err, lab.ErrNoHost) {
		t.Errorf("cut from a host that does not exist: %v", err)
	}

	// No way out: not at all without a default route, and nobody answers with one.
	_, err := l.Dial(t.Context(), "n1", "tcp", "192.0.2.1:80")
	if !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("n1 to the outside: %v, want network unreachable", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), short)
	defer cancel()
	if _, err := l.Dial(ctx, "n3", "tcp", "192.0.2.1:80"); err == nil || errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("n3 to the outside: %v, want silence", err)
	}
	if routes := n3.Run(t, "cat", "/proc/net/route"); !strings.Contains(routes, "eth0\t00000000\t00000000") {
		t.Errorf("n3 has no default route:\n%s", routes)
	}

	// The switch is one process; without it there is no network, and up brings it back.
	do(killProcess(t, "microk8s-lab-switch", l.Instance()))
	labtest.Eventually(t, soon, func() error {
		if dial(t, n1, "n2", short) == nil {
			return errors.New("n1 still reaches n2")
		}
		return nil
	})
	do(l.Up(t.Context(), "n1", lab.Options{}))
	reach("new switch", n1, n2, true)
	reach("new switch", n2, n3, true)
}

// killProcess kills one of the lab's own processes, found by its arguments.
func killProcess(t *testing.T, argv ...string) error {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && string(b) == strings.Join(argv, "\x00")+"\x00" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			if err != nil {
				return err
			}
			return syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return fmt.Errorf("found no process %q", argv)
}

// ticker starts a process in a host that counts in a file, and gives the file.
func ticker(t *testing.T, h labtest.Host) (count func() int) {
	t.Helper()
	h.Run(t, "sh", "-c", "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /root/tick.new; mv /root/tick.new /root/tick; sleep 0.01; done' </dev/null >/dev/null 2>&1 &")
	return func() int {
		b, err := os.ReadFile(filepath.Join(h.Root(h.Name), "root/tick"))
		if err != nil {
			return 0
		}
		n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		return n
	}
}

func advance(t *testing.T, count func() int, by int) {
	t.Helper()
	start := count()
	labtest.Eventually(t, soon, func() error {
		if now := count(); now < start+by {
			return fmt.Errorf("the counter is at %d, began at %d", now, start)
		}
		return nil
	})
}

func TestLabPauseAndResume(t *testing.T) {
	l := labtest.New(t, "")
	n1, n2 := labtest.Node(t, l, "n1", lab.Options{}), labtest.Node(t, l, "n2", lab.Options{})
	one, two := ticker(t, n1), ticker(t, n2)
	advance(t, one, 3)
	if err := l.Pause(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	frozen := one()
	advance(t, two, 20)
	if now := one(); now != frozen {
		t.Errorf("a paused host counted from %d to %d", frozen, now)
	}
	if i, err := l.Info(t.Context(), "n1"); err != nil || i.State != lab.Paused {
		t.Errorf("state %v, %v; want paused", i.State, err)
	}
	if err := l.Exec(t.Context(), "n1", lab.Command{Args: []string{"true"}}); !errors.Is(err, lab.ErrPaused) {
		t.Errorf("exec in a paused host: %v", err)
	}
	if err := l.Resume(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	advance(t, one, 3)

	// A paused host goes on at its time, and can be switched off.
	labtest.Play(t, l, `version: 1
hosts: [{name: n1}, {name: n2}]
steps:
- {pause: n1}
- {at: 200ms, resume: n1}
- {expect: {host: n1, command: "true"}}
- {at: 300ms, pause: n1}
- {at: 400ms, kill: n1}
`)
	if i, err := l.Info(t.Context(), "n1"); err != nil || i.State != lab.Off {
		t.Errorf("state %v, %v; want off", i.State, err)
	}
	if err := l.Pause(t.Context(), "n1"); !errors.Is(err, lab.ErrNotRunning) {
		t.Errorf("pause of a host that is off: %v", err)
	}
}

// fakeProduct keeps the contract between lab and product: start enables, boot supervises.
const fakeProduct = `#!/bin/sh
case $1 in
start) mkdir -p /var/snap/microk8s/common/var; touch /var/snap/microk8s/common/var/supervisor.enabled;;
supervise) cat /proc/sys/kernel/random/uuid >> /var/snap/microk8s/common/supervised; exec sleep 100000;;
esac
`

func TestLabKillAndStart(t *testing.T) {
	snap := t.TempDir()
	if err := os.Mkdir(filepath.Join(snap, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(snap, "bin/microk8s"), []byte(fakeProduct), 0o755); err != nil {
		t.Fatal(err)
	}
	l := labtest.New(t, snap)
	h := labtest.Node(t, l, "n1", lab.Options{})
	ip, err := l.IP("n1")
	if err != nil {
		t.Fatal(err)
	}
	h.Run(t, "sh", "-c", "echo kept > /etc/mine; echo kept > /var/snap/microk8s/common/mine; echo gone > /tmp/mine; echo gone > /run/mine")
	count := ticker(t, h)
	advance(t, count, 3)
	restart := func() {
		t.Helper()
		labtest.Play(t, l, "version: 1\nhosts: [{name: n1}]\nsteps: [{kill: n1}]\n")
		if err := l.Exec(t.Context(), "n1", lab.Command{Args: []string{"true"}}); !errors.Is(err, lab.ErrNotRunning) {
			t.Errorf("exec in a host that is off: %v", err)
		}
		if err := l.Start(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	if got := h.Run(t, "sh", "-c", "cat /etc/mine /var/snap/microk8s/common/mine; ls /tmp /run"); got != "kept\nkept\n/run:\nlab\nlock\n\n/tmp:\n" {
		t.Errorf("after power loss the host has %q", got)
	}
	if again, err := l.IP("n1"); err != nil || again != ip {
		t.Errorf("address %s, %v; was %s", again, err, ip)
	}
	if out := h.Run(t, "cat", "/proc/net/fib_trie"); !strings.Contains(out, ip+"\n") {
		t.Errorf("the host does not have its address %s", ip)
	}
	if out, _ := h.Output(t.Context(), "n1", "cat", "/var/snap/microk8s/common/supervised"); out != "" {
		t.Error("boot started a product that was never started")
	}
	h.Run(t, "microk8s", "start")
	restart()
	labtest.Eventually(t, soon, func() error {
		out, err := h.Output(t.Context(), "n1", "cat", "/var/snap/microk8s/common/supervised")
		if err == nil && strings.Count(out, "\n") != 1 {
			err = fmt.Errorf("supervised %q, want one line", out)
		}
		return err
	})
	// A running host stays as it is.
	if err := l.Start(t.Context(), "n1"); err != nil {
		t.Error(err)
	}
	// Orphans are reaped by the host's init.
	h.Run(t, "sh", "-c", "for i in 1 2 3 4 5; do (true &) ; done")
	labtest.Eventually(t, soon, func() error {
		if out := h.Run(t, "sh", "-c", "cat /proc/[0-9]*/stat"); strings.Contains(out, ") Z ") {
			return fmt.Errorf("zombies: %s", out)
		}
		return nil
	})
}

func TestLabDisk(t *testing.T) {
	l := labtest.New(t, "")
	before := hoststate.Take(t, l.Instance())
	h := labtest.Node(t, l, "n1", lab.Options{})
	const file = "/var/snap/microk8s/common/mine"
	h.Run(t, "sh", "-c", "echo kept > "+file+"; mknod "+file+".null c 1 3; ln "+file+" "+file+".link")
	check := func(what string) {
		t.Helper()
		if got := h.Run(t, "sh", "-c", "cat "+file+"; stat -c '%F %h' "+file+".null "+file+".link; readlink /var/snap/microk8s/current"); got != "kept\ncharacter special file 1\nregular file 2\nx1\n" {
			t.Errorf("%s: data is %q", what, got)
		}
	}
	size := func() int {
		t.Helper()
		kib, err := strconv.Atoi(strings.TrimSpace(h.Run(t, "sh", "-c", "df -k --output=size /var/snap | tail -1")))
		if err != nil {
			t.Fatal(err)
		}
		return kib / 1024
	}
	for _, mib := range []int{40, 80, 30} {
		if err := l.Disk(t.Context(), "n1", int64(mib)<<20); err != nil {
			t.Fatal(err)
		}
		check(fmt.Sprintf("%d MiB", mib))
		if got := size(); got > mib || got < mib/2 {
			t.Errorf("the disk has %d MiB, want nearly %d", got, mib)
		}
	}
	_, err := h.Output(t.Context(), "n1", "dd", "if=/dev/zero", "of=/var/snap/microk8s/common/big", "bs=1M")
	if err == nil || !strings.Contains(err.Error(), "No space left") {
		t.Errorf("filling the disk: %v", err)
	}
	// A full disk survives power loss, and does not fit a smaller one.
	if err := l.Kill(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	if err := l.Disk(t.Context(), "n1", 20<<20); err == nil {
		t.Error("a full disk was made smaller")
	}
	if i, err := l.Info(t.Context(), "n1"); err != nil || i.State != lab.Off || i.Disk != 30<<20 {
		t.Errorf("after a refusal: %+v, %v", i, err)
	}
	if err := l.Start(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	check("after power loss")
	if err := l.Disk(t.Context(), "n1", 0); err != nil {
		t.Fatal(err)
	}
	check("no limit")
	if got := size(); got < 100 {
		t.Errorf("without a limit the disk has %d MiB", got)
	}
	// What does not fit is refused at once as well.
	if err := l.Disk(t.Context(), "n1", 16<<20); err == nil {
		t.Error("the data does not fit, and was put there")
	}
	check("after a refusal")
	if err := l.Disk(t.Context(), "n1", 1000); err == nil {
		t.Error("made a disk of 1000 bytes")
	}
	if err := l.Disk(t.Context(), "n1", 64<<20); err != nil {
		t.Fatal(err)
	}
	if err := l.Down(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	hoststate.Compare(t, before)
}

func TestLabDownLeavesNoTrace(t *testing.T) {
	labtest.NeedRoot(t)
	busy := func(t *testing.T, h labtest.Host) {
		// Nested cgroups, a mount, a network namespace with a link, netfilter rules, and an orphan.
		h.Run(t, "sh", "-c", `set -e
for d in /sys/fs/cgroup/* /sys/fs/cgroup; do [ -e $d/cgroup.procs ] && mkdir -p $d/kubepods/pod || true; done
mkdir -p /var/lib/kubelet/x && mount -t tmpfs none /var/lib/kubelet/x
nft add table inet t
setsid sleep 100000 </dev/null >/dev/null 2>&1 &
setsid unshare -n sleep 100000 </dev/null >/dev/null 2>&1 &
echo 10 > /proc/sys/kernel/panic`)
	}
	killInit := func(t *testing.T, l *lab.Lab) {
		i, err := l.Info(t.Context(), "n1")
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(i.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	for name, hurt := range map[string]func(*testing.T, *lab.Lab){
		"in order":        func(*testing.T, *lab.Lab) {},
		"init was killed": killInit,
		"paused":          func(t *testing.T, l *lab.Lab) { must(t, l.Pause(t.Context(), "n1")) },
		"cut":             func(t *testing.T, l *lab.Lab) { must(t, l.Cut(t.Context(), "n1", "n2")) },
		"host by host":    func(t *testing.T, l *lab.Lab) { must(t, l.Down(t.Context(), "n2")) },
		"switch was killed": func(t *testing.T, l *lab.Lab) {
			must(t, killProcess(t, "microk8s-lab-switch", l.Instance()))
		},
		"record is damaged": func(t *testing.T, l *lab.Lab) {
			must(t, os.WriteFile(filepath.Join(filepath.Dir(l.Root("n1")), "host.json"), []byte("{"), 0o644))
		},
		"records are lost": func(t *testing.T, l *lab.Lab) {
			must(t, os.Remove(filepath.Join(filepath.Dir(l.Root("n1")), "host.json")))
			must(t, os.Remove(filepath.Join(l.Root("n1"), "../../../lab.json")))
		},
		"machine was started again": func(t *testing.T, l *lab.Lab) { // as far as the records tell
			killInit(t, l)
			for _, f := range []string{"host.json", "../../lab.json"} {
				path := filepath.Join(filepath.Dir(l.Root("n1")), f)
				data, err := os.ReadFile(path)
				must(t, err)
				boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
				must(t, err)
				must(t, os.WriteFile(path, bytes.ReplaceAll(data, bytes.TrimSpace(boot), []byte("another")), 0o644))
			}
			i, err := l.Info(t.Context(), "n1")
			if err != nil || i.State != lab.Off {
				t.Errorf("a host of before the reboot is %s, %v", i.State, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := labtest.New(t, "")
			before := hoststate.Take(t, l.Instance())
			for _, n := range []string{"n1", "n2"} {
				busy(t, labtest.Node(t, l, n, lab.Options{}))
			}
			hurt(t, l)
			must(t, l.Down(t.Context()))
			hoststate.Compare(t, before)
			if _, err := os.Stat(filepath.Join(l.Root("n1"), "../../..")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the lab's directory: %v, want none", err)
			}
		})
	}
}

// TestLabUpInterrupted kills the program at several points of Up; Down then finds everything,
// and Up goes on from there.
func TestLabUpInterrupted(t *testing.T) {
	labtest.NeedRoot(t)
	exists := func(patterns ...string) func(l *lab.Lab) bool {
		return func(l *lab.Lab) bool {
			for _, p := range patterns {
				if m, _ := filepath.Glob(strings.ReplaceAll(strings.ReplaceAll(p, "INSTANCE", l.Instance()), "HOST", filepath.Dir(l.Root("n1")))); len(m) > 0 {
					return true
				}
			}
			return false
		}
	}
	pid := func(l *lab.Lab) bool {
		b, _ := os.ReadFile(filepath.Join(filepath.Dir(l.Root("n1")), "host.json"))
		return bytes.Contains(b, []byte(`"prepared"`)) && !bytes.Contains(b, []byte(`"pid": 0`))
	}
	for _, point := range []struct {
		name    string
		reached func(*lab.Lab) bool
	}{
		{"host directory", exists("HOST")},
		{"record", exists("HOST/host.json")},
		{"half a root", exists("HOST/root/var")},
		{"root", exists("HOST/root/etc/hostname")},
		{"switch's cgroup", exists("/sys/fs/cgroup/*/microk8s-lab-INSTANCE/.switch", "/sys/fs/cgroup/microk8s-lab-INSTANCE/.switch")},
		{"switch", exists("HOST/../../lab.json")},
		{"host's cgroup", exists("/sys/fs/cgroup/*/microk8s-lab-INSTANCE/n1", "/sys/fs/cgroup/microk8s-lab-INSTANCE/n1")},
		{"init's log", exists("HOST/init.log")},
		{"init", pid},
	} {
		for _, then := range []string{"down", "up"} {
			t.Run(point.name+" then "+then, func(t *testing.T) {
				l := labtest.New(t, "")
				before := hoststate.Take(t, l.Instance())
				cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
				cmd.Env = append(os.Environ(), upEnv+"="+l.Instance())
				must(t, cmd.Start())
				ended := make(chan struct{})
				go func() { _ = cmd.Wait(); close(ended) }()
				for reached := false; !reached; reached = reached || point.reached(l) {
					select {
					case <-ended: // it was faster than this loop: nothing is interrupted, all the same must hold
						reached = true
					default:
					}
				}
				_ = cmd.Process.Kill()
				<-ended
				if then == "up" {
					h := labtest.Node(t, l, "n1", lab.Options{})
					if got := h.Run(t, "cat", "/etc/hostname"); got != "n1\n" {
						t.Errorf("the host calls itself %q", got)
					}
				}
				must(t, l.Down(t.Context()))
				hoststate.Compare(t, before)
			})
		}
	}
}

func TestLabsSideBySide(t *testing.T) {
	l := labtest.New(t, "")
	labtest.Node(t, l, "n1", lab.Options{})
	other, err := lab.New(lab.Config{Instance: labtest.Instance(t) + "-b"})
	must(t, err)
	must(t, other.Down(t.Context()))
	before := hoststate.Take(t, other.Instance())
	must(t, other.Up(t.Context(), "n1", lab.Options{}))
	must(t, other.Down(t.Context()))
	hoststate.Compare(t, before)
	if i, err := l.Info(t.Context(), "n1"); err != nil || i.State != lab.Running {
		t.Errorf("the first lab's host: %s, %v", i.State, err)
	}
}

func TestLabRefusesNames(t *testing.T) {
	for _, name := range []string{"", "N1", "a/b", "..", ".switch", "-a", "a-", strings.Repeat("a", 64)} {
		l, err := lab.New(lab.Config{StateDir: t.TempDir()})
		must(t, err)
		if err := l.Up(t.Context(), name, lab.Options{}); err == nil {
			t.Errorf("a host may be called %q", name)
		}
		if name == "" {
			continue
		}
		if _, err := lab.New(lab.Config{Instance: name}); err == nil {
			t.Errorf("a lab may be called %q", name)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
