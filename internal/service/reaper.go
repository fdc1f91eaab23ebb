package service

import (
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// reaper starts processes and collects every child of this process, adopted ones included, so
// that none stays a zombie. A process that has one must start children through it only:
// os/exec would lose its exit statuses to it.
type reaper struct {
	mu       sync.Mutex // held while a process is being started: it may end before it is known
	known    map[int]*process
	requests chan func()
}

func startReaper() (*reaper, error) {
	r := &reaper{known: map[int]*process{}, requests: make(chan func())}
	// Pdeathsig goes by the thread that forked, so one thread forks them all and never ends.
	go func() {
		runtime.LockOSThread()
		for f := range r.requests {
			f()
		}
	}()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGCHLD)
	go func() {
		for range signals {
			r.collect()
		}
	}()
	return r, nil
}

// spawn starts a program. The returned process' ended channel is closed when it has ended.
func (r *reaper) spawn(path string, argv []string, attr *os.ProcAttr) (*process, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var osp *os.Process
	var err error
	done := make(chan struct{})
	r.requests <- func() {
		osp, err = os.StartProcess(path, argv, attr)
		close(done)
	}
	<-done
	if err != nil {
		return nil, err
	}
	p := &process{pid: osp.Pid, ended: make(chan struct{})}
	_ = osp.Release()
	r.known[p.pid] = p
	return p, nil
}

// collect waits for every child that has ended; one SIGCHLD may stand for several.
func (r *reaper) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if p := r.known[pid]; p != nil {
			delete(r.known, pid)
			p.status = ws
			close(p.ended)
		}
	}
}
