package docs

import (
	"reflect"
	"strings"
	"testing"

	"microk8s/cluster-agent/launchconf"
)

// TestLaunchFields wants each field of a launch configuration on the page for users, and among the
// fields of docs/spec.
func TestLaunchFields(t *testing.T) {
	files := tree(t)
	_, spec, _ := strings.Cut(files["docs/spec/cluster-agent.md"], "### 6.3")
	spec, _, _ = strings.Cut(spec, "### 6.5")
	fields := reflect.TypeFor[launchconf.Document]()
	for i := range fields.NumField() {
		name := fields.Field(i).Tag.Get("yaml")
		for page, text := range map[string]string{"docs/launch.md": files["docs/launch.md"], "docs/spec/cluster-agent.md 6.3": spec} {
			if !strings.Contains(text, "`"+name) && !(name == "version" && page != "docs/launch.md") {
				t.Errorf("%s does not name the field %s", page, name)
			}
		}
	}
}
