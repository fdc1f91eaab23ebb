package scenario

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"microk8s/internal/atomicfile"
)

// Recorder writes a scenario of what is done to a lab. Its file is replaced after each step, so that what was
// recorded stays when the recording program ends.
type Recorder struct {
	// Path is the file that is written.
	Path string
	// Began is the time of the first step.
	Began time.Time
}

// Begin makes the file with the hosts that are there.
func (r Recorder) Begin(hosts []Host) error {
	if _, err := os.Stat(r.Path); err == nil {
		return fmt.Errorf("%s exists; name another file, or remove it", r.Path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return r.write(&Scenario{Version: Version, About: "recorded with lab record", Hosts: hosts, Product: true, Steps: []Step{}})
}

// Add adds a step that was done at a time.
func (r Recorder) Add(step Step, at time.Time) error {
	step.At = metav1.Duration{Duration: at.Sub(r.Began).Round(100 * time.Millisecond)}
	return r.change(func(s *Scenario) { s.Steps = append(s.Steps, step) })
}

// AddHost adds a host, if it is not there.
func (r Recorder) AddHost(h Host) error {
	return r.change(func(s *Scenario) {
		if !slices.ContainsFunc(s.Hosts, func(x Host) bool { return x.Name == h.Name }) {
			s.Hosts = append(s.Hosts, h)
		}
	})
}

func (r Recorder) change(do func(*Scenario)) error {
	data, err := os.ReadFile(r.Path)
	if err != nil {
		return err
	}
	s := &Scenario{}
	if err := yaml.UnmarshalStrict(data, s); err != nil {
		return fmt.Errorf("%s: %w", r.Path, err)
	}
	do(s)
	return r.write(s)
}

func (r Recorder) write(s *Scenario) error {
	data, err := yaml.Marshal(s)
	if err != nil {
		return err
	}
	return atomicfile.Write(r.Path, data, 0o644, nil)
}
