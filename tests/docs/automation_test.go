package docs

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"microk8s/tests/snippet"
)

// TestAutomationSnippets reads what docs/automation.md shows with the parsers of its languages. Real
// nodes run it in tests/cluster.
func TestAutomationSnippets(t *testing.T) {
	list, err := snippet.Read("../../docs/automation.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range list {
		names = append(names, s.Name)
		switch s.Language {
		case "yaml":
			var v any
			if err := yaml.UnmarshalStrict([]byte(s.Text), &v); err != nil {
				t.Errorf("line %d: %v", s.Line, err)
			}
		case "sh":
			cmd := exec.Command("sh", "-n")
			cmd.Stdin = strings.NewReader(s.Text)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("line %d: %v: %s", s.Line, err, out)
			}
		default:
			t.Errorf("line %d: nothing runs %s", s.Line, s.Language)
		}
	}
	for _, want := range []string{"cloud-init first", "cloud-init join", "ansible", "juju first", "juju join", "juju remove", "capi first", "capi join", "capi worker", "gitops"} {
		if !slices.Contains(names, want) {
			t.Errorf("there is no snippet %q", want)
		}
	}
}
