package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
	"microk8s/tests/snippet"
)

// operations returns a function that runs snippets of docs/operations.md on a host, as they are there.
func (c *cluster) operations(t *testing.T) func(t *testing.T, host, name string) result {
	t.Helper()
	list, err := snippet.Read("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T, host, name string) result {
		t.Helper()
		for _, s := range list {
			if s.Name == name {
				return c.try(t, host, "sh", "-ec", "sudo() { \"$@\"; }\n"+s.Text)
			}
		}
		t.Fatalf("docs/operations.md has no snippet %q", name)
		return result{}
	}
}

// rejoin is what recover prints for a node: its name and two lines to type there.
var rejoin = regexp.MustCompile(`(?m)^  on (\S+) \(.*\):\n    sudo (.+)\n    sudo (.+)$`)

// TestRecover loses two of three control-plane nodes, goes on with the one that is left, and brings the two back
// by the lines that were printed: every node serves what was acknowledged, and the pods have their volumes again.
func TestRecover(t *testing.T) {
	longtest.Only(t)
	hosts := []string{"n1", "n2", "n3"}
	c := newCluster(t, hosts...)
	step, doc := steps(t), c.operations(t)
	step("three nodes with volumes", func(t *testing.T) {
		c.start(t, "n1")
		c.join(t, "n1", "n2")
		c.join(t, "n1", "n3")
		c.wantHA(t, "n1", "yes", 3)
		c.run(t, "n1", "microk8s", "enable", "hostpath-storage")
		for _, h := range hosts {
			c.loadWebImage(t, h)
			c.runIn(t, "n1", volumeOn(h), "microk8s", "kubectl", "apply", "-f", "-")
		}
		for _, h := range hosts {
			c.waitPod(t, "keeper-"+h+"-0")
			c.run(t, "n1", "microk8s", "kubectl", "exec", "keeper-"+h+"-0", "--", "/web", "write", "/data/file", "kept on "+h)
			c.run(t, h, "sync")
		}
		c.mark(t, "n1", "acknowledged")
	})
	step("refused while the datastore works", func(t *testing.T) {
		if r := c.try(t, "n1", "microk8s", "recover", "--others-are-gone", "--yes"); r.code != 3 || !strings.Contains(r.err, "the datastore works") {
			t.Errorf("%s", r)
		}
	})
	step("two of three are lost", func(t *testing.T) {
		for _, h := range hosts[1:] {
			if err := c.lab.Kill(t.Context(), h); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, 2*time.Minute, func() error {
			if r := c.status(t, "n1"); !strings.Contains(r.out, "microk8s recover") {
				return fmt.Errorf("status names no way out: %s", r)
			}
			return nil
		})
		// The last copy is not deleted for a slip, and the way that loses nothing is named first.
		if r := c.try(t, "n1", "microk8s", "leave", "--force"); r.code != 2 || !strings.Contains(r.err, "recover --dry-run") {
			t.Errorf("leave: %s", r)
		}
		if r := doc(t, "n1", "recover plan"); r.code != 3 || !strings.Contains(r.err, "may come back") {
			t.Errorf("recover: %s", r)
		}
	})
	lines := map[string][]string{}
	step("the node that is left goes on", func(t *testing.T) {
		began := time.Now()
		r := doc(t, "n1", "recover")
		if r.code != 0 {
			t.Fatal(r)
		}
		t.Logf("recovered in %s", time.Since(began).Round(100*time.Millisecond))
		for _, m := range rejoin.FindAllStringSubmatch(r.out, -1) {
			lines[m[1]] = m[2:]
		}
		if len(lines["n2"]) != 2 || len(lines["n3"]) != 2 || len(lines) != 2 {
			t.Fatalf("it printed\n%s", r)
		}
		c.waitReady(t, "n1", "n1")
		c.wantMark(t, "n1", "acknowledged")
		c.keeps(t, "n1", time.Minute)
	})
	for i, h := range hosts[1:] {
		step(h+" joins again", func(t *testing.T) {
			if err := c.lab.Start(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			for _, line := range lines[h] {
				eventually(t, 4*time.Minute, func() error { // its name is free when the cluster calls it NotReady
					if r := c.try(t, h, strings.Fields(line)...); r.code != 0 {
						return fmt.Errorf("%s: %s", line, r)
					}
					return nil
				})
			}
			c.waitReady(t, "n1", h)
			c.wantHA(t, "n1", []string{"no", "yes"}[i], i+2)
			c.wantMark(t, h, "acknowledged")
			files, err := filepath.Glob(filepath.Join(c.lab.Root(h), "var/snap/microk8s/common/default-storage/default-data-keeper-"+h+"-0-*/file"))
			if err != nil || len(files) != 1 {
				t.Errorf("volumes on %s: %q, %v", h, files, err)
			}
			c.keeps(t, h, 5*time.Minute)
		})
	}
	step("each of them takes writes", func(t *testing.T) {
		for _, h := range hosts {
			eventually(t, time.Minute, func() error {
				_, err := c.client(t, h).CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "after-" + h}}, metav1.CreateOptions{})
				if apierrors.IsAlreadyExists(err) {
					err = nil
				}
				return err
			})
		}
	})
	step("a member heals its files", func(t *testing.T) {
		c.testDamage(t, "n3", func() result { return doc(t, "n3", "damage look") })
	})
}

