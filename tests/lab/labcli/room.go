package labcli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"microk8s/internal/atomicfile"
	"microk8s/tests/lab"
)

// What one host with a node on it takes, from `make bench` (docs/figures) and from counting in /proc: the
// kubelet, containerd and the watches of a control-plane node.
const (
	hostMemory    = 800 << 20 // bytes; a worker takes half of it
	hostInstances = 24        // inotify instances of root
	hostAIO       = 8192      // asynchronous I/O requests of its datastore
	reserved      = 512 << 20 // bytes of memory left to the machine
)

// kernelLimit is a limit of the machine that all hosts share.
type kernelLimit struct {
	path    string // below /proc/sys
	perHost uint64
	base    uint64 // for the machine itself
}

var kernelLimits = []kernelLimit{
	{"fs/inotify/max_user_instances", hostInstances, 128},
	{"fs/aio-max-nr", hostAIO, 65536},
}

func (k kernelLimit) file(root string) string { return filepath.Join(root, "proc/sys", k.path) }
func (k kernelLimit) name() string            { return strings.ReplaceAll(k.path, "/", ".") }
func (k kernelLimit) need(hosts int) uint64   { return k.base + k.perHost*uint64(hosts) }

func readNumber(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// limitsFile keeps the values of before, by their paths. It is of the machine: labs that run side by side share
// the limits.
func limitsFile(stateDir string) string { return filepath.Join(stateDir, "limits-before.json") }

// raiseLimits raises what is too low for so many hosts in all, and keeps the values of before.
func raiseLimits(root, stateDir string, hosts int, say func(string)) error {
	before := map[string]uint64{}
	data, err := os.ReadFile(limitsFile(stateDir))
	if err == nil {
		err = json.Unmarshal(data, &before)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot read %s: %w", limitsFile(stateDir), err)
	}
	for _, k := range kernelLimits {
		now, err := readNumber(k.file(root))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		want := k.need(hosts)
		if now >= want {
			continue
		}
		if _, kept := before[k.path]; !kept {
			before[k.path] = now
			data, err := json.Marshal(before)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(stateDir, 0o755); err != nil {
				return err
			}
			if err := atomicfile.Write(limitsFile(stateDir), data, 0o644, nil); err != nil {
				return err
			}
		}
		if err := os.WriteFile(k.file(root), []byte(strconv.FormatUint(want, 10)), 0o644); err != nil {
			return fmt.Errorf("%s is %d, and %d hosts need %d: %w; raise it with: sysctl -w %s=%d", k.name(), now, hosts, want, err, k.name(), want)
		}
		say(fmt.Sprintf("raised %s from %d to %d; lab down restores it", k.name(), now, want))
	}
	return nil
}

// restoreLimits writes the values of before back, unless somebody else has changed them since.
func restoreLimits(root, stateDir string) error {
	data, err := os.ReadFile(limitsFile(stateDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	before := map[string]uint64{}
	if err == nil {
		err = json.Unmarshal(data, &before)
	}
	if err != nil {
		return fmt.Errorf("cannot read %s: %w", limitsFile(stateDir), err)
	}
	for path, value := range before {
		if err := os.WriteFile(filepath.Join(root, "proc/sys", path), []byte(strconv.FormatUint(value, 10)), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Remove(limitsFile(stateDir))
}

// space is how many hosts fit.
type space struct {
	Memory uint64 `json:"memoryAvailable"` // bytes
	// More is how many control-plane nodes fit besides what runs.
	More int `json:"hostsThatFit"`
	// Limits are the machine's, which lab up raises.
	Limits map[string]uint64 `json:"limits"`
}

func measure(root string) (space, error) {
	text, err := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return space{}, err
	}
	s := space{Limits: map[string]uint64{}}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "MemAvailable:" {
			kib, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				return space{}, err
			}
			s.Memory = kib << 10
		}
	}
	if s.Memory > reserved {
		s.More = int((s.Memory - reserved) / hostMemory)
	}
	for _, k := range kernelLimits {
		if n, err := readNumber(k.file(root)); err == nil {
			s.Limits[k.name()] = n
		}
	}
	return s, nil
}

// makeRoom raises the limits that the hosts need, and warns where memory does not suffice.
func (o *options) makeRoom(ctx context.Context, l *lab.Lab, names []string) error {
	there, err := l.List(ctx)
	if err != nil {
		return err
	}
	on, fresh := 0, 0
	known := map[string]bool{}
	for _, i := range there {
		known[i.Name] = i.PID != 0
		if i.PID != 0 {
			on++
		}
	}
	for _, n := range names {
		if !known[n] {
			fresh++
		}
	}
	if s, err := measure("/"); err == nil && fresh > s.More {
		fmt.Fprintf(o.Err, "lab: %d more hosts with nodes may not fit: %d MiB of memory are available, and a control-plane node takes some %d; see lab room\n",
			fresh, s.Memory>>20, hostMemory>>20)
	}
	return raiseLimits("/", o.stateDir(), on+fresh, func(text string) { fmt.Fprintln(o.Err, text) })
}

func (o *options) stateDir() string {
	if o.cfg.StateDir == "" {
		return lab.DefaultStateDir
	}
	return o.cfg.StateDir
}

// restoreLimits does that when no lab is left that may need them.
func (o *options) restoreLimits() error {
	entries, _ := os.ReadDir(o.stateDir())
	for _, e := range entries {
		if e.IsDir() {
			if hosts, _ := os.ReadDir(filepath.Join(o.stateDir(), e.Name(), "hosts")); len(hosts) > 0 {
				return nil
			}
		}
	}
	return restoreLimits("/", o.stateDir())
}

func (o *options) room() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use: "room", Short: "Say how many more hosts with nodes fit on this machine", Args: cobra.NoArgs, DisableFlagsInUseLine: true,
		Long: fmt.Sprintf(`Says how many more control-plane nodes fit in the memory that is available (some %d MiB each; a worker takes
half of it), and the limits of the kernel that all hosts share. lab up raises those to what its hosts need,
and lab down of the last lab restores them.`, hostMemory>>20),
		RunE: func(*cobra.Command, []string) error {
			s, err := measure("/")
			if err != nil {
				return err
			}
			switch output {
			case "json":
				enc := json.NewEncoder(o.Out)
				enc.SetIndent("", "  ")
				return enc.Encode(s)
			case "":
			default:
				return usage(fmt.Errorf("cannot print as %q: the format is json or none", output))
			}
			fmt.Fprintf(o.Out, "%d more control-plane nodes fit: %d MiB of memory are available\n", s.More, s.Memory>>20)
			for _, k := range kernelLimits {
				if n, ok := s.Limits[k.name()]; ok {
					fmt.Fprintf(o.Out, "%s is %d, enough for %d hosts; lab up raises it for more\n", k.name(), n, (max(n, k.base)-k.base)/k.perHost)
				}
			}
			return nil
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "json, or text if not given")
	return c
}
