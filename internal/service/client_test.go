package service

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"microk8s/internal/snapenv"
)

// TestSilentSupervisor asks one that takes connections and says nothing, as a frozen process
// does, and one that answers everything but the call.
func TestSilentSupervisor(t *testing.T) {
	calls := map[string]func(*Client) error{
		"start":   func(c *Client) error { return c.Start(t.Context()) },
		"stop":    func(c *Client) error { return c.Stop(t.Context()) },
		"restart": func(c *Client) error { return c.Restart(t.Context(), Kubelite) },
		"status":  func(c *Client) error { _, err := c.Status(t.Context()); return err },
	}
	listen := func(t *testing.T) (*Client, net.Listener) {
		dir, err := os.MkdirTemp("", "sup")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		env := snapenv.Under(dir)
		if err := os.MkdirAll(filepath.Dir(env.SupervisorSocket()), 0o755); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", env.SupervisorSocket())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		c := NewClient(env)
		c.Silence = 100 * time.Millisecond
		return c, l
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, _ := listen(t)
			err := call(c)
			var silent *SilentError
			if !errors.As(err, &silent) || silent.PID != os.Getpid() || !strings.Contains(err.Error(), "did not answer within 100ms") {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("busy", func(t *testing.T) {
		t.Parallel()
		c, l := listen(t)
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				time.Sleep(5 * c.Silence) // it ends containers, and answers questions meanwhile
			}
			_, _ = w.Write([]byte(`{"services":[]}`))
		})}
		go func() { _ = s.Serve(l) }()
		t.Cleanup(func() { s.Close() })
		if err := c.Stop(t.Context()); err != nil {
			t.Errorf("a supervisor that is busy is called silent: %v", err)
		}
	})
	for state, want := range map[string]string{"T": "kill -CONT 7", "D": "network file system", "S": "kill -KILL 7", "": "logs supervisor"} {
		if text := (&SilentError{PID: 7, State: state}).Error(); !strings.Contains(text, want) || !strings.Contains(text, "pid 7") {
			t.Errorf("%q: %s", state, text)
		}
	}
}

// TestSupervisorOnItsWayUp asks while the supervisor of a boot does not answer yet: the one that
// is started for the call finds it running and gives up.
func TestSupervisorOnItsWayUp(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	socket := env.SupervisorSocket()
	for _, dir := range []string{filepath.Dir(socket), filepath.Dir(recordFile(env, Kubelite))} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(recordFile(env, Kubelite), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		call func(*Client) error
		path string
	}{
		{"start", func(c *Client) error { return c.Start(t.Context()) }, "/v1/start"},
		{"stop", func(c *Client) error { return c.Stop(t.Context()) }, "/v1/stop"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			asked := ""
			c := NewClient(env)
			c.Spawn = func(context.Context) error {
				l, err := net.Listen("unix", socket)
				if err != nil {
					t.Fatal(err)
				}
				s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method == http.MethodPost { // besides, it is asked whether it still answers
						asked = r.URL.Path
					}
					_, _ = w.Write([]byte(`{"services":[]}`))
				})}
				t.Cleanup(func() { s.Close() })
				go func() { _ = s.Serve(l) }()
				return ErrOther
			}
			if err := tc.call(c); err != nil || asked != tc.path {
				t.Errorf("error %v, asked for %q", err, asked)
			}
		})
		t.Run(tc.name+" in vain", func(t *testing.T) {
			c := NewClient(env)
			c.Spawn = func(context.Context) error { return errors.New("no memory") }
			if err := tc.call(c); err == nil || !strings.Contains(err.Error(), "no memory") {
				t.Errorf("error %v", err)
			}
		})
	}
}
