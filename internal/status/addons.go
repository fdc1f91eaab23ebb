package status

import (
	"context"
	"maps"
	"net/url"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/addon"
	"microk8s/internal/snapenv"
)

// recordsPath lists what is written down about the addons that are on.
var recordsPath = "/api/v1/namespaces/kube-system/configmaps?labelSelector=" + url.QueryEscape(addon.RecordLabel)

// enabledAddons returns the names of the addons that the records say are on.
func enabledAddons(records []corev1.ConfigMap) map[string]bool {
	on := map[string]bool{}
	for _, r := range records {
		on[r.Labels[addon.RecordLabel]] = true
	}
	return on
}

// foreign says which addons with hooks are on.
func (c *apiClient) foreign(ctx context.Context, env snapenv.Env) (map[string]bool, error) {
	all, _, err := addon.Catalogue(env)
	if err != nil {
		return nil, nil // said elsewhere
	}
	return addon.CheckForeign(ctx, env, func(ctx context.Context, path string, into *metav1.PartialObjectMetadataList) error {
		return c.decodeAs(ctx, path, addon.MetadataOnly, into)
	}, addon.Foreign(all))
}

// packs adds addons that are of another version than this package's, because their pack is missing.
func (r *Report) packs(env snapenv.Env, all []addon.Addon, records []corev1.ConfigMap) {
	for i := range records {
		record, err := addon.RecordOf(&records[i])
		if err != nil {
			continue // the API server's start says so
		}
		x, _, err := addon.Find(all, addon.CoreRepository+"/"+record.Name)
		if err != nil || record.Online || record.Version == x.Version || len(addon.Missing(env, x)) == 0 {
			continue
		}
		r.add("addons.pack", "addon %s stays at version %s: the pack with its version %s is not on this node", x.Name, record.Version, x.Version)(
			"get the pack of this package's version and run: microk8s addons import FILE; microk8s enable " + x.Name)
	}
}

// addons adds the addons with their states, as far as they could be found out.
func (r *Report) addons(env snapenv.Env, s apiState) {
	all, broken, err := addon.Catalogue(env)
	if err != nil {
		r.add("addons.catalogue", "%v", err)("the installation is damaged: reinstall it")
		return
	}
	for _, err := range broken {
		r.add("addons.repository", "%v", err)("repair it, or remove it with microk8s addons repo remove NAME")
	}
	if s.recordErr != nil && s.err == nil {
		r.add("addons.state", "cannot find out which addons are enabled: %v", s.recordErr)("wait a moment, or see microk8s logs kubelite")
	}
	if s.foreignErr != nil && s.err == nil {
		r.add("addons.state", "cannot find out which addons of added repositories are enabled: %v", s.foreignErr)("wait a moment")
	}
	for _, key := range slices.Sorted(maps.Keys(s.ignored)) {
		r.add("dns.custom", "the key %s of the ConfigMap coredns-custom is without effect: %s", key, s.ignored[key])("correct it with: microk8s kubectl edit configmap -n kube-system coredns-custom")
	}
	r.AddonsKnown = s.err == nil && s.recordErr == nil && s.foreignErr == nil
	r.packs(env, all, s.records)
	on := enabledAddons(s.records)
	for _, x := range all {
		r.Addons = append(r.Addons, Addon{
			Name: x.Name, Repository: x.Repository, Description: x.Description, Version: x.Version,
			Enabled: x.Builtin != "" || s.foreign[x.FullName()] || x.Repository == addon.CoreRepository && on[addon.Target(all, x).Name],
		})
	}
}
