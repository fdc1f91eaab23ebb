package cluster

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/args"
	"microk8s/internal/pki"
	"microk8s/tests/lab"
)

// balancerName is a name that only the certificate knows.
const balancerName = "k8s.example.com"

// TestEtcdBehindBalancer has two control-plane nodes on an etcd of three members, and HAProxy with
// the configuration of docs/loadbalancer.md in front, through which clients write while a member
// and a node die.
func TestEtcdBehindBalancer(t *testing.T) {
	for _, need := range []string{"peers/etcd", "haproxy/haproxy"} {
		if _, err := os.Stat(filepath.Join(build, need)); err != nil {
			t.Fatalf("%v; run `make peers` first", err)
		}
	}
	c := newCluster(t, "n1", "n2", "w1", "lb")
	step, last := steps(t), t.Cleanup
	var etcd *etcdCluster
	step("etcd on the first node", func(t *testing.T) {
		etcd = c.startEtcd(t, last, "lb")
		c.start(t, "n1")
		c.useEtcd(t, "n1", etcd)
		c.mark(t, "n1", "etcd")
		c.wantStatus(t, "n1", etcd.addresses...)
		if r := c.try(t, "n1", "pgrep", "-x", "k8s-dqlite"); r.code != 1 {
			t.Errorf("the built-in datastore runs beside: %s", r)
		}
	})
	step("join", func(t *testing.T) {
		c.join(t, "n1", "n2")
		c.waitReady(t, "n1", "n2")
		c.wantMark(t, "n2", "etcd")
		c.wantNodes(t, "n2", "n1", "n2")
		c.wantStatus(t, "n2", etcd.addresses...)
		if st, err := os.Stat(c.path("n2", "certs/remote-etcd.key")); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("the etcd's client key: %v, %v", st, err)
		}
	})
	step("balancer", func(t *testing.T) {
		for _, host := range []string{"n1", "n2"} {
			c.addNames(t, host, c.ip(t, "lb"))
		}
		c.startBalancer(t, last, "lb", c.ip(t, "n1"), c.ip(t, "n2"))
		for _, at := range []string{c.ip(t, "lb") + ":6443", c.ip(t, "lb") + ":16443"} {
			for _, name := range []string{"", balancerName} { // "": the address
				k := c.through(t, "n1", at, name)
				eventually(t, time.Minute, func() error { // every certificate has the names now
					for range 4 {
						if _, err := k().CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{}); err != nil {
							return fmt.Errorf("at %s as %q: %w", at, name, err)
						}
					}
					return nil
				})
			}
		}
	})
	step("join through it", func(t *testing.T) {
		c.run(t, "w1", append(c.lineTo(t, c.ip(t, "lb")+":25000", "n1"), "--worker")...)
		c.waitReady(t, "n2", "w1")
		c.wantAddress(t, "n2", "w1")
	})
	step("ingress", func(t *testing.T) {
		c.webOnPort80(t, "n1", "n1", "n2")
		eventually(t, 2*time.Minute, func() error {
			_, err := c.httpGet("lb", "http://"+c.ip(t, "lb")+"/")
			return err
		})
	})
	step("an etcd member and a node die", func(t *testing.T) {
		w := c.write(t, "balanced", map[string]*kubernetes.Clientset{"balancer": c.through(t, "n1", c.ip(t, "lb")+":6443", balancerName)()})
		w.goOn(t, 20, "")
		w.fault()
		etcd.kill(1)
		w.goOn(t, 20, "")
		if err := c.lab.Kill(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
		w.goOn(t, 20, "")
		eventually(t, time.Minute, func() error {
			_, err := c.httpGet("lb", "http://"+c.ip(t, "lb")+"/")
			return err
		})
		if err := c.lab.Start(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
		c.waitReady(t, "n1", "n1")
		w.goOn(t, 20, "")
		c.end(t, w)
		c.wantWrites(t, "n2")
	})
	step("leave", func(t *testing.T) {
		for _, host := range []string{"n2", "n1"} { // n1 had the etcd first
			c.run(t, host, "microk8s", "leave")
			if host == "n2" {
				c.run(t, "n1", "microk8s", "remove-node", "n2")
				c.wantNodes(t, "n1", "n1", "w1")
			}
			c.waitReady(t, host, host)
			c.wantMark(t, host, "")
			if out := c.run(t, host, "microk8s", "status", "--wait-ready", "--timeout", "120"); !strings.Contains(out, "datastore master nodes: 127.0.0.1:19001") {
				t.Errorf("status of %s after leaving: %s", host, out)
			}
			for _, name := range []string{"remote-etcd-ca.crt", "remote-etcd.crt", "remote-etcd.key"} {
				if _, err := os.Stat(c.path(host, "certs/"+name)); err == nil {
					t.Errorf("%s still has %s", host, name)
				}
			}
			data, err := os.ReadFile(c.path(host, "args/kube-apiserver"))
			if err != nil || strings.Contains(string(data), "--etcd-cafile") {
				t.Errorf("arguments of %s: %v\n%s", host, err, data)
			}
		}
	})
}

// wantAddress checks that the others know a node by its own address.
func (c *cluster) wantAddress(t *testing.T, at, host string) {
	t.Helper()
	n, err := c.node(t, at, host)
	if err != nil {
		t.Fatal(err)
	}
	if len(n.Status.Addresses) == 0 || n.Status.Addresses[0].Address != c.ip(t, host) {
		t.Errorf("%s has the addresses %v, want %s", host, n.Status.Addresses, c.ip(t, host))
	}
}

// etcdCluster is an etcd of three members on one host.
type etcdCluster struct {
	addresses     []string
	ca, cert, key []byte
	members       []*exec.Cmd
}

func (e *etcdCluster) kill(i int) { _ = e.members[i].Process.Kill() }

// startEtcd starts the members, which want clients to have a certificate.
func (c *cluster) startEtcd(t *testing.T, last func(func()), host string) *etcdCluster {
	t.Helper()
	e := &etcdCluster{}
	var maker pki.Maker
	caKey, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	caDER, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "etcd-ca"}, Days: 2, CA: true}, caKey.Public(), nil, caKey)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(req pki.Request) (cert, key []byte) {
		k, err := maker.Key(2048)
		if err != nil {
			t.Fatal(err)
		}
		req.Days = 1
		der, err := maker.Issue(req, k.Public(), ca, caKey)
		if err != nil {
			t.Fatal(err)
		}
		return pki.EncodeCert(der), pki.EncodeKey(k)
	}
	ip := c.ip(t, host)
	e.ca = pki.EncodeCert(caDER)
	e.cert, e.key = issue(pki.Request{Subject: pkix.Name{CommonName: "kube-apiserver"}, ClientAuth: true})
	cert, key := issue(pki.Request{Subject: pkix.Name{CommonName: "etcd"}, IPs: []net.IP{net.ParseIP(ip), net.IPv4(127, 0, 0, 1)}, ServerAuth: true, ClientAuth: true})
	dir := filepath.Join(c.lab.Root(host), "opt/etcd")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(build, "peers/etcd"))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"ca.crt": e.ca, "server.crt": cert, "server.key": key, "etcd": program} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var initial []string
	for i := range 3 {
		initial = append(initial, fmt.Sprintf("m%d=http://127.0.0.1:%d", i, 2390+i))
		e.addresses = append(e.addresses, fmt.Sprintf("%s:%d", ip, 2379+i))
	}
	for i, address := range e.addresses {
		peer := fmt.Sprintf("http://127.0.0.1:%d", 2390+i)
		e.members = append(e.members, c.spawn(t, last, host, fmt.Sprintf("etcd-m%d", i), "/opt/etcd/etcd",
			fmt.Sprintf("--name=m%d", i), fmt.Sprintf("--data-dir=/var/lib/etcd-m%d", i),
			"--listen-client-urls=https://"+address, "--advertise-client-urls=https://"+address,
			"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster="+strings.Join(initial, ","),
			"--cert-file=/opt/etcd/server.crt", "--key-file=/opt/etcd/server.key", "--trusted-ca-file=/opt/etcd/ca.crt", "--client-cert-auth"))
	}
	return e
}

