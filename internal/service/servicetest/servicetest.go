// Package servicetest has a service manager for tests of those who use one. It starts nothing: it
// notes what it is asked for, and its services are in the phase that the test sets.
package servicetest

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"

	"microk8s/internal/service"
)

// Manager implements [service.Manager]. Its fields are set while nothing calls it.
type Manager struct {
	Phase    service.Phase            // of every service; "" is Running
	Phases   map[string]service.Phase // of single services
	Restarts int                      // of every service
	// Answer, if set, is asked at each call, such as "start", "stop kubelite" or "status": its
	// error is the call's.
	Answer func(call string) error

	mu    sync.Mutex
	calls []string
}

var _ service.Manager = (*Manager)(nil)

// Calls returns what was asked for so far, without "status".
func (m *Manager) Calls() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.calls)
}

func (m *Manager) call(verb string, names []string) error {
	call := strings.TrimSpace(verb + " " + strings.Join(names, " "))
	if verb != "status" {
		m.mu.Lock()
		m.calls = append(m.calls, call)
		m.mu.Unlock()
	}
	if m.Answer == nil {
		return nil
	}
	return m.Answer(call)
}

// Start implements [service.Manager].
func (m *Manager) Start(_ context.Context, names ...string) error { return m.call("start", names) }

// Stop implements [service.Manager].
func (m *Manager) Stop(_ context.Context, names ...string) error { return m.call("stop", names) }

// Restart implements [service.Manager].
func (m *Manager) Restart(_ context.Context, names ...string) error { return m.call("restart", names) }

// Status implements [service.Manager].
func (m *Manager) Status(context.Context) ([]service.State, error) {
	if err := m.call("status", nil); err != nil {
		return nil, err
	}
	var out []service.State
	for _, n := range service.Names() {
		phase := cmp.Or(m.Phases[n], m.Phase, service.Running)
		out = append(out, service.State{Name: n, Phase: phase, Restarts: m.Restarts, LastExit: "exit status 1"})
	}
	return out, nil
}

// Failing returns an Answer that fails one call.
func Failing(call string, err error) func(string) error {
	return func(c string) error {
		if c == call {
			return err
		}
		return nil
	}
}
