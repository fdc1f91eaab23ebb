package main

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestMain is the program itself where it is to read a Corefile.
func TestMain(m *testing.M) {
	if os.Getenv(checkVar) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestWrongKeysAreLeftOut has keys of coredns-custom with all kinds of mistakes: the others are in force.
func TestWrongKeysAreLeftOut(t *testing.T) {
	const base = ".:1053 {\n  errors\n  cache 30\n  forward . 192.0.2.1\n  import {$MICROK8S_CUSTOM}/*.override\n}\nimport {$MICROK8S_CUSTOM}/*.server\n"
	for _, tc := range []struct {
		name  string
		base  string
		keys  map[string]string
		taken string
		says  map[string]string
	}{
		{"nothing", base, nil, "", nil},
		{"good ones", base, map[string]string{"log.override": "log", "corp.server": "corp.example:1053 {\n forward . 192.0.2.53\n}\n"}, "corp.server log.override", nil},
		{"usual plugins", base, map[string]string{"x.override": "any\nminimal\nnsid x\nbind 127.0.0.1\ndns64 64:ff9b::/96\nmetadata\n", "y.server": "example.test:1053 {\n whoami\n debug\n}\n"}, "x.override y.server", nil},
		{"an unknown plugin", base, map[string]string{"a.override": "autopaht @kubernetes", "b.override": "log"}, "b.override", map[string]string{"a.override": "Unknown directive 'autopaht'"}},
		{"a mistake in a plugin", base, map[string]string{"a.server": "a.test:1053 {\n forward .\n}\n", "b.server": "b.test:1053 {\n whoami\n}\n"}, "b.server", map[string]string{"a.server": "forward"}},
		{"a brace too few", base, map[string]string{"a.server": "a.test:1053 {\n whoami\n", "b.override": "log"}, "b.override", map[string]string{"a.server": ""}},
		{"a plugin that is there", base, map[string]string{"a.override": "cache 60", "b.override": "log"}, "b.override", map[string]string{"a.override": "cache"}},
		{"two of one zone", base, map[string]string{"a.server": "a.test:1053 {\n whoami\n}\n", "b.server": "a.test:1053 {\n whoami\n}\n"}, "a.server", map[string]string{"b.server": "already defined"}},
		{"other keys", base, map[string]string{"README": "not read", "x.txt": "nor this"}, "", nil},
		{"the Corefile itself is wrong", "nonsense {\n nonsense\n}\n" + base, map[string]string{"b.override": "log"}, "b.override", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			corefile, from := filepath.Join(dir, "Corefile"), filepath.Join(dir, "from")
			put := func(file, text string) {
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			put(corefile, tc.base)
			if err := os.Mkdir(from, 0o700); err != nil {
				t.Fatal(err)
			}
			for name, text := range tc.keys {
				put(filepath.Join(from, name), text)
			}
			var left map[string]string
			c := &custom{corefile: corefile, from: from, link: filepath.Join(dir, "taken"), try: tryCorefile(corefile), report: func(l map[string]string) { left = l }}
			if err := c.take(); err != nil {
				t.Fatal(err)
			}
			taken, err := customKeys(c.link)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(slices.Sorted(maps.Keys(taken)), " "); got != tc.taken {
				t.Errorf("in force: %q, want %q", got, tc.taken)
			}
			if len(left) != len(tc.says) {
				t.Errorf("left out: %v, want %v", left, tc.says)
			}
			for name, want := range tc.says {
				if why, ok := left[name]; !ok || !strings.Contains(why, want) {
					t.Errorf("%s: %q, want %q", name, why, want)
				}
			}
			if len(tc.says) == 0 {
				return
			}
			// What is corrected is taken, and what it replaces is gone.
			for name := range tc.says {
				put(filepath.Join(from, name), "")
			}
			if err := c.take(); err != nil || len(left) > 0 {
				t.Errorf("after the correction: %v, left out %v", err, left)
			}
			if old, _ := filepath.Glob(c.link + "-*"); len(old) != 1 {
				t.Errorf("folders: %v", old)
			}
		})
	}
}

// TestNewContainer is a container that starts again in the same pod: what the one before had in force is still there.
func TestNewContainer(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "from")
	if err := os.Mkdir(from, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one.server", "two.server", "three.server"} {
		if err := os.WriteFile(filepath.Join(from, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		c := &custom{from: from, link: filepath.Join(dir, "taken"), try: func(string) error { return nil }, report: func(map[string]string) {}}
		if err := c.take(); err != nil {
			t.Fatal(err)
		}
		keys, err := customKeys(c.link)
		if err != nil || string(keys[name]) != name {
			t.Errorf("after a start with %s in force: %q, %v", name, keys, err)
		}
	}
	if folders, _ := filepath.Glob(filepath.Join(dir, "taken-*")); len(folders) != 1 {
		t.Errorf("left over: %q", folders)
	}
}
