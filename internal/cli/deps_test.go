package cli

import (
	"os/exec"
	"strings"
	"testing"
)

// forbidden lists what the small programs must not link, and why.
var forbidden = map[string]string{
	"k8s.io/kubernetes/":                    "the daemons belong to kubelite alone; the command line must start in milliseconds",
	"k8s.io/apiserver/":                     "servers belong to kubelite alone",
	"k8s.io/kubectl/":                       "kubectl is run, not linked",
	"k8s.io/client-go/kubernetes/typed/":    "the typed clients cost megabytes for the few requests made here",
	"github.com/flannel-io/flannel/":        "the pod network belongs to kubelite alone",
	"github.com/traefik/traefik/":           "the balancer belongs to apiserver-proxy alone",
	"github.com/canonical/go-dqlite/v3/app": "the server half of dqlite needs C; it belongs to k8s-dqlite alone",
	"github.com/mattn/go-sqlite3":           "needs C; belongs to k8s-dqlite alone",
}

func TestDependencies(t *testing.T) {
	for _, program := range []string{"microk8s/cmd/microk8s", "microk8s/cmd/cluster-agent"} {
		out, err := exec.Command("go", "list", "-tags", "nosqlite3", "-deps", program).CombinedOutput() // the Makefile's tag
		if err != nil {
			t.Fatalf("go list -deps %s: %v\n%s", program, err, out)
		}
		deps := strings.Fields(string(out))
		if len(deps) < 50 {
			t.Fatalf("only %d dependencies of %s: the list is not one", len(deps), program)
		}
		for _, dep := range deps {
			for prefix, why := range forbidden {
				if strings.HasPrefix(dep+"/", prefix) {
					t.Errorf("%s links %s: %s", program, dep, why)
				}
			}
		}
	}
}
