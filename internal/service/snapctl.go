package service

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
)

// Snapctl drives services of a snap through snapd. It works in processes that snapd started
// as root (hooks, services, commands under sudo).
type Snapctl struct {
	Snap string // snap name

	// Run runs a program to its end and gives its standard output; the error of a failed
	// program says what it printed.
	Run func(ctx context.Context, argv ...string) (string, error)
}

var _ Manager = (*Snapctl)(nil)

// Start implements [Manager].
func (s *Snapctl) Start(ctx context.Context, names ...string) error {
	return s.control(ctx, []string{"start", "--enable"}, names)
}

// Stop implements [Manager]. Ending the containers, which outlive containerd's unit on
// purpose, is up to the caller: snapd has no notion of them.
func (s *Snapctl) Stop(ctx context.Context, names ...string) error {
	return s.control(ctx, []string{"stop", "--disable"}, names)
}

// Restart implements [Manager].
func (s *Snapctl) Restart(ctx context.Context, names ...string) error {
	return s.control(ctx, []string{"restart"}, names)
}

func (s *Snapctl) control(ctx context.Context, verb, names []string) error {
	all, err := resolveAll(names)
	if err != nil {
		return err
	}
	argv := append([]string{"snapctl"}, verb...)
	if len(names) == 0 {
		argv = append(argv, s.Snap)
	} else {
		for _, n := range all {
			argv = append(argv, s.Snap+".daemon-"+n)
		}
	}
	_, err = s.Run(ctx, argv...)
	return err
}

// Status implements [Manager] from the table that `snapctl services` prints: name, startup
// and current state in columns.
func (s *Snapctl) Status(ctx context.Context) ([]State, error) {
	out, err := s.Run(ctx, "snapctl", "services", s.Snap)
	if err != nil {
		return nil, err
	}
	found := map[string]State{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		name, ours := strings.CutPrefix(f[0], s.Snap+".daemon-")
		if !ours || !slices.Contains(Names(), name) {
			continue
		}
		st := State{Name: name, Phase: Stopped, Enabled: f[1] == "enabled"}
		if f[2] == "active" { // the whole word: "inactive" holds it too
			st.Phase = Running
		}
		found[name] = st
	}
	var states []State
	for _, n := range Names() {
		if st, ok := found[n]; ok {
			states = append(states, st)
		}
	}
	if len(states) == 0 {
		return nil, fmt.Errorf("cannot read the state of the services: snapctl lists none of snap %q", s.Snap)
	}
	return states, nil
}

// runProgram is the runner of production code.
func runProgram(ctx context.Context, argv ...string) (string, error) {
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		msg := strings.TrimSpace(errOut.String())
		if msg == "" {
			return "", fmt.Errorf("cannot run %s: %w", strings.Join(argv, " "), err)
		}
		return "", fmt.Errorf("cannot run %s: %w: %s", strings.Join(argv, " "), err, msg)
	}
	return out.String(), nil
}
