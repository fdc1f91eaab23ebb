package node

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"microk8s/internal/longtest"
	catalogue "microk8s/tests/faults"
)

// sampledFaults is how many faults of the catalogue the gate breaks.
const sampledFaults = 1

// testFaults breaks a running node in the ways of the catalogue, and wants to be told: all of them in the
// long run, some in the gate, drawn by the seed of the commit.
func (n *node) testFaults(t *testing.T) {
	var list []catalogue.Fault
	for _, f := range catalogue.Catalogue {
		if f.Break != "" {
			list = append(list, f)
		}
	}
	if !longtest.Enabled() {
		seed, _ := strconv.ParseUint(os.Getenv("MICROK8S_TEST_SEED"), 10, 64)
		r := rand.New(rand.NewPCG(seed, 7)) //nolint:gosec // a sample
		r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		list = list[:sampledFaults]
	}
	for _, f := range list {
		t.Run(f.Name, func(t *testing.T) {
			n.run(t, "sh", "-c", f.Break)
			repaired := false
			repair := func() {
				if !repaired {
					repaired = true
					n.run(t, "sh", "-c", f.Repair)
				}
			}
			defer repair()
			if f.Inspect {
				out, _ := n.tryAll(t, "", "microk8s", "inspect")
				n.wantFault(t, out, f)
			} else { // inspect has the same report
				eventually(t, 2*time.Minute, func() error { // pods take a while to fail
					out, _ := n.tryAll(t, "", "env", "MICROK8S_STATUS_BUDGET=2s", "microk8s", "status")
					return faultIn(out, f)
				})
			}
			repair()
			eventually(t, 2*time.Minute, func() error {
				out, err := n.tryAll(t, "", "env", "MICROK8S_STATUS_BUDGET=30s", "microk8s", "status")
				if err != nil || strings.Contains(out, "("+f.ID+": from ") {
					return fmt.Errorf("after the repair: %v\n%s", fmt.Sprint(err), out)
				}
				return nil
			})
		})
	}
}

func faultIn(out string, f catalogue.Fault) error {
	if !strings.Contains(out, f.Says) || !strings.Contains(out, f.Do) || !strings.Contains(out, "("+f.ID+": from ") {
		return fmt.Errorf("want %q, %q and %q in\n%s", f.Says, f.Do, f.ID, out)
	}
	return nil
}

// wantFault wants it among the warnings of inspect.
func (n *node) wantFault(t *testing.T, out string, f catalogue.Fault) {
	t.Helper()
	var warnings []string
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "WARNING") {
			warnings = append(warnings, line)
		}
	}
	if err := faultIn(strings.Join(warnings, ""), f); err != nil {
		t.Errorf("inspect: %v", err)
	}
}
