package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"microk8s/internal/snapenv"
)

// Component is one program inside the package.
type Component struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// versionReport is the form of `version --format json`; with -o it is a document.
type versionReport struct {
	Version    string      `json:"version"`
	Revision   string      `json:"revision"`
	Components []Component `json:"components"`
}

func (a *App) newVersion() *cobra.Command {
	format := "pretty"
	var out *output
	cmd := &cobra.Command{
		Use:   "version [-o json|yaml] [--format pretty|json]",
		Short: "Print the versions of MicroK8s and its components",
		Args:  cobra.ArbitraryArgs, // upstream ignores them
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "pretty" && format != "json" {
				return &usageError{cmd, fmt.Errorf("invalid option: --format=%s", format)}
			}
			return a.version(format, out)
		},
	}
	out = addOutput(cmd, "pretty")
	cmd.Flags().StringVar(&format, "format", format, "pretty, or json as upstream prints it")
	completeFlag(cmd, "format", "pretty", "json")
	return cmd
}

func (a *App) version(format string, out *output) error {
	r := versionReport{}
	r.Version, r.Revision = Version(a.Env)
	components, err := readBOM(a.Env.BOM())
	if err != nil {
		return err
	}
	r.Components = components
	if out.document() {
		return a.print(out, struct {
			documentMeta
			versionReport
		}{documentOf("Version"), r})
	}
	if format == "json" {
		enc := json.NewEncoder(a.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	fmt.Fprintf(a.Out, "MicroK8s %s revision %s\n", r.Version, r.Revision)
	for _, c := range r.Components {
		fmt.Fprintf(a.Out, "%s %s\n", c.Name, c.Version)
	}
	return nil
}

// Version returns version and revision of the package: as snapd says, else from the package's
// meta/snap.yaml, whose revision counts as x1, else "(unknown)".
func Version(env snapenv.Env) (version, revision string) {
	const unknown = "(unknown)"
	version, revision = env.Version, env.Revision
	if version == "" {
		var meta struct {
			Version string `json:"version"`
		}
		data, err := os.ReadFile(filepath.Join(env.Snap, "meta/snap.yaml"))
		if err == nil && yaml.Unmarshal(data, &meta) == nil && meta.Version != "" {
			version = meta.Version
			if revision == "" {
				revision = "x1"
			}
		}
	}
	if version == "" {
		version = unknown
	}
	if revision == "" {
		revision = unknown
	}
	return version, revision
}

// readBOM reads the bill of materials; a package without one has no components to tell of.
func readBOM(path string) ([]Component, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the bill of materials: %w", err)
	}
	var bom struct {
		Components []Component `json:"components"`
	}
	if err := json.Unmarshal(data, &bom); err != nil {
		return nil, fmt.Errorf("cannot read the bill of materials %s: %w", path, err)
	}
	return bom.Components, nil
}
