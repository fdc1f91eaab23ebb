// Package scenario plays files that say which hosts a lab has, what happens to them at which time, and
// what is expected, so that a problem that somebody met can be met again. [Parse] reads one, [Play] plays
// it, [Recorder] writes one while a person uses the lab. docs/lab.md has the form.
//
// What is done to a host is the business of package lab.
package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"microk8s/tests/lab"
)

// Version is that of the form.
const Version = 1

// Scenario is one file.
type Scenario struct {
	Version int    `json:"version"`
	About   string `json:"about,omitempty"`
	// Hosts are made before the first step; Product starts the product on them.
	Hosts   []Host `json:"hosts"`
	Product bool   `json:"product,omitempty"`
	// Choose draws a host for each name, by the seed, which steps then use as $name.
	Choose map[string][]string `json:"choose,omitempty"`
	Steps  []Step              `json:"steps"`
}

// Host is one host.
type Host struct {
	Name         string `json:"name"`
	Disk         string `json:"disk,omitempty"` // a size as for lab disk, "" is no limit
	DefaultRoute bool   `json:"defaultRoute,omitempty"`
	// IPv6 is "dual" or "only", as for lab up --ipv6.
	IPv6 lab.IPv6 `json:"ipv6,omitempty"`
}

// Step is one thing that is done, or expected. Exactly one of its actions is set.
type Step struct {
	// At is when it begins, after the first step: 10s, 2m. Without it, it follows the one before.
	At metav1.Duration `json:"at,omitzero"`

	Kill   string   `json:"kill,omitempty"`
	Start  string   `json:"start,omitempty"`
	Pause  string   `json:"pause,omitempty"`
	Resume string   `json:"resume,omitempty"`
	Cut    []string `json:"cut,omitempty"`  // one host from all others, or two from each other
	Heal   []string `json:"heal,omitempty"` // "all", or as cut
	Disk   *Disk    `json:"disk,omitempty"`
	Run    *Command `json:"run,omitempty"`
	Expect *Command `json:"expect,omitempty"`
}

// Disk makes a host's data a file system of a size.
type Disk struct {
	Host string `json:"host"`
	Size string `json:"size"`
}

// Command is a shell command in a host. For run it is called once; expect calls it until its exit code and
// output are as wanted.
type Command struct {
	On      string `json:"host"`
	Command string `json:"command"`
	Exit    int    `json:"exit,omitempty"`
	Output  string `json:"output,omitempty"` // a regular expression that standard output and error match somewhere
	// Within bounds expect; 2m if it is not set.
	Within metav1.Duration `json:"within,omitzero"`
}

// Parse reads a scenario. Fields that there are not, steps with no or several actions, and hosts that are not
// in the list are errors that name the step, counted from 1.
func Parse(data []byte) (*Scenario, error) {
	s := &Scenario{}
	if err := yaml.UnmarshalStrict(data, s); err != nil {
		why := err.Error() // the form is JSON's to the library
		for _, prefix := range []string{"error unmarshaling JSON: ", "while decoding JSON: ", "error converting YAML to JSON: ", "json: "} {
			why = strings.TrimPrefix(why, prefix)
		}
		return nil, fmt.Errorf("it is not a scenario: %s; see lab play --help", why)
	}
	if s.Version != Version {
		return nil, fmt.Errorf("version: %d is not known; write version: %d", s.Version, Version)
	}
	known := map[string]bool{}
	for i, h := range s.Hosts {
		switch {
		case h.Name == "":
			return nil, fmt.Errorf("hosts: number %d has no name; write - name: n%d", i+1, i+1)
		case known[h.Name]:
			return nil, fmt.Errorf("hosts: %s is there twice", h.Name)
		}
		if h.IPv6 != lab.NoIPv6 {
			if err := new(lab.IPv6).Set(string(h.IPv6)); err != nil {
				return nil, fmt.Errorf("hosts: %s: ipv6: %w", h.Name, err)
			}
		}
		if _, err := size(h.Disk); err != nil {
			return nil, fmt.Errorf("hosts: %s: disk: %w", h.Name, err)
		}
		known[h.Name] = true
	}
	if len(known) == 0 {
		return nil, errors.New("hosts: there are none; write hosts: [{name: n1}]")
	}
	for name, of := range s.Choose {
		if len(of) == 0 {
			return nil, fmt.Errorf("choose: %s: there are no hosts to choose from", name)
		}
		for _, h := range of {
			if !known[h] {
				return nil, fmt.Errorf("choose: %s: there is no host %s in hosts", name, h)
			}
		}
	}
	last := time.Duration(0)
	for i, step := range s.Steps {
		if err := s.check(step, known); err != nil {
			return nil, fmt.Errorf("steps: number %d: %w", i+1, err)
		}
		if at := step.At.Duration; at != 0 {
			if at < last {
				return nil, fmt.Errorf("steps: number %d: at: %s is before the step above it, at %s", i+1, at, last)
			}
			last = at
		}
	}
	return s, nil
}

