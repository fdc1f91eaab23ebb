package node

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
)

// TestUpgradeOfAddons starts a node with newer definitions of its enabled addons: every pod is
// renewed, and data and arguments of the user are what they were.
func TestUpgradeOfAddons(t *testing.T) {
	longtest.Only(t)
	labtest.NeedRoot(t)
	// The tree that the host sees is one of the test's own, whose files it replaces.
	snap, err := os.MkdirTemp(build, "upgraded-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(snap) }) // runs after the lab is gone
	if out, err := exec.CommandContext(t.Context(), "cp", "-al", filepath.Join(build, "snap")+"/.", snap).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	n := &node{name: "n1", lab: labtest.New(t, snap)}
	labtest.Node(t, n.lab, n.name, lab.Options{})
	step := n.steps(t)
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.waitReady(t)
	n.loadWebImage(t)

	cert, key := selfSigned(t, "shop.example.test")
	const image = "localhost:32000/web:1"
	step("addons with arguments and data", func(t *testing.T) {
		n.runIn(t, cert, "sh", "-c", "cat > /tls.crt")
		n.runIn(t, key, "sh", "-c", "cat > /tls.key")
		for _, args := range []string{
			"enable dns 192.0.2.53", "enable hostpath-storage --reclaim-policy=Retain", "enable registry --size=21Gi", "enable metrics-server",
			"kubectl create namespace ingress", "kubectl create secret tls -n ingress own --cert=/tls.crt --key=/tls.key",
			"enable ingress --default-ssl-certificate ingress/own",
			"kubectl create configmap -n kube-system coredns-custom --from-literal=mine.override=#mine",
			"addons import " + n.packOf(t, "cert-manager"), "enable cert-manager",
		} {
			n.run(t, append([]string{"microk8s"}, strings.Fields(args)...)...)
		}
		n.issue(t, "self-signed", "web-tls")
		n.runIn(t, statefulSet, "microk8s", "kubectl", "apply", "-f", "-")
		n.waitPod(t, "db-0")
		n.run(t, "microk8s", "kubectl", "exec", "db-0", "--", "/web", "write", "/data/file", "kept")
		n.run(t, "microk8s", "ctr", "images", "tag", webImage, image)
		eventually(t, time.Minute, func() error {
			out, err := n.tryAll(t, "", "microk8s", "ctr", "images", "push", "--plain-http", image)
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		})
	})
	step("newer definitions", func(t *testing.T) {
		n.run(t, "microk8s", "stop")
		newerAddons(t, snap)
		n.run(t, "microk8s", "start")
		n.connect(t)
		n.waitReady(t)
		eventually(t, 3*time.Minute, func() error { return n.allNew(t) })
	})
	step("data and arguments are kept", func(t *testing.T) {
		for want, args := range map[string]string{
			"192.0.2.53": "get configmap -n kube-system coredns -o jsonpath={.data.Corefile}",
			"#mine":      "get configmap -n kube-system coredns-custom -o jsonpath={.data}",
			"Retain":     "get storageclass microk8s-hostpath -o jsonpath={.reclaimPolicy}",
			"21Gi":       "get pvc -n container-registry registry-claim -o jsonpath={.spec.resources.requests.storage}",
			`"9.`:        "get configmap -n kube-system microk8s-addon-registry -o jsonpath={.data.record}",
		} {
			if out := n.run(t, append([]string{"microk8s", "kubectl"}, strings.Fields(args)...)...); !strings.Contains(out, want) {
				t.Errorf("%s: %q, want %s in it", args, out, want)
			}
		}
		n.run(t, "microk8s", "kubectl", "delete", "secret", "web-tls")
		n.waitCertificate(t, "web-tls") // it is issued again
		n.waitPod(t, "db-0")
		if out := n.run(t, "microk8s", "kubectl", "exec", "db-0", "--", "/web", "cat", "/data/file"); strings.TrimSpace(out) != "kept" {
			t.Errorf("the volume has %q", out)
		}
		n.run(t, "microk8s", "ctr", "images", "rm", image)
		n.pullPod(t, "pulled", image, "")
		n.waitPod(t, "pulled")
		eventually(t, time.Minute, func() error { return n.servesCertificate(t, cert) })
		eventually(t, 3*time.Minute, func() error {
			_, err := n.try(t, "microk8s", "kubectl", "top", "node", n.name)
			return err
		})
	})
}

// newerAddons gives every container of the core addons a field that it has not got, and every
// addon a higher version.
func newerAddons(t *testing.T, snap string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(snap, "addons/core/addons/*/*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	replace := func(file, old, with string) {
		data, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(data, []byte(old)) {
			t.Fatalf("%s has no %q: %v", file, old, err)
		}
		// Another file under the name: the content of this one is also build's.
		err = errors.Join(os.Remove(file), os.WriteFile(file, bytes.ReplaceAll(data, []byte(old), []byte(with)), 0o644))
		if err != nil {
			t.Fatal(err)
		}
	}
	const common = "        terminationMessagePolicy: FallbackToLogsOnError\n"
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil && !bytes.Contains(data, []byte("\n      containers:\n")) {
			continue // no pods
		}
		replace(file, common, common+"        workingDir: /newer\n")
	}
	replace(filepath.Join(snap, "addons/core/addons.yaml"), `version: "`, `version: "9.`)
}

// allNew reports whether every pod of an addon is one of the newer definition, and ready.
func (n *node) allNew(t *testing.T) error {
	pods, err := n.client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		return err
	}
	found := 0
	for _, p := range pods.Items {
		if p.Namespace == metav1.NamespaceDefault {
			continue
		}
		ready := 0
		for _, s := range p.Status.ContainerStatuses {
			if s.Ready {
				ready++
			}
		}
		if p.DeletionTimestamp != nil || p.Spec.Containers[0].WorkingDir != "/newer" || ready != len(p.Spec.Containers) {
			return fmt.Errorf("pod %s of the earlier version, or not ready: %s", p.Name, p.Status.Phase)
		}
		found++
	}
	if found < 9 { // coredns, provisioner, registry and its forwarder, metrics-server, traefik, three of cert-manager
		return fmt.Errorf("%d pods of addons", found)
	}
	return nil
}

// servesCertificate checks that a host without a certificate of its own gets this one.
func (n *node) servesCertificate(t *testing.T, cert string) error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(cert))
	conn, err := n.lab.Dial(t.Context(), n.name, "tcp", n.ip(t)+":443")
	if err != nil {
		return err
	}
	defer conn.Close()
	// It is for shop.example.test; a request without a name gets the default certificate.
	client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	if err := client.HandshakeContext(t.Context()); err != nil {
		return err
	}
	_, err = client.ConnectionState().PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: "shop.example.test"})
	return err
}
