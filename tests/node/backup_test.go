package node

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/tests/snippet"
)

// testBackup runs what docs/operations.md says of backups: a schedule, by which the agent makes the first
// archive, looking at it, proving it again, and bringing an object back.
func (n *node) testBackup(t *testing.T) {
	list, err := snippet.Read("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	vars := "sudo() { \"$@\"; }\n"
	shell := func(name string) string {
		t.Helper()
		for _, s := range list {
			if s.Name == name {
				// No network file system is mounted in the lab.
				return n.run(t, "sh", "-ec", vars+strings.ReplaceAll(s.Text, "nfs:/mnt/backups", "/root/backups"))
			}
		}
		t.Fatalf("docs/operations.md has no snippet %q", name)
		return ""
	}
	maps := n.client.CoreV1().ConfigMaps("default")
	if _, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kept"}, Data: map[string]string{"a": "1"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	recipient := strings.TrimSpace(shell("backup key"))
	vars += "RECIPIENT=" + recipient[strings.LastIndex(recipient, "age1"):] + "\n"
	shell("backup schedule")
	name := ""
	eventually(t, 2*time.Minute, func() error {
		var s struct {
			Error  string
			Proven struct{ Name string }
		}
		if err := json.Unmarshal([]byte(n.run(t, "microk8s", "backup", "schedule", "-o", "json")), &s); err != nil {
			return err
		}
		if name = s.Proven.Name; name == "" {
			return errors.New("no archive is proven yet: " + s.Error)
		}
		return nil
	})
	vars += "NAME=" + name + "\n"
	if out := shell("backup look"); !strings.Contains(out, name) || !strings.Contains(out, "can be restored: ") {
		t.Errorf("%s", out)
	}
	if out := n.run(t, "env", "MICROK8S_STATUS_BUDGET=30s", "microk8s", "status"); !strings.Contains(out, "backup: newest proven archive ") {
		t.Errorf("%s", out)
	}
	if err := maps.Delete(t.Context(), "kept", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "later"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if out := shell("restore plan"); !strings.Contains(out, "the cluster that it is of, which runs") {
		t.Errorf("%s", out)
	}
	shell("restore")
	n.waitReady(t)
	if _, err := maps.Get(t.Context(), "kept", metav1.GetOptions{}); err != nil {
		t.Errorf("after the restore: %v", err)
	}
	if _, err := maps.Get(t.Context(), "later", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("what came after the archive: %v", err)
	}
	n.run(t, "microk8s", "backup", "schedule", "--off")
	n.run(t, "rm", "-r", "/root/backups", "/root/backup.key")
}
