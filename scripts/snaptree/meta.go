package main

import (
	"errors"
	"fmt"
	"slices"

	"sigs.k8s.io/yaml"
)

// What snapcraft copies from snapcraft.yaml to meta/snap.yaml, at the top and in an app.
var (
	copiedKeys = []string{
		"name", "title", "version", "summary", "description", "license", "type", "base", "assumes", "epoch",
		"confinement", "grade", "environment", "plugs", "slots", "hooks", "layout", "system-usernames", "provenance",
	}
	copiedAppKeys = []string{
		"command", "completer", "daemon", "after", "before", "refresh-mode", "stop-mode", "stop-command",
		"post-stop-command", "reload-command", "start-timeout", "stop-timeout", "watchdog-timeout", "restart-delay",
		"restart-condition", "install-mode", "timer", "sockets", "plugs", "slots", "aliases", "environment",
		"command-chain", "daemon-scope", "bus-name", "activates-on", "autostart", "common-id",
	}
	buildKeys = []string{"parts", "platforms", "architectures", "package-repositories", "lint", "compression", "adopt-info", "icon", "apps", "build-base"}
)

// SnapYAML derives meta/snap.yaml for one architecture from the text of snapcraft.yaml. It
// refuses keys that it does not know how to carry over, rather than losing them.
func SnapYAML(craft []byte, arch string) ([]byte, error) {
	var in map[string]any
	if err := yaml.UnmarshalStrict(craft, &in); err != nil {
		return nil, err
	}
	var errs []error
	for key := range in {
		if !slices.Contains(copiedKeys, key) && !slices.Contains(buildKeys, key) {
			errs = append(errs, fmt.Errorf("key %q is not known here: add it to what is copied or left out", key))
		}
	}
	for _, key := range []string{"name", "version", "summary", "description", "base", "confinement"} {
		if in[key] == nil {
			errs = append(errs, fmt.Errorf("key %q is missing", key))
		}
	}
	out := pick(in, copiedKeys)
	out["architectures"] = []string{arch}
	if out["grade"] == nil {
		out["grade"] = "stable"
	}
	apps := map[string]any{}
	given, _ := in["apps"].(map[string]any)
	for name, a := range given {
		app, ok := a.(map[string]any)
		if !ok {
			errs = append(errs, fmt.Errorf("app %q is no mapping", name))
			continue
		}
		for key := range app {
			if !slices.Contains(copiedAppKeys, key) {
				errs = append(errs, fmt.Errorf("app %q: key %q is not known here", name, key))
			}
		}
		apps[name] = pick(app, copiedAppKeys)
	}
	out["apps"] = apps
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return yaml.Marshal(out)
}

// pick copies the named keys that have a value; empty lists and mappings are left out.
func pick(from map[string]any, keys []string) map[string]any {
	out := map[string]any{}
	for _, k := range keys {
		switch v := from[k].(type) {
		case nil:
		case []any:
			if len(v) > 0 {
				out[k] = v
			}
		case map[string]any:
			if len(v) > 0 {
				out[k] = v
			}
		default:
			out[k] = v
		}
	}
	return out
}
