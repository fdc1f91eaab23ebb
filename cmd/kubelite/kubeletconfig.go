package main

import (
	"strings"

	"microk8s/internal/args"
)

// pullRecords is the feature gate of the kubelet's records of pulled images. Without it the kubelet
// refuses a configuration that sets a policy for them.
const pullRecords = "KubeletEnsureSecretPulledImages"

// defaultKubeletConfig makes the kubelet read the configuration file of the product, which holds what
// is not a flag of the kubelet: see docs/adr/0030. A file of the user's own (--config) stands in its
// place; a folder of drop-ins (--config-dir) and flags count more than it. It does nothing where the
// feature that the file configures is off. files are the argument files of all daemons, whose feature
// gates are those of the one process.
func defaultKubeletConfig(kubelet *args.File, files []*args.File, path string) (added bool, err error) {
	if _, own := kubelet.Get("config"); own || !gateEnabled(files, pullRecords) {
		return false, nil
	}
	return true, kubelet.Set("config", path)
}

// gateEnabled reports whether a beta feature, on by default, is left on by the daemons' arguments.
func gateEnabled(files []*args.File, gate string) bool {
	beta, set := true, ""
	for _, f := range files {
		text, _ := f.Get("feature-gates")
		for _, one := range strings.Split(strings.Trim(text, `"'`), ",") {
			name, value, _ := strings.Cut(strings.TrimSpace(one), "=")
			switch strings.TrimSpace(name) {
			case gate:
				set = value
			case "AllBeta":
				beta = beta && !strings.EqualFold(value, "false")
			}
		}
	}
	if set != "" {
		return !strings.EqualFold(set, "false")
	}
	return beta
}
