package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/longtest"
)

func pass(p string) func() (string, error) { return func() (string, error) { return p, nil } }

// release makes a key and two signed files.
func release(t *testing.T) (dir, key string, files []string) {
	t.Helper()
	dir = t.TempDir()
	key = filepath.Join(dir, "mine")
	if err := makeKey(key, pass("")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"a.snap": "a snap", "a.spdx.json": "{}"} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	if err := sign(key+".key", pass(""), "1", files); err != nil {
		t.Fatal(err)
	}
	return dir, key, files
}

func TestSignAndVerify(t *testing.T) {
	_, key, files := release(t)
	var out bytes.Buffer
	if err := verify(&out, key+".pub", files); err != nil || strings.Count(out.String(), ": good\n") != 2 {
		t.Errorf("%v\n%s", err, &out)
	}
	one, err := os.ReadFile(files[0] + ".minisig")
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(key+".key", pass(""), "1", files); err != nil {
		t.Fatal(err)
	}
	if two, _ := os.ReadFile(files[0] + ".minisig"); !bytes.Equal(one, two) {
		t.Error("signing again made another signature")
	}
}

func TestWhatIsWrongIsRefused(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		spoil      func(t *testing.T, dir string, file string) (public string)
	}{
		{"a changed byte", "file or signature was changed", func(t *testing.T, _, file string) string { return flip(t, file, 0) }},
		{"a byte more", "file or signature was changed", func(t *testing.T, _, file string) string {
			f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteString("x")
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			return ""
		}},
		{"a changed signature", "", func(t *testing.T, _, file string) string {
			text, err := os.ReadFile(file + ".minisig")
			if err != nil {
				t.Fatal(err)
			}
			return flip(t, file+".minisig", bytes.IndexByte(text, '\n')+20)
		}},
		{"a changed comment", "file or signature was changed", func(t *testing.T, _, file string) string {
			text, err := os.ReadFile(file + ".minisig")
			if err != nil {
				t.Fatal(err)
			}
			return flip(t, file+".minisig", bytes.Index(text, []byte("timestamp:1"))+10)
		}},
		{"another file's signature", "is that of a file called a.s", func(t *testing.T, dir, file string) string {
			for _, ending := range []string{"", ".minisig"} {
				if err := os.Rename(file+ending, filepath.Join(dir, "old.snap"+ending)); err != nil {
					t.Fatal(err)
				}
			}
			return ""
		}},
		{"no signature", "there is no signature", func(t *testing.T, _, file string) string {
			os.Remove(file + ".minisig")
			return ""
		}},
		{"another key", "signed with another key", func(t *testing.T, dir, _ string) string {
			if err := makeKey(filepath.Join(dir, "other"), pass("")); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(dir, "other.pub")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, key, files := release(t)
			public := tc.spoil(t, dir, files[0])
			if public == "" {
				public = key + ".pub"
			}
			if _, err := os.Stat(files[0]); err != nil {
				files[0] = filepath.Join(dir, "old.snap")
			}
			if err := verify(io.Discard, public, files); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want one with %q", err, tc.want)
			}
		})
	}
}

// flip changes one bit of a file.
func flip(t *testing.T, file string, at int) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data[at] ^= 1
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return ""
}

func TestKeys(t *testing.T) {
	dir, key, files := release(t)
	if err := makeKey(key, pass("")); err == nil {
		t.Error("a key was replaced by another")
	}
	if fi, err := os.Stat(key + ".key"); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the private key's mode: %v, %v", fi.Mode(), err)
	}
	if !longtest.Enabled() {
		return // the rest takes a gigabyte of memory and seconds, so that guessing passwords does
	}
	locked := filepath.Join(dir, "locked")
	if err := makeKey(locked, pass("secret")); err != nil {
		t.Fatal(err)
	}
	if err := sign(locked+".key", pass("wrong"), "", files[:1]); err == nil {
		t.Error("signed with the wrong password")
	}
	if err := sign(locked+".key", pass("secret"), "", files[:1]); err != nil {
		t.Error(err)
	}
}
