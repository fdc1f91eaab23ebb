package cluster

import (
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"

	"microk8s/internal/kubeconfig"
	"microk8s/internal/longtest"
	"microk8s/internal/pki"
	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
)

// TestUpkeep is the life of a cluster on hosts with several addresses and another agent port: nodes
// join by IPv6, by name and through a balancer, certificates are renewed, and a worker that was
// reinstalled comes back. It takes several minutes, so the gate leaves it out (scripts/test).
func TestUpkeep(t *testing.T) {
	longtest.Only(t)
	nodes := []string{"n1", "n2", "n3", "w1"}
	c := newCluster(t, append(nodes, "lb")...)
	c.port = "25555"
	step, last := steps(t), t.Cleanup
	const name = "first.example.com"
	v6 := func(i int) string { return fmt.Sprintf("fd00:77::%d", i+1) }
	step("start", func(t *testing.T) {
		for i, h := range nodes {
			c.otherPort(t, h)
			c.run(t, h, "sh", "-c", "ip addr add "+v6(i)+"/64 dev eth0 nodad; ip link add second type veth peer name other && ip link set second up && ip link set other up && "+
				fmt.Sprintf("ip addr add 192.168.77.%d/24 dev second", i+1))
		}
		c.start(t, "n1")
		c.wantAddress(t, "n1", "n1")
	})
	step("another port is not enough", func(t *testing.T) {
		if r := c.try(t, "lb", c.line(t, "n1")...); r.code != 1 || !strings.Contains(r.err, "has to be set to 25555") {
			t.Errorf("join from port 25000: %s", r)
		}
	})
	step("a control-plane node joins by IPv6", func(t *testing.T) {
		c.run(t, "n2", c.lineTo(t, "["+v6(0)+"]:25555", "n1")...)
		c.waitReady(t, "n1", "n2")
		c.wantAddress(t, "n1", "n2")
		c.wantHA(t, "n2", "no", 2)
		list, err := c.members(t, "n2")
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range list { // the first one moved to where the pods' family is
			if strings.Contains(m.Address, "[") {
				t.Errorf("the datastore is at %s", m.Address)
			}
		}
	})
	step("a worker joins by a name", func(t *testing.T) {
		c.run(t, "w1", "sh", "-c", "echo "+c.ip(t, "n1")+" "+name+" >>/etc/hosts")
		c.run(t, "w1", append(c.lineTo(t, name+":25555", "n1"), "--worker")...)
		c.waitReady(t, "n2", "w1")
		c.wantAddress(t, "n2", "w1")
	})
	step("join through a balancer", func(t *testing.T) {
		c.startBalancer(t, last, "lb", c.ip(t, "n1"), c.ip(t, "n2"))
		at := c.ip(t, "lb") + ":25555"
		c.run(t, "n3", c.lineTo(t, at, "n1")...)
		c.waitReady(t, "n1", "n3")
		c.wantAddress(t, "n1", "n3")
		c.wantHA(t, "n1", "yes", 3)
		// The node that made the token need not live.
		c.run(t, "w1", "microk8s", "leave")
		c.run(t, "n2", "microk8s", "remove-node", "w1")
		line := append(c.lineTo(t, at, "n1"), "--worker")
		if err := c.lab.Kill(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
		eventually(t, 2*time.Minute, func() error {
			if r := c.try(t, "w1", line...); r.code != 0 {
				return fmt.Errorf("join: %s", r)
			}
			return nil
		})
		c.waitReady(t, "n2", "w1")
		c.wantAddress(t, "n2", "w1")
		if err := c.lab.Start(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
		c.run(t, "n1", "ip", "addr", "add", v6(0)+"/64", "dev", "eth0", "nodad")
		c.waitReady(t, "n2", "n1")
		c.wantHA(t, "n1", "yes", 3)
	})
	step("the worker is frozen", func(t *testing.T) {
		c.testWorkerFault(t, nodes[:3], "frozen", func() error { return c.lab.Pause(t.Context(), "w1") }, func() error { return c.lab.Resume(t.Context(), "w1") })
	})
	step("the worker is cut off", func(t *testing.T) {
		c.testWorkerFault(t, nodes[:3], "cut off", func() error { return c.lab.Cut(t.Context(), "w1", "") }, func() error { return c.lab.Heal(t.Context()) })
	})
	step("certificates are renewed", func(t *testing.T) {
		for _, h := range nodes {
			c.testRenewal(t, "n1", h)
		}
		for _, h := range nodes {
			c.waitReady(t, "n2", h)
		}
		c.wantHA(t, "n3", "yes", 3)
	})
	step("the worker is installed anew", func(t *testing.T) { c.testReinstalled(t, "n1", "w1", "--worker") })
	step("a control-plane node is installed anew", func(t *testing.T) {
		c.testReinstalled(t, "n1", "n2")
		c.wantHA(t, "n1", "yes", 3)
	})
}

// otherPort makes the agent of a host on which nothing was started yet listen at the cluster's port.
func (c *cluster) otherPort(t *testing.T, host string) {
	t.Helper()
	shipped, err := os.ReadFile(filepath.Join(build, "snap/default-args/cluster-agent"))
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(shipped), ":25000", ":"+c.port, 1)
	if err := os.WriteFile(c.path(host, "args/cluster-agent"), []byte(changed), 0o660); err != nil {
		t.Fatal(err)
	}
}

// testWorkerFault does something to the worker until the cluster has noticed. The control plane does
// not mind, and afterwards the worker and who goes through its proxy are back.
func (c *cluster) testWorkerFault(t *testing.T, controlPlane []string, what string, begin, end func() error) {
	clients := map[string]*kubernetes.Clientset{"proxy": c.throughProxy(t, controlPlane[0], "w1")}
	for _, h := range controlPlane {
		clients[h] = c.client(t, h)
	}
	w := c.write(t, "worker "+what, clients)
	w.goOn(t, 20, "proxy")
	w.fault()
	if err := begin(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Minute, func() error {
		n, err := c.node(t, controlPlane[0], "w1")
		if err == nil && isReady(n) {
			err = errors.New("w1 still counts as ready")
		}
		return err
	})
	for _, h := range controlPlane {
		w.goOn(t, 50, h)
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	c.waitReady(t, controlPlane[0], "w1")
	w.goOn(t, 50, "proxy")
	c.end(t, w)
	c.wantWrites(t, controlPlane[1])
}

// testRenewal puts certificates on a node that end in a few hours, and wants it to replace and use
// new ones.
func (c *cluster) testRenewal(t *testing.T, ca, host string) {
	ours := pki.Maker{Now: func() time.Time { return time.Now().Add(-20 * time.Hour) }}
	caCert := readCert(t, c.path(ca, "certs/ca.crt"))
	caKey := readKey(t, c.path(ca, "certs/ca.key"))
	names := []string{"kubelet", "proxy"}
	if host != "w1" {
		names = append(names, "server", "client")
	}
	old := map[string]*x509.Certificate{}
	for _, name := range names {
		path, key := c.path(host, "certs/"+name+".crt"), c.path(host, "certs/"+name+".key")
		have := readCert(t, path)
		have.Subject.ExtraNames = have.Subject.Names // of a worker's, which join it is of
		der, err := ours.Issue(pki.Request{
			Subject: have.Subject, DNSNames: have.DNSNames, IPs: have.IPAddresses, Days: 1, ServerAuth: true, ClientAuth: true,
		}, readKey(t, key).Public(), caCert, caKey)
		if err != nil {
			t.Fatal(err)
		}
		if old[name], err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, pki.EncodeCert(der), 0o660); err != nil {
			t.Fatal(err)
		}
	}
	if host == "w1" { // it looks once an hour, and when it starts
		c.run(t, host, "sh", "-c", "kill $(pgrep -x cluster-agent)")
	}
	eventually(t, 2*time.Minute, func() error {
		for _, name := range names {
			if have := readCert(t, c.path(host, "certs/"+name+".crt")); have.Equal(old[name]) {
				return fmt.Errorf("%s has not renewed %s.crt", host, name)
			}
		}
		return nil
	})
	for file, name := range map[string]string{"kubelet.config": "kubelet", "proxy.config": "proxy", "client.config": "client"} {
		if _, renewed := old[name]; !renewed {
			continue
		}
		eventually(t, time.Minute, func() error {
			data, err := os.ReadFile(c.path(host, "credentials/"+file))
			if err != nil {
				return err
			}
			config, err := kubeconfig.Decode(data)
			if err != nil {
				return err
			}
			cert, err := pki.ParseCert(config.Cert)
			if err == nil && !cert.Equal(readCert(t, c.path(host, "certs/"+name+".crt"))) {
				err = fmt.Errorf("%s of %s has another certificate than %s.crt", file, host, name)
			}
			return err
		})
	}
	served := map[string]string{"10250": "kubelet"}
	if host != "w1" {
		served["16443"], served[c.port] = "server", "server"
	}
	for port, name := range served {
		eventually(t, 2*time.Minute, func() error {
			raw, err := c.lab.Dial(t.Context(), host, "tcp", net.JoinHostPort(c.ip(t, host), port))
			if err != nil {
				return err
			}
			defer raw.Close()
			conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // it is compared below
			if err := conn.HandshakeContext(t.Context()); err != nil {
				return err
			}
			if !conn.ConnectionState().PeerCertificates[0].Equal(readCert(t, c.path(host, "certs/"+name+".crt"))) {
				return fmt.Errorf("port %s of %s still has another certificate than %s.crt", port, host, name)
			}
			return nil
		})
	}
}

func readKey(t *testing.T, path string) *rsa.PrivateKey {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.ParseKey(data)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func readCert(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCert(data)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// testReinstalled replaces a worker's machine by an empty one of the same name and address, which comes back
// after one command on another node.
func (c *cluster) testReinstalled(t *testing.T, at, host string, flags ...string) {
	ip := c.ip(t, host)
	before, err := c.node(t, at, host)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.lab.Down(t.Context(), host); err != nil {
		t.Fatal(err)
	}
	labtest.Node(t, c.lab, host, lab.Options{DefaultRoute: true})
	if c.ip(t, host) != ip {
		t.Fatalf("the new %s has the address %s, and had %s", host, c.ip(t, host), ip)
	}
	c.otherPort(t, host)
	if r := c.try(t, host, c.line(t, at)...); r.code != 1 || !strings.Contains(r.err, "is in the cluster already") && !strings.Contains(r.err, "is already known") {
		t.Errorf("a join without anybody's word: %s", r)
	}
	line := append(c.line(t, at, "--name", host), flags...)
	eventually(t, 5*time.Minute, func() error { // its name is free when the old machine is silent
		n, err := c.node(t, at, host)
		if err == nil && isReady(n) {
			err = fmt.Errorf("%s still counts as ready", host)
		}
		return err
	})
	c.run(t, host, line...)
	eventually(t, 2*time.Minute, func() error {
		n, err := c.node(t, at, host)
		switch {
		case err != nil:
			return err
		case n.Status.NodeInfo.MachineID == before.Status.NodeInfo.MachineID:
			return fmt.Errorf("%s is the old machine", host)
		case !isReady(n):
			return fmt.Errorf("%s is not Ready", host)
		}
		return nil
	})
}
