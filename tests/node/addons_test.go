package node

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/tests/lab/labtest"
	"microk8s/tests/snippet"
)

const (
	clusterName = "kubernetes.default.svc.cluster.local"
	outsideName = "printer.home.arpa" // known to the test's own name server only
	outsideAddr = "192.0.2.77"
)

// TestAddons takes the addons of one node on and off. Its hosts reach no other machine: all
// images are the product's own.
func TestAddons(t *testing.T) {
	n := newNode(t, "resolver")
	step := n.steps(t)

	step("dns is on from the first start", func(t *testing.T) {
		n.run(t, "microk8s", "start")
		n.connect(t)
		n.waitReady(t)
		n.wantAddon(t, "dns", "enabled")
		n.startPod(t, "asker")
		n.waitLookup(t, clusterName, "10.152.183.1")
	})
	step("without a name server names outside are refused at once", func(t *testing.T) {
		n.waitLookup(t, "kube-dns.kube-system", "10.152.183.10")
		if out, err := n.lookup(t, outsideName); err == nil {
			t.Errorf("%s has the address %q", outsideName, out)
		}
	})
	step("refusals", n.testAddonRefusals)
	server := labtest.Resolver(t, n.lab, "resolver", filepath.Join(build, "components/bin/coredns"), outsideName, outsideAddr)
	step("other arguments change an enabled addon", func(t *testing.T) {
		out := n.run(t, "microk8s", "enable", "dns", server)
		if !strings.Contains(out, "CoreDNS service deployed with IP address 10.152.183.10\n") || !strings.Contains(out, "DNS is enabled\n") {
			t.Errorf("enable dns printed %q", out)
		}
		n.waitLookup(t, outsideName, outsideAddr)
		n.waitLookup(t, clusterName, "10.152.183.1")
		if out := n.run(t, "microk8s", "enable", "dns"); out != "Addon core/dns is already enabled\n" {
			t.Errorf("enabling it again printed %q", out)
		}
		n.waitLookup(t, outsideName, outsideAddr) // the servers were kept
	})
	step("disable removes everything", func(t *testing.T) {
		if out := n.run(t, "microk8s", "disable", "dns"); out != "DNS is disabled\n" {
			t.Errorf("disable dns printed %q", out)
		}
		n.wantAddon(t, "dns", "disabled")
		if out := n.run(t, "microk8s", "kubectl", "get", "-A", "-o", "name", "-l", "microk8s.io/addon",
			"deployments,services,configmaps,serviceaccounts,clusterroles,clusterrolebindings"); out != "" {
			t.Errorf("left in the cluster:\n%s", out)
		}
		if out := n.run(t, "microk8s", "disable", "dns"); out != "Addon core/dns is already disabled\n" {
			t.Errorf("disabling it again printed %q", out)
		}
	})
	step("what is disabled stays disabled", func(t *testing.T) {
		n.run(t, "microk8s", "stop")
		// As with systemd-resolved: a stub on the loopback, and the servers behind it elsewhere;
		// among them, as on machines whose owner wants the cluster's names, the cluster's own.
		n.run(t, "mkdir", "-p", "/run/systemd/resolve")
		for file, text := range map[string]string{
			"/etc/resolv.conf":                 "nameserver 127.0.0.53\n",
			"/run/systemd/resolve/resolv.conf": "nameserver 10.152.183.10\nnameserver " + server + "\n",
		} {
			n.runIn(t, text, "sh", "-c", "cat > "+file)
		}
		n.run(t, "microk8s", "start")
		n.waitReady(t)
		n.wantAddon(t, "dns", "disabled")
	})
	step("the host's name servers, without a loop", func(t *testing.T) {
		n.run(t, "microk8s", "enable", "dns", "helm")
		n.waitLookup(t, outsideName, outsideAddr)
		n.waitLookup(t, clusterName, "10.152.183.1")
	})
	step("other name servers of the host", func(t *testing.T) {
		const resolved = "/run/systemd/resolve/resolv.conf"
		n.runIn(t, "nameserver 10.152.183.10\n", "sh", "-c", "cat > "+resolved+".new && mv "+resolved+".new "+resolved)
		eventually(t, 2*time.Minute, func() error {
			if out, err := n.lookup(t, outsideName); err == nil {
				return fmt.Errorf("%s still has the address %s", outsideName, out)
			}
			_, err := n.lookup(t, clusterName)
			return err
		})
		n.runIn(t, "nameserver "+server+"\n", "sh", "-c", "cat > "+resolved+".new && mv "+resolved+".new "+resolved)
		n.waitLookup(t, outsideName, outsideAddr)
	})
	step("the user's own configuration, and a new start", func(t *testing.T) {
		n.run(t, "microk8s", "kubectl", "create", "configmap", "-n", "kube-system", "coredns-custom",
			"--from-literal=mine.server=example.test {\n  hosts {\n    192.0.2.99 www.example.test\n  }\n}\n")
		n.run(t, "microk8s", "stop")
		n.run(t, "microk8s", "start")
		n.waitReady(t)
		n.waitLookup(t, "www.example.test", "192.0.2.99")
		n.waitLookup(t, outsideName, outsideAddr)
	})
	step("objects are the same as the commands", n.testAddonObjects)
	step("reset disables addons", func(t *testing.T) {
		if out, err := n.tryAll(t, "", "microk8s", "reset"); err != nil {
			t.Fatalf("reset: %v\n%s", err, out)
		}
		n.waitReady(t)
		n.wantAddon(t, "dns", "disabled")
		n.run(t, "microk8s", "enable", "dns")
		n.startPod(t, "asker")
		n.waitLookup(t, clusterName, "10.152.183.1")
	})
}

