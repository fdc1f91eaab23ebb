package nodeconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// nameFile holds the name under which this node registered. It is in $SNAP_COMMON, so that a
// revert of the snap does not bring an old one back.
func nameFile(env snapenv.Env) string { return filepath.Join(env.Common, "var/node-name") }

// RegisteredName returns the name under which this node is in its cluster; "" before its first
// start.
func RegisteredName(env snapenv.Env) (string, error) {
	text, err := os.ReadFile(nameFile(env))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(text)), err
}

// KeepName notes the name under which this node registers. Its kubelet calls it at each start.
func KeepName(env snapenv.Env, name string) error {
	if before, err := RegisteredName(env); err == nil && before == name {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(nameFile(env)), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(nameFile(env), []byte(name+"\n"), 0o644, nil)
}

// ForgetName lets this node register under another name. Its Node object of the old name stays in the
// cluster until somebody deletes it.
func ForgetName(env snapenv.Env) error {
	if err := os.Remove(nameFile(env)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// CheckRegistered reports that the node would register under another name than it has. Kubernetes
// takes that for a second machine: the Node of the old name stays, with pods that run nowhere
// and volumes that nothing mounts. A join or leave that is under way makes a new node.
func CheckRegistered(env snapenv.Env, name string) error {
	s := ReadState(env)
	before, err := RegisteredName(env)
	if err != nil || before == "" || name == "" || before == name || s.Changing {
		return err
	}
	why := fmt.Sprintf("the host is called %s now", name)
	next := fmt.Sprintf("go back with: hostnamectl set-hostname %s; or keep both names with --%s=%s in %s; then run: microk8s start",
		before, overrideFlag, before, env.Args(Kubelet))
	if f, err := File(env, Kubelet); err == nil {
		if v, _ := f.Get(overrideFlag); v != "" {
			why = fmt.Sprintf("--%s in %s is %s now", overrideFlag, env.Args(Kubelet), name)
			next = fmt.Sprintf("change it to %s there and run: microk8s start", before)
		}
	}
	if !s.Clustered && !s.Worker {
		next += "; or make it a new node with: microk8s start --new-name"
	}
	return fmt.Errorf("this node is %s in its cluster, and %s: %s", before, why, next)
}
