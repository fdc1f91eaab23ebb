package cluster

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// apiAddress is a free address of the hosts' network.
func (c *cluster) apiAddress(t *testing.T) string {
	return c.neighbour(t, "n1", "250")
}

// neighbour is an address of a host's network, of the same family as the host's.
func (c *cluster) neighbour(t *testing.T, host, last string) string {
	ip := c.ip(t, host)
	return ip[:strings.LastIndexAny(ip, ".:")+1] + last
}

// asksAPIAddress returns nil when an API server answers at the virtual address, asked from a host that is none of the control
// plane, with a certificate that names it.
func (c *cluster) asksAPIAddress(t *testing.T, outside string) error {
	address := c.apiAddress(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // a dead holder answers nothing at all
	defer cancel()
	conn, err := c.dialer(outside)(ctx, "tcp", net.JoinHostPort(address, "16443"))
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
			if out := c.run(t, n, "microk8s", "config"); !strings.Contains(out, "server: https://"+net.JoinHostPort(c.apiAddress(t), "16443")+"\n") {
				return fmt.Errorf("config of %s: %s", n, out)
			}
		}
		return nil
	})
	if out := c.run(t, "n2", "microk8s", "network", "api-address"); !strings.Contains(out, c.apiAddress(t)+": node n") {
		t.Errorf("it is shown as %q", out)
	}
}

// wantOneHolder wants the virtual address to be on exactly one of the nodes, which it returns, and to answer.
func (c *cluster) wantOneHolder(t *testing.T, outside string, nodes ...string) (holder string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		var on []string
		for _, n := range nodes {
			if out := c.run(t, n, "ip", "-o", "addr"); strings.Contains(out, " "+bits(c.apiAddress(t))+" ") {
				on = append(on, n)
			}
		}
		if len(on) != 1 {
			return fmt.Errorf("the address is on %v", on)
		}
		holder = on[0]
		return c.asksAPIAddress(t, outside)
	})
	return holder
}

// testAPIAddressMoves pulls the plug of the node that has the virtual address, and prints after what time it answers again.
func (c *cluster) testAPIAddressMoves(t *testing.T, outside string, nodes ...string) {
	holder := c.wantOneHolder(t, outside, nodes...)
	if err := c.lab.Kill(t.Context(), holder); err != nil {
		t.Fatal(err)
	}
	died := time.Now()
	eventually(t, time.Minute, func() error { return c.asksAPIAddress(t, outside) })
	t.Logf("the API's address answers %s after power loss of its holder", time.Since(died).Round(10*time.Millisecond))
	if err := c.lab.Start(t.Context(), holder); err != nil {
		t.Fatal(err)
	}
	c.waitReady(t, nodes[(slices.Index(nodes, holder)+1)%len(nodes)], holder)
	c.wantOneHolder(t, outside, nodes...)
}
