package cli

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"microk8s/internal/addon"
	"microk8s/internal/cis"
	"microk8s/internal/images"
	"microk8s/internal/netcheck"
	"microk8s/internal/netpolicy"
	"microk8s/internal/podsecurity"
	"microk8s/internal/serverargs"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
)

// withoutOutput are the commands that print no table and no list, and why not. A command that does
// gets -o with addOutput, a document in docs/output.md and a case of TestDocuments.
var withoutOutput = map[string]string{
	"addons":              "help",
	"addons bundle":       "an archive",
	"addons repo":         "help",
	"addons repo add":     "git's progress",
	"addons repo remove":  "nothing",
	"addons repo update":  "git's progress",
	"backup":              "as backup create, which has one",
	"backup key":          "the recipient",
	"completion":          "a script",
	"ctr":                 "containerd's own client, with its own forms",
	"dashboard-proxy":     "an address and a token, in upstream's words",
	"dbctl":               "progress; its -o is a file",
	"disable":             "progress; status lists the addons",
	"enable":              "progress; status lists the addons",
	"encryption":          "help",
	"network":             "help",
	"encryption rotate":   "progress",
	"helm":                "Helm's own -o",
	"helm3":               "Helm's own -o",
	"images":              "help",
	"images export-local": "an archive",
	"join":                "progress",
	"kubectl":             "kubectl's own -o",
	"leave":               "progress",
	"logs":                "lines of others",
	"pod-security":        "help",
	"pod-security relax":  "nothing",
	"remove-node":         "progress",
	"reset":               "progress",
	"start":               "progress; status has a document",
	"stop":                "progress",
}

func outputApp(t *testing.T) (*App, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	return &App{Env: snapenv.Under(t.TempDir()), Out: &out, Err: &out, Group: "microk8s"}, &out
}

// walkVisible visits every command that people see.
func walkVisible(cmd *cobra.Command, path string, visit func(path string, cmd *cobra.Command)) {
	for _, c := range cmd.Commands() {
		if c.Hidden || c.Name() == "no-help" {
			continue
		}
		name := strings.TrimSpace(path + " " + c.Name())
		visit(name, c)
		walkVisible(c, name, visit)
	}
}

// TestEveryTableHasADocument: a new command either has -o, or says above why it needs none.
func TestEveryTableHasADocument(t *testing.T) {
	a, _ := outputApp(t)
	var seen []string
	walkVisible(a.root(), "", func(path string, cmd *cobra.Command) {
		seen = append(seen, path)
		f := cmd.Flags().Lookup(outputFlag)
		document := false
		if f != nil {
			_, document = f.Value.(*output)
		}
		switch why := withoutOutput[path]; {
		case document && why != "":
			t.Errorf("microk8s %s has -o, and is listed as one that has not", path)
		case !document && why == "":
			t.Errorf("microk8s %s has no -o: add it with addOutput, or say in withoutOutput why it prints no list", path)
		case document && !strings.Contains(cmd.UseLine(), "-o json|yaml"):
			t.Errorf("microk8s %s does not show -o json|yaml in its usage", path)
		}
	})
	for path := range withoutOutput {
		if !slices.Contains(seen, path) {
			t.Errorf("there is no command microk8s %s", path)
		}
	}
}

var fixedTime = time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC)

var update = flag.Bool("update", false, "write the golden documents again")

