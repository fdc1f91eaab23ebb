package node

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestAddonsServices uses what the addons beside dns bring, on one node that reaches no other
// machine: all images are the product's own and the test's.
func TestAddonsServices(t *testing.T) {
	n := newNode(t)
	step := n.steps(t)
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.waitReady(t)
	n.loadWebImage(t)

	step("storage", n.testStorage)
	step("helm", n.testHelm)
	step("plugins of kubectl and helm", n.testPlugins)
	step("repositories", n.testRepositories)
	step("images", n.testImages)
	step("metrics", n.testMetrics)
	step("ingress", n.testIngress)
	step("certificates", n.testCertificates)
	step("dashboard", n.testDashboard)
	step("host access", n.testHostAccess)
}

const statefulSet = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  replicas: 1
  selector: {matchLabels: {app: db}}
  serviceName: db
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsUser: 1234, runAsNonRoot: true}
      containers:
      - name: db
        image: microk8s.test/web:1
        imagePullPolicy: Never
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      resources: {requests: {storage: 10Mi}}
`

func (n *node) testStorage(t *testing.T) {
	if out, err := n.tryAll(t, "", "microk8s", "enable", "hostpath-storage", "--reclaim-policy", "Recycle"); exitCode(err) != 1 || !strings.Contains(out, "Delete or Retain") {
		t.Errorf("a wrong reclaim policy: %v\n%s", err, out)
	}
	n.wantAddon(t, "hostpath-storage", "disabled")
	out, err := n.tryAll(t, "", "microk8s", "enable", "storage")
	if err != nil || !strings.Contains(out, "Please use 'hostpath-storage' instead") || !strings.Contains(out, "not suitable for production") {
		t.Fatalf("enable storage: %v\n%s", err, out)
	}
	for _, name := range []string{"storage", "hostpath-storage"} {
		n.wantAddon(t, name, "enabled")
	}
	n.runIn(t, statefulSet, "microk8s", "kubectl", "apply", "-f", "-")
	n.waitPod(t, "db-0")
	n.run(t, "microk8s", "kubectl", "exec", "db-0", "--", "/web", "write", "/data/file", "kept")
	kept := func(after string) {
		t.Helper()
		n.waitPod(t, "db-0")
		eventually(t, time.Minute, func() error {
			out, err := n.try(t, "microk8s", "kubectl", "exec", "db-0", "--", "/web", "cat", "/data/file")
			if err == nil && strings.TrimSpace(out) != "kept" {
				err = fmt.Errorf("the file holds %q after %s", out, after)
			}
			return err
		})
	}
	pv := n.volume(t)
	dir := filepath.Join(n.lab.Root(n.name), pv.Spec.HostPath.Path)
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o777 {
		t.Errorf("%s: %v, %v", dir, fi, err)
	}
	if fi, err := os.Stat(filepath.Dir(dir)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%s: %v, %v", filepath.Dir(dir), fi, err)
	}
	n.run(t, "microk8s", "kubectl", "delete", "pod", "db-0")
	kept("the pod was deleted")
	if err := errors.Join(n.lab.Kill(t.Context(), n.name), n.lab.Start(t.Context(), n.name)); err != nil {
		t.Fatal(err)
	}
	n.connect(t)
	n.waitReady(t)
	kept("a power cut")
	if out := n.runIn(t, "n\n", "microk8s", "disable", "hostpath-storage"); !strings.Contains(out, "Remove PVC storage at ") {
		t.Errorf("disable printed %q", out)
	}
	n.wantAddon(t, "storage", "disabled")
	n.run(t, "microk8s", "kubectl", "delete", "pod", "db-0")
	kept("a pod deleted without the addon")
	n.run(t, "microk8s", "enable", "hostpath-storage", "--reclaim-policy=Retain")
	kept("disable and enable")
	if out := n.run(t, "microk8s", "kubectl", "get", "storageclass", "microk8s-hostpath", "-o", "jsonpath={.reclaimPolicy}"); out != "Retain" {
		t.Errorf("the class has reclaim policy %q", out)
	}
	t.Run("claims that get no volume say why", func(t *testing.T) {
		n.runIn(t, `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: outside}
provisioner: microk8s.io/hostpath
parameters: {pvDir: /etc}
volumeBindingMode: Immediate
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: outside}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: outside
  resources: {requests: {storage: 1Mi}}
