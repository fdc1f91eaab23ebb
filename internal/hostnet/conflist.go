package hostnet

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// WriteConflist replaces the CNI configuration, with which containerd calls the node's
// network ready: pods get addresses of subnets, on a bridge with this MTU. It is a no-op if
// the file says so already.
func WriteConflist(env snapenv.Env, subnets []netip.Prefix, mtu int) error {
	data, err := conflist(env, subnets, mtu)
	if err != nil {
		return err
	}
	path := Conflist(env)
	if old, err := os.ReadFile(path); err == nil && string(old) == string(data) {
		return nil
	}
	if err := os.MkdirAll(env.CNIConf(), 0o755); err != nil {
		return fmt.Errorf("cannot write the CNI configuration: %w", err)
	}
	return atomicfile.Write(path, data, 0o600, nil) // only containerd reads it, which is root
}

func conflist(env snapenv.Env, subnets []netip.Prefix, mtu int) ([]byte, error) {
	type object map[string]any
	var ranges []any
	for _, s := range subnets {
		ranges = append(ranges, []any{object{"subnet": s.String()}})
	}
	data, err := json.MarshalIndent(object{
		"cniVersion": "1.0.0",
		"name":       NetworkName,
		"plugins": []any{
			object{
				"type": "bridge", "bridge": Bridge, "mtu": mtu,
				"isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
				// Masquerading is done once for all pods, by Rules.
				"ipMasq": false,
				"ipam":   object{"type": "host-local", "ranges": ranges, "dataDir": leasesDir(env)},
			},
			object{"type": "portmap", "backend": "nftables", "snat": true, "capabilities": object{"portMappings": true}},
			object{"type": "bandwidth", "capabilities": object{"bandwidth": true}},
		},
	}, "", "  ")
	return append(data, '\n'), err
}

// PodSubnets are the ranges of the pods of this node as the CNI configuration has them; none where
// the built-in pod network has not written any.
func PodSubnets(env snapenv.Env) []netip.Prefix { return conflistSubnets(env) }

// conflistSubnets reads the node's pod subnets back; none if there is no readable file.
func conflistSubnets(env snapenv.Env) []netip.Prefix {
	data, err := os.ReadFile(Conflist(env))
	if err != nil {
		return nil
	}
	var c struct {
		Plugins []struct {
			IPAM struct {
				Ranges [][]struct{ Subnet netip.Prefix }
			}
		}
	}
	if json.Unmarshal(data, &c) != nil {
		return nil
	}
	var out []netip.Prefix
	for _, p := range c.Plugins {
		for _, set := range p.IPAM.Ranges {
			for _, r := range set {
				out = append(out, r.Subnet)
			}
		}
	}
	return out
}