// testAddonObjects enables an addon as docs/addons.md has it for GitOps, makes a mistake, and deletes the object.
func (n *node) testAddonObjects(t *testing.T) {
	list, err := snippet.Read("../../docs/addons.md")
	if err != nil {
		t.Fatal(err)
	}
	kubectl := func(args ...string) string {
		t.Helper()
		return n.run(t, append([]string{"microk8s", "kubectl"}, args...)...)
	}
	is := func(name, path, want string) {
		t.Helper()
		kubectl("wait", "addon", name, "--for=jsonpath="+path+"="+want, "--timeout=2m")
	}
	const reason = `{.status.conditions[?(@.type=="Ready")].reason}`
	is("dns", reason, "Enabled")
	if out := kubectl("get", "addons.microk8s.io"); !strings.Contains(out, "ENABLED   PHASE") || !strings.Contains(out, "metallb") {
		t.Errorf("kubectl get addons printed:\n%s", out)
	}
	is("hostpath-storage", "{.status.phase}", "Disabled")
	for _, s := range list {
		if s.Name == "gitops" {
			n.runIn(t, s.Text, "microk8s", "kubectl", "apply", "-f", "-")
		}
	}
	kubectl("wait", "addon", "hostpath-storage", "--for=condition=Ready", "--timeout=2m")
	is("hostpath-storage", "{.status.phase}", "Enabled")
	n.wantAddon(t, "hostpath-storage", "enabled")
	if out := n.run(t, "microk8s", "enable", "hostpath-storage", "--reclaim-policy=Retain"); !strings.Contains(out, "already enabled") {
		t.Errorf("the arguments of the object are not those of the command: %s", out)
	}
	kubectl("patch", "addon", "hostpath-storage", "--type=merge", "-p", `{"spec":{"arguments":["--reclaim-policy=Keep"]}}`)
	is("hostpath-storage", reason, "InvalidArguments")
	n.wantAddon(t, "hostpath-storage", "enabled")
	for _, wrong := range []string{`{"spec":{"arguments":["a\nb"]}}`, `{"spec":{"repository":"other"}}`} {
		if out, err := n.tryAll(t, "", "microk8s", "kubectl", "patch", "addon", "hostpath-storage", "--type=merge", "-p", wrong); err == nil {
			t.Errorf("%s was taken: %s", wrong, out)
		}
	}
	if out := n.run(t, "microk8s", "enable", "hostpath-storage", "--reclaim-policy=Delete"); !strings.Contains(out, "hostpath-storage is enabled") {
		t.Errorf("the command printed %s", out)
	}
	is("hostpath-storage", reason, "Enabled")
	if out := kubectl("get", "addon", "hostpath-storage", "-o", "jsonpath={.spec.arguments}"); out != `["--reclaim-policy=Delete"]` {
		t.Errorf("after the command the object has the arguments %s", out)
	}
	// Tenants with every right in their namespace, and those who may edit all namespaces, have none here.
	kubectl("create", "rolebinding", "tenant", "--clusterrole=admin", "--user=tenant")
	for _, role := range []string{"admin", "edit", "view"} {
		kubectl("create", "clusterrolebinding", "all-"+role, "--clusterrole="+role, "--user=all-"+role)
		for _, verb := range []string{"get", "patch", "create", "delete"} {
			for _, user := range []string{"tenant", "all-" + role} {
				if out, err := n.try(t, "microk8s", "kubectl", "auth", "can-i", verb, "addons.microk8s.io", "--as="+user); err == nil || strings.TrimSpace(out) != "no" {
					t.Errorf("%s may %s addons: %s", user, verb, out)
				}
			}
		}
	}
	kubectl("delete", "addon", "hostpath-storage", "--timeout=2m")
	n.wantAddon(t, "hostpath-storage", "disabled")
	eventually(t, time.Minute, func() error { // the new object
		_, err := n.try(t, "microk8s", "kubectl", "get", "addon", "hostpath-storage")
		return err
	})
	is("hostpath-storage", "{.status.phase}", "Disabled")
}

