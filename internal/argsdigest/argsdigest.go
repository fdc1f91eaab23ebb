// Package argsdigest knows which argument files were changed after the service that reads them was
// started: [Record] keeps their digests when it is, [Changed] compares. The files themselves are the
// business of internal/args.
package argsdigest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// Files returns the names of the files in args/ that a service reads when it starts, by the service's
// name (cli.md 6.3). Those that need not exist are among them.
func Files(service string) []string {
	files := []string{service, service + "-env", "fips-env"}
	switch service {
	case "kubelite":
		files = append(files, "kubelet", "kube-proxy", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "pod-network", "cni-env")
	case "containerd":
		files = append(files, "containerd-template.toml")
	}
	return files
}

func path(env snapenv.Env, service string) string {
	return filepath.Join(env.RunDir(), "args-"+service+".json")
}

// Record keeps the digests of the service's files. Call it right before the service reads them.
func Record(env snapenv.Env, service string) error {
	digests := map[string]string{}
	for _, name := range Files(service) {
		digest, err := digestOf(env.Args(name))
		if err != nil {
			return err
		}
		digests[name] = digest
	}
	data, err := json.Marshal(digests)
	if err != nil {
		return err
	}
	return atomicfile.Write(path(env, service), append(data, '\n'), 0o640, nil)
}

// Changed returns the names of the files that are not what the running service read: changed, new or
// removed. The error wraps [fs.ErrNotExist] for a service that was started by a version that recorded nothing.
func Changed(env snapenv.Env, service string) (names []string, err error) {
	data, err := os.ReadFile(path(env, service))
	if err != nil {
		return nil, err
	}
	digests := map[string]string{}
	if err := json.Unmarshal(data, &digests); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path(env, service), err)
	}
	for _, name := range Files(service) {
		digest, err := digestOf(env.Args(name))
		if err != nil {
			return names, err
		}
		if digest != digests[name] {
			names = append(names, name)
		}
	}
	return names, nil
}

// digestOf returns the SHA-256 of a file in hexadecimal digits, "" for one that does not exist.
func digestOf(path string) (string, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}
