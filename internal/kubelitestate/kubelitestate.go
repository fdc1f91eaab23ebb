// Package kubelitestate is what kubelite says about itself to the other programs of its node: which
// of its daemons are down while the others go on, and that the cluster has removed the node. It is
// a file of state that does not outlive a boot; kubelite writes it and empties it when it starts.
package kubelitestate

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// Daemon is a daemon that is down, or that runs without a part of it.
type Daemon struct {
	Name  string    `json:"name"`
	Why   string    `json:"why"`            // its error
	Since time.Time `json:"since"`          // of the first failure in a row
	Times int       `json:"times"`          // failures in a row
	Again time.Time `json:"again"`          // when it is started again
	Runs  bool      `json:"runs,omitempty"` // it runs, without what Why says
}

// State is what kubelite says.
type State struct {
	Down []Daemon `json:"down,omitempty"` // by name
	// Refused is what the API server says to this node's credentials when the cluster has removed
	// the node; "" while it is in the cluster.
	Refused string `json:"refused,omitempty"`
	// Policies is why network policies are not enforced on this node as the cluster has them; "" while
	// they are.
	Policies string `json:"policies,omitempty"`
	// Manifests is what is wrong with the files in args/manifests; "" when nothing is.
	Manifests string `json:"manifests,omitempty"`
}

// Path is the file of the state.
func Path(env snapenv.Env) string { return filepath.Join(env.RunDir(), "kubelite.json") }

// Read reads the state; it is empty where kubelite has written none.
func Read(env snapenv.Env) (State, error) {
	var s State
	data, err := os.ReadFile(Path(env))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("cannot read what kubelite says about itself: %w", err)
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return State{}, fmt.Errorf("cannot read what kubelite says about itself: %s: %w", Path(env), err)
	}
	return s, nil
}

// Writer keeps the state. Its methods may be called from any goroutine; what cannot be written is
// logged.
type Writer struct {
	env snapenv.Env
	log *slog.Logger
	now func() time.Time

	mu        sync.Mutex
	down      map[string]Daemon
	refused   string
	policies  string
	manifests string
}

// NewWriter begins with an empty state.
func NewWriter(env snapenv.Env, log *slog.Logger) *Writer {
	w := &Writer{env: env, log: log, now: time.Now, down: map[string]Daemon{}}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.write()
	return w
}

// Down notes that a daemon ended, why, and when it is started again.
func (w *Writer) Down(daemon string, why error, again time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, known := w.down[daemon]
	if !known {
		d = Daemon{Name: daemon, Since: w.now()}
	}
	d.Why, d.Again = strings.Join(strings.Fields(why.Error()), " "), again
	d.Times++
	d.Runs = false
	w.down[daemon] = d
	w.write()
}

// Without notes that a daemon which was down runs without a part of it, why, and when it is tried as a
// whole again.
func (w *Writer) Without(daemon string, why error, again time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, known := w.down[daemon]
	if !known {
		d = Daemon{Name: daemon, Since: w.now(), Times: 1}
	}
	d.Why, d.Again, d.Runs = strings.Join(strings.Fields(why.Error()), " "), again, true
	w.down[daemon] = d
	w.write()
}

// Up notes that a daemon runs.
func (w *Writer) Up(daemon string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, known := w.down[daemon]; known {
		delete(w.down, daemon)
		w.write()
	}
}

// Refused notes what the API server says to the credentials of a node that was removed; "" that
// it takes them.
func (w *Writer) Refused(why string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refused != why {
		w.refused = why
		w.write()
	}
}

// Policies notes why network policies are not enforced; "" that they are.
func (w *Writer) Policies(why string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if why = strings.Join(strings.Fields(why), " "); w.policies != why {
		w.policies = why
		w.write()
	}
}

// Manifests notes what is wrong with the files in args/manifests; "" that nothing is.
func (w *Writer) Manifests(why string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if why = strings.Join(strings.Fields(why), " "); w.manifests != why {
		w.manifests = why
		w.write()
	}
}

// write replaces the file, or removes it where there is nothing to say; w.mu is held.
func (w *Writer) write() {
	s := State{Refused: w.refused, Policies: w.policies, Manifests: w.manifests}
	for _, name := range slices.Sorted(maps.Keys(w.down)) {
		s.Down = append(s.Down, w.down[name])
	}
	path := Path(w.env)
	if len(s.Down) == 0 && s.Refused == "" && s.Policies == "" && s.Manifests == "" {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			w.log.Warn("cannot say how the daemons are", "err", err)
		}
		return
	}
	data, err := json.Marshal(s)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = atomicfile.Write(path, append(data, '\n'), 0o644, nil)
	}
	if err != nil {
		w.log.Warn("cannot say how the daemons are", "err", err)
	}
}
