package status

import (
	"net/url"

	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/addon"
	"microk8s/internal/snapenv"
)

// recordsPath lists what is written down about the addons that are on.
var recordsPath = "/api/v1/namespaces/kube-system/configmaps?labelSelector=" + url.QueryEscape(addon.RecordLabel)

// enabledAddons gives the names of the addons that the records say are on.
func enabledAddons(records []corev1.ConfigMap) map[string]bool {
	on := map[string]bool{}
	for _, r := range records {
		on[r.Labels[addon.RecordLabel]] = true
	}
	return on
}

// addons adds the addons with their states, as far as they could be found out.
func (r *Report) addons(env snapenv.Env, s apiState) {
	all, err := addon.Catalogue(env)
	if err != nil {
		r.add("%v", err)("the installation is damaged: reinstall it")
		return
	}
	if s.recordErr != nil && s.err == nil {
		r.add("cannot find out which addons are enabled: %v", s.recordErr)("wait a little, or see microk8s logs kubelite")
	}
	on := enabledAddons(s.records)
	for _, x := range all {
		r.Addons = append(r.Addons, Addon{
			Name: x.Name, Repository: x.Repository, Description: x.Description, Version: x.Version,
			Enabled: x.Builtin != "" || on[x.Name],
		})
	}
}
