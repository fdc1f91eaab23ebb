package place

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// behaves is what every place does.
func behaves(t *testing.T, p Place) {
	t.Helper()
	ctx := t.Context()
	put := func(name, text string) {
		t.Helper()
		if err := p.Put(ctx, name, strings.NewReader(text), int64(len(text))); err != nil {
			t.Fatal(err)
		}
	}
	put("b.json", "1")
	put("a.tar", strings.Repeat("x", 1<<20))
	put("b.json", "2")
	list, err := p.List(ctx)
	var names []string
	for _, e := range list {
		names = append(names, e.Name)
	}
	if err != nil || !slices.Equal(names, []string{"a.tar", "b.json"}) || list[0].Size != 1<<20 {
		t.Errorf("%+v, %v", list, err)
	}
	r, err := p.Get(ctx, "b.json")
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	r.Close()
	if err != nil || string(data) != "2" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := p.Get(ctx, "c"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
	for _, bad := range []string{"", "../x", "a/b", ".hidden"} {
		if err := p.Put(ctx, bad, strings.NewReader(""), 0); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q was stored: %v", bad, err)
		}
	}
	// One that breaks off is not there.
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := p.Put(gone, "c", bytes.NewReader(make([]byte, 100)), 100); err == nil {
		t.Error("an interrupted one was stored")
	}
	if err := p.Put(ctx, "c", strings.NewReader("short"), 100); err == nil {
		t.Error("a short one was stored")
	}
	if _, err := p.Get(ctx, "c"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what broke off: %v", err)
	}
	for range 2 {
		if err := p.Remove(ctx, "a.tar"); err != nil {
			t.Error(err)
		}
	}
	if list, err := p.List(ctx); err != nil || len(list) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "backups")
	p, err := Open(dir, Keys{})
	if err != nil {
		t.Fatal(err)
	}
	behaves(t, p)
	st, err := os.Stat(filepath.Join(dir, "b.json"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("others may read it: %v, %v", st.Mode(), err)
	}
	// What a writer that was killed has left goes away, after a day.
	old := filepath.Join(dir, partly+"1")
	if err := os.WriteFile(old, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(old, time.Now(), time.Now().Add(-2*staleAfter)); err != nil {
		t.Fatal(err)
	}
	if err := p.Put(t.Context(), "d", strings.NewReader(""), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}
	// A network file system that is not mounted is not replaced by the disk of this machine.
	p, err = Open("nfs:"+t.TempDir(), Keys{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Put(t.Context(), "a", strings.NewReader(""), 0); err == nil || !strings.Contains(err.Error(), "mount") {
		t.Errorf("not mounted: %v", err)
	}
}

func TestCheck(t *testing.T) {
	for word, says := range map[string]string{
		"/var/backups":     "",
		"nfs:/mnt/backups": "",
		"s3://backups/home?endpoint=https://s3.example:9000&region=eu": "",
		"":                                       "no place",
		"backups":                                "beginning with /",
		"nfs:backups":                            "beginning with /",
		"s3://backups":                           "endpoint=",
		"s3://b?endpoint=https://h":              "not the name of a bucket",
		"s3://key:secret@b-1?endpoint=https://h": "--s3-credentials-file",
		"s3://b-1?endpoint=ftp://h":              "endpoint=",
		"s3://b-1?endpoint=https://h&secret=x":   "unknown option",
	} {
		err := Check(word)
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", word, err, says)
		}
	}
	if _, err := Open("s3://b-1?endpoint=https://h", Keys{}); err == nil || !strings.Contains(err.Error(), "--s3-credentials-file") {
		t.Errorf("without keys: %v", err)
	}
}