`, "microk8s", "kubectl", "apply", "-f", "-")
		n.waitEvent(t, "outside", "must have volumeBindingMode WaitForFirstConsumer")
		n.run(t, "microk8s", "kubectl", "delete", "pvc/outside", "storageclass/outside")
	})
	// The volume was made with Delete.
	n.run(t, "microk8s", "kubectl", "delete", "statefulset/db", "pvc/data-db-0", "--wait=true")
	eventually(t, time.Minute, func() error {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			return fmt.Errorf("%s is still there", dir)
		}
		_, err := n.client.CoreV1().PersistentVolumes().Get(t.Context(), pv.Name, metav1.GetOptions{})
		if err == nil {
			return errors.New("the volume is still there")
		}
		return nil
	})
}

// volume returns the one PersistentVolume.
func (n *node) volume(t *testing.T) corev1.PersistentVolume {
	t.Helper()
	list, err := n.client.CoreV1().PersistentVolumes().List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%d volumes, want one: %v", len(list.Items), err)
	}
	return list.Items[0]
}

// waitPod waits for a pod in the namespace default to be ready.
func (n *node) waitPod(t *testing.T, name string) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		pod, err := n.client.CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if pod.DeletionTimestamp == nil {
			for _, c := range pod.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
					return nil
				}
			}
		}
		return fmt.Errorf("pod %s is %s: %+v", name, pod.Status.Phase, pod.Status.Conditions)
	})
}

// waitEvent waits for an event about an object of that name.
func (n *node) waitEvent(t *testing.T, name, text string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		list, err := n.client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.InvolvedObject.Name == name && strings.Contains(e.Message, text) {
				return nil
			}
		}
		return fmt.Errorf("no event about %s with %q", name, text)
	})
}

// testHelm takes a chart in a local directory through its life.
func (n *node) testHelm(t *testing.T) {
	chart := map[string]string{
		"Chart.yaml":  "apiVersion: v2\nname: greeting\nversion: 0.1.0\n",
		"values.yaml": "words: hello\n",
		"templates/config.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}\n" +
			"data:\n  words: {{ .Values.words }}\n",
	}
	for file, text := range chart {
		n.runIn(t, text, "sh", "-c", "mkdir -p /chart/templates && cat > /chart/"+file)
	}
	words := func(want string) {
		t.Helper()
		if got := n.run(t, "microk8s", "kubectl", "get", "configmap", "mine", "-o", "jsonpath={.data.words}"); got != want {
			t.Errorf("the chart's words are %q, want %q", got, want)
		}
	}
	// Without a cluster, helm is for the Kubernetes that is shipped. Charts say which they need.
	n.runIn(t, "apiVersion: v2\nname: modern\nversion: 0.1.0\nkubeVersion: \">=1.25.0-0\"\n", "sh", "-c", "mkdir -p /modern/templates && cat > /modern/Chart.yaml")
	n.runIn(t, "kubernetes: {{ .Capabilities.KubeVersion.Minor }}\n", "sh", "-c", "cat > /modern/templates/version.yaml")
	kubernetes, err := n.client.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	if out := n.run(t, "microk8s", "helm", "template", "/modern"); !strings.Contains(out, "\nkubernetes: "+kubernetes.Minor+"\n") {
		t.Errorf("helm template is not for the Kubernetes of this node:\n%s", out)
	}
	n.run(t, "microk8s", "helm", "lint", "/modern")
	n.run(t, "microk8s", "helm", "install", "mine", "/chart", "--wait")
	words("hello")
	n.run(t, "microk8s", "helm3", "upgrade", "mine", "/chart", "--set", "words=again")
	words("again")
	n.run(t, "microk8s", "helm", "rollback", "mine", "1")
	words("hello")
	if out := n.run(t, "microk8s", "helm", "history", "mine"); !strings.Contains(out, "Rollback to 1") {
		t.Errorf("history:\n%s", out)
	}
	n.run(t, "microk8s", "helm", "uninstall", "mine")
	if out, err := n.tryAll(t, "", "microk8s", "kubectl", "get", "configmap", "mine"); err == nil {
		t.Errorf("the chart's object is still there:\n%s", out)
	}
	if out := n.run(t, "microk8s", "enable", "helm", "helm3"); !strings.Contains(out, "Helm comes pre-installed with MicroK8s") {
		t.Errorf("enable helm printed %q", out)
	}
}

// testPlugins has plugins that are scripts and call kubectl and helm themselves, as most do, found
// where people put them: krew's folder, Helm's own, and the one that HELM_PLUGINS names.
func (n *node) testPlugins(t *testing.T) {
	write := func(path, text string) {
		t.Helper()
		n.runIn(t, text, "sh", "-c", "mkdir -p $(dirname "+path+") && cat > "+path+" && chmod 755 "+path)
	}
	in := func(line string) string {
		t.Helper()
		return n.run(t, "sh", "-c", "export PATH=/root/.krew/bin:$PATH; "+line)
	}
	wants := func(what, out string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s does not say %q:\n%s", what, w, out)
			}
		}
	}
	write("/root/.krew/bin/kubectl-greet", "#!/bin/sh\nexec kubectl get namespace default \"$@\"\n")
	write("/root/.krew/bin/kubectl_complete-greet", "#!/bin/sh\necho --loudly; echo :4\n")
	wants("plugin list", in("microk8s kubectl plugin list"), "/root/.krew/bin/kubectl-greet")
	wants("the plugin", in("microk8s kubectl greet -o name"), "namespace/default")
	wants("the plugin's completion", in("microk8s kubectl __complete greet ''"), "--loudly")
	wants("the plugin's completion by ours", in("microk8s __complete kubectl greet ''"), "--loudly")
	wants("kubectl's completion", in("microk8s kubectl completion bash"), "__start_kubectl")

	write("/root/greet/plugin.yaml", "name: greet\nversion: 1.0.0\nusage: greet\ndescription: greets\ncommand: $HELM_PLUGIN_DIR/greet.sh\n")
	write("/root/greet/greet.sh", "#!/bin/sh\n$HELM_BIN list -A -o json && kubectl get namespace default -o name && echo in $HELM_PLUGINS for \"$@\"\n")
	in("microk8s helm plugin install /root/greet")
	wants("helm plugin list", in("microk8s helm plugin list"), "greet", "1.0.0")
	wants("helm's plugin", in("microk8s helm greet me"), "[]", "namespace/default", "in /root/.local/share/helm/plugins for me")
	// Without HOME, as in cloud-init, it is found all the same, whatever the directory.
	wants("helm plugin list without HOME", in("cd /tmp; env -u HOME microk8s helm plugin list"), "greet")
	in("microk8s helm plugin uninstall greet")
	in("mkdir /root/shared; HELM_PLUGINS=/root/shared microk8s helm plugin install /root/greet")
	wants("a plugin of HELM_PLUGINS", in("HELM_PLUGINS=/root/shared microk8s helm greet you"), "namespace/default", "in /root/shared for you")
	if out := in("microk8s helm plugin list"); strings.Contains(out, "greet") {
		t.Errorf("it is in the other folder too:\n%s", out)
	}
}

// testRepositories uses an addon repository of the community's form, in a local directory.
func (n *node) testRepositories(t *testing.T) {
	if err := os.CopyFS(filepath.Join(n.lab.Root(n.name), "repo"), os.DirFS("testdata/addonrepo")); err != nil {
		t.Fatal(err)
	}
	commit := func(what string) {
		t.Helper()
		n.run(t, "sh", "-ec", "cd /repo; git init -q -b main . 2>/dev/null; git add -A; git -c user.name=test -c user.email=test@example.test commit -qm "+what)
	}
	commit("first")
	all := func(args ...string) string {
		t.Helper()
		out, err := n.tryAll(t, "", append([]string{"microk8s"}, args...)...)
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return out
	}
	refused := func(code int, want string, args ...string) {
		t.Helper()
		out, err := n.tryAll(t, "", append([]string{"microk8s"}, args...)...)
		if err == nil && code != 0 || err != nil && exitCode(err) != code || !strings.Contains(out, want) {
			t.Errorf("%q: %v, want exit code %d and %q:\n%s", args, err, code, want, out)
		}
	}
	all("addons", "repo", "add", "mine", "/repo")
	refused(1, "Error: repository 'mine' already exists!\nUse the --force flag to overwrite it", "addons", "repo", "add", "mine", "/repo")
	if out := all("addons", "repo", "list"); !strings.Contains(out, "REPO       ADDONS SOURCE\ncore      ") || !strings.Contains(out, "\nmine            2 /repo@") {
		t.Errorf("repo list printed:\n%s", out)
	}
	n.wantRepoAddon(t, "greeter", "disabled")
	refused(3, "the greeter fails as asked", "enable", "greeter", "fail")
	n.wantRepoAddon(t, "greeter", "disabled")
	out := all("enable", "mine/greeter", "words=good-day")
	if !strings.Contains(out, "Enabling the greeter for ") || !strings.Contains(out, "The greeter is enabled on "+n.name) {
		t.Errorf("enable greeter printed:\n%s", out)
	}
	n.wantRepoAddon(t, "greeter", "enabled")
	if got := n.run(t, "microk8s", "kubectl", "get", "deployment", "greeter", "-o", "jsonpath={.metadata.annotations.words}"); got != "good-day" {
		t.Errorf("the words are %q", got)
	}
	refused(0, "Addon mine/greeter is already enabled", "enable", "greeter")
	all("enable", "teller", "--story", "long")
	n.wantRepoAddon(t, "teller", "enabled")
	if data, err := os.ReadFile(n.path("var/lock/teller-enabled")); err != nil || !strings.HasPrefix(string(data), "long 1 ") {
		t.Errorf("the teller wrote %q, %v", data, err)
	}
	all("disable", "teller")
	if out := all("disable", "greeter"); !strings.Contains(out, "The greeter is disabled") {
		t.Errorf("disable greeter printed:\n%s", out)
	}
	n.wantRepoAddon(t, "greeter", "disabled")
	refused(0, "Addon mine/greeter is already disabled", "disable", "greeter")

	n.run(t, "sh", "-c", "sed -i s/1.2.3/1.2.4/ /repo/addons.yaml")
	commit("second")
	all("addons", "repo", "update", "mine")
	if out := n.run(t, "env", "MICROK8S_STATUS_BUDGET=30s", "microk8s", "status", "--format", "yaml"); !strings.Contains(out, "version: 1.2.4") {
		t.Errorf("status after the update:\n%s", out)
	}
	n.run(t, "rm", "/repo/addons/greeter/enable")
	commit("third")
	refused(1, "Missing enable hook for greeter addon", "addons", "repo", "update", "mine")
	n.wantRepoAddon(t, "greeter", "disabled") // it is there still
	refused(1, "Missing enable hook for greeter addon", "addons", "repo", "add", "other", "/repo")
	refused(1, "cannot fetch /nowhere", "addons", "repo", "add", "other", "/nowhere")
	if out := all("addons", "repo", "list"); strings.Contains(out, "other") {
		t.Errorf("a refused repository is there:\n%s", out)
	}
	if out := all("addons", "repo", "remove", "mine"); !strings.Contains(out, "Removing /var/snap/microk8s/common/addons/mine") {
		t.Errorf("repo remove printed:\n%s", out)
	}
	refused(1, "Addon greeter was not found in any repository", "enable", "greeter")
}

func (n *node) wantRepoAddon(t *testing.T, name, state string) {
	t.Helper()
	if out := n.run(t, "env", "MICROK8S_STATUS_BUDGET=30s", "microk8s", "status", "--format", "short"); !strings.Contains(out, "\nmine/"+name+": "+state+"\n") {
		t.Errorf("status lacks mine/%s: %s:\n%s", name, state, out)
	}
}

// testImages takes images out of the node and brings them back.
func (n *node) testImages(t *testing.T) {
	if out := n.run(t, "microk8s", "images", "list"); !strings.Contains(out, "microk8s.io/traefik:") || !regexp.MustCompile(`(?m)^microk8s\.io/coredns:\S+ .* product +1$`).MatchString(out) {
		t.Errorf("images list printed:\n%s", out)
	}
	n.run(t, "microk8s", "images", "export-local", "/web.tar", webImage)
	n.run(t, "microk8s", "ctr", "images", "rm", "--sync", webImage)
	if out, err := n.tryAll(t, "", "microk8s", "images", "export-local", "/web2.tar", webImage); err == nil || !strings.Contains(out, "is not on this node") {
		t.Errorf("exporting what is not there: %v\n%s", err, out)
	}
	archive, err := os.ReadFile(filepath.Join(n.lab.Root(n.name), "web.tar"))
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(archive)
	damaged[len(damaged)/2] ^= 1
	if out, err := n.tryAll(t, string(damaged), "microk8s", "images", "import"); exitCode(err) != 1 || !strings.Contains(out, "Error: failed to read -: it is damaged") {
		t.Errorf("a damaged archive: %v\n%s", err, out)
	}
	if out, err := n.tryAll(t, "", "microk8s", "images", "import", "/no-such-file"); exitCode(err) != 1 || !strings.Contains(out, "Error: failed to read /no-such-file") {
		t.Errorf("no archive: %v\n%s", err, out)
	}
	if out := n.runIn(t, string(archive), "microk8s", "images", "import"); !strings.Contains(out, "Pushing OCI images to "+n.ip(t)+":25000") {
		t.Errorf("images import printed %q", out)
	}
	var packed bytes.Buffer
	gz := gzip.NewWriter(&packed)
	if _, err := gz.Write(archive); err != nil || gz.Close() != nil {
		t.Fatal("cannot compress the archive")
	}
	if out := n.runIn(t, packed.String(), "microk8s", "images", "import"); !strings.Contains(out, "Imported "+webImage+" on "+n.name+"\n") {
		t.Errorf("images import of a compressed archive printed %q", out)
	}
	// Complete, and of no use on this machine.
	foreign := tarOf(t, "config.json", `{"os":"linux","architecture":"s390x","rootfs":{"type":"layers","diff_ids":[]}}`,
		"manifest.json", `[{"Config":"config.json","RepoTags":["foreign:1"],"Layers":[]}]`)
	if out, err := n.tryAll(t, foreign, "microk8s", "images", "import"); exitCode(err) != 1 || !strings.Contains(out, "docker.io/library/foreign:1 is for linux/s390x, not for linux/"+runtime.GOARCH) {
		t.Errorf("images import of an archive for another machine: %v\n%s", err, out)
	}
	n.run(t, "microk8s", "images", "import", "/web.tar")
	if out := n.run(t, "microk8s", "images", "list"); !strings.Contains(out, webImage) {
		t.Errorf("the image was not imported:\n%s", out)
	}
	n.testImportedStays(t)
}

// testImportedStays pulls the digest of an imported image by another name, of which the kubelet keeps a
// record, and uses the imported name then (docs/adr/0030).
func (n *node) testImportedStays(t *testing.T) {
	const pulled = "localhost:32000/web:1"
	n.run(t, "microk8s", "enable", "registry")
	n.run(t, "microk8s", "ctr", "images", "tag", webImage, pulled)
	n.run(t, "microk8s", "ctr", "images", "push", "--plain-http", pulled) // without a second try: it is ready
	n.run(t, "microk8s", "ctr", "images", "rm", pulled)
	n.pullPod(t, "by-another-name", pulled, "")
	n.waitPod(t, "by-another-name")
	for name, policy := range map[string]string{"imported-never": "Never", "imported-present": "IfNotPresent"} {
		n.run(t, "microk8s", "kubectl", "run", name, "--image="+webImage, "--image-pull-policy="+policy)
		n.waitPod(t, name)
	}
	n.run(t, "microk8s", "kubectl", "delete", "pod", "--wait=false", "by-another-name", "imported-never", "imported-present")
	n.run(t, "microk8s", "disable", "registry")
}

// testMetrics asks for figures about the node and its pods.
func (n *node) testMetrics(t *testing.T) {
	n.run(t, "microk8s", "enable", "metrics-server")
	n.wantAddon(t, "metrics-server", "enabled")
	eventually(t, 3*time.Minute, func() error {
		out, err := n.try(t, "microk8s", "kubectl", "top", "node", n.name)
		if err == nil && !regexp.MustCompile(`(?m)^`+n.name+` +\d+m +\d+% +\d+Mi`).MatchString(out) {
			err = fmt.Errorf("kubectl top printed %q", out)
		}
		return err
	})
	eventually(t, time.Minute, func() error {
		_, err := n.try(t, "microk8s", "kubectl", "top", "pod", "-n", "kube-system", "-l", "k8s-app=metrics-server")
		return err
	})
}

const ingress = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop}
spec:
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: web, image: "microk8s.test/web:1", imagePullPolicy: Never}
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec:
  selector: {app: shop}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: shop}
spec:
  tls: [{hosts: [shop.example.test], secretName: shop}]
  rules:
  - host: shop.example.test
    http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: old
spec:
  ingressClassName: nginx
  rules:
  - host: old.example.test
    http: {paths: [{path: /client, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}
`

