package node

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
)

// stall is longer than a leader's lease (docs/adr/0017), as a disk or a virtual machine that stands still.
const stall = "25"

// TestStall has the datastore stand still: kubelite goes on, and with it open watches.
func TestStall(t *testing.T) {
	longtest.Only(t)
	n := newNode(t)
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.waitReady(t)
	n.run(t, "microk8s", "status", "--wait-ready")
	pid := n.run(t, "pgrep", "-o", "-x", "kubelite")
	watch, err := n.client.CoreV1().ConfigMaps("default").Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	frozen := n.background(t, "sh", "-c", "p=$(pgrep -o -x k8s-dqlite); kill -STOP $p; sleep "+stall+"; kill -CONT $p; sleep 1000")
	defer frozen()
	eventually(t, time.Minute, func() error {
		out, err := n.tryAll(t, "", "microk8s", "status")
		if exitCode(err) != 1 || !strings.HasPrefix(out, "microk8s is slow to answer") || strings.Contains(out, "not running") {
			return fmt.Errorf("status of a stalled node: %v\n%s", fmt.Sprint(err), out)
		}
		return nil
	})
	const name = "after-the-stall"
	eventually(t, 2*time.Minute, func() error {
		_, err := n.try(t, "microk8s", "kubectl", "--request-timeout=2s", "create", "configmap", name)
		return err
	})
	if again := n.run(t, "pgrep", "-o", "-x", "kubelite"); again != pid {
		t.Errorf("kubelite was restarted: its process was %s and is %s", strings.TrimSpace(pid), strings.TrimSpace(again))
	}
	limit := time.After(time.Minute)
	for {
		select {
		case e, open := <-watch.ResultChan():
			if !open {
				t.Fatal("the watch has ended")
			}
			if o, ok := e.Object.(metav1.Object); ok && o.GetName() == name {
				// The controllers come back as well: they make what a Deployment is for.
				n.run(t, "microk8s", "kubectl", "create", "deployment", "d", "--image=x")
				eventually(t, 2*time.Minute, func() error {
					out, err := n.try(t, "microk8s", "kubectl", "get", "pods", "-l", "app=d", "-o", "name")
					if err == nil && out == "" {
						err = fmt.Errorf("no pod was made")
					}
					return err
				})
				return
			}
		case <-limit:
			t.Fatal("the watch did not go on")
		}
	}
}