const actions = "kill, start, pause, resume, cut, heal, disk, run or expect"

func (s *Scenario) check(step Step, known map[string]bool) error {
	set := 0
	var hosts []string
	for _, h := range []string{step.Kill, step.Start, step.Pause, step.Resume} {
		if h != "" {
			set++
			hosts = append(hosts, h)
		}
	}
	for _, list := range [][]string{step.Cut, step.Heal} {
		if list != nil {
			set++
			if len(list) == 0 || len(list) > 2 {
				return errors.New("cut and heal take one host or two: [n1] or [n1, n2]")
			}
			if !slices.Equal(list, []string{"all"}) || step.Cut != nil {
				hosts = append(hosts, list...)
			}
		}
	}
	if step.Disk != nil {
		set++
		hosts = append(hosts, step.Disk.Host)
		if _, err := size(step.Disk.Size); err != nil || step.Disk.Size == "" {
			return fmt.Errorf("disk: size: %q is none; write 500Mi, 2G, or 0 for no limit", step.Disk.Size)
		}
	}
	for _, c := range []*Command{step.Run, step.Expect} {
		if c == nil {
			continue
		}
		set++
		hosts = append(hosts, c.On)
		if c.Command == "" {
			return errors.New("there is no command; write {host: n1, command: microk8s status}")
		}
		if _, err := regexp.Compile(c.Output); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}
	if set != 1 {
		return fmt.Errorf("it has %d actions, and should have one of %s", set, actions)
	}
	for _, h := range hosts {
		name, chosen := strings.CutPrefix(h, "$")
		if chosen && s.Choose[name] == nil {
			return fmt.Errorf("there is no %s in choose", name)
		}
		if !chosen && !known[h] {
			return fmt.Errorf("there is no host %q in hosts", h)
		}
	}
	return nil
}

// size reads a size in bytes; "" is 0.
func size(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	q, err := resource.ParseQuantity(text)
	if err != nil || q.Sign() < 0 {
		return 0, fmt.Errorf("%q is not a size; write 500Mi, 2G, or 0 for no limit", text)
	}
	return q.Value(), nil
}

// Lab is what is played on; *lab.Lab is one.
type Lab interface {
	Up(ctx context.Context, name string, opt lab.Options) error
	Start(ctx context.Context, name string) error
	Kill(ctx context.Context, name string) error
	Pause(ctx context.Context, name string) error
	Resume(ctx context.Context, name string) error
	Cut(ctx context.Context, a, b string) error
	Heal(ctx context.Context, names ...string) error
	Disk(ctx context.Context, name string, size int64) error
	Exec(ctx context.Context, name string, c lab.Command) error
}

// expectWithin bounds an expectation that says nothing of it; only what is broken takes so long.
const expectWithin = 2 * time.Minute