const oddIngress = `
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: odd
  annotations: {nginx.ingress.kubernetes.io/mirror-target: /}
spec:
  ingressClassName: haproxy
  rules:
  - host: odd.example.test
    http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}
`

// annotatedIngress are Ingresses as charts have them: the class in the annotation, annotations of
// ingress-nginx, Traefik's kinds, and backends outside of the cluster and with HTTPS.
const annotatedIngress = `
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: by-public, annotations: {kubernetes.io/ingress.class: public, nginx.ingress.kubernetes.io/whitelist-source-range: "0.0.0.0/0,::/0"}}
spec: {rules: [{host: public.example.test, http: {paths: [{path: /client, pathType: ImplementationSpecific, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: by-nginx, annotations: {kubernetes.io/ingress.class: nginx}}
spec: {rules: [{host: nginx.example.test, http: {paths: [{path: /client, pathType: ImplementationSpecific, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: by-traefik, annotations: {kubernetes.io/ingress.class: traefik}}
spec: {rules: [{host: traefik.example.test, http: {paths: [{path: /client, pathType: ImplementationSpecific, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: rewritten
  annotations: {nginx.ingress.kubernetes.io/rewrite-target: /client, nginx.ingress.kubernetes.io/enable-cors: "true"}
spec: {ingressClassName: nginx, rules: [{host: rewritten.example.test, http: {paths: [{path: /anything, pathType: ImplementationSpecific, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: v1
kind: Secret
metadata: {name: people}
stringData: {auth: "ann:{SHA}qUqP5cyxm6YcTAhz05Hph5gvu9M=\n"}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: closed
  annotations: {nginx.ingress.kubernetes.io/auth-type: basic, nginx.ingress.kubernetes.io/auth-secret: people}
spec: {rules: [{host: closed.example.test, http: {paths: [{path: /client, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: traefik.io/v1alpha1
kind: Middleware
metadata: {name: people}
spec: {basicAuth: {secret: people}}
---
apiVersion: traefik.io/v1alpha1
kind: IngressRoute
metadata: {name: route}
spec: {entryPoints: [web], routes: [{kind: Rule, match: Host("route.example.test"), middlewares: [{name: people}], services: [{name: shop, port: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: outside}
spec: {type: ExternalName, externalName: shop.default.svc.cluster.local, ports: [{port: 80}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: outside}
spec: {rules: [{host: outside.example.test, http: {paths: [{path: /client, pathType: Prefix, backend: {service: {name: outside, port: {number: 80}}}}]}}]}
---
apiVersion: traefik.io/v1alpha1
kind: ServersTransport
metadata: {name: any}
spec: {insecureSkipVerify: true}
---
apiVersion: v1
kind: Service
metadata:
  name: kubernetes-too
  annotations: {traefik.ingress.kubernetes.io/service.serversscheme: https, traefik.ingress.kubernetes.io/service.serverstransport: default-any@kubernetescrd}
spec: {type: ExternalName, externalName: kubernetes.default.svc.cluster.local, ports: [{port: 443}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: tls-backend}
spec: {rules: [{host: backend.example.test, http: {paths: [{path: /readyz, pathType: Prefix, backend: {service: {name: kubernetes-too, port: {number: 443}}}}]}}]}
`

