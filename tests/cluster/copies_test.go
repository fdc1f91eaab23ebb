package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"microk8s/internal/longtest"
	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
)

// TestCopies has copies of a worker's disk and of a control-plane node's run on machines of their own: they and the
// originals say so, and so does the control plane; leaving on a copy leaves the original alone.
func TestCopies(t *testing.T) {
	longtest.Only(t)
	c := newCluster(t, "n1", "n2", "w1")
	for _, host := range []string{"n1", "n2", "w1"} {
		c.run(t, host, "microk8s", "start")
	}
	c.join(t, "n1", "n2")
	c.join(t, "n1", "w1", "--worker")
	c.waitReady(t, "n1", "w1")
	says := func(host, original, clone string) {
		t.Helper()
		eventually(t, 2*time.Minute, func() error {
			r := c.status(t, host)
			for _, want := range []string{"2 machines run as node " + original, c.ip(t, original), c.ip(t, clone), "on the copy run: microk8s leave"} {
				if !strings.Contains(r.out, want) {
					return fmt.Errorf("status of %s has no %q: %s", host, want, r)
				}
			}
			return nil
		})
	}

	c.clone(t, "w1", "w1c")
	c.run(t, "w1c", "microk8s", "start")
	for _, host := range []string{"n1", "n2", "w1", "w1c"} {
		says(host, "w1", "w1c")
	}
	if r := c.try(t, "w1c", "microk8s", "leave"); r.code != 0 || !strings.Contains(r.err, "the other stays in its cluster") {
		t.Errorf("leave on the copy: %s", r)
	}
	c.run(t, "w1c", "sh", "-c", "hostname w2 && microk8s stop && microk8s start --new-name")
	c.join(t, "n1", "w1c", "--worker")
	eventually(t, 2*time.Minute, func() error {
		for _, name := range []string{"w1", "w2"} {
			if n, err := c.node(t, "n1", name); err != nil || !isReady(n) {
				return fmt.Errorf("node %s is not Ready: %s", name, fmt.Sprint(err))
			}
		}
		return nil
	})

	c.clone(t, "n2", "n2c")
	if r := c.try(t, "n2c", "microk8s", "start"); r.code != 1 || !strings.Contains(r.err, "runs on another machine") || !strings.Contains(r.err, "microk8s leave") {
		t.Errorf("start of the copy: %s", r)
	}
	says("n1", "n2", "n2c")
	says("n2", "n2", "n2c")
}

// clone makes a host whose disk is a copy of another's, which goes on, with the same name and an address of its own.
func (c *cluster) clone(t *testing.T, of, host string) {
	t.Helper()
	labtest.Node(t, c.lab, host, lab.Options{DefaultRoute: true})
	c.run(t, of, "sync")
	c.run(t, host, "hostname", of)
	to := filepath.Join(c.lab.Root(host), "var/snap")
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	// Files that vanish while they are copied are no error of the copy.
	out, err := exec.CommandContext(t.Context(), "cp", "-a", filepath.Join(c.lab.Root(of), "var/snap"), to).CombinedOutput()
	if err != nil && strings.Count(string(out), "\n") != strings.Count(string(out), "No such file or directory") {
		t.Fatalf("%v: %s", err, out)
	}
}
