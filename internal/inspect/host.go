package inspect

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"microk8s/internal/hostprobe"
	"microk8s/internal/nodeconfig"
)

// registryHost is where the registry addon listens, as docker on the same machine names it.
const registryHost = "localhost:32000"

// hostFindings says what about the host below root ("/" but in tests) is known to get in the
// way of a node, each with what to do (cli.md 1.13).
func hostFindings(root string, c nodeconfig.Config) (found []string) {
	warn := func(format string, a ...any) { found = append(found, fmt.Sprintf(format, a...)) }
	read := func(path string) string {
		data, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			return ""
		}
		return string(data)
	}
	exists := func(path string) bool {
		_, err := os.Stat(filepath.Join(root, path))
		return err == nil
	}

	for _, d := range []struct{ program, config, restart string }{
		{"usr/bin/dockerd", "etc/docker/daemon.json", "systemctl restart docker"},
		{"snap/docker/current/bin/dockerd", "var/snap/docker/current/config/daemon.json", "snap restart docker"},
	} {
		if exists(d.program) && !insecureRegistry(read(d.config)) {
			warn(`Docker is installed and cannot push to the registry addon: add "insecure-registries": [%q] to /%s, then run %s`,
				registryHost, d.config, d.restart)
		}
	}
	if fields := shellVars(read("etc/ufw/ufw.conf")); strings.EqualFold(fields["ENABLED"], "yes") {
		warn("the firewall ufw is active: pod traffic on this machine is let through, but other machines reach this node "+
			"only if ufw allows %d, 10250, %d and %d by TCP and 4789 by UDP from them, such as with: ufw allow from ADDRESS", c.APIServer.Port, c.AgentPort, c.Datastore.Port)
	}
	if strings.TrimSpace(read("sys/fs/selinux/enforce")) == "1" {
		warn("SELinux is enforcing, and no policy for this product exists: if services or pods are denied access, see ausearch -m avc, or run setenforce 0")
	}
	h := hostprobe.Probe(root)
	if h.NoKmsg {
		do := ""
		if text := read("run/systemd/container"); strings.TrimSpace(text) == "lxc" {
			do = "; apply the LXD profile for this product to the container"
		}
		warn("there is no /dev/kmsg: the kubelet cannot report processes killed because memory ran out%s", do)
	}
	return found
}

// insecureRegistry reports whether a configuration of Docker allows the registry addon.
func insecureRegistry(config string) bool {
	var c struct {
		Insecure []string `json:"insecure-registries"`
	}
	return json.Unmarshal([]byte(config), &c) == nil && slices.Contains(c.Insecure, registryHost)
}

// shellVars reads a file of NAME=value lines.
func shellVars(text string) map[string]string {
	vars := map[string]string{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			vars[name] = strings.Trim(value, `"'`)
		}
	}
	return vars
}
