package hostnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/nftables"

	"microk8s/internal/snapenv"
)

// hostPortsTable is the table of the portmap plugin.
const hostPortsTable = "cni_hostport"

// pluginTimeout is how long the portmap plugin may take; it runs nft a few times.
const pluginTimeout = 30 * time.Second

// ensureHostPorts has the portmap plugin write the host ports of each pod again whose rules are gone. The plugin
// marks a pod's rules with the ID of its sandbox.
func (c *changes) ensureHostPorts(ctx context.Context, env snapenv.Env) {
	var pods []Pod
	for _, p := range Pods(env) {
		if len(p.portMaps) > 0 && string(p.portMaps) != "null" {
			pods = append(pods, p)
		}
	}
	if len(pods) == 0 {
		return
	}
	complete, err := hostPortsOf()
	if err != nil {
		c.errs = append(c.errs, err)
		return
	}
	for _, p := range pods {
		if !complete(p) {
			c.try(restoreHostPorts(ctx, env, p), "host ports of the pod behind %s", p.hostEnd)
		}
	}
}

// hostPortsOf reads the plugin's rules and returns a function that reports whether those of a pod are all there.
func hostPortsOf() (complete func(Pod) bool, err error) {
	h, err := readHost()
	if err != nil {
		return nil, err
	}
	marked := map[nftables.TableFamily]map[string]int{} // rules that translate, by sandbox
	hooked := map[nftables.TableFamily]int{}            // base chains with a rule
	for _, chain := range h.chains {
		if chain.Table.Name != hostPortsTable {
			continue
		}
		rules, err := h.rules(chain)
		if err != nil {
			return nil, err
		}
		family := chain.Table.Family
		if chain.Name == "prerouting" || chain.Name == "output" || chain.Name == "hostports_all" {
			if len(rules) > 0 {
				hooked[family]++
			}
			continue
		}
		if chain.Name != "hostports" && chain.Name != "hostip_hostports" {
			continue
		}
		for _, r := range rules {
			if marked[family] == nil {
				marked[family] = map[string]int{}
			}
			marked[family][ruleComment(r.UserData)]++
		}
	}
	return func(p Pod) bool {
		for _, a := range p.addresses {
			family := family(a)
			if want := p.hostPorts(a.Addr().Is4()); want > 0 && (marked[family][p.Sandbox] < want || hooked[family] < 3) {
				return false
			}
		}
		return true
	}, nil
}

// hostPorts counts the rules that the plugin writes for a pod's address of one family.
func (p Pod) hostPorts(v4 bool) int {
	var maps []struct{ HostIP string }
	if json.Unmarshal(p.portMaps, &maps) != nil {
		return 0
	}
	n := 0
	for _, m := range maps {
		if m.HostIP == "" || bytes.ContainsRune([]byte(m.HostIP), ':') != v4 {
			n++
		}
	}
	return n
}

// restoreHostPorts runs the plugin for a pod: first to remove what is left, then to add. A pod that went
// meanwhile gets nothing.
func restoreHostPorts(ctx context.Context, env snapenv.Env, p Pod) error {
	config, err := p.pluginConfig("portmap")
	if err != nil {
		return err
	}
	for _, command := range []string{"DEL", "ADD"} {
		if err := runPlugin(ctx, env, "portmap", command, p, config); err != nil {
			return err
		}
	}
	if _, err := os.Stat(p.File); errors.Is(err, fs.ErrNotExist) {
		return runPlugin(ctx, env, "portmap", "DEL", p, config)
	}
	return nil
}

// pluginConfig is what the CNI library passes to a plugin of the chain for a pod that is connected.
func (p Pod) pluginConfig(kind string) ([]byte, error) {
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal(p.config, &list); err != nil {
		return nil, fmt.Errorf("cannot read the CNI configuration in %s: %w", p.File, err)
	}
	i := slices.IndexFunc(list.Plugins, func(c map[string]any) bool { return c["type"] == kind })
	if i < 0 {
		return nil, fmt.Errorf("no plugin %s in the CNI configuration in %s", kind, p.File)
	}
	c := list.Plugins[i]
	delete(c, "capabilities")
	c["cniVersion"], c["name"], c["prevResult"] = list.CNIVersion, list.Name, p.result
	c["runtimeConfig"] = map[string]any{"portMappings": p.portMaps}
	return json.Marshal(c)
}

// runPlugin runs a CNI plugin as the library does.
func runPlugin(ctx context.Context, env snapenv.Env, kind, command string, p Pod, config []byte) error {
	ctx, cancel := context.WithTimeout(ctx, pluginTimeout)
	defer cancel()
	path := filepath.Join(env.CNIBin(), kind)
	if _, err := os.Stat(path); err != nil {
		path = filepath.Join(env.ShippedCNIBin(), kind)
	}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+p.Sandbox, "CNI_NETNS="+p.netns, "CNI_IFNAME="+p.ifName, "CNI_ARGS=",
		"CNI_PATH="+env.CNIBin())
	cmd.Stdin = bytes.NewReader(config)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot run %s %s: %w: %s", path, command, err, bytes.TrimSpace(out))
	}
	return nil
}
