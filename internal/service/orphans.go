package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// record names a process so that it can be recognised later: the pid alone is reused.
type record struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/<pid>/stat
	Boot  string `json:"boot"`  // boot id and pid namespace in which pid and start mean anything
}

// alive reports whether the process still runs.
func (r record) alive() bool {
	if r.PID <= 1 || r.Boot != bootID() {
		return false
	}
	st, err := readStat(r.PID)
	return err == nil && st.start == r.Start && st.state != 'Z'
}

// Alive lists the services whose last process still runs, whoever supervises it: after a
// supervisor was killed its services take a moment to end.
func Alive(env snapenv.Env) []string {
	return slices.DeleteFunc(Names(), func(name string) bool {
		var rec record
		data, err := os.ReadFile(recordFile(env, name))
		return err != nil || json.Unmarshal(data, &rec) != nil || !rec.alive()
	})
}

func recordFile(env snapenv.Env, name string) string {
	return filepath.Join(env.RunDir(), "supervisor."+name+".json")
}

func remember(env snapenv.Env, name string, pid int) error {
	st, err := readStat(pid)
	if err != nil {
		return err
	}
	data, err := json.Marshal(record{PID: pid, Start: st.start, Boot: bootID()})
	if err != nil {
		return err
	}
	return atomicfile.Write(recordFile(env, name), append(data, '\n'), 0o644, nil)
}

func forget(env snapenv.Env, name string) { _ = os.Remove(recordFile(env, name)) }

func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	ns, _ := os.Readlink("/proc/self/ns/pid")
	return strings.TrimSpace(string(id)) + " " + ns
}

// endOrphans ends the services that a predecessor left when it was killed. Containers and
// their shims are left alone: containerd takes them over again.
func (s *Supervisor) endOrphans(ctx context.Context) error {
	for _, name := range slices.Backward(Names()) {
		data, err := os.ReadFile(recordFile(s.Env, name))
		if err != nil {
			continue
		}
		var rec record
		alive := func() bool { return rec.alive() }
		if json.Unmarshal(data, &rec) == nil && alive() {
			s.Log.Warn("stopping a service that a previous supervisor left", "service", name, "pid", rec.PID)
			target := -rec.PID
			if name == Containerd {
				target = rec.PID
			}
			_ = unix.Kill(target, unix.SIGTERM)
			_ = unix.Kill(target, unix.SIGCONT)
			if !await(ctx, s.StopTimeout, func() bool { return !alive() }) {
				_ = unix.Kill(target, unix.SIGKILL)
				if !await(ctx, s.StopTimeout, func() bool { return !alive() }) {
					return fmt.Errorf("cannot end process %d, which a previous supervisor started as %s", rec.PID, name)
				}
			}
		}
		forget(s.Env, name)
	}
	return ctx.Err()
}

// await polls for a condition of foreign processes, of which the kernel sends no event.
func await(ctx context.Context, limit time.Duration, done func() bool) bool {
	deadline := time.Now().Add(limit)
	for !done() {
		if time.Now().After(deadline) {
			return false
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(10 * time.Millisecond):
		}
	}
	return true
}

// endContainers kills every descendant of this process and every containerd shim of this
// installation with all that runs below it. It needs no containerd, so it is the last resort
// after the orderly way.
func (s *Supervisor) endContainers() error {
	var left []int
	ok := await(context.Background(), s.StopTimeout, func() bool {
		left = s.remains()
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		return len(left) == 0
	})
	if !ok {
		return fmt.Errorf("cannot end processes %v", left)
	}
	return nil
}

// remains lists the processes that belong to us and still run, except what [Detach] runs.
func (s *Supervisor) remains() []int {
	all := processes()
	delete(all, spared(s.Env))
	ours := map[int]bool{os.Getpid(): true}
	for pid := range all {
		if s.isShim(pid) {
			ours[pid] = true
		}
	}
	for grown := true; grown; {
		grown = false
		for pid, st := range all {
			if !ours[pid] && ours[st.ppid] {
				ours[pid], grown = true, true
			}
		}
	}
	delete(ours, os.Getpid())
	var out []int
	for pid := range ours {
		if all[pid].state != 'Z' {
			out = append(out, pid)
		}
	}
	return out
}

// isShim reports whether a process is a containerd shim of this installation, in our pid
// namespace: other installations on the machine (the lab's hosts) are not ours to touch.
func (s *Supervisor) isShim(pid int) bool {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(cmdline, []byte("containerd-shim")) ||
		!bytes.Contains(cmdline, []byte("\x00"+s.Env.ContainerdSocket()+"\x00")) {
		return false
	}
	mine, err1 := os.Readlink("/proc/self/ns/pid")
	theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	return err1 == nil && err2 == nil && mine == theirs
}

type procStat struct {
	ppid  int
	state byte
	start uint64
}

// processes reads all processes of this pid namespace.
func processes() map[int]procStat {
	out := map[int]procStat{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if st, err := readStat(pid); err == nil {
			out[pid] = st
		}
	}
	return out
}

func readStat(pid int) (procStat, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return procStat{}, err
	}
	// The second field is a name in brackets that may hold anything, brackets included.
	_, rest, ok := bytes.Cut(data[max(0, bytes.LastIndexByte(data, ')')):], []byte(") "))
	f := strings.Fields(string(rest))
	if !ok || len(f) < 20 {
		return procStat{}, errors.New("cannot read the state of a process: unknown form of stat")
	}
	ppid, err1 := strconv.Atoi(f[1])
	start, err2 := strconv.ParseUint(f[19], 10, 64)
	return procStat{ppid: ppid, state: f[0][0], start: start}, errors.Join(err1, err2)
}
