package hostnet

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"microk8s/internal/snapenv"
)

// Pod is a pod of this node that has an address of the pod network, as the CNI library wrote it down when it
// was connected (libcni, cachedInfo). Pods in the host's network have none.
type Pod struct {
	Sandbox string // ID of the pod's sandbox in containerd
	File    string // what this was read from; it goes when the pod is disconnected

	netns     string // path of the pod's network namespace
	ifName    string // of the interface in it
	hostEnd   string // name of the interface's other end, on the bridge
	bridgeMAC string
	addresses []netip.Prefix

	config   json.RawMessage // the CNI configuration in force at that time
	result   json.RawMessage
	portMaps json.RawMessage // host ports, nil without
}

// resultsDir is where the CNI library keeps what it did.
func resultsDir(env snapenv.Env) string { return env.HostPath("var/lib/cni/results") }

// Pods lists the pods of the built-in network. What cannot be read is left out: the library writes its files in place.
func Pods(env snapenv.Env) []Pod {
	files, _ := filepath.Glob(filepath.Join(resultsDir(env), NetworkName+"-*"))
	var out []Pod
	for _, file := range files {
		if p, ok := readPod(file); ok {
			out = append(out, p)
		}
	}
	return out
}

func readPod(file string) (p Pod, ok bool) {
	data, err := os.ReadFile(file)
	if err != nil {
		return p, false
	}
	var cached struct {
		ContainerID, NetworkName, IfName, NetNS string
		Config                                  []byte // base64
		Result                                  json.RawMessage
		CapabilityArgs                          struct {
			PortMappings json.RawMessage
		}
	}
	var result struct {
		Interfaces []struct{ Name, MAC, Sandbox string }
		IPs        []struct{ Address netip.Prefix }
	}
	if json.Unmarshal(data, &cached) != nil || cached.NetworkName != NetworkName || json.Unmarshal(cached.Result, &result) != nil {
		return p, false
	}
	p = Pod{
		Sandbox: cached.ContainerID, File: file, netns: cached.NetNS, ifName: cached.IfName,
		config: cached.Config, result: cached.Result, portMaps: cached.CapabilityArgs.PortMappings,
	}
	for _, i := range result.Interfaces {
		switch {
		case i.Sandbox != "":
		case i.Name == Bridge:
			p.bridgeMAC = i.MAC
		default:
			p.hostEnd = i.Name
		}
	}
	for _, a := range result.IPs {
		p.addresses = append(p.addresses, a.Address)
	}
	return p, p.Sandbox != ""
}

// Outside reports whether a pod has an address outside of the node's subnets: nobody routes to it any more.
func (p Pod) Outside(subnets []netip.Prefix) bool {
	return slices.ContainsFunc(p.addresses, func(a netip.Prefix) bool {
		return !slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return s.Contains(a.Addr()) })
	})
}
