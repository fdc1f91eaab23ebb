package main

import (
	"errors"
	"fmt"
	"maps"
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
		"command-chain", "daemon-scope", "bus-name", "activates-on", "autostart", "common-id", "success-exit-status",
	}
	buildKeys = []string{"parts", "platforms", "architectures", "package-repositories", "lint", "compression", "adopt-info", "icon", "apps", "build-base"}
)

// linkKeys are collected under links.
var linkKeys = []string{"contact", "website", "issues", "source-code", "donation"}

// SnapYAML derives meta/snap.yaml for one architecture from the text of snapcraft.yaml, as
// snapcraft does. It refuses keys that it does not know how to carry over, rather than losing
// them.
func SnapYAML(craft []byte, arch string) ([]byte, error) {
	var in map[string]any
	if err := yaml.UnmarshalStrict(craft, &in); err != nil {
		return nil, err
	}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(in)) {
		if !slices.Contains(copiedKeys, key) && !slices.Contains(buildKeys, key) && !slices.Contains(linkKeys, key) && key != "passthrough" {
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
	links := map[string]any{}
	for _, key := range linkKeys {
		switch v := in[key].(type) {
		case string:
			links[key] = []any{v}
		case []any:
			links[key] = v
		}
	}
	if len(links) > 0 {
		out["links"] = links
	}
	apps := map[string]any{}
	given, _ := in["apps"].(map[string]any)
	assumes, _ := in["assumes"].([]any)
	for _, name := range slices.Sorted(maps.Keys(given)) {
		app, ok := given[name].(map[string]any)
		if !ok {
			errs = append(errs, fmt.Errorf("app %q is no mapping", name))
			continue
		}
		for _, key := range slices.Sorted(maps.Keys(app)) {
			if !slices.Contains(copiedAppKeys, key) && key != "passthrough" {
				errs = append(errs, fmt.Errorf("app %q: key %q is not known here", name, key))
			}
		}
		picked := pick(app, copiedAppKeys)
		errs = append(errs, passThrough(picked, app["passthrough"]))
		for key, needs := range map[string]string{"command-chain": "command-chain", "success-exit-status": "snapd2.74"} {
			if picked[key] != nil && !slices.Contains(assumes, any(needs)) {
				assumes = append(assumes, needs)
			}
		}
		apps[name] = picked
	}
	out["apps"] = apps
	if len(assumes) > 0 {
		out["assumes"] = assumes
	}
	errs = append(errs, passThrough(out, in["passthrough"]))
	if out["confinement"] != "classic" {
		// The real one adds PATH and LD_LIBRARY_PATH then.
		errs = append(errs, fmt.Errorf("confinement %v: the environment of a confined snap is not derived here", out["confinement"]))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return yaml.Marshal(out)
}

// passThrough merges what snapcraft shall not look at.
func passThrough(into map[string]any, from any) error {
	if from == nil {
		return nil
	}
	more, ok := from.(map[string]any)
	if !ok {
		return errors.New("passthrough is no mapping")
	}
	maps.Copy(into, more)
	return nil
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
