package cli

import (
	"strings"
	"testing"
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
