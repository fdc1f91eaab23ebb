package registryhosts

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// containerd 2.2.9 pulls from the original registry with each of these but the good ones, or
// fails, and says so in its log at most.
func TestCheck(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"a mirror", "server = \"https://registry-1.docker.io\"\n[host.\"http://n2:5000\"]\ncapabilities = [\"pull\", \"resolve\"]\n", ""},
		{"everything", "server = \"https://a.test\"\n[host.\"https://b.test/v2/x\"]\ncapabilities = [\"pull\", \"resolve\", \"push\"]\noverride_path = true\nskip_verify = true\nca = \"ca.crt\"\nclient = [[\"c.crt\", \"c.key\"]]\ndial_timeout = \"3s\"\n[host.\"https://b.test/v2/x\".header]\nx-key = \"v\"\n", ""},
		{"without a scheme", "[host.\"n2:5000\"]\n", ""},
		{"empty", "", ""},
		{"no TOML", "[host.\"http://n2:5000\"\ncapabilities = []\n", "x/hosts.toml:1: "},
		{"an unknown capability", "[host.\"http://n2:5000\"]\ncapabilities = [\"pull\", \"resolv\"]\n", "unknown capability resolv"},
		{"a wrong type", "server = \"https://a.test\"\n[host.\"http://n2:5000\"]\ncapabilities = \"pull\"\n", "x/hosts.toml:3: "},
		{"a time that is none", "[host.\"http://n2:5000\"]\ndial_timeout = \"soon\"\n", "soon"},
		{"a key twice", "server = \"https://a.test\"\nserver = \"https://b.test\"\n", "x/hosts.toml"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := Check("x/hosts.toml", []byte(tc.text))
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error is %v, want %q", err, tc.want)
			}
		})
	}
}

// On a node, what the files name has to be there as well.
func TestCheckAll(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"docker.io":        "server = \"https://a.test\"\n",
		"broken.test":      "server = [\n",
		"typo.test":        "server = \"https://a.test\"\n[host.\"http://n2:5000\"]\nskipverify = true\n",
		"localhost__32000": "[host.\"http://127.0.0.1:32000\"]\nca = \"none.crt\"\n",
	} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name, "hosts.toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	errs := CheckAll(root)
	if len(errs) != 3 || !strings.Contains(errs[0].Error(), "broken.test/hosts.toml:") || !strings.Contains(errs[1].Error(), "none.crt") ||
		!strings.Contains(errs[2].Error(), "typo.test/hosts.toml:3: containerd does not know the key host.http://n2:5000.skipverify") {
		t.Errorf("found %v", errs)
	}
	if errs := CheckAll("../../snap/local/default-args/certs.d"); len(errs) > 0 {
		t.Errorf("the files that are shipped: %v", errs)
	}
}