// testIngress routes by host name, with TLS and without.
func (n *node) testIngress(t *testing.T) {
	if out, err := n.tryAll(t, "", "microk8s", "enable", "ingress", "--default-ssl-certificate", "default/x"); exitCode(err) != 1 || !strings.Contains(out, "must be in the namespace ingress") {
		t.Errorf("a Secret elsewhere: %v\n%s", err, out)
	}
	if out := n.run(t, "microk8s", "enable", "ingress"); !strings.Contains(out, "annotations of ingress-nginx are translated") {
		t.Errorf("enable ingress printed %q", out)
	}
	n.wantAddon(t, "ingress", "enabled")
	cert, key := selfSigned(t, "shop.example.test")
	n.runIn(t, cert, "sh", "-c", "cat > /tls.crt")
	n.runIn(t, key, "sh", "-c", "cat > /tls.key")
	n.run(t, "microk8s", "kubectl", "create", "secret", "tls", "shop", "--cert=/tls.crt", "--key=/tls.key")
	n.runIn(t, ingress, "microk8s", "kubectl", "apply", "-f", "-")
	eventually(t, time.Minute, func() error { // a policy is in force a moment after it was made
		out, err := n.tryAll(t, oddIngress, "microk8s", "kubectl", "apply", "--dry-run=server", "-f", "-")
		for _, want := range []string{"its classes are public, traefik and nginx", "without effect here: nginx.ingress.kubernetes.io/mirror-target"} {
			if err != nil || !strings.Contains(out, want) {
				return fmt.Errorf("an odd Ingress: exit code %d, want %q in\n%s", exitCode(err), want, out)
			}
		}
		return nil
	})
	if out, err := n.tryAll(t, annotatedIngress, "microk8s", "kubectl", "apply", "-f", "-"); err != nil || strings.Contains(out, "this is advice") {
		t.Errorf("Ingresses as people have them: %v\n%s", err, out)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(cert))
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return n.lab.Dial(ctx, n.name, network, net.JoinHostPort(n.ip(t), port))
		},
	}}
	get := func(url string, code int, want string) {
		t.Helper()
		eventually(t, 2*time.Minute, func() error {
			resp, err := client.Get(url)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err == nil && (resp.StatusCode != code || !strings.Contains(string(body), want)) {
				err = fmt.Errorf("%s: %s, %q, want %d and %q", url, resp.Status, body, code, want)
			}
			return err
		})
	}
	get("http://shop.example.test/", 200, "shop-")
	get("https://shop.example.test/", 200, "shop-")
	get("http://other.example.test/", 404, "")
	get("http://old.example.test/client", 200, ":") // an address with its port
	for _, class := range []string{"public", "nginx", "traefik"} {
		get("http://"+class+".example.test/client", 200, ":")
	}
	get("http://rewritten.example.test/anything", 200, ":")
	get("http://closed.example.test/client", 401, "")
	get("http://ann:test@closed.example.test/client", 200, ":")
	get("http://route.example.test/", 401, "")
	get("http://ann:test@route.example.test/", 200, "shop-")
	get("http://outside.example.test/client", 200, ":")
	get("http://backend.example.test/readyz", 200, "ok")
	n.run(t, "microk8s", "disable", "ingress")
	eventually(t, time.Minute, func() error {
		resp, err := client.Get("http://shop.example.test/")
		if err != nil {
			return nil
		}
		resp.Body.Close()
		return fmt.Errorf("after disable the answer is %s", resp.Status)
	})
	n.run(t, "microk8s", "kubectl", "get", "middleware/people", "ingressroute/route") // they are the person's
	n.runIn(t, annotatedIngress, "microk8s", "kubectl", "delete", "-f", "-")
	n.run(t, "microk8s", "kubectl", "delete", "ingress/shop", "ingress/old", "service/shop", "deployment/shop", "secret/shop")
}

