package node

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"microk8s/internal/snapenv"
)

// Runner returns the function that runs programs of the product.
func Runner(env snapenv.Env) func(ctx context.Context, stdin io.Reader, argv ...string) error {
	return func(ctx context.Context, stdin io.Reader, argv ...string) error {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env = env.Environ(os.Environ())
		cmd.Stdin = stdin
		cmd.WaitDelay = 10 * time.Second
		out := &tail{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(out.kept.String()))
		}
		return nil
	}
}

// tail keeps the last of what a program prints.
type tail struct{ kept bytes.Buffer }

const tailSize = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	if len(p) > tailSize {
		p = p[len(p)-tailSize:]
	}
	if over := t.kept.Len() + len(p) - tailSize; over > 0 {
		t.kept.Next(over)
	}
	_, err := t.kept.Write(p)
	return n, err
}

// steadyTimeout is how long a stream may say nothing.
const steadyTimeout = 30 * time.Second

// steady is a body that may take as long as it needs, but not stand still.
type steady struct {
	body    io.Reader
	control *http.ResponseController
	bytes   int64
}

func (s *steady) Read(p []byte) (int, error) {
	until := time.Now().Add(steadyTimeout)
	_ = s.control.SetReadDeadline(until) // not for recorders of tests
	_ = s.control.SetWriteDeadline(time.Now().Add(time.Hour))
	n, err := s.body.Read(p)
	s.bytes += int64(n)
	return n, err
}
