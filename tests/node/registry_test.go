package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
	"microk8s/tests/lab"
)

const (
	registryHost = "registry.example.test" // with a mirror on port 5000, and a private one on 5001
	registryUser = "me:letmein"
	// registryUsers is its htpasswd file.
	registryUsers = "me:$2a$05$y40GmScWckUfV3/5qU4oZeXzm5h1q0HRdtsIVkLKwr4cooMo4kSjC\n"
)

// TestRegistries has containerd pull from registries of the user's own, which are on another
// host: the program is the one of the addon.
func TestRegistries(t *testing.T) {
	longtest.Only(t)
	n := newNode(t, "registries")
	step := n.steps(t)
	ca := n.startRegistries(t, "registries")

	step("a mirror in the launch configuration", func(t *testing.T) {
		text := fmt.Sprintf(`version: 0.2.0
extraConfigFiles:
  mirror-ca.crt: |
    %s
containerdRegistryConfigs:
  docker.io: |
    server = "https://registry-1.docker.io"
    [host."https://%s:5000"]
    capabilities = ["pull", "resolve"]
    ca = "/var/snap/microk8s/current/args/mirror-ca.crt"
`, strings.ReplaceAll(strings.TrimSpace(ca), "\n", "\n    "), registryHost)
		n.runIn(t, text, "sh", "-c", "mkdir -p /var/snap/microk8s/common/etc/launcher && cat > /var/snap/microk8s/common/etc/launcher/install.yaml")
		n.run(t, "microk8s", "start")
		n.connect(t)
		n.waitReady(t)
		n.loadWebImage(t)
		const name = registryHost + ":5001/app/thing:1"
		n.run(t, "microk8s", "ctr", "images", "tag", webImage, name)
		n.run(t, "microk8s", "ctr", "images", "push", "--local", "--skip-verify", "--user", registryUser, name)
		n.run(t, "microk8s", "ctr", "images", "rm", name)
		n.pullPod(t, "mirrored", "app/thing:1", "")
		n.waitPod(t, "mirrored")
	})
	step("a private registry, without a restart", func(t *testing.T) {
		const name = registryHost + ":5001"
		n.runIn(t, fmt.Sprintf("[host.\"https://%s\"]\nca = \"/var/snap/microk8s/current/args/mirror-ca.crt\"\n", name),
			"sh", "-c", "mkdir -p /var/snap/microk8s/current/args/certs.d/"+name+" && cat > /var/snap/microk8s/current/args/certs.d/"+name+"/hosts.toml")
		n.pullPod(t, "stranger", name+"/app/thing:1", "")
		n.waitEvent(t, "stranger", "no basic auth credentials")
		user, password, _ := strings.Cut(registryUser, ":")
		n.run(t, "microk8s", "kubectl", "create", "secret", "docker-registry", "mine",
			"--docker-server="+name, "--docker-username="+user, "--docker-password="+password)
		n.pullPod(t, "friend", name+"/app/thing:1", "mine")
		n.waitPod(t, "friend")
	})
	step("a push to an addon without room", func(t *testing.T) {
		n.run(t, "sh", "-c", "mkdir -p /mnt/small && mount -t tmpfs -o size=1m none /mnt/small")
		n.run(t, "microk8s", "enable", "hostpath-storage", "--pv-dir=/mnt/small")
		n.runIn(t, `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: small}
provisioner: microk8s.io/hostpath
parameters: {pvDir: /mnt/small}
volumeBindingMode: WaitForFirstConsumer
`, "microk8s", "kubectl", "apply", "-f", "-")
		n.run(t, "microk8s", "enable", "registry", "--storageclass=small")
		n.run(t, "microk8s", "ctr", "images", "tag", webImage, "localhost:32000/web:1")
		eventually(t, time.Minute, func() error {
			out, err := n.tryAll(t, "", "microk8s", "ctr", "images", "push", "--plain-http", "localhost:32000/web:1")
			if exitCode(err) != 1 || !strings.Contains(out, "507 Insufficient Storage\nunknown: the disk of the registry is full") {
				return fmt.Errorf("push: exit code %d\n%s", exitCode(err), out)
			}
			return nil
		})
		if out := n.run(t, "sh", "-c", "find /mnt/small -path '*_uploads*' -name data"); out != "" {
			t.Errorf("of the failed push are left:\n%s", out)
		}
	})
}

// pullPod makes a pod whose image is to be pulled, with the credentials of a Secret unless it
// is "".
func (n *node) pullPod(t *testing.T, name, image, secret string) {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: ptr(int64(1)),
			Containers:                    []corev1.Container{{Name: "web", Image: image, ImagePullPolicy: corev1.PullAlways}},
		},
	}
	if secret != "" {
		pod.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: secret}}
	}
	eventually(t, time.Minute, func() error { // the service account may not be there yet
		_, err := n.client.CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{})
		return err
	})
}

// startRegistries runs two registries over one store on another host, which the node knows as
// registryHost, and gives the certificate of their CA.
func (n *node) startRegistries(t *testing.T, host string) (ca string) {
	t.Helper()
	ip, err := n.lab.IP(host)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(build, "components/bin/registry"))
	if err != nil {
		t.Fatal(err)
	}
	cert, key := selfSigned(t, registryHost)
	config := `version: 0.1
storage: {filesystem: {rootdirectory: /store}}
http: {addr: ":%d", tls: {certificate: /tls.crt, key: /tls.key}}
%s`
	for file, data := range map[string]string{
		"registry": string(program), "tls.crt": cert, "tls.key": key, "users": registryUsers,
		"open.yml":    fmt.Sprintf(config, 5000, ""),
		"private.yml": fmt.Sprintf(config, 5001, "auth: {htpasswd: {realm: test, path: /users}}\n"),
	} {
		if err := os.WriteFile(filepath.Join(n.lab.Root(host), file), []byte(data), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, config := range []string{"/open.yml", "/private.yml"} {
		cmd, err := n.lab.Spawn(t.Context(), host, lab.Command{Args: []string{"env", "OTEL_TRACES_EXPORTER=none", "/registry", "serve", config}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	}
	n.run(t, "sh", "-c", "echo "+ip+" "+registryHost+" >> /etc/hosts")
	return cert
}
