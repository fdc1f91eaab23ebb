package main

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// smallDatabase writes a database of one entry in the form of https://go.dev/doc/security/vuln/database:
// every version of a module has a hole.
func smallDatabase(t *testing.T, module string) string {
	t.Helper()
	dir := t.TempDir()
	const id, day = "GO-2099-0001", "2099-01-01T00:00:00Z"
	for name, v := range map[string]any{
		"index/db.json":      map[string]any{"modified": day},
		"index/modules.json": []any{map[string]any{"path": module, "vulns": []any{map[string]any{"id": id, "modified": day}}}},
		"index/vulns.json":   []any{map[string]any{"id": id, "modified": day}},
		"ID/" + id + ".json": map[string]any{
			"schema_version": "1.3.1", "id": id, "modified": day, "published": day,
			"summary": "a hole for the test", "details": "a hole for the test",
			"affected": []any{map[string]any{
				"package":            map[string]any{"name": module, "ecosystem": "Go"},
				"ranges":             []any{map[string]any{"type": "SEMVER", "events": []any{map[string]any{"introduced": "0"}}}},
				"ecosystem_specific": map[string]any{},
			}},
			"database_specific": map[string]any{"url": "https://pkg.go.dev/vuln/" + id, "review_status": "REVIEWED"},
		},
	} {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestFindsAKnownHole checks a real program of ours, built as for a release, with a database in
// a folder and in a zip file.
func TestFindsAKnownHole(t *testing.T) {
	program := filepath.Join(t.TempDir(), "host-access")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program, "./cmd/host-access")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const linked = "github.com/vishvananda/netlink"
	folder := smallDatabase(t, linked)
	packed := filepath.Join(t.TempDir(), "vulndb.zip")
	f, err := os.Create(packed)
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	if err := z.AddFS(os.DirFS(folder)); err != nil || z.Close() != nil || f.Close() != nil {
		t.Fatal("cannot pack the database", err)
	}
	for _, tc := range []struct {
		name, db string
		found    bool
	}{
		{"a folder", folder, true},
		{"a zip file", packed, true},
		{"of a module that is not linked", smallDatabase(t, "example.test/other"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			found, err := run("../..", tc.db, []string{program}, &out)
			if err != nil || found != tc.found || strings.Contains(out.String(), "GO-2099-0001") != tc.found {
				t.Errorf("found is %v, %v\n%s", found, err, &out)
			}
		})
	}
}

// TestWithoutDatabase: what was not looked at is not called good.
func TestWithoutDatabase(t *testing.T) {
	for name, db := range map[string]string{"no folder": filepath.Join(t.TempDir(), "none"), "another folder": t.TempDir(), "nobody": "http://127.0.0.1:1"} {
		t.Run(name, func(t *testing.T) {
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			if found, err := run("../..", db, []string{self}, &bytes.Buffer{}); err == nil {
				t.Errorf("found is %v, without an error", found)
			}
		})
	}
}
