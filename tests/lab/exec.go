package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Path is the search path of commands in a host.
const Path = "/snap/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Command is a program to run in a host.
type Command struct {
	Args   []string  // name (looked up in [Path]) and arguments
	Env    []string  // beside PATH, HOME, LANG and TERM
	Dir    string    // "" is /root
	Stdin  io.Reader // as in [exec.Cmd]
	Stdout io.Writer
	Stderr io.Writer
}

// Exec runs a command in a host, as root, and waits for it. If the command ends unsuccessfully
// the error is an [*exec.ExitError]; if it does not exist in the host, errors.Is(err,
// exec.ErrNotFound). When ctx ends the command is killed (not what it started in the
// background).
func (l *Lab) Exec(ctx context.Context, name string, c Command) error {
	cmd, err := l.Spawn(ctx, name, c)
	if err != nil {
		return err
	}
	return cmd.Wait()
}

// Output is [Lab.Exec] for a command whose output is wanted. Its errors hold what the command
// wrote to its standard error.
func (l *Lab) Output(ctx context.Context, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	err := l.Exec(ctx, name, Command{Args: args, Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		if msg := strings.TrimSpace(stderr.String()); msg != "" {
			err = fmt.Errorf("%w: %s", err, msg)
		}
		return stdout.String(), fmt.Errorf("on %s, %s: %w", name, strings.Join(args, " "), err)
	}
	return stdout.String(), nil
}

// Spawn starts a command in a host. The caller must call Wait of the result.
func (l *Lab) Spawn(ctx context.Context, name string, c Command) (*exec.Cmd, error) {
	if len(c.Args) == 0 {
		return nil, errors.New("cannot run a command in a host: none is given")
	}
	h, err := l.running(name)
	if err != nil {
		return nil, err
	}
	return l.startIn(h.Name, &h.Init, func() (*exec.Cmd, error) {
		path, err := lookPath(c.Args[0], Path)
		if err != nil {
			return nil, err
		}
		cmd := exec.CommandContext(ctx, path, c.Args[1:]...)
		cmd.Args[0] = c.Args[0]
		cmd.Env = append([]string{"PATH=" + Path, "HOME=/root", "USER=root", "LANG=C.UTF-8", "TERM=" + term()}, c.Env...)
		cmd.Dir = c.Dir
		if cmd.Dir == "" {
			cmd.Dir = "/root"
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
		cmd.WaitDelay = 2 * time.Second // for a background child that holds the output open
		return cmd, nil
	})
}

func term() string {
	if t := os.Getenv("TERM"); t != "" {
		return t
	}
	return "dumb"
}

// Dial connects from within a host's network to an address (numbers, not names).
func (l *Lab) Dial(ctx context.Context, name, network, address string) (net.Conn, error) {
	h, err := l.running(name)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	err = onThread(func() error {
		if err := enter(h.Init, "net"); err != nil {
			return err
		}
		// One literal address is dialled on the calling goroutine, which this relies on.
		d := net.Dialer{FallbackDelay: -1}
		var err error
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens in a host's network, for tests that need somebody to talk to.
func (l *Lab) Listen(ctx context.Context, name, network, address string) (net.Listener, error) {
	h, err := l.running(name)
	if err != nil {
		return nil, err
	}
	var listener net.Listener
	err = onThread(func() error {
		if err := enter(h.Init, "net"); err != nil {
			return err
		}
		var lc net.ListenConfig
		var err error
		listener, err = lc.Listen(ctx, network, address)
		return err
	})
	return listener, err
}

// running returns the record of a host that runs and is not paused.
func (l *Lab) running(name string) (*host, error) {
	h, err := l.load(name)
	if err != nil {
		return nil, err
	}
	switch l.state(h) {
	case Off:
		return nil, fmt.Errorf("cannot enter %s: %w; lab start %s switches it on", name, ErrNotRunning, name)
	case Paused:
		return nil, fmt.Errorf("cannot enter %s: %w; lab resume %s lets it go on", name, ErrPaused, name)
	}
	return h, nil
}
