package member

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/datastore/storedir"
)

func TestTermAndVoteAreCompared(t *testing.T) {
	for _, tc := range []struct {
		name  string
		after func(write func(name string, data []byte))
		err   string
	}{
		{"nothing happened", func(func(string, []byte)) {}, ""},
		{"a new vote, after a crash", func(w func(string, []byte)) { w("metadata1", termVote{5, 8, 3}.bytes()) }, ""},
		{"a torn new vote", func(w func(string, []byte)) { w("metadata1", termVote{5, 8, 3}.bytes()[:20]) }, ""},
		{"a flipped term", func(w func(string, []byte)) { w("metadata2", termVote{4, 7 ^ 64, 2}.bytes()) }, "damaged"},
		{"a flipped vote", func(w func(string, []byte)) { w("metadata2", termVote{4, 7, 3}.bytes()) }, "damaged"},
		{"the newer one lost", func(w func(string, []byte)) { w("metadata2", nil) }, "damaged"},
		{"both lost", func(w func(string, []byte)) { w("metadata1", nil); w("metadata2", nil) }, "lost"},
		{"a lower term", func(w func(string, []byte)) { w("metadata1", termVote{5, 6, 3}.bytes()) }, "damaged"},
		{"the copy flipped", func(w func(string, []byte)) { w(termFile, append(termVote{4, 7, 9}.bytes(), 0, 0, 0, 0)) }, "remove this file"},
		{"the copy cut", func(w func(string, []byte)) { w(termFile, termVote{4, 7, 2}.bytes()) }, "remove this file"},
		{"the copy removed", func(w func(string, []byte)) { w(termFile, nil) }, ""},
	} {
		dir := t.TempDir()
		write := func(name string, data []byte) {
			path := filepath.Join(dir, name)
			if data == nil {
				os.Remove(path)
			} else if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("metadata1", termVote{3, 7, 1}.bytes())
		write("metadata2", termVote{4, 7, 2}.bytes())
		if err := rememberTerm(dir); err != nil {
			t.Fatal(err)
		}
		tc.after(write)
		err := checkTerm(dir)
		if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestUnborn(t *testing.T) {
	first := termVote{1, 1, 0}.bytes()
	for _, tc := range []struct {
		name  string
		files map[string][]byte
		want  bool
	}{
		{"an interrupted first start", map[string][]byte{"metadata1": first, storedir.InfoFile: nil, "dqlite-lock": nil}, true},
		{"nothing yet", nil, false},
		{"a finished one", map[string][]byte{"metadata1": first, "0000000000000001-0000000000000001": nil}, false},
		{"a segment in use", map[string][]byte{"metadata1": first, "open-1": nil}, false},
		{"a snapshot", map[string][]byte{"metadata1": first, "snapshot-1-1-1": nil}, false},
		{"a member that has voted", map[string][]byte{"metadata1": termVote{1, 1, 7}.bytes()}, false},
		{"a later term", map[string][]byte{"metadata1": first, "metadata2": termVote{2, 2, 1}.bytes()}, false},
		{"a copy of the term", map[string][]byte{"metadata1": first, termFile: nil}, false},
	} {
		dir := t.TempDir()
		for name, data := range tc.files {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := unborn(dir); err != nil || got != tc.want {
			t.Errorf("%s: %t, %v", tc.name, got, err)
		}
	}
}
