package main

import (
	"maps"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"microk8s/internal/service"
)

const craft = `name: tiny
base: core24
version: v1
summary: s
description: d
confinement: classic
website: https://example.test
contact: [a@example.test]
plugs: {}
platforms: {amd64: , arm64: }
parts: {tiny: {plugin: nil}}
apps:
  tiny: {command: bin/tiny, completer: tiny.bash, aliases: []}
  daemon-a:
    command: bin/tiny a
    daemon: simple
    restart-delay: 1s
    command-chain: [bin/chain]
    passthrough: {new-key: 1}
passthrough: {other: 2}
`

func TestSnapYAML(t *testing.T) {
	got, err := SnapYAML([]byte(craft), "arm64")
	if err != nil {
		t.Fatal(err)
	}
	const want = `apps:
  daemon-a:
    command: bin/tiny a
    command-chain:
    - bin/chain
    daemon: simple
    new-key: 1
    restart-delay: 1s
  tiny:
    command: bin/tiny
    completer: tiny.bash
architectures:
- arm64
assumes:
- command-chain
base: core24
confinement: classic
description: d
grade: stable
links:
  contact:
  - a@example.test
  website:
  - https://example.test
name: tiny
other: 2
summary: s
version: v1
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

func TestMistakesAreFound(t *testing.T) {
	files := map[string]bool{"bin/tiny": true, "bin/chain": true, "tiny.bash": false, "meta/hooks/install": true}
	check := func(craft string, files map[string]bool) error {
		meta, err := SnapYAML([]byte(craft), "amd64")
		if err == nil {
			err = CheckCraft([]byte(craft), "v1")
		}
		if err == nil {
			err = CheckTree(meta, files)
		}
		return err
	}
	good := strings.Replace(craft, "confinement", "grade: devel\nconfinement", 1)
	if err := check(good, files); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ old, new, want string }{
		{"summary: s", "sum-mary: s", `key "summary" is missing`},
		{"summary: s", "summary: s\nsum-mary: s", `key "sum-mary" is not known`},
		{"aliases: []", "alias: [x]", `key "alias" is not known`},
		{"version: v1", "version: v2", `version is "v2", and go.mod has Kubernetes v1`},
		{"summary: s", "summary: " + strings.Repeat("s", 79), "summary has 79 characters"},
		{"grade: devel", "grade: beta", `grade is "beta"`},
		{"core24", "core18", `base is "core18"`},
		{", arm64: ", "", "platforms does not name arm64"},
		{"plugin: nil", "plugin: nill", "plugin nill is not known"},
		{"plugin: nil", "plugin: nil, overide-build: x", `key "overide-build"`},
		{"confinement: classic", "confinement: strict", "confinement strict"},
		{"command: bin/tiny,", "command: bin/tinny,", "there is no bin/tinny"},
		{"command: bin/tiny,", "command: tiny.bash,", "tiny.bash cannot be executed"},
		{"completer: tiny.bash", "completer: tinny.bash", "there is no tinny.bash"},
		{"restart-delay: 1s", "after: [tiny]", `"tiny", which it is ordered by, is no service`},
		{"restart-delay: 1s", "stop-timeout: 1s", "without restart-delay"},
		{"restart-delay: 1s", "restart-delay: 1s\n    plugs: [netwrk]", `plug "netwrk"`},
		{"daemon-a:", "a:", "services, and only they, are called daemon-"},
		{"apps:\n", "apps:\n  no_such: {command: bin/tiny}\n", "does not take this name"},
		{"plugs: {}", "hooks: {remove: {plugs: [network]}}", `hook "remove" is declared and has no file`},
	} {
		text := strings.Replace(good, tc.old, tc.new, 1)
		if text == good {
			t.Fatalf("%q is not in the text", tc.old)
		}
		if err := check(text, files); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: the error is %v, want one with %q", tc.new, err, tc.want)
		}
	}
	for _, tc := range []struct {
		hook       string
		executable bool
		want       string
	}{
		{"instal", true, "one that snapd never calls"},
		{"connect-plug-netwrk", true, "one that snapd never calls"},
		{"remove", false, "cannot be executed"},
	} {
		more := maps.Clone(files)
		more["meta/hooks/"+tc.hook] = tc.executable
		if err := check(good, more); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("hook %s: the error is %v, want one with %q", tc.hook, err, tc.want)
		}
	}
}

// The snap's own file: what its services and commands are called is known to users, and to
// internal/service.
func TestNamesOfTheProduct(t *testing.T) {
	if err := Check("../..", "amd64"); err != nil {
		t.Error(err)
	}
	data, err := os.ReadFile("../../snapcraft.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var in struct {
		Apps map[string]struct{ Command, Daemon string }
	}
	if err := yaml.Unmarshal(data, &in); err != nil {
		t.Fatal(err)
	}
	for name, app := range in.Apps {
		want := "bin/microk8s " + strings.Replace(name, "daemon-", "daemon ", 1)
		if name == "microk8s" {
			want = "bin/microk8s"
		}
		if app.Command != want {
			t.Errorf("app %s runs %q, want %q", name, app.Command, want)
		}
	}
	for _, s := range service.Names() {
		if in.Apps["daemon-"+s].Daemon == "" {
			t.Errorf("there is no service daemon-%s", s)
		}
	}
	for _, s := range []string{"add-node", "config", "ctr", "dbctl", "disable", "enable", "helm", "helm3", "inspect", "join", "kubectl", "leave", "refresh-certs", "remove-node", "reset", "start", "status", "stop", "version"} {
		if _, ok := in.Apps[s]; !ok {
			t.Errorf("there is no app %s", s)
		}
	}
}
