package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"microk8s/scripts/catalog"
)

// Component is one line of the bill of materials that `microk8s version` prints. The complete
// one, with every module, is made by scripts/sbom.
type Component struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Source  string `json:"source"` // Go module path, or the name of the source package
}

// BOM is the bill of materials of the repository at root, as JSON: names and versions as
// the build's own pins say them.
func BOM(root string) ([]byte, error) {
	var out struct {
		Components []Component `json:"components"`
	}
	for _, p := range catalog.Parts {
		version, err := catalog.Required(filepath.Join(root, "go.mod"), p.Module)
		if err != nil {
			return nil, err
		}
		out.Components = append(out.Components, Component{p.Row, version, p.Module})
	}
	for _, c := range catalog.Components {
		if c.Place == catalog.Peer || c.Place == catalog.Pack {
			continue
		}
		version, err := c.Version(root)
		if err != nil {
			return nil, err
		}
		out.Components = append(out.Components, Component{c.Title(), version, c.Module})
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
