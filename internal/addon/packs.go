package addon

import (
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"microk8s/internal/pack"
	"microk8s/internal/snapenv"
)

// Missing returns those of an addon's images that are in no pack on this node.
func Missing(env snapenv.Env, a Addon) []string {
	if len(a.Images) == 0 {
		return nil
	}
	kept, _ := pack.List(env.Packs())
	var missing []string
	for _, name := range a.Images {
		if !slices.ContainsFunc(kept, func(k pack.Kept) bool { return k.Has(name) }) {
			missing = append(missing, name)
		}
	}
	return missing
}

// Packed lists the core addons whose images are in packs.
func Packed(env snapenv.Env) []string {
	all, _, err := Catalogue(env)
	if err != nil {
		return nil
	}
	var names []string
	for _, a := range all {
		if a.Repository == CoreRepository && len(a.Images) > 0 {
			names = append(names, a.Name)
		}
	}
	return names
}

// pull makes the containers of an addon's pods use the images of the registries that the addon names, by
// the containers' names, and those of their arguments that name an image.
func pull(a Addon, objects []*unstructured.Unstructured) error {
	for _, o := range objects {
		if _, ok := workloads[o.GetKind()]; !ok {
			continue
		}
		for _, list := range []string{"initContainers", "containers"} {
			path := []string{"spec", "template", "spec", list}
			containers, found, err := unstructured.NestedSlice(o.Object, path...)
			if err != nil {
				return err
			}
			if !found {
				continue
			}
			for _, c := range containers {
				container, ok := c.(map[string]any)
				if !ok || !slices.Contains(a.Images, fmt.Sprint(container["image"])) {
					continue
				}
				online := a.Online[fmt.Sprint(container["name"])]
				if online == "" {
					return fmt.Errorf("addon %s names no registry for container %v", a.Name, container["name"])
				}
				container["image"], container["imagePullPolicy"] = online, "IfNotPresent"
				args, _ := container["args"].([]any)
				for i, arg := range args {
					name, value, _ := strings.Cut(fmt.Sprint(arg), "=")
					if !slices.Contains(a.Images, value) {
						continue
					}
					if online = a.Online[name]; online == "" {
						return fmt.Errorf("addon %s names no registry for argument %s", a.Name, name)
					}
					args[i] = name + "=" + online
				}
			}
			if err := unstructured.SetNestedSlice(o.Object, containers, path...); err != nil {
				return err
			}
		}
	}
	return nil
}