func (n *node) testAddonRefusals(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"enable"}, 2, "Missing argument"},
		{[]string{"enable", "dsn"}, 1, "Addon dsn was not found in any repository\nDid you mean dns?"},
		{[]string{"disable", "no-such-thing"}, 1, "Addon no-such-thing was not found"},
		{[]string{"enable", "a/b/c"}, 1, "Invalid addon name a/b/c"},
		{[]string{"enable", "dns", "router"}, 1, `"router" is not the address of a name server`},
		{[]string{"enable", "dns:127.0.0.53", "helm"}, 1, "pods cannot reach a name server at 127.0.0.53"},
		{[]string{"disable", "dns", "helm"}, 1, "cannot disable core/helm: Helm comes pre-installed with MicroK8s"},
	} {
		out, err := n.tryAll(t, "", append([]string{"microk8s"}, tc.args...)...)
		if exitCode(err) != tc.code || !strings.Contains(out, tc.want) {
			t.Errorf("%q: %v, want exit code %d and %q:\n%s", tc.args, err, tc.code, tc.want, out)
		}
	}
	n.wantAddon(t, "dns", "enabled") // nothing was half done
}

func (n *node) wantAddon(t *testing.T, name, state string) {
	t.Helper()
	status := func(args ...string) string { // not bound by the time that it takes
		return n.run(t, append([]string{"env", "MICROK8S_STATUS_BUDGET=30s", "microk8s", "status"}, args...)...)
	}
	status("--wait-ready", "--timeout", "60")
	if out := strings.TrimSpace(status("--addon", name)); out != state {
		t.Errorf("status --addon %s printed %q, want %q", name, out, state)
	}
	row := fmt.Sprintf("\n    %-20s # (core) ", name)
	_, listed, _ := strings.Cut(status(), "\n  "+state+":")
	if head, _, found := strings.Cut(listed, row); !found || strings.Contains(head, "disabled:") {
		t.Errorf("status does not list %s as %s:\n%s", name, state, listed)
	}
	if out := status("--format", "short"); !strings.Contains(out, "\ncore/"+name+": "+state+"\n") {
		t.Errorf("status --format short lacks core/%s: %s:\n%s", name, state, out)
	}
}

// startPod runs a pod of the test image that asks for names.
func (n *node) startPod(t *testing.T, name string) {
	t.Helper()
	n.loadWebImage(t)
	eventually(t, time.Minute, func() error { // made by a controller, and no pod without it
		_, err := n.client.CoreV1().ServiceAccounts("default").Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	if _, err := n.client.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: ptr(int64(1)),
			Containers:                    []corev1.Container{{Name: "web", Image: webImage, ImagePullPolicy: corev1.PullNever}},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (n *node) lookup(t *testing.T, name string) (string, error) {
	t.Helper()
	out, err := n.try(t, "microk8s", "kubectl", "exec", "asker", "--", "/web", "lookup", name)
	return strings.TrimSpace(out), err
}

func (n *node) waitLookup(t *testing.T, name, want string) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		got, err := n.lookup(t, name)
		if err == nil && got != want {
			err = fmt.Errorf("%s has the address %q, want %s", name, got, want)
		}
		return err
	})
}
