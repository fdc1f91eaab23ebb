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

	"microk8s/internal/snapenv"
)

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
					asked = r.URL.Path
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
