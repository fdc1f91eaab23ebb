// Package apiaddress is the virtual address of the API: one address in front of the API servers of all
// control-plane nodes, on one of them at a time. Which address it is, the cluster says (a ConfigMap); each
// control-plane node keeps a copy in a file, from which certificates and `microk8s config` take it. Putting it on
// an interface and making it known to the network are here; who holds it is elected in cmd/kubelite.
package apiaddress

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

const (
	// ConfigMap of kube-system says the address under Key.
	ConfigMap = "microk8s-api-address"
	Key       = "address"
	// Lease of kube-system is the holder's.
	Lease = "microk8s-api-address"
)

// file is this node's copy. It is beside the certificates, whose keeper watches that folder.
func file(env snapenv.Env) string { return env.Cert("api-address") }

// Read returns the address of this node's cluster; it is not valid where there is none.
func Read(env snapenv.Env) netip.Addr {
	data, err := os.ReadFile(file(env))
	if err != nil {
		return netip.Addr{}
	}
	addr, _ := Parse(strings.TrimSpace(string(data)))
	return addr
}

// Keep writes this node's copy; one that is not valid removes it.
func Keep(env snapenv.Env, addr netip.Addr) error {
	if !addr.IsValid() {
		if err := os.Remove(file(env)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if Read(env) == addr {
		return nil
	}
	return atomicfile.Write(file(env), []byte(addr.String()+"\n"), 0o644, nil)
}

// Parse reads an address that hosts of a network can have.
func Parse(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is not an address", text)
	}
	addr = addr.Unmap()
	if !addr.IsGlobalUnicast() {
		return netip.Addr{}, fmt.Errorf("%s cannot be the address of a host", addr)
	}
	return addr, nil
}

// Apart returns a list of a host's addresses without that of the API, and the latter alone, if the cluster has one.
func Apart(env snapenv.Env, list []net.IP) (own, shared []net.IP) {
	addr := Read(env)
	if !addr.IsValid() {
		return list, nil
	}
	ip := net.IP(addr.AsSlice())
	for _, have := range list {
		if !have.Equal(ip) {
			own = append(own, have)
		}
	}
	return own, []net.IP{ip}
}