// selfSigned makes a certificate for a name.
func selfSigned(t *testing.T, host string) (certPEM, keyPEM string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{host}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}))
}

// testHostAccess looks for the address on the loopback.
func (n *node) testHostAccess(t *testing.T) {
	for _, args := range [][]string{{"ip=router"}, {"ip=127.0.0.1"}, {"10.0.9.1"}} {
		if out, err := n.tryAll(t, "", append([]string{"microk8s", "enable", "host-access"}, args...)...); exitCode(err) != 1 || !strings.Contains(out, "cannot enable host-access") {
			t.Errorf("enable host-access %q: %v\n%s", args, err, out)
		}
	}
	n.run(t, "microk8s", "enable", "host-access", "ip=10.0.9.1")
	if out := n.run(t, "ip", "-o", "addr", "show", "dev", "lo"); !strings.Contains(out, "10.0.9.1/32") || !strings.Contains(out, "lo:microk8s") {
		t.Errorf("the loopback has\n%s", out)
	}
	n.run(t, "ip", "addr", "del", "10.0.9.1/32", "dev", "lo")
	eventually(t, time.Minute, func() error {
		if out := n.run(t, "ip", "-o", "addr", "show", "dev", "lo"); !strings.Contains(out, "10.0.9.1/32") {
			return fmt.Errorf("it was not put back:\n%s", out)
		}
		return nil
	})
	n.run(t, "microk8s", "disable", "host-access")
	eventually(t, time.Minute, func() error {
		if out := n.run(t, "ip", "-o", "addr", "show", "dev", "lo"); strings.Contains(out, "10.0.9.1/32") {
			return fmt.Errorf("it is still there:\n%s", out)
		}
		return nil
	})
}

// tarOf makes an archive of name, content, name, content…
func tarOf(t *testing.T, files ...string) string {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := 0; i+1 < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(files[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.String()
}
