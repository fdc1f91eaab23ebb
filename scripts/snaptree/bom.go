package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/modfile"
)

// Component is one line of the bill of materials.
type Component struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Source  string `json:"source"` // Go module path, or the name of the source package
}

// materials says which module of which go.mod a component comes from.
var materials = []struct{ name, mod, module string }{
	{"kubernetes", "go.mod", "k8s.io/kubernetes"},
	{"flannel", "go.mod", "github.com/flannel-io/flannel"},
	{"traefik-balancer", "go.mod", "github.com/traefik/traefik/v2"}, // a part of apiserver-proxy
	{"go-dqlite", "go.mod", "github.com/canonical/go-dqlite/v3"},
	{"containerd", "scripts/components/containerd/go.mod", "github.com/containerd/containerd/v2"},
	{"runc", "scripts/components/runc/go.mod", "github.com/opencontainers/runc"},
	{"cni-plugins", "scripts/components/cni/go.mod", "github.com/containernetworking/plugins"},
	{"coredns", "scripts/components/coredns/go.mod", "github.com/coredns/coredns"},
	{"metrics-server", "scripts/components/metrics-server/go.mod", "sigs.k8s.io/metrics-server"},
	{"registry", "scripts/components/registry/go.mod", "github.com/distribution/distribution/v3"},
	{"traefik", "scripts/components/traefik/go.mod", "github.com/traefik/traefik/v3"},
	{"helm", "scripts/components/helm/go.mod", "helm.sh/helm/v3"},
}

// BOM is the bill of materials of the repository at root, as JSON: names and versions as
// the build's own pins say them.
func BOM(root string) ([]byte, error) {
	var out struct {
		Components []Component `json:"components"`
	}
	for _, m := range materials {
		version, err := required(root, m.mod, m.module)
		if err != nil {
			return nil, err
		}
		out.Components = append(out.Components, Component{m.name, version, m.module})
	}
	// Those that are no Go modules have a file with their version, written by their build.
	for _, c := range []struct{ name, file string }{
		{"dqlite", "build/dqlite/version"},
		{"nftables", "build/components/nft/version"},
	} {
		if v, err := os.ReadFile(filepath.Join(root, c.file)); err == nil {
			out.Components = append(out.Components, Component{c.name, "v" + strings.TrimSpace(string(v)), c.name})
		}
	}
	data, err := json.MarshalIndent(out, "", "  ")
	return append(data, '\n'), err
}

// required gives the version of a module that a go.mod of the repository requires.
func required(root, gomod, module string) (string, error) {
	path := filepath.Join(root, gomod)
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	mod, err := modfile.Parse(path, data, nil)
	if err != nil {
		return "", err
	}
	for _, r := range mod.Require {
		if r.Mod.Path == module {
			return r.Mod.Version, nil
		}
	}
	return "", fmt.Errorf("%s requires no %s", path, module)
}