// TestDocuments compares one document of each kind with the one that is kept: programs rely on them.
// A field may be added; one that is changed or gone needs another version.
func TestDocuments(t *testing.T) {
	pods := 2
	token := connection{token: "0123", check: "abcd", port: "25000", first: "10.0.0.1", all: []string{"10.0.0.1", "fd00::1"}, worker: true}
	use, err := (&addNodeFlags{worker: true, name: "n2"}).options()
	if err != nil {
		t.Fatal(err)
	}
	report := status.Report{
		Ready: true, HA: status.HA{Datastore: true, Enabled: true, Nodes: []status.Member{{Address: "10.0.0.1:19001", Alive: true}}},
		Addons:      []status.Addon{{Name: "dns", Repository: "core", Description: "CoreDNS", Version: "1.15", Enabled: true}},
		Problems:    []status.Problem{{What: "the disk is nearly full", Do: "free some"}},
		Differences: []serverargs.Difference{{Argument: "event-ttl", Groups: []serverargs.Group{{Nodes: []string{"n1", "n3"}, Set: true}, {Nodes: []string{"n2"}}}}},
	}
	documents := []any{
		statusDocument{documentOf("NodeStatus"), jsonOf(report)},
		struct {
			documentMeta
			versionReport
		}{documentOf("Version"), versionReport{"v1", "x1", []Component{{"kubernetes", "v1.2.3"}}}},
		token.document(use, fixedTime),
		listOf("JoinTokenList", []listedToken{{ID: "ab", Role: "worker", Node: "n2", Uses: "1", Expires: "2026-11-28T00:00:00Z", State: "valid", Nodes: []string{"n2"}}}),
		listOf("AddonRepositoryList", []addon.Repository{{Name: "core", Addons: 3, Source: "built-in", Description: "x"}}),
		listOf("UserList", []listedUser{{"ann", "view", "shop", fixedTime}}),
		listOf("ImageList", imageItems([]images.Image{{Name: "a:1", Digest: "sha256:00", Size: 5, Shipped: true}}, map[string]int{"a:1": pods, "b:1": 1}, true)),
		imageImport{documentOf("ImageImport"), "", []nodeImport{{Name: "n1", Address: "10.0.0.1", Images: []string{"docker.io/library/a:1"}, Skipped: []string{"x"}}, {Name: "n2", Address: "10.0.0.2", Images: []string{}, Error: "no answer"}}},
		imageImport{documentOf("AddonImport"), "microk8s-addons_v1_amd64.tar", []nodeImport{{Name: "n1", Address: "10.0.0.1", Images: []string{"microk8s.io/a:1"}}}},
		apiAddressDocument{documentOf("APIAddress"), "10.0.0.5", "n1"},
		encryptionDocument{documentOf("EncryptionStatus"), "secretbox", []string{"k1"}, true},
		inspectionDocument{documentOf("InspectionReport"), "/r.tar.gz", true, []string{"w"}},
		securityDocument{documentOf("SecurityReport"), "CIS", map[cis.Status]int{cis.Fail: 1}, []cis.Result{{ID: "1.1", Title: "t", Status: cis.Fail, Wanted: "w", Found: "f", Do: "d"}}},
		flowDocument{documentOf("FlowReport"), "web", "db", "10.1.0.2", "10.1.1.2", 80, "tcp", true, []netpolicy.Side{{Direction: netpolicy.Ingress, Pod: "shop/db", Node: "n2", Allowed: true, Isolated: true, OwnNode: true, AllowedBy: []string{"shop/p"}, Policies: []string{"shop/p"}}}},
		networkDocument{documentOf("NetworkCheck"), "n1", 1450, []netcheck.Result{{Node: "n2", Address: "10.0.0.2", Tunnel: true, RoundTrip: 5, Problems: []netcheck.Problem{{Code: "port-there", Node: "n2", What: "w", Do: "d"}}}}},
		podSecurityDocument{documentOf("PodSecurityStatus"), podsecurity.Status{Level: "baseline", Namespaces: []podsecurity.Namespace{{Name: "default", Enforce: "baseline", By: "microk8s"}}}},
		podSecurityPlanDocument{documentOf("PodSecurityPlan"), podsecurity.Plan{Level: "baseline", Enforce: []string{"default"}, Exempt: []string{"kube-system"}, Others: []podsecurity.Namespace{{Name: "x", Enforce: "privileged", By: "user"}}, Violations: []podsecurity.Violation{{Namespace: "default", Warnings: []string{"w"}}}}},
		listOf("CertificateList", []listedCert{{"ca.crt", "CA", 3, "2026-12-01T00:00:00Z"}}),
	}
	page, err := os.ReadFile("../../docs/output.md")
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, d := range documents {
		a, out := outputApp(t)
		if err := a.print(&output{value: "json"}, d); err != nil {
			t.Fatal(err)
		}
		var meta documentMeta
		var got, want any
		if err := json.Unmarshal(out.Bytes(), &got); err != nil || json.Unmarshal(out.Bytes(), &meta) != nil {
			t.Fatalf("%v: %s", err, out)
		}
		kinds = append(kinds, meta.Kind)
		golden := filepath.Join("testdata", "output", meta.Kind+".json")
		if *update {
			if err := os.WriteFile(golden, out.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		kept, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(kept, &want); err != nil {
			t.Fatal(err)
		}
		if meta.APIVersion != documentVersion {
			t.Errorf("%s: apiVersion %q", meta.Kind, meta.APIVersion)
		}
		for _, missing := range lacks(got, want, meta.Kind) {
			t.Errorf("what programs rely on has changed: %s", missing)
		}
		if !reflect.DeepEqual(got, want) && !t.Failed() {
			t.Errorf("%s has new fields: keep them with -update, and document them", meta.Kind)
		}
		if !strings.Contains(string(page), "`"+meta.Kind+"`") {
			t.Errorf("docs/output.md does not have the kind %s", meta.Kind)
		}
		// yaml is the same document.
		asJSON := out.String()
		out.Reset()
		if err := a.print(&output{value: "yaml"}, d); err != nil {
			t.Fatal(err)
		}
		back, err := yaml.YAMLToJSON(out.Bytes())
		var again any
		if err != nil || json.Unmarshal(back, &again) != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("as yaml it is %s, as json %s", out, asJSON)
		}
	}
	if entries, err := os.ReadDir("testdata/output"); err != nil || len(entries) != len(kinds) {
		t.Errorf("%d documents are kept, %d are made: %v", len(entries), len(kinds), err)
	}
}

// lacks names what of want is not in got.
func lacks(got, want any, path string) (out []string) {
	switch want := want.(type) {
	case map[string]any:
		have, _ := got.(map[string]any)
		for k, v := range want {
			if _, there := have[k]; !there {
				out = append(out, path+"."+k+" is gone")
				continue
			}
			out = append(out, lacks(have[k], v, path+"."+k)...)
		}
	case []any:
		have, _ := got.([]any)
		if len(have) != len(want) {
			return append(out, fmt.Sprintf("%s has %d items", path, len(have)))
		}
		for i := range want {
			out = append(out, lacks(have[i], want[i], fmt.Sprintf("%s[%d]", path, i))...)
		}
	default:
		if !reflect.DeepEqual(got, want) {
			out = append(out, fmt.Sprintf("%s is %v, was %v", path, got, want))
		}
	}
	return out
}

// TestExitCodesInHelp reads the help of every command, and compares docs/output.md with the table.
func TestExitCodesInHelp(t *testing.T) {
	page, err := os.ReadFile("../../docs/output.md")
	if err != nil {
		t.Fatal(err)
	}
	a, out := outputApp(t)
	for _, c := range a.commands() {
		if c.hidden {
			continue
		}
		for _, e := range c.exits {
			if row := fmt.Sprintf("| `%s` | %d | %s |", c.name, e.code, e.when); !strings.Contains(string(page), row) {
				t.Errorf("docs/output.md lacks the row %s", row)
			}
		}
		if c.raw && !c.ownHelp { // its help is the program's own
			continue
		}
		check := func(args ...string) {
			t.Helper()
			out.Reset()
			if code := a.Main(t.Context(), append([]string{"microk8s"}, args...)); code != 0 {
				t.Fatalf("%v ends with %d: %s", args, code, out)
			}
			_, list, found := strings.Cut(out.String(), "\nExit codes:\n")
			if !found {
				t.Errorf("microk8s %v lists no exit codes:\n%s", args, out)
			}
			for _, e := range c.exitCodes() {
				if !strings.Contains(list, fmt.Sprintf("%3d  %s\n", e.code, e.when)) {
					t.Errorf("microk8s %v lacks %d %s:\n%s", args, e.code, e.when, list)
				}
			}
		}
		check(c.name, "--help")
		walkVisible(c.build(), "", func(path string, _ *cobra.Command) {
			check(append(append([]string{c.name}, strings.Fields(path)...), "--help")...)
			if !strings.Contains(out.String(), "microk8s "+c.name+" "+path) {
				t.Errorf("the help of microk8s %s %s is that of another command:\n%s", c.name, path, out)
			}
		})
	}
}

func TestAsksDocument(t *testing.T) {
	for line, want := range map[string]string{
		"": "", "-o json": "json", "-ojson": "json", "-o=yaml": "yaml", "--output yaml": "yaml", "--output=json": "json",
		"-o table": "", "-o": "", "--output": "", "x -- -o json": "", "--list -o json": "json", "--other json": "",
	} {
		if got, asks := asksDocument(strings.Fields(line)); got != want || asks != (want != "") {
			t.Errorf("%q: %q, %v", line, got, asks)
		}
	}
}
