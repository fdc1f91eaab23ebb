package service

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Snapctl drives services of a snap through snapd. That works in processes that snapd started
// as root (hooks, services, commands under sudo); [Snapctl.Status] works for everybody.
type Snapctl struct {
	Snap string // snap name

	// Run runs a program to its end and returns its standard output; the error of a failed
	// program says what it printed.
	Run func(ctx context.Context, argv ...string) (string, error)
}

var _ Manager = (*Snapctl)(nil)

// Start implements [Manager].
func (s *Snapctl) Start(ctx context.Context, names ...string) error {
	return s.control(ctx, []string{"start", "--enable"}, names)
}

// Stop implements [Manager]. Stopping the containers, which outlive containerd's unit on
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
	limited, cancel := context.WithTimeout(ctx, controlLimit)
	defer cancel()
	if _, err = s.Run(limited, argv...); limited.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("snapd did not finish %q within %s; see: snap changes, and journalctl -u snapd", strings.Join(argv, " "), controlLimit)
	}
	return err
}

// Limits of snapd and systemd: of a change, in which services end and start, and of a question.
const (
	controlLimit  = 5 * time.Minute
	questionLimit = 10 * time.Second
)

// unitProperties are what systemd is asked about each unit.
const unitProperties = "Id,LoadState,ActiveState,SubState,UnitFileState,MainPID,NRestarts,StateChangeTimestamp,ExecMainCode,ExecMainStatus"

// Status implements [Manager]. It asks systemd itself, which answers everybody, tells more
// than `snapctl services`, and takes a few milliseconds where that takes up to 200.
func (s *Snapctl) Status(ctx context.Context) ([]State, error) {
	argv := []string{"env", "TZ=UTC", "LC_ALL=C", "systemctl", "show", "--property=" + unitProperties}
	for _, n := range Names() {
		argv = append(argv, s.unit(n))
	}
	limited, cancel := context.WithTimeout(ctx, questionLimit)
	defer cancel()
	out, err := s.Run(limited, argv...)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("cannot read the state of the services: systemd did not answer within %s; see: journalctl -b -u init.scope", questionLimit)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the state of the services: %w", err)
	}
	found := map[string]State{}
	for block := range strings.SplitSeq(out, "\n\n") {
		properties := map[string]string{}
		for line := range strings.Lines(block) {
			k, v, _ := strings.Cut(strings.TrimRight(line, "\n"), "=")
			properties[k] = v
		}
		name, ours := strings.CutPrefix(properties["Id"], "snap."+s.Snap+".daemon-")
		if !ours || properties["LoadState"] != "loaded" {
			continue
		}
		st := unitState(strings.TrimSuffix(name, ".service"), properties)
		if st.Phase == Backoff || st.Phase == Failed {
			st.LastWords = s.lastWords(ctx, st.Name)
		}
		found[st.Name] = st
	}
	var states []State
	for _, n := range Names() {
		if st, ok := found[n]; ok {
			states = append(states, st)
		}
	}
	if len(states) == 0 {
		return nil, fmt.Errorf("cannot read the state of the services: systemd knows none of snap %q", s.Snap)
	}
	return states, nil
}

func (s *Snapctl) unit(name string) string {
	return "snap." + s.Snap + ".daemon-" + name + ".service"
}

// unitState reads what `systemctl show` printed of one unit.
func unitState(name string, p map[string]string) State {
	st := State{Name: name, Phase: Stopped, Enabled: p["UnitFileState"] == "enabled"}
	switch p["ActiveState"] {
	case "active":
		st.Phase = Running
	case "activating": // one of type notify runs before it says that it is ready
		st.Phase = Running
		if p["SubState"] == "auto-restart" {
			st.Phase = Backoff
		}
	case "deactivating":
		st.Phase = Stopping
	case "failed":
		st.Phase = Failed
	}
	if st.Phase == Running || st.Phase == Stopping {
		st.PID, _ = strconv.Atoi(p["MainPID"])
	}
	st.Restarts, _ = strconv.Atoi(p["NRestarts"])
	if since, err := time.Parse("Mon 2006-01-02 15:04:05 MST", p["StateChangeTimestamp"]); err == nil {
		st.Since = since
	}
	switch status := p["ExecMainStatus"]; p["ExecMainCode"] { // waitid's numbers
	case "1":
		st.LastExit = "exit status " + status
	case "2", "3":
		st.LastExit = "signal " + status
	}
	return st
}

// lastWords returns the last line of a service that systemd had to restart, "" where it has none
// or the caller may not read the journal.
func (s *Snapctl) lastWords(ctx context.Context, name string) string {
	out, err := s.Run(ctx, "journalctl", "--quiet", "--no-pager", "--output=cat", "--boot", "--lines=200", "--identifier="+s.Snap+".daemon-"+name)
	if err != nil {
		return ""
	}
	return lastLine([]byte(out))
}

// runProgram is the runner of production code.
func runProgram(ctx context.Context, argv ...string) (string, error) {
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		msg := strings.TrimSpace(errOut.String())
		if msg == "" {
			return "", fmt.Errorf("cannot run %s: %w", strings.Join(argv, " "), err)
		}
		return "", fmt.Errorf("cannot run %s: %w: %s", strings.Join(argv, " "), err, msg)
	}
	return out.String(), nil
}