// TestDamageAlone damages the files of a node that is alone: its status names the newest archive that was proven, and
// what it says to type brings that one back.
func TestDamageAlone(t *testing.T) {
	longtest.Only(t)
	c := newCluster(t, "n1")
	c.start(t, "n1")
	c.mark(t, "n1", "archived")
	key := strings.TrimSpace(c.run(t, "n1", "microk8s", "backup", "key", "/root/backup.key"))
	c.run(t, "n1", "microk8s", "backup", "schedule", "--every", "12h", "--keep", "3", "--to", "/root/backups", "--recipient", key[strings.LastIndex(key, "age1"):])
	known := filepath.Join(c.lab.Root("n1"), "var/snap/microk8s/common/var/kubernetes/newest-archive.json")
	eventually(t, 3*time.Minute, func() error { _, err := os.Stat(known); return err })
	c.spoil(t, "n1")
	var words []string
	eventually(t, 3*time.Minute, func() error {
		r := c.status(t, "n1")
		m := proposed.FindStringSubmatch(r.out)
		if m == nil || !strings.Contains(r.out, "what was written since then is lost") {
			return fmt.Errorf("%s", r)
		}
		words = []string{"microk8s", "restore", m[1], "--from", m[2], "--identity-file", "/root/backup.key"}
		return nil
	})
	c.run(t, "n1", append(words, "--dry-run")...)
	c.run(t, "n1", append(words, "--yes")...)
	c.waitReady(t, "n1", "n1")
	c.wantMark(t, "n1", "archived")
	if r := c.status(t, "n1"); strings.Contains(r.out, "is damaged") {
		t.Errorf("%s", r)
	}
}

// proposed is what status says to type where only an archive is left.
var proposed = regexp.MustCompile(`sudo microk8s restore (\S+) --from '(\S+)' --identity-file FILE --dry-run`)

// keeps waits until the pod on a node has what it had written to its volume.
func (c *cluster) keeps(t *testing.T, host string, limit time.Duration) {
	t.Helper()
	eventually(t, limit, func() error {
		r := c.try(t, "n1", "microk8s", "kubectl", "exec", "keeper-"+host+"-0", "--", "/web", "cat", "/data/file")
		if strings.TrimSpace(r.out) != "kept on "+host {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
}

// testDamage damages what a member knows of its term and vote, and kills it: it comes back with everything, and says
// what it was.
func (c *cluster) testDamage(t *testing.T, host string, status func() result) {
	t.Helper()
	c.spoil(t, host)
	eventually(t, 3*time.Minute, func() error {
		r := status()
		if !strings.Contains(r.out, "files of the datastore on this node were damaged once since") {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
	c.wantHA(t, host, "yes", 3)
	c.wantMark(t, host, "acknowledged")
}

// spoil damages what a member knows of its term and vote, and kills it.
func (c *cluster) spoil(t *testing.T, host string) {
	t.Helper()
	c.run(t, host, "sh", "-ec", "cd /var/snap/microk8s/common/var/kubernetes/backend; for f in metadata1 metadata2; do [ ! -e $f ] || printf '\\377' | dd of=$f bs=1 seek=16 conv=notrunc status=none; done; "+
		"kill -9 $(pgrep -o -x k8s-dqlite)")
}

// volumeOn is a stateful set of one pod on a node, with a volume there.
func volumeOn(host string) string {
	return strings.ReplaceAll(`
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: keeper-HOST}
spec:
  serviceName: keeper-HOST
  selector: {matchLabels: {app: keeper-HOST}}
  template:
    metadata: {labels: {app: keeper-HOST}}
    spec:
      terminationGracePeriodSeconds: 1
      nodeSelector: {kubernetes.io/hostname: HOST}
      containers:
      - {name: web, image: "`+webImage+`", imagePullPolicy: Never, volumeMounts: [{name: data, mountPath: /data}]}
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      resources: {requests: {storage: 1Mi}}
`, "HOST", host)
}
