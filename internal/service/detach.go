package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"microk8s/internal/snapenv"
)

// detached is the name of the record of what [Detach] runs.
const detached = "detached"

// outputTail is how many bytes of a detached program's output an error has at most.
const outputTail = 4 << 10

// Detach runs a command of the product that stops the services of this node, the caller's among
// them: as `microk8s join` and `leave` do when a service begins them. It returns the command's
// error, with the end of what it printed. When ctx ends, which it does for a service that is
// stopped, Detach returns ctx's error and the command goes on: the supervisor spares it. Whoever
// runs next looks for what it has done. stdin is not seen in its arguments or in a named file.
//
// One command at a time: the supervisor knows of the last one.
func Detach(ctx context.Context, env snapenv.Env, stdin string, args ...string) error {
	argv := append([]string{env.Bin("microk8s")}, args...)
	if env.Snapd {
		// snapd runs it in a scope of its own; in the service's it would end with the service.
		argv = append([]string{"snap", "run", env.Name}, args...)
	}
	return detach(ctx, env, stdin, argv)
}

func detach(ctx context.Context, env snapenv.Env, stdin string, argv []string) error {
	if err := os.MkdirAll(env.RunDir(), 0o755); err != nil {
		return err
	}
	in, err := os.CreateTemp(env.RunDir(), ".stdin-*")
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.Remove(in.Name()); err != nil {
		return err
	}
	if _, err := in.WriteString(stdin); err != nil {
		return err
	}
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		return err
	}
	// A file and not a pipe, which nobody would read from when the caller has ended.
	path := filepath.Join(env.LogDir(), detached+".log")
	if err := os.MkdirAll(env.LogDir(), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	defer out.Close()

	cmd := exec.Command(argv[0], argv[1:]...) // not with ctx, which would kill it
	cmd.Env = slices.DeleteFunc(env.Environ(os.Environ()), func(s string) bool { return strings.HasPrefix(s, supervisorVar+"=") })
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := remember(env, detached, cmd.Process.Pid); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot record process %d: %w", cmd.Process.Pid, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err = <-ended:
	}
	forget(env, detached)
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", err, tail(out))
}

// tail returns the end of what is in a file.
func tail(f *os.File) string {
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	text, err := io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-outputTail), outputTail))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// spared returns the process that [Detach] runs, or 0.
func spared(env snapenv.Env) int {
	var rec record
	data, err := os.ReadFile(recordFile(env, detached))
	if err != nil || json.Unmarshal(data, &rec) != nil || !rec.alive() {
		return 0
	}
	return rec.PID
}
