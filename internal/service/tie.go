package service

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// supervisorVar tells a service the pid of the supervisor that started it.
const supervisorVar = "MICROK8S_SUPERVISOR"

// ExitIdle is the exit status with which a service tells our supervisor that it has nothing to
// do on this node. Status 0 does not say that: a daemon that somebody else told to end has it
// too, and must be started again. (Under snapd 0 is what says it.)
const ExitIdle = 80

// Supervised reports whether our supervisor started this process.
func Supervised(getenv func(string) string) bool { return getenv(supervisorVar) != "" }

// TieToSupervisor makes this process end when the supervisor that started it dies, also after
// it has become another program. The kernel keeps that wish per thread, so the calling
// goroutine is bound to its thread and must be the one that calls exec. It does nothing in a
// process that no supervisor started.
func TieToSupervisor(getenv func(string) string) error {
	pid, err := strconv.Atoi(getenv(supervisorVar))
	if err != nil {
		return nil
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		return fmt.Errorf("cannot tie the service to its supervisor: %w", err)
	}
	if os.Getppid() != pid {
		return fmt.Errorf("the supervisor (pid %d) has ended", pid)
	}
	return nil
}
