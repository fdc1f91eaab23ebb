package storedir

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestFormats holds the bytes of the files, which upstream's daemon and tools read, too.
func TestFormats(t *testing.T) {
	one := Member{ID: 3297041220608546238, Address: "127.0.0.1:19001"}
	six := Member{ID: 1<<64 - 3, Address: "[fd00::1]:19001", Role: Spare}
	init := func(i Init) string {
		data, err := i.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for _, tc := range []struct{ name, got, want string }{
		{"info.yaml", string(EncodeSelf(one)), "Address: 127.0.0.1:19001\nID: 3297041220608546238\nRole: 0\n"},
		{"cluster.yaml", string(EncodeMembers([]Member{one, six})), "- Address: 127.0.0.1:19001\n  ID: 3297041220608546238\n  Role: 0\n" +
			"- Address: '[fd00::1]:19001'\n  ID: 18446744073709551613\n  Role: 2\n"},
		{"init.yaml", init(Init{Address: FirstAddress}), "Address: 127.0.0.1:19001\n"},
		{"init.yaml of one that joins", init(Init{Address: "[fd00::1]:19001", Cluster: []string{"10.0.0.1:19001", "[fd00::2]:19001"}}),
			"Address: '[fd00::1]:19001'\nCluster:\n- 10.0.0.1:19001\n- '[fd00::2]:19001'\n"},
	} {
		if tc.got != tc.want {
			t.Errorf("%s is %q, want %q", tc.name, tc.got, tc.want)
		}
	}
	if got, err := ParseMembers(EncodeMembers([]Member{one, six})); err != nil || !slices.Equal(got, []Member{one, six}) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := ParseSelf(EncodeSelf(six)); err != nil || got != six {
		t.Errorf("%v, %v", got, err)
	}
}

func TestDamagedFiles(t *testing.T) {
	for _, tc := range []struct{ file, text, want string }{
		{InfoFile, "Address: 10.0.0.1:19001\nID: 1\n", "Role is missing"},
		{InfoFile, "Address: 10.0.0.1:19001\nRole: 0\n", "ID is missing"},
		{InfoFile, "Address: 10.0.0.1\nID: 1\nRole: 0\n", `"10.0.0.1" is not host:port`},
		{InfoFile, "Address: 10.0.0.1:19001\nID: 1\nRole: 3\n", "Role is 3"},
		{InfoFile, "\x00", "correct the file"},
		{ClusterFile, "", "it lists no member"},
		{ClusterFile, "- ID: 1\n", "Address is empty"},
		{ClusterFile, "{", "correct the file"},
	} {
		d := Dir(t.TempDir())
		if err := os.WriteFile(d.File(tc.file), []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := d.Self()
		if tc.file == ClusterFile {
			_, err = d.Members()
		}
		if err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), d.File(tc.file)) {
			t.Errorf("%s %q: %v, want %q", tc.file, tc.text, err, tc.want)
		}
		if d.Port() != DefaultPort || d.Address() != "" || len(d.Addresses()) > 0 || !d.Used() {
			t.Errorf("%s %q: %d, %q, %q", tc.file, tc.text, d.Port(), d.Address(), d.Addresses())
		}
	}
}

func TestDir(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "backend"))
	write := func(path string, data []byte) error { return os.WriteFile(path, data, 0o600) }
	if _, err := d.Self(); !errors.Is(err, fs.ErrNotExist) || d.Used() || d.Address() != "" || d.Port() != DefaultPort {
		t.Errorf("a directory that is not there: %v", err)
	}
	if err := os.Mkdir(string(d), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.Begin(Init{Address: "10.0.0.1:20001", Cluster: []string{"10.0.0.2:20001"}}, write); err != nil {
		t.Fatal(err)
	}
	if d.Used() || d.Address() != "10.0.0.1:20001" || d.Port() != 20001 {
		t.Errorf("before the first start: %q, %d", d.Address(), d.Port())
	}
	if got := d.Known(); !slices.Equal(got, []Member{{Address: "10.0.0.1:20001"}}) {
		t.Errorf("before the first start: %v", got)
	}
	self := Member{ID: 7, Address: "[fd00::1]:20002", Role: Voter}
	for name, data := range map[string][]byte{InfoFile: EncodeSelf(self), ClusterFile: EncodeMembers([]Member{{ID: 8, Address: "10.0.0.2:20001"}, self})} {
		if err := write(d.File(name), data); err != nil {
			t.Fatal(err)
		}
	}
	if got := d.Known(); len(got) != 2 {
		t.Errorf("of two: %v", got)
	}
	if got, err := d.Self(); err != nil || got != self || got.Host() != "fd00::1" || got.OnLoopback() {
		t.Errorf("%v, %v", got, err)
	}
	if got := d.Addresses(); !d.Used() || d.Port() != 20002 || !slices.Equal(got, []string{"10.0.0.2:20001", "[fd00::1]:20002"}) {
		t.Errorf("%q, port %d", got, d.Port())
	}
	if err := d.Move("127.0.0.1:20002", write); err != nil || !d.Has(UpdateFile) {
		t.Error(err)
	}
	if data, err := os.ReadFile(d.File(UpdateFile)); err != nil || string(data) != "Address: 127.0.0.1:20002\n" {
		t.Errorf("%q, %v", data, err)
	}
	if err := d.Move("nowhere", write); err == nil {
		t.Error("an address without a port was written")
	}
	if !(Member{Address: FirstAddress}).OnLoopback() || !(Member{Address: "[::1]:1"}).OnLoopback() || (Member{Address: "x:1"}).OnLoopback() {
		t.Error("loopback addresses")
	}
}

func FuzzFiles(f *testing.F) {
	for _, s := range []string{"Address: 127.0.0.1:19001\n", "ID: 1\nAddress: a:1\nRole: 0\n", "- Address: a:1\n  ID: 2\n  Role: 1\n", "\x00", "&a [*a]"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if i, err := ParseInit(data); err == nil {
			text, err := i.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if back, err := ParseInit(text); err != nil || back.Address != i.Address || !slices.Equal(back.Cluster, i.Cluster) {
				t.Errorf("%+v is written as %q", i, text)
			}
		}
		if m, err := ParseSelf(data); err == nil {
			if back, err := ParseSelf(EncodeSelf(m)); err != nil || back != m {
				t.Errorf("%+v is written as %q", m, EncodeSelf(m))
			}
		}
		_, _ = ParseMembers(data)
	})
}
