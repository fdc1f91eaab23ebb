package nodeconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"microk8s/internal/fileaccess"
	"microk8s/internal/snapenv"
)

// State is what the lock files say (cli.md 6.6): what the node is, and what people have asked of
// it. Reading it costs a few system calls and cannot fail.
type State struct {
	Installed bool // the node was set up; nothing runs before
	Stopped   bool // by microk8s stop
	Kubelite  bool // kubelite may start
	HA        bool // the datastore takes other members, so nodes can join

	Worker bool // a worker of a cluster: no control plane, and the API server proxy runs
	// Clustered: this node has joined another, or another has joined it. Its certificates then do
	// not follow the host's addresses.
	Clustered bool
	// Changing: a join or leave is under way, which starts and stops services itself.
	Changing bool
	// Resetting: a reset has begun to delete, and has not ended.
	Resetting bool

	LowMemory bool // too little for a control plane, which is not started by itself
	RootOnly  bool // hardened: the group has no access to the files

	KeepPods         bool // pods that mount an old revision are not restarted
	KeepObsoleteArgs bool // flags that today's programs refuse stay in the argument files
	KeepAIO          bool // the kernel's limit of asynchronous I/O is not raised
	KeepLimits       bool // none of the kernel's limits is raised
	KeepInotify      bool // the kernel's limits of inotify are not raised

	datastoreOff bool // the node runs no member; see Config.Datastore for why
}

// ReadState looks which locks there are.
func ReadState(env snapenv.Env) State {
	return State{
		Installed: locked(env, snapenv.LockInstalled),
		Stopped:   locked(env, snapenv.LockStopped),
		Kubelite:  locked(env, snapenv.LockLite),
		HA:        locked(env, snapenv.LockHA),
		Worker:    locked(env, snapenv.LockWorker),
		Clustered: locked(env, snapenv.LockNoReissue),
		Changing:  locked(env, snapenv.LockJoining),
		Resetting: locked(env, snapenv.LockResetting),
		LowMemory: locked(env, snapenv.LockLowMemory),
		RootOnly:  locked(env, snapenv.LockCIS),

		KeepPods:         locked(env, snapenv.LockNoRemount),
		KeepObsoleteArgs: locked(env, snapenv.LockKeepArgs),
		KeepAIO:          locked(env, snapenv.LockKeepAIO),
		KeepInotify:      locked(env, snapenv.LockKeepInotify),
		KeepLimits:       locked(env, snapenv.LockKeepLimits),

		datastoreOff: locked(env, snapenv.LockNoDqlite),
	}
}

func locked(env snapenv.Env, name string) bool {
	_, err := os.Lstat(env.Lock(name))
	return err == nil
}

// Lock makes lock files, by their names in package snapenv. One that exists is replaced by a new
// one, whose time of modification is now.
func Lock(env snapenv.Env, names ...string) error {
	files := fileaccess.For(env)
	if _, err := os.Stat(env.LocksDir()); errors.Is(err, fs.ErrNotExist) {
		if err := files.SharedDir(env.LocksDir()); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := files.WriteShared(env.Lock(name), nil); err != nil {
			return fmt.Errorf("cannot make the lock %s: %w", name, err)
		}
	}
	return nil
}

// Unlock removes lock files; one that does not exist is no error.
func Unlock(env snapenv.Env, names ...string) error {
	for _, name := range names {
		if err := os.Remove(env.Lock(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove the lock %s: %w", name, err)
		}
	}
	return nil
}
