package cluster

import (
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// apiAddress is a free address of the hosts' network.
func (c *cluster) apiAddress(t *testing.T) string {
	ip := c.ip(t, "n1")
	return ip[:strings.LastIndexByte(ip, '.')+1] + "250"
}

// asksAPIAddress returns nil when an API server answers at the virtual address, asked from a host that is none of the control
// plane, with a certificate that names it.
func (c *cluster) asksAPIAddress(t *testing.T, outside string) error {
	address := c.apiAddress(t)
	conn, err := c.dialer(outside)(t.Context(), "tcp", net.JoinHostPort(address, "16443"))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true}) // the name is checked below
	if err := client.HandshakeContext(t.Context()); err != nil {
		return err
	}
	return client.ConnectionState().PeerCertificates[0].VerifyHostname(address)
}

// testAPIAddress sets the virtual address of the API.
func (c *cluster) testAPIAddress(t *testing.T, outside string) {
	if r := c.try(t, "n1", "microk8s", "network", "api-address", c.ip(t, outside)); r.code != 1 || !strings.Contains(r.err, "it is the address of node "+outside) {
		t.Errorf("the address of a node: %s", r)
	}
	c.run(t, "n1", "microk8s", "network", "api-address", c.apiAddress(t))
	eventually(t, time.Minute, func() error { return c.asksAPIAddress(t, outside) })
	eventually(t, time.Minute, func() error { // each node has it from the cluster
		for _, n := range []string{"n1", "n2", "n3"} {
			if out := c.run(t, n, "microk8s", "config"); !strings.Contains(out, "server: https://"+c.apiAddress(t)+":16443\n") {
				return fmt.Errorf("config of %s: %s", n, out)
			}
		}
		return nil
	})
	if out := c.run(t, "n2", "microk8s", "network", "api-address"); !strings.Contains(out, c.apiAddress(t)+": node n") {
		t.Errorf("it is shown as %q", out)
	}
}

// wantOneHolder wants the virtual address to be on exactly one of the nodes, and to answer.
func (c *cluster) wantOneHolder(t *testing.T, outside string, nodes ...string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		var on []string
		for _, n := range nodes {
			if out := c.run(t, n, "ip", "-o", "addr"); strings.Contains(out, " "+c.apiAddress(t)+"/32 ") {
				on = append(on, n)
			}
		}
		if len(on) != 1 {
			return fmt.Errorf("the address is on %v", on)
		}
		return c.asksAPIAddress(t, outside)
	})
}