// spawn runs a program in a host until last, the Cleanup of the whole test, with its output in
// the host's /var/log.
func (c *cluster) spawn(t *testing.T, last func(func()), host, name string, argv ...string) *exec.Cmd {
	t.Helper()
	log, err := os.Create(filepath.Join(c.lab.Root(host), "var/log", "microk8s-test-"+name+".log"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	cmd, err := c.lab.Spawn(ctx, host, lab.Command{Args: argv, Stdout: log, Stderr: log})
	if err != nil {
		cancel()
		log.Close()
		t.Fatal(err)
	}
	last(func() {
		cancel()
		_ = cmd.Wait()
		log.Close()
	})
	return cmd
}

// useEtcd does what docs/loadbalancer.md says.
func (c *cluster) useEtcd(t *testing.T, host string, e *etcdCluster) {
	t.Helper()
	for name, data := range map[string][]byte{"remote-etcd-ca.crt": e.ca, "remote-etcd.crt": e.cert, "remote-etcd.key": e.key} {
		if err := os.WriteFile(c.path(host, "certs/"+name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := c.path(host, "args/kube-apiserver")
	f, err := args.Load(path, args.GrammarFor("kube-apiserver"))
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range [][2]string{
		{"etcd-servers", "https://" + strings.Join(e.addresses, ",https://")},
		{"etcd-cafile", "${SNAP_DATA}/certs/remote-etcd-ca.crt"},
		{"etcd-certfile", "${SNAP_DATA}/certs/remote-etcd.crt"},
		{"etcd-keyfile", "${SNAP_DATA}/certs/remote-etcd.key"},
	} {
		if err := f.Set(flag[0], flag[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Save(path); err != nil {
		t.Fatal(err)
	}
	c.run(t, host, "microk8s", "stop")
	c.start(t, host)
}

// wantStatus wants status to name the etcd, and nothing of the built-in datastore.
func (c *cluster) wantStatus(t *testing.T, host string, addresses ...string) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		r := c.try(t, host, "microk8s", "status")
		want := "  datastore endpoints:\n    " + strings.Join(addresses, "\n    ") + "\n"
		if r.code != 0 || !strings.Contains(r.out, want) || strings.Contains(r.out, "high-availability") {
			return fmt.Errorf("want %q: %s", want, r)
		}
		return nil
	})
}

// addNames puts the balancer into a node's certificate.
func (c *cluster) addNames(t *testing.T, host, ip string) {
	t.Helper()
	path := c.path(host, "certs/csr.conf.template")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const at = "[ alt_names ]\n"
	changed := strings.Replace(string(text), at, at+"DNS.6 = "+balancerName+"\nIP.3 = "+ip+"\n", 1)
	if changed == string(text) {
		t.Fatalf("no %q in:\n%s", at, text)
	}
	if err := os.WriteFile(path, []byte(changed), 0o660); err != nil {
		t.Fatal(err)
	}
}

// documented returns the haproxy.cfg of the documentation.
func documented(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("../../docs/loadbalancer.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	in := false
	for line := range strings.Lines(string(data)) {
		if line == "    global\n" {
			in = true
		}
		code, indented := strings.CutPrefix(line, "    ")
		if in && !indented && line != "\n" {
			break
		}
		if in {
			out = append(out, code)
		}
	}
	if len(out) < 30 {
		t.Fatalf("docs/loadbalancer.md has no haproxy.cfg: %q", out)
	}
	return strings.Join(out, "")
}

// startBalancer runs HAProxy with the documented configuration in front of two nodes.
func (c *cluster) startBalancer(t *testing.T, last func(func()), host, first, second string) {
	t.Helper()
	root := c.lab.Root(host)
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", filepath.Join(build, "haproxy"), filepath.Join(root, "opt/haproxy")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var lines []string
	for line := range strings.Lines(documented(t)) {
		if !strings.Contains(line, "10.0.0.3") {
			lines = append(lines, strings.NewReplacer("10.0.0.1:", first+":", "10.0.0.2:", second+":").Replace(strings.Replace(line, ":25000", ":"+c.port, 1)))
		}
	}
	if err := os.WriteFile(filepath.Join(root, "etc/haproxy.cfg"), []byte(strings.Join(lines, "")), 0o644); err != nil {
		t.Fatal(err)
	}
	c.run(t, host, "/opt/haproxy/haproxy", "-c", "-f", "/etc/haproxy.cfg")
	c.spawn(t, last, host, "haproxy", "/opt/haproxy/haproxy", "-db", "-f", "/etc/haproxy.cfg")
	eventually(t, time.Minute, func() error {
		conn, err := c.lab.Dial(t.Context(), host, "tcp", net.JoinHostPort(c.ip(t, host), c.port))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
}

// through returns clients that reach the API servers at an address, each with a connection of its
// own, and check the certificate for a name, or with "" for the address.
func (c *cluster) through(t *testing.T, credentials, address, name string) func() *kubernetes.Clientset {
	t.Helper()
	data, err := os.ReadFile(c.path(credentials, "credentials/client.config"))
	if err != nil {
		t.Fatal(err)
	}
	return func() *kubernetes.Clientset {
		cfg, err := clientcmd.RESTConfigFromKubeConfig(data)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Host, cfg.ServerName = "https://"+address, name
		cfg.QPS, cfg.Timeout = -1, 5*time.Second
		cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			return c.lab.Dial(ctx, "lb", network, address)
		}
		k, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
}

// webOnPort80 runs the test's web server on port 80 of some nodes, as an ingress controller does.
func (c *cluster) webOnPort80(t *testing.T, at string, nodes ...string) {
	t.Helper()
	for _, n := range nodes {
		c.loadWebImage(t, n)
	}
	labels := map[string]string{"app": "edge"}
	_, err := c.client(t, at).AppsV1().DaemonSets("default").Create(t.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "edge"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{
					Name: "web", Image: webImage, ImagePullPolicy: corev1.PullNever,
					Ports: []corev1.ContainerPort{{ContainerPort: 8080, HostPort: 80}},
				}}},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}
