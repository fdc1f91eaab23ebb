package nodeconfig

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

// Edit changes one argument file, $SNAP_DATA/args/<file>, which need not exist. Of several
// edits at the same time, in any process, each sees what the one before it has written. An error
// of change, or a file that cannot be understood, leaves the file as it is. changed reports whether
// the text is another; only then the file is replaced, and the old text kept as FILE.backup.
func Edit(env snapenv.Env, file string, change func(*args.File) error) (changed bool, err error) {
	unlock, err := lockArgs(env)
	if err != nil {
		return false, fmt.Errorf("cannot change %s: %w", env.Args(file), err)
	}
	defer unlock()
	f, err := File(env, file)
	if err != nil {
		return false, err
	}
	before := f.Bytes()
	if err := change(f); err != nil {
		return false, err
	}
	if bytes.Equal(before, f.Bytes()) {
		return false, nil
	}
	return true, f.Save(env.Args(file))
}

// SetFlags is [Edit] for values of flags, named without dashes: each is set, and one with the
// value "" is removed.
func SetFlags(env snapenv.Env, file string, values map[string]string) (changed bool, err error) {
	return Edit(env, file, func(f *args.File) error {
		for _, flag := range slices.Sorted(maps.Keys(values)) {
			if has, ok := f.Get(flag); values[flag] == "" {
				f.Unset(flag)
			} else if ok && has == values[flag] {
				continue // as it is written: quotes may differ
			} else if err := f.Set(flag, values[flag]); err != nil {
				return fmt.Errorf("in %s: %w", env.Args(file), err)
			}
		}
		return nil
	})
}

// lockArgs holds the folder of the argument files for one edit, by a lock of the kernel that ends
// with the process.
func lockArgs(env snapenv.Env) (unlock func(), err error) {
	dir, err := os.Open(env.ArgsDir())
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		dir.Close()
		return nil, err
	}
	return func() { dir.Close() }, nil
}
