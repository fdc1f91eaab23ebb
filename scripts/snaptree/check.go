package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"microk8s/scripts/catalog"
)

// What snapd and snapcraft accept without a word although it cannot be meant, and what the
// published schema does not see, is checked here.
var (
	appName = regexp.MustCompile(`^[a-zA-Z0-9](?:-?[a-zA-Z0-9])*$`)

	// hookNames are those that snapd calls, beside those of interfaces.
	hookNames = []string{"install", "configure", "default-configure", "pre-refresh", "post-refresh", "remove", "check-health", "gate-auto-refresh"}

	// interfaces are those that the snap names; a name that snapd does not know would be
	// accepted and mean nothing.
	interfaces = []string{"network", "network-bind", "network-control"}

	partKeys = []string{
		"plugin", "source", "source-type", "source-tag", "source-branch", "source-commit", "source-checksum", "source-depth", "source-subdir",
		"after", "build-packages", "build-snaps", "build-environment", "build-attributes", "stage-packages", "stage-snaps",
		"organize", "stage", "prime", "filesets", "override-pull", "override-build", "override-stage", "override-prime", "parse-info",
	}
)

// Check finds mistakes in the snapcraft.yaml and the components' modules of the repository at
// root that can be found without having built anything.
func Check(root, arch string) error {
	craft, err := os.ReadFile(filepath.Join(root, "snapcraft.yaml"))
	if err != nil {
		return err
	}
	kubernetes, err := catalog.Required(filepath.Join(root, "go.mod"), "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	_, err = SnapYAML(craft, arch)
	return errors.Join(append(catalog.Check(root), CheckCraft(craft, kubernetes), err)...)
}

// CheckCraft finds mistakes in snapcraft.yaml itself; kubernetes is the version of Kubernetes
// that go.mod names, which is the version of the snap.
func CheckCraft(craft []byte, kubernetes string) error {
	var in struct {
		Version, Summary, Grade, License, Base string
		Adopt                                  string `json:"adopt-info"`
		Platforms                              map[string]any
		Parts                                  map[string]map[string]any
	}
	if err := yaml.Unmarshal(craft, &in); err != nil {
		return err
	}
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if in.Version != kubernetes {
		bad("version is %q, and go.mod has Kubernetes %s", in.Version, kubernetes)
	}
	if len(in.Version) > 32 {
		bad("version is longer than 32 characters")
	}
	if in.Adopt != "" {
		bad("adopt-info is not known to the tool that derives meta/snap.yaml")
	}
	if len(in.Summary) > 78 {
		bad("summary has %d characters; the store takes 78", len(in.Summary))
	}
	if in.Grade != "devel" && in.Grade != "stable" {
		bad("grade is %q; snapd accepts that, and would treat it as stable", in.Grade)
	}
	if !slices.Contains([]string{"core22", "core24"}, in.Base) {
		bad("base is %q; core22 and core24 are known to work", in.Base)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		if _, ok := in.Platforms[arch]; !ok {
			bad("platforms does not name %s", arch)
		}
	}
	if len(in.Parts) == 0 {
		bad("there are no parts")
	}
	for _, name := range slices.Sorted(maps.Keys(in.Parts)) {
		for _, key := range slices.Sorted(maps.Keys(in.Parts[name])) {
			if !slices.Contains(partKeys, key) {
				bad("part %q: key %q is not one of snapcraft's", name, key)
			}
		}
		if plugin := in.Parts[name]["plugin"]; plugin != "nil" && plugin != "dump" && plugin != "go" && plugin != "make" {
			bad("part %q: plugin %v is not known here", name, plugin)
		}
	}
	return errors.Join(errs...)
}

// CheckTree finds mistakes in meta/snap.yaml against the tree of the snap: files says of each
// file, by its path, whether it can be executed.
func CheckTree(meta []byte, files map[string]bool) error {
	var in struct {
		Apps map[string]struct {
			Command, Completer, Daemon string
			RestartDelay               string `json:"restart-delay"`
			After, Before, Plugs       []string
		}
		Plugs, Slots, Hooks map[string]any
	}
	if err := yaml.Unmarshal(meta, &in); err != nil {
		return err
	}
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	for _, name := range slices.Sorted(maps.Keys(in.Apps)) {
		app := in.Apps[name]
		if !appName.MatchString(name) {
			bad("app %q: snapd does not take this name", name)
		}
		program, _, _ := strings.Cut(app.Command, " ")
		if executable, there := files[path.Clean(program)]; !there {
			bad("app %q: there is no %s in the snap", name, program)
		} else if !executable {
			bad("app %q: %s cannot be executed", name, program)
		}
		if app.Completer != "" {
			if _, there := files[app.Completer]; !there {
				bad("app %q: there is no %s in the snap", name, app.Completer)
			}
		}
		for _, other := range slices.Concat(app.After, app.Before) {
			if in.Apps[other].Daemon == "" {
				bad("app %q: %q, which it is ordered by, is no service", name, other)
			}
		}
		for _, plug := range app.Plugs {
			if _, declared := in.Plugs[plug]; !declared && !slices.Contains(interfaces, plug) {
				bad("app %q: plug %q is not known here", name, plug)
			}
		}
		if app.Daemon != "" && app.RestartDelay == "" {
			bad("app %q: without restart-delay five quick failures are the end of the service", name)
		}
		if app.Daemon != "" != strings.HasPrefix(name, "daemon-") {
			bad("app %q: services, and only they, are called daemon-…", name)
		}
	}
	for file, executable := range files {
		hook, ours := strings.CutPrefix(file, "meta/hooks/")
		if !ours {
			continue
		}
		if !executable {
			bad("hook %q cannot be executed", hook)
		}
		known := slices.Contains(hookNames, hook)
		for _, prefix := range []string{"connect-plug-", "disconnect-plug-"} {
			if plug, is := strings.CutPrefix(hook, prefix); is {
				known = slices.Contains(interfaces, plug)
			}
		}
		if !known {
			bad("hook %q is one that snapd never calls", hook)
		}
	}
	for _, hook := range slices.Sorted(maps.Keys(in.Hooks)) {
		if _, there := files["meta/hooks/"+hook]; !there {
			bad("hook %q is declared and has no file", hook)
		}
	}
	return errors.Join(errs...)
}
