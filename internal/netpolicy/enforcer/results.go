package enforcer

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"microk8s/internal/hostnet"
	"microk8s/internal/snapenv"
)

// resultsDir is where the CNI library, in containerd, keeps what it did for each pod, from the end
// of ADD to the end of DEL.
func resultsDir(env snapenv.Env) string { return env.HostPath("var/lib/cni/results") }

// makeDirectory makes the directory as the CNI library does, so that it can be watched before it
// is used.
func makeDirectory(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("cannot watch what the CNI does: %w", err)
	}
	return nil
}

// results returns the addresses of the pods on this host, by the UIDs under which the kubelet runs
// them. Files that are being written are left out; their end is another event.
func results(env snapenv.Env) map[string][]netip.Addr {
	files, _ := filepath.Glob(filepath.Join(resultsDir(env), hostnet.NetworkName+"-*"))
	out := map[string][]netip.Addr{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if uid, ips := parseResult(data); uid != "" {
			out[uid] = append(out[uid], ips...)
		}
	}
	return out
}

// parseResult reads one file of the CNI library (libcni's cachedInfo); "" for one that is no pod's.
func parseResult(data []byte) (uid string, ips []netip.Addr) {
	var r struct {
		NetworkName string      `json:"networkName"`
		CNIArgs     [][2]string `json:"cniArgs"`
		Result      struct {
			IPs []struct {
				Address netip.Prefix `json:"address"`
			} `json:"ips"`
		} `json:"result"`
	}
	if json.Unmarshal(data, &r) != nil || r.NetworkName != hostnet.NetworkName {
		return "", nil
	}
	for _, arg := range r.CNIArgs {
		if arg[0] == "K8S_POD_UID" {
			uid = arg[1]
		}
	}
	for _, ip := range r.Result.IPs {
		ips = append(ips, ip.Address.Addr().Unmap())
	}
	return uid, ips
}
