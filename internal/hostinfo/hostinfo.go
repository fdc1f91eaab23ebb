// Package hostinfo knows facts about the host: its name and its addresses. What the host can
// and cannot do is internal/hostprobe; which name the node has is internal/nodeconfig.
package hostinfo

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
)

// podInterfaces have addresses of the pod network, under which nobody reaches the host.
var podInterfaces = []string{"vxlan.calico", "flannel.1", "flannel-v6.1", "cni0", "ovn0"}

// Hostname returns the host's name as the kernel has it.
func Hostname() (string, error) {
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("cannot find out the host's name: %w", err)
	}
	return name, nil
}

// Addresses returns those under which other machines reach this one: of all interfaces that are
// up, without loopback, link-local ones and the pod network's. The order is the kernel's.
func Addresses() ([]net.IP, error) { return addresses(0) }

// Joinable returns those of [Addresses] that other machines may be told to join at: without the ones that the host keeps on
// its loopback interface for itself, such as that of the addon host-access.
func Joinable() ([]net.IP, error) { return addresses(net.FlagLoopback) }

func addresses(without net.Flags) ([]net.IP, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("cannot list the host's addresses: %w", err)
	}
	var ips []net.IP
	for _, i := range interfaces {
		if i.Flags&net.FlagUp == 0 || i.Flags&without != 0 || slices.Contains(podInterfaces, i.Name) || strings.HasPrefix(i.Name, "cali") {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue // the interface went away
		}
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if ok && !n.IP.IsLoopback() && n.IP.IsGlobalUnicast() {
				ips = append(ips, n.IP)
			}
		}
	}
	return ips, nil
}
