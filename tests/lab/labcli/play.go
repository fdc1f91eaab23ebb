package labcli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/atomicfile"
	"microk8s/tests/lab"
	"microk8s/tests/lab/scenario"
)

func (o *options) play() *cobra.Command {
	var seed uint64
	c := o.simple("play FILE", "Play a scenario: hosts, faults at times, expectations",
		`Makes the hosts of a scenario and does its steps at their times, until one fails (exit code 1). "-" reads
standard input. Hosts that exist are used as they are. The seed by which hosts are chosen is printed first;
with --seed the same are chosen again.

    version: 1
    about: a voter that loses its power comes back
    hosts: [{name: n1}, {name: n2, disk: 4G}]
    product: true                      # microk8s start on each
    choose: {victim: [n1, n2]}         # $victim is one of them
    steps:
    - run: {host: n1, command: "microk8s status --wait-ready --timeout 120"}
    - at: 10s                          # after the first step
      kill: $victim                    # also start, pause, resume: NAME; cut, heal: [A, B]; heal: [all];
    - at: 20s                          # disk: {host: NAME, size: 500Mi}
      start: $victim
    - expect: {host: $victim, command: "microk8s status", output: "is running", within: 3m}

run calls a shell command once, and wants exit code 0 or "exit"; expect calls it until exit code and output
are as wanted. "output" is a regular expression.`,
		cobra.ExactArgs(1), 0, func(ctx context.Context, l *lab.Lab, args []string) error {
			var data []byte
			var err error
			if args[0] == "-" {
				data, err = io.ReadAll(io.LimitReader(o.In, 1<<20))
			} else {
				data, err = os.ReadFile(args[0])
			}
			if err != nil {
				return err
			}
			s, err := scenario.Parse(data)
			if err != nil {
				return usage(fmt.Errorf("%s: %w", args[0], err))
			}
			if _, err := os.Stat(o.cfg.Snap); err != nil && !s.Product { // hosts alone
				cfg := o.cfg
				cfg.Snap = ""
				if l, err = lab.New(cfg); err != nil {
					return err
				}
			}
			if seed == 0 {
				seed = rand.Uint64()>>1 | 1 //nolint:gosec // which host is drawn is no secret
			}
			var names []string
			for _, h := range s.Hosts {
				names = append(names, h.Name)
			}
			if err := o.makeRoom(ctx, l, names); err != nil {
				return err
			}
			return scenario.Play(ctx, l, s, seed, o.Out)
		})
	c.Flags().Uint64Var(&seed, "seed", 0, "choose hosts as a play with this seed did; 0 is a new one")
	c.ValidArgsFunction = nil // files
	return c
}

// recordingFile says that, and into which file, a lab is recorded.
func (o *options) recordingFile() string {
	instance := o.cfg.Instance
	if instance == "" {
		instance = lab.DefaultInstance
	}
	return filepath.Join(o.stateDir(), instance, "recording.json")
}

// recorder returns nil where nothing is recorded.
func (o *options) recorder() (*scenario.Recorder, error) {
	data, err := os.ReadFile(o.recordingFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	r := &scenario.Recorder{}
	if err == nil {
		err = json.Unmarshal(data, r)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w; end the recording with lab record --stop", o.recordingFile(), err)
	}
	return r, nil
}

func (o *options) record() *cobra.Command {
	var stop bool
	c := &cobra.Command{
		Use: "record FILE", Short: "Write what is done to the lab from now on into a scenario, until record --stop",
		Long: `Writes a scenario of what other lab commands do from now on, with their times: up, kill, start, pause, resume,
cut, heal, disk, and the commands of exec with their exit codes. lab record --stop ends it; lab play plays it.`,
		Args: cobra.MaximumNArgs(1), DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := o.recorder()
			switch {
			case stop:
				if err == nil && r == nil {
					return errors.New("nothing is recorded; begin with lab record FILE")
				}
				if err := os.Remove(o.recordingFile()); err != nil {
					return err
				}
				if r != nil {
					fmt.Fprintf(o.Err, "play it with: lab play %s\n", r.Path)
				}
				return nil
			case err != nil:
				return err
			case len(args) == 0:
				return usage(fmt.Errorf("no file is given\nusage: %s, or lab record --stop", cmd.UseLine()))
			case r != nil:
				return fmt.Errorf("%s is being written already; end it with lab record --stop", r.Path)
			}
			path, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			l, err := o.lab()
			if err != nil {
				return err
			}
			infos, err := l.List(cmd.Context())
			if err != nil {
				return err
			}
			var hosts []scenario.Host
			for _, i := range infos {
				h := scenario.Host{Name: i.Name}
				if i.Disk > 0 {
					h.Disk = fmt.Sprint(i.Disk)
				}
				hosts = append(hosts, h)
			}
			r = &scenario.Recorder{Path: path, Began: time.Now()}
			if err := r.Begin(hosts); err != nil {
				return err
			}
			data, err := json.Marshal(r)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(o.recordingFile()), 0o755); err != nil {
				return err
			}
			return atomicfile.Write(o.recordingFile(), data, 0o644, nil)
		},
	}
	c.Flags().BoolVar(&stop, "stop", false, "end the recording")
	return c
}

// recorded adds what a command did to the scenario that is being recorded, if one is.
func (o *options) recorded(command string, args []string) error {
	r, err := o.recorder()
	if err != nil || r == nil {
		return err
	}
	now := time.Now()
	var steps []scenario.Step
	for _, n := range args {
		switch command {
		case "up":
			if err := r.AddHost(scenario.Host{Name: n}); err != nil {
				return err
			}
		case "kill":
			steps = append(steps, scenario.Step{Kill: n})
		case "start":
			steps = append(steps, scenario.Step{Start: n})
		case "pause":
			steps = append(steps, scenario.Step{Pause: n})
		case "resume":
			steps = append(steps, scenario.Step{Resume: n})
		}
	}
	switch {
	case command == "cut":
		steps = append(steps, scenario.Step{Cut: args})
	case command == "heal" && len(args) == 0:
		steps = append(steps, scenario.Step{Heal: []string{"all"}})
	case command == "heal":
		steps = append(steps, scenario.Step{Heal: args})
	case command == "disk":
		bytes, err := parseSize(args[1])
		if err != nil {
			return err
		}
		steps = append(steps, scenario.Step{Disk: &scenario.Disk{Host: args[0], Size: fmt.Sprint(bytes)}})
	}
	for _, s := range steps {
		if err := r.Add(s, now); err != nil {
			return err
		}
	}
	return nil
}

// recordExec adds a command that was run in a host.
func (o *options) recordExec(name string, args []string, code int) error {
	r, err := o.recorder()
	if err != nil || r == nil {
		return err
	}
	var words []string
	for _, a := range args {
		words = append(words, "'"+strings.ReplaceAll(a, "'", `'\''`)+"'")
	}
	return r.Add(scenario.Step{Run: &scenario.Command{On: name, Command: strings.Join(words, " "), Exit: code}}, time.Now())
}
