package cluster

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	membership "microk8s/internal/cluster"

	"microk8s/internal/longtest"
)

// TestInterrupted kills every command that changes a cluster at every point of its journal, on a
// control-plane node and a worker at the same time. The points come from the journal's own lists.
// It takes a quarter of an hour, so the gate leaves it out (scripts/test); TestHA and TestWorker
// have some of the points.
func TestInterrupted(t *testing.T) {
	longtest.Only(t)
	c := newCluster(t, "n1", "n2", "w1")
	step := steps(t)
	flags := map[string][]string{"n2": nil, "w1": {"--worker"}}
	step("start", func(t *testing.T) {
		c.start(t, "n1")
		for h := range flags {
			c.start(t, h)
			c.mark(t, h, "single")
		}
	})
	step("taking a join back", func(t *testing.T) {
		c.each(t, flags, func(t *testing.T, host string) {
			operation := "join"
			if flags[host] != nil {
				operation = "join-worker"
			}
			line := append(c.line(t, "n1"), flags[host]...) // one for all: the token is never spent
			step := steps(t)
			for _, name := range membership.Undos()[operation] {
				for _, at := range []string{"undo-begin", "undo-end"} {
					step(name+" "+at, func(t *testing.T) {
						c.wantKilled(t, host, operation+"/"+name+"/end", line...)
						c.wantKilled(t, host, operation+"/"+name+"/"+at, "microk8s", "leave")
						c.run(t, host, "microk8s", "leave")
						c.waitReady(t, host, host)
						c.wantMark(t, host, "single")
						left, _ := filepath.Glob(c.lab.Root(host) + "/var/snap/microk8s/common/var/cluster/*")
						for _, f := range left {
							if filepath.Base(f) != "journal.lock" {
								t.Errorf("%s was left behind", f)
							}
						}
					})
				}
			}
			c.run(t, host, line...)
			c.waitReady(t, "n1", host)
		})
		c.wantNodes(t, "n1", "n1", "n2", "w1")
	})
	step("leave and remove-node", func(t *testing.T) {
		removal := c.allPoints(t, "remove-node")
		each := steps(t)
		for i, point := range c.allPoints(t, "leave") {
			each(point, func(t *testing.T) {
				c.each(t, flags, func(t *testing.T, host string) {
					if _, err := c.node(t, "n1", host); err != nil {
						c.join(t, "n1", host, flags[host]...)
					}
					c.waitReady(t, "n1", host)
					c.wantKilled(t, host, point, "microk8s", "leave")
				})
				switch i % 3 { // what the machines do before the command is typed again
				case 1:
					for host := range flags {
						c.power(t, host)
					}
				case 2:
					c.power(t, "n1")
					c.waitReady(t, "n1", "n1")
				}
				c.each(t, flags, func(t *testing.T, host string) {
					c.run(t, host, "microk8s", "leave")
					c.waitReady(t, host, host)
					c.wantNodes(t, host, host)
					c.wantMark(t, host, "")
					c.noSecrets(t, host, "n1")
				})
				for host := range flags {
					c.wantKilled(t, "n1", removal[i%len(removal)], "microk8s", "remove-node", host)
					if i%3 == 0 {
						c.power(t, "n1")
						c.waitReady(t, "n1", "n1")
					}
					c.run(t, "n1", "microk8s", "remove-node", host)
				}
				c.wantNodes(t, "n1", "n1")
				c.wantHA(t, "n1", "no", 1)
			})
		}
	})
	step("a leave that is taken back", func(t *testing.T) {
		c.join(t, "n1", "n2")
		c.waitReady(t, "n1", "n2")
		for _, name := range membership.Undos()["leave"] {
			for _, at := range []string{"undo-begin", "undo-end"} {
				t.Run(name+" "+at, func(t *testing.T) {
					// The other node dies when nobody looks for it any more.
					c.wantKilled(t, "n2", "leave/"+membership.StepLeaveDatastore+"/begin", "microk8s", "leave")
					if err := c.lab.Kill(t.Context(), "n1"); err != nil {
						t.Fatal(err)
					}
					c.wantKilled(t, "n2", "leave/"+name+"/"+at, "microk8s", "leave")
					if err := c.lab.Start(t.Context(), "n1"); err != nil {
						t.Fatal(err)
					}
					c.waitReady(t, "n1", "n1")
					if r := c.try(t, "n2", "microk8s", "leave"); r.code == 0 || !strings.Contains(r.err, "the node was rolled back") {
						t.Fatalf("finishing what takes it back: %s", r)
					}
					c.waitReady(t, "n1", "n2")
					c.wantHA(t, "n2", "no", 2)
				})
			}
		}
		c.run(t, "n2", "microk8s", "leave")
		c.run(t, "n1", "microk8s", "remove-node", "n2")
	})
}

// each does something on several hosts at once, with a test of its own for each.
func (c *cluster) each(t *testing.T, hosts map[string][]string, f func(t *testing.T, host string)) {
	t.Helper()
	ok := t.Run("on", func(t *testing.T) {
		for h := range hosts {
			t.Run(h, func(t *testing.T) {
				t.Parallel()
				f(t, h)
			})
		}
	})
	if !ok {
		t.FailNow()
	}
}

// wantKilled runs a command that must come to a point of its journal and die there.
func (c *cluster) wantKilled(t *testing.T, host, point string, command ...string) {
	t.Helper()
	if r := c.try(t, host, append([]string{"env", "MICROK8S_DIE_AT=" + point}, command...)...); r.code != killed {
		t.Fatalf("%s was not killed at %s: %s", strings.Join(command[:2], " "), point, r)
	}
}

// power switches a host off and on again.
func (c *cluster) power(t *testing.T, host string) {
	t.Helper()
	if err := c.lab.Kill(t.Context(), host); err != nil {
		t.Fatal(err)
	}
	if err := c.lab.Start(t.Context(), host); err != nil {
		t.Fatal(err)
	}
}

// allPoints lists the moments at which an operation may be killed.
func (c *cluster) allPoints(t *testing.T, operation string) []string {
	t.Helper()
	names := membership.Steps()[operation]
	if len(names) < 3 {
		t.Fatalf("%s has the steps %q", operation, names)
	}
	var all []string
	for _, name := range names {
		all = append(all, fmt.Sprintf("%s/%s/begin", operation, name), fmt.Sprintf("%s/%s/end", operation, name))
	}
	return all
}
