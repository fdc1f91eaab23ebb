package daemon

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/datastore/member"
)

// dqlite runs the tool as scripts do.
func dqlite(p *process, args ...string) (code int, out string) {
	dir := p.cfg.StorageDir
	var buf bytes.Buffer
	base := []string{"-s", "file://" + filepath.Join(dir, "cluster.yaml"), "-c", filepath.Join(dir, "cluster.crt"), "-k", filepath.Join(dir, "cluster.key")}
	code = Tool(append(base, args...), &buf, &buf)
	return code, buf.String()
}

// The tool's answers, to the byte: scripts parse them.
func TestDqliteTool(t *testing.T) {
	t.Chdir(t.TempDir())
	p := start(t, newDir(t))
	info, err := os.ReadFile(filepath.Join(p.cfg.StorageDir, "info.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimPrefix(strings.SplitN(string(info), "\n", 2)[0], "Address: ")
	if _, err := p.client.Put(testContext(t), "/a", "1"); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"-f", "json", "k8s", ".cluster"}, fmt.Sprintf("[\n\t{\n\t\t\"ID\": %d,\n\t\t\"Address\": \"%s\",\n\t\t\"Role\": 0\n\t}\n]\n", member.BootstrapID, address)},
		{[]string{"k8s", ".cluster"}, fmt.Sprintf("%x|%s|voter\n", member.BootstrapID, address)},
		{[]string{"k8s", ".leader"}, address + "\n"},
		{[]string{"k8s", ".weight " + address + " 7; .describe " + address}, address + "|0|7\n"},
		{[]string{"-f", "json", "k8s", ".describe " + address}, "{\n\t\"FailureDomain\": 0,\n\t\"Weight\": 7\n}\n"},
		{[]string{"k8s", ".dump " + address + " k8s"}, "OK\n"},
		{[]string{"k8s", "SELECT name, version FROM log WHERE name = CAST('/a' AS BLOB)"}, "name\tversion\t\n[47 97]\t1\t\n"},
		{[]string{"-f", "json", "k8s", "SELECT version FROM log LIMIT 1"}, "[\n\t{\n\t\t\"version\": 1\n\t}\n]\n"},
	} {
		if code, out := dqlite(p, tc.args...); code != 0 || out != tc.want {
			t.Errorf("%q: %d, %q; want %q", tc.args, code, out, tc.want)
		}
	}
	if db, err := os.ReadFile("k8s"); err != nil || !bytes.HasPrefix(db, []byte("SQLite format 3\x00")) {
		t.Errorf("the dump: %.20q, %v", db, err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"k8s", ".remove " + address}, "only member"},
		{[]string{"k8s", ".remove 127.0.0.1:1"}, "no member has the address"},
		{[]string{"k8s", ".remove"}, "ADDRESS"},
		{[]string{"k8s", ".weight " + address + " heavy"}, "heavy"},
		{[]string{"k8s", ".frob"}, ".frob"},
		{[]string{"k8s", "DELETE FROM log"}, "may write"},
		{[]string{"k8s", "WITH x AS (SELECT 1) DELETE FROM log"}, "query"},
		{[]string{"k8s", "SELECT nothing"}, "nothing"},
		// Errors of a query that runs, not the name of its first column (larger-answers.patch).
		{[]string{"k8s", "SELECT abs(-9223372036854775807 - 1) AS the_column"}, "integer overflow"},
		{[]string{"k8s", "SELECT version, json('no json') FROM log"}, "malformed JSON"},
		{[]string{"-f", "xml", "k8s", ".cluster"}, "xml"},
		{[]string{"k8s"}, "2 arg"},
	} {
		if code, out := dqlite(p, tc.args...); code == 0 || !strings.Contains(out, tc.want) {
			t.Errorf("%q: %d, %q", tc.args, code, out)
		}
	}
	if got := contents(t, p.client)["/a"]; got != "1" {
		t.Errorf("after the refusals: %q", got)
	}
	// Without the cluster's key nobody gets an answer.
	var buf bytes.Buffer
	if code := Tool([]string{"-s", address, "--timeout", "500", "k8s", ".cluster"}, &buf, &buf); code == 0 || !strings.Contains(buf.String(), "no leader was found") {
		t.Errorf("without a key pair: %d, %q", code, &buf)
	}
	p.stop()
	yaml := filepath.Join(p.cfg.StorageDir, "cluster.yaml")
	if code, out := dqlite(p, "k8s", ".reconfigure "+p.cfg.StorageDir+" "+yaml); code != 0 || out != "OK\n" {
		t.Errorf("reconfigure: %d, %q", code, out)
	}
	p = start(t, p.cfg.StorageDir)
	if got := contents(t, p.client)["/a"]; got != "1" {
		t.Errorf("after the reconfiguration: %q", got)
	}
}
