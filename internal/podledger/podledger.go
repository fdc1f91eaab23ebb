// Package podledger writes down which pods this node's kubelet has run, by UID, so that the removal of the
// product knows whose logs are in /var/log/pods when the kubelet has forgotten the pod. The kubelet makes a
// directory for each pod in its own folder before the pod has a log; [Run] watches that folder.
package podledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"microk8s/internal/atomicfile"
	"microk8s/internal/filewatch"
	"microk8s/internal/snapenv"
)

// file has a UID in each line.
func file(env snapenv.Env) string { return filepath.Join(env.Common, "var/pods.ledger") }

// folder is where the kubelet has a directory for each pod, called after its UID.
func folder(env snapenv.Env) string { return filepath.Join(env.KubeletRoot(), "pods") }

// Read returns the UIDs of the pods that were written down, and of those that the kubelet has now.
func Read(env snapenv.Env) map[string]bool {
	out := map[string]bool{}
	data, _ := os.ReadFile(file(env)) // none on a node of an earlier version
	for uid := range strings.Lines(string(data)) {
		if uid, whole := strings.CutSuffix(uid, "\n"); whole && uid != "" {
			out[uid] = true
		}
	}
	for _, uid := range present(env) {
		out[uid] = true
	}
	return out
}

// present lists the pods that the kubelet has now.
func present(env snapenv.Env) (uids []string) {
	entries, _ := os.ReadDir(folder(env))
	for _, e := range entries {
		if e.IsDir() {
			uids = append(uids, e.Name())
		}
	}
	return uids
}

// Run keeps the ledger until ctx ends or the folder cannot be watched any more. Only one may run. First it
// drops the pods that have no logs left.
func Run(ctx context.Context, env snapenv.Env) error {
	if err := os.MkdirAll(folder(env), 0o750); err != nil { // as the kubelet makes it
		return fmt.Errorf("cannot watch the kubelet's pods: %w", err)
	}
	changed, err := filewatch.Watch(ctx, filewatch.Options{}, folder(env))
	if err != nil {
		return err
	}
	known := Read(env)
	if err := compact(env, known); err != nil {
		return err
	}
	for range changed {
		if err := add(env, known); err != nil {
			return err
		}
	}
	return nil
}

// compact rewrites the ledger without the pods that neither run nor have logs.
func compact(env snapenv.Env, known map[string]bool) error {
	logged := map[string]bool{}
	entries, err := os.ReadDir(env.HostPath("var/log/pods"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot look for logs of pods: %w", err)
	}
	for _, e := range entries {
		if i := strings.LastIndexByte(e.Name(), '_'); i >= 0 { // NAMESPACE_NAME_UID
			logged[e.Name()[i+1:]] = true
		}
	}
	now := present(env)
	var lines []string
	for uid := range known {
		if logged[uid] || slices.Contains(now, uid) {
			lines = append(lines, uid+"\n")
		} else {
			delete(known, uid)
		}
	}
	slices.Sort(lines)
	return atomicfile.Write(file(env), []byte(strings.Join(lines, "")), 0o600, nil)
}

// add appends the pods that are new.
func add(env snapenv.Env, known map[string]bool) error {
	var text strings.Builder
	for _, uid := range present(env) {
		if !known[uid] {
			known[uid] = true
			text.WriteString(uid + "\n")
		}
	}
	if text.Len() == 0 {
		return nil
	}
	f, err := os.OpenFile(file(env), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("cannot write down the kubelet's pods: %w", err)
	}
	_, err = f.WriteString(text.String())
	return errors.Join(err, f.Sync(), f.Close())
}