// Play makes the hosts that are not there and does the steps at their times, each of which it writes to out,
// and first the seed by which hosts are chosen. It ends at the first step that fails, which the error names.
func Play(ctx context.Context, l Lab, s *Scenario, seed uint64, out io.Writer) error {
	fmt.Fprintf(out, "seed %d\n", seed)
	r := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a seed, to play the same again
	chosen := map[string]string{}
	var names []string
	for name := range s.Choose {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		of := s.Choose[name]
		chosen["$"+name] = of[r.IntN(len(of))]
		fmt.Fprintf(out, "$%s is %s\n", name, chosen["$"+name])
	}
	host := func(name string) string {
		if h, ok := chosen[name]; ok {
			return h
		}
		return name
	}
	for _, h := range s.Hosts {
		if err := l.Up(ctx, h.Name, lab.Options{DefaultRoute: h.DefaultRoute, IPv6: h.IPv6}); err != nil {
			return fmt.Errorf("cannot make %s: %w", h.Name, err)
		}
		if h.Disk != "" {
			bytes, _ := size(h.Disk) // checked before
			if err := l.Disk(ctx, h.Name, bytes); err != nil {
				return fmt.Errorf("cannot make the disk of %s: %w", h.Name, err)
			}
		}
	}
	if s.Product {
		for _, h := range s.Hosts {
			fmt.Fprintf(out, "%s: microk8s start\n", h.Name)
			if err := once(ctx, l, h.Name, &Command{Command: "microk8s start"}); err != nil {
				return fmt.Errorf("cannot start the product on %s: %w", h.Name, err)
			}
		}
	}
	began := time.Now()
	for i, step := range s.Steps {
		if err := sleep(ctx, step.At.Duration-time.Since(began)); err != nil {
			return err
		}
		fmt.Fprintf(out, "%6.1fs  %s\n", time.Since(began).Seconds(), step.text(host))
		if err := step.do(ctx, l, host); err != nil {
			return fmt.Errorf("step %d, %s: %w", i+1, step.text(host), err)
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s Step) text(host func(string) string) string {
	all := func(list []string) string {
		var out []string
		for _, h := range list {
			out = append(out, host(h))
		}
		return strings.Join(out, " ")
	}
	switch {
	case s.Kill != "":
		return "kill " + host(s.Kill)
	case s.Start != "":
		return "start " + host(s.Start)
	case s.Pause != "":
		return "pause " + host(s.Pause)
	case s.Resume != "":
		return "resume " + host(s.Resume)
	case s.Cut != nil:
		return "cut " + all(s.Cut)
	case s.Heal != nil:
		return "heal " + all(s.Heal)
	case s.Disk != nil:
		return "disk " + host(s.Disk.Host) + " " + s.Disk.Size
	case s.Run != nil:
		return "run on " + host(s.Run.On) + ": " + s.Run.Command
	}
	return "expect on " + host(s.Expect.On) + ": " + s.Expect.Command
}

func (s Step) do(ctx context.Context, l Lab, host func(string) string) error {
	switch {
	case s.Kill != "":
		return l.Kill(ctx, host(s.Kill))
	case s.Start != "":
		return l.Start(ctx, host(s.Start))
	case s.Pause != "":
		return l.Pause(ctx, host(s.Pause))
	case s.Resume != "":
		return l.Resume(ctx, host(s.Resume))
	case len(s.Cut) == 2:
		return l.Cut(ctx, host(s.Cut[0]), host(s.Cut[1]))
	case s.Cut != nil:
		return l.Cut(ctx, host(s.Cut[0]), "")
	case slices.Equal(s.Heal, []string{"all"}):
		return l.Heal(ctx)
	case s.Heal != nil:
		var names []string
		for _, h := range s.Heal {
			names = append(names, host(h))
		}
		return l.Heal(ctx, names...)
	case s.Disk != nil:
		bytes, _ := size(s.Disk.Size) // checked before
		return l.Disk(ctx, host(s.Disk.Host), bytes)
	case s.Run != nil:
		return once(ctx, l, host(s.Run.On), s.Run)
	}
	return eventually(ctx, l, host(s.Expect.On), s.Expect)
}

// once runs a command, and returns how its end differs from what is wanted.
func once(ctx context.Context, l Lab, on string, c *Command) error {
	var out bytes.Buffer
	err := l.Exec(ctx, on, lab.Command{Args: []string{"sh", "-c", c.Command}, Stdout: &out, Stderr: &out})
	code := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	case err != nil:
		return err
	}
	if code != c.Exit {
		return fmt.Errorf("exit code %d, want %d; it printed:\n%s", code, c.Exit, strings.TrimSpace(out.String()))
	}
	if ok, _ := regexp.Match(c.Output, out.Bytes()); !ok { // checked before
		return fmt.Errorf("no match of %q in:\n%s", c.Output, strings.TrimSpace(out.String()))
	}
	return nil
}

func eventually(ctx context.Context, l Lab, on string, c *Command) error {
	within := c.Within.Duration
	if within == 0 {
		within = expectWithin
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var last error
	for {
		err := once(ctx, l, on, c)
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil { // one that was cut short says nothing
			last = err
		}
		if sleep(ctx, 250*time.Millisecond) != nil {
			return fmt.Errorf("not within %s: %w", within, last)
		}
	}
}
