package archive

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"microk8s/internal/datastore/backup"
)

func TestMain(m *testing.M) {
	workFactor = 10 // a passphrase is stretched in milliseconds
	os.Exit(m.Run())
}

func keys(t testing.TB, n int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	w, err := backup.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if err := w.Add(backup.Pair{Key: fmt.Appendf(nil, "/k/%d", i), Value: bytes.Repeat([]byte{byte(i)}, i)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Close(9, time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func sealed(t testing.TB, s Seal) (data []byte, who age.Identity) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.key")
	if err := os.WriteFile(file, []byte("secret key"), 0o600); err != nil {
		t.Fatal(err)
	}
	to, who, err := s.Open()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	m := &Manifest{Name: "n", Cluster: "01234567"}
	if err := Write(t.Context(), &out, m, keys(t, 20), map[string]string{"certs/ca.key": file}, to...); err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), who
}

func TestRoundTrip(t *testing.T) {
	file, recipient, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]Seal{"passphrase": {Passphrase: "correct horse battery"}, "recipient": {Recipients: []string{recipient}}} {
		t.Run(name, func(t *testing.T) {
			data, once := sealed(t, s)
			if bytes.Contains(data, []byte("secret key")) {
				t.Error("it can be read by everybody")
			}
			owner, err := Identities(strings.NewReader(file), false)
			if s.Passphrase != "" {
				owner, err = Identities(strings.NewReader(s.Passphrase+"\n"), true)
			}
			if err != nil {
				t.Fatal(err)
			}
			for who, id := range map[string]age.Identity{"its maker": once, "its owner": owner[0]} {
				o, err := Read(t.Context(), bytes.NewReader(data), filepath.Join(t.TempDir(), "o"), id)
				if err != nil {
					t.Fatalf("%s: %v", who, err)
				}
				got, err := os.ReadFile(o.File("certs/ca.key"))
				if err != nil || string(got) != "secret key" || o.Manifest.Datastore.Keys != 20 || o.Manifest.Datastore.Revision != 9 {
					t.Errorf("%q, %+v, %v", got, o.Manifest, err)
				}
			}
			other, err := age.GenerateX25519Identity()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Read(t.Context(), bytes.NewReader(data), filepath.Join(t.TempDir(), "o"), other); err == nil || errors.Is(err, ErrDamaged) {
				t.Errorf("with another key: %v", err)
			}
		})
	}
}

// TestDamage: a byte changed anywhere, or an end that is missing, is found.
func TestDamage(t *testing.T) {
	_, recipient, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	data, who := sealed(t, Seal{Recipients: []string{recipient}})
	read := func(data []byte) error {
		_, err := Read(t.Context(), bytes.NewReader(data), filepath.Join(t.TempDir(), "o"), who)
		return err
	}
	if err := read(data); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(data); at += 1 + len(data)/40 {
		changed := bytes.Clone(data)
		changed[at] ^= 0x10
		if read(changed) == nil {
			t.Fatalf("byte %d was changed, and nothing found", at)
		}
		if at < len(data)-1 && read(data[:at]) == nil {
			t.Fatalf("it was cut off at %d, and nothing found", at)
		}
	}
}

func TestSeal(t *testing.T) {
	for _, s := range []Seal{{}, {Passphrase: "short"}, {Recipients: []string{"age1x"}}, {Passphrase: "correct horse battery", Recipients: []string{"age1x"}}} {
		if s.Check() == nil {
			t.Errorf("taken: %+v", s)
		}
	}
}

func TestNames(t *testing.T) {
	at := time.Date(2026, 11, 29, 0, 17, 51, 0, time.UTC)
	id := ClusterID([]byte("ca\n"))
	cluster, created, ok := ParseName(NewName(id, at))
	if !ok || cluster != id || !created.Equal(at) {
		t.Errorf("%s, %s, %v", cluster, created, ok)
	}
	for _, bad := range []string{"", "x", "microk8s-0123-20261129T001751Z.tar.gz.age", "../" + NewName(id, at), NewName(id, at) + ".json"} {
		if _, _, ok := ParseName(bad); ok {
			t.Errorf("taken: %q", bad)
		}
	}
}

func FuzzParseNote(f *testing.F) {
	n := Note{Format: format, Name: NewName("01234567", time.Unix(1e9, 0)), Proven: time.Unix(1e9, 0), Keys: 1}
	data, err := n.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := ParseNote(data)
		if err == nil && n.Keys <= 0 {
			t.Error("an empty archive was taken")
		}
	})
}
