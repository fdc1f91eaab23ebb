package cli

import (
	"strings"
	"testing"
	"time"

	"microk8s/internal/tokenstore"
)

// TestConnectionForms compares what add-node prints with cli.md 2.5, to the letter.
func TestConnectionForms(t *testing.T) {
	c := connection{token: "T", check: "C", port: "25000", first: "10.0.0.1", all: []string{"10.0.0.1", "fd00::1"}, ha: true}
	worker := c
	worker.worker = true
	alone := c
	alone.ha = false
	none := connection{token: "T", check: "C", port: "25000", first: "none", all: []string{"none"}}
	for _, tc := range []struct {
		name   string
		c      connection
		format string
		want   string
	}{
		{"pretty", c, "pretty", `From the node you wish to join to this cluster, run the following:
microk8s join 10.0.0.1:25000/T/C

Use the '--worker' flag to join a node as a worker not running the control plane, eg:
microk8s join 10.0.0.1:25000/T/C --worker

If the node you are adding is not reachable through the default interface you can use one of the following:
microk8s join 10.0.0.1:25000/T/C
microk8s join [fd00::1]:25000/T/C
`},
		{"a worker's", worker, "pretty", `From the node you wish to join to this cluster, run the following:
microk8s join 10.0.0.1:25000/T/C --worker

If the node you are adding is not reachable through the default interface you can use one of the following:
microk8s join 10.0.0.1:25000/T/C --worker
microk8s join [fd00::1]:25000/T/C --worker
`},
		{"not in HA mode", alone, "pretty", `From the node you wish to join to this cluster, run the following:
microk8s join 10.0.0.1:25000/T/C

If the node you are adding is not reachable through the default interface you can use one of the following:
microk8s join 10.0.0.1:25000/T/C
microk8s join [fd00::1]:25000/T/C
`},
		{"short", c, "short", "microk8s join 10.0.0.1:25000/T/C\nmicrok8s join [fd00::1]:25000/T/C\n"},
		{"no address", none, "short", "microk8s join none:25000/T/C\n"},
		{"token", c, "token", "T\n"},
		{"token-check", c, "token-check", "T/C\n"},
		{"json", c, "json", `{
  "token": "T/C",
  "urls": [
    "10.0.0.1:25000/T/C",
    "[fd00::1]:25000/T/C"
  ]
}
`},
		{"yaml", c, "yaml", "token: T/C\nurls:\n- 10.0.0.1:25000/T/C\n- '[fd00::1]:25000/T/C'\n\n"},
	} {
		var out strings.Builder
		if err := tc.c.print(&out, tc.format); err != nil {
			t.Fatal(err)
		}
		if out.String() != tc.want {
			t.Errorf("%s:\n%s\nwant\n%s", tc.name, out.String(), tc.want)
		}
	}
}

// TestTokenOptions shows how long a new token is good, and for how many nodes: one node and one
// hour unless something else is asked for, and upstream's meaning of --token-ttl.
func TestTokenOptions(t *testing.T) {
	for _, tc := range []struct {
		name string
		f    addNodeFlags
		uses int
		ttl  time.Duration
		says string
	}{
		{"nothing said", addNodeFlags{ttl: noTTL}, 1, time.Hour, "good for one node, for 60m."},
		{"a worker", addNodeFlags{ttl: noTTL, worker: true}, 1, time.Hour, "good for one node, as a worker, for 60m."},
		{"upstream's default, typed", addNodeFlags{ttl: noTTL, ttlSet: true}, 1, 0, "good for one node, without an end."},
		{"for many", addNodeFlags{ttl: 90, ttlSet: true}, tokenstore.Unlimited, 90 * time.Second, "good for any number of nodes, for 90s."},
		{"for many, but of one name", addNodeFlags{ttl: 90, ttlSet: true, name: "n2"}, 1, 90 * time.Second, "good for the node n2, for 90s."},
		{"for longer", addNodeFlags{ttl: noTTL, expires: "72h"}, 1, 72 * time.Hour, "good for one node, for 3d."},
		{"for ever", addNodeFlags{ttl: noTTL, expires: "never"}, 1, 0, "good for one node, without an end."},
	} {
		use, err := tc.f.options()
		if err != nil || use.Uses != tc.uses || use.TTL != tc.ttl {
			t.Errorf("%s: %d uses for %v, %v; want %d for %v", tc.name, use.Uses, use.TTL, err, tc.uses, tc.ttl)
		}
		if !strings.Contains(use.describe(), tc.says) {
			t.Errorf("%s: %q does not contain %q", tc.name, use.describe(), tc.says)
		}
	}
}
