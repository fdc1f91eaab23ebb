package status

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// PortProblem is a TCP port that a service of ours needs and a program holds.
type PortProblem struct {
	Problem
	Port    int
	Owner   string // who holds it, as "nginx (pid 12)"; "" where that cannot be seen
	service string
	inode   uint32 // of the listening socket
}

// port is a TCP port that a service listens on (cli.md 6.8).
type port struct {
	number  int
	service string
}

// neededPorts lists the ports of this node's services, with what the argument files change.
func neededPorts(env snapenv.Env) []port {
	c := nodeconfig.Load(env)
	all := []port{{10250, service.Kubelite}, {c.AgentPort, service.ClusterAgent}}
	if c.Worker {
		return append(all, port{nodeconfig.DefaultAPIServerPort, service.Proxy})
	}
	all = append(all, port{c.APIServer.Port, service.Kubelite}, port{10257, service.Kubelite}, port{10259, service.Kubelite})
	if c.Datastore.Own() {
		all = append(all, port{c.Datastore.Port, service.Datastore})
	}
	return all
}

// busyPorts lists the needed ports on which something listens that is not a process of the
// service itself, as far as our supervisor's records say; where there is none the caller knows.
func busyPorts(env snapenv.Env) []PortProblem {
	busy, own := listeners(), service.Alive(env)
	var out []PortProblem
	for _, p := range neededPorts(env) {
		if inode, ok := busy[p.number]; ok && !slices.Contains(own, p.service) {
			out = append(out, PortProblem{Port: p.number, service: p.service, inode: inode})
		}
	}
	return out
}

// describe finds out who holds the port. It looks at every open file of the machine, so it is
// for ports that are a problem only.
func (p PortProblem) describe() PortProblem {
	p.Owner = socketOwner(p.inode)
	by := p.Owner
	if by == "" {
		by = "another program"
	}
	p.Problem = Problem{
		ID:   "ports.busy",
		What: fmt.Sprintf("port %d, which %s needs, is in use by %s", p.Port, p.service, by),
		Do:   "stop that program and run microk8s start",
	}
	return p
}

// PortsInUse lists the ports that services not in running need and other programs hold.
func PortsInUse(env snapenv.Env, running []string) []PortProblem {
	var out []PortProblem
	for _, p := range busyPorts(env) {
		if !slices.Contains(running, p.service) {
			out = append(out, p.describe())
		}
	}
	return out
}

// listeners maps the listening TCP ports of this network namespace to their socket inodes, as the
// kernel returns them (sock_diag(7)). A kernel without that interface has none: then the service itself
// reports the port.
func listeners() map[int]uint32 {
	out := map[int]uint32{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, _ := netlink.SocketDiagTCP(family)
		for _, s := range sockets {
			if s.State == netlink.TCP_LISTEN {
				out[int(s.ID.SourcePort)] = s.INode
			}
		}
	}
	return out
}

// socketOwner names the process that has a socket, as "nginx (pid 12)"; "" where it cannot be
// seen.
func socketOwner(inode uint32) string {
	want := fmt.Sprintf("socket:[%d]", inode)
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && target == want {
			pid := strings.Split(link, "/")[2]
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
		}
	}
	return ""
}
