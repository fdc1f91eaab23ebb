package member

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"microk8s/internal/datastore/storedir"
)

func TestTuning(t *testing.T) {
	for _, tc := range []struct {
		text     string
		want     Tuning
		warnings int
		err      string
	}{
		{text: "", want: DefaultTuning()},
		{text: "snapshot: {threshold: 384, trailing: 1024, strategy: static}\nnetwork-latency: 20ms\n", want: Tuning{384, 1024, false, 20 * time.Millisecond}},
		{text: "snapshot: {threshold: 0, trailing: 1024}", want: Tuning{768, 1024, true, 66 * time.Millisecond}},
		{text: "snapshot: {trailing: 512}", want: Tuning{512, 512, true, 66 * time.Millisecond}},
		{text: "snapshot: {strategy: lazy}\nkine-poll-interval: 1s\nkine-compact-interval: 5m", want: DefaultTuning(), warnings: 3},
		{text: "snapshot: {trailing: 511}", err: "trailing"},
		{text: "snapshot: {threshold: 100}", err: "threshold"},
		{text: "snapshot: {threshold: 600, trailing: 512}", err: "threshold"},
		{text: "network-latency: fast", err: "network-latency"},
		{text: "network-latency: -1s", err: "network-latency"},
		{text: "\t:", err: "yaml"},
	} {
		got, warnings, err := parseTuning([]byte(tc.text))
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: error %v", tc.text, err)
			}
			continue
		}
		if err != nil || got != tc.want || len(warnings) != tc.warnings {
			t.Errorf("%q: %+v, %q, %v", tc.text, got, warnings, err)
		}
	}
}

func TestIdentityRoundTrip(t *testing.T) {
	d := at(t.TempDir())
	want := storedir.Member{ID: 1<<64 - 3, Address: "[fd00::1]:19001", Role: 0}
	if err := d.identify(want); err != nil {
		t.Fatal(err)
	}
	got, ok, err := read(d, storedir.InfoFile, storedir.ParseSelf)
	if err != nil || !ok || got != want {
		t.Errorf("info: %v, %v", got, err)
	}
	list, ok, err := read(d, storedir.ClusterFile, storedir.ParseMembers)
	if err != nil || !ok || len(list) != 1 || list[0] != want {
		t.Errorf("cluster: %v, %v", list, err)
	}
}

// A start that was interrupted after any of its steps is completed by the next.
func TestInitializeIsRepeatable(t *testing.T) {
	for _, tc := range []struct {
		name, init string
		cluster    []string
		node       storedir.Member
	}{
		{"first", "Address: 127.0.0.1:19001\n", nil, storedir.Member{ID: BootstrapID, Address: "127.0.0.1:19001"}},
		{"joining", "Address: 127.0.0.1:19001\nCluster: [10.0.0.1:19001]\n", []string{"10.0.0.1:19001"}, storedir.Member{ID: 7, Address: "127.0.0.1:19001", Role: 2}},
	} {
		files := directory{}.identity(tc.node, tc.cluster)
		for done := range len(files) + 1 {
			d := at(t.TempDir())
			for _, f := range files[:done] {
				if err := d.write(f.name, f.content); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.write(storedir.InitFile, tc.init); err != nil {
				t.Fatal(err)
			}
			if err := d.write(storedir.EncryptionFile, "the installation's key"); err != nil {
				t.Fatal(err)
			}
			got, err := d.prepare(nil)
			known := tc.cluster == nil || done >= 2 // with info.yaml the id is known
			if err != nil || got.Address != tc.node.Address || got.Role != tc.node.Role || got.ID == 0 || known && got != tc.node || d.Has(storedir.InitFile) {
				t.Errorf("%s, after %d files: %v, %v, %t", tc.name, done, got, err, d.Has(storedir.InitFile))
			}
			if d.Has(storedir.JoinFile) != (tc.cluster != nil) {
				t.Errorf("%s: the mark of a joining node: %t", tc.name, d.Has(storedir.JoinFile))
			}
		}
	}
}

func makeBatch(terms ...string) []byte {
	header := binary.LittleEndian.AppendUint64(nil, uint64(len(terms)))
	var data []byte
	for _, e := range terms {
		for len(e)%8 != 0 {
			e += "."
		}
		header = binary.LittleEndian.AppendUint64(header, 1)
		header = append(header, 1, 0, 0, 0)
		header = binary.LittleEndian.AppendUint32(header, uint32(len(e)))
		data = append(data, e...)
	}
	out := binary.LittleEndian.AppendUint32(nil, crc(0, header))
	out = binary.LittleEndian.AppendUint32(out, crc(0, data))
	return append(append(out, header...), data...)
}

func segment(batches ...[]byte) []byte {
	out := binary.LittleEndian.AppendUint64(nil, diskFormat)
	for _, b := range batches {
		out = append(out, b...)
	}
	return out
}

func TestSegments(t *testing.T) {
	a, b := makeBatch("the first", "the second"), makeBatch("the third")
	whole := segment(a, b)
	padded := append(append([]byte(nil), whole...), make([]byte, 4096)...)
	if err := checkClosed(whole, 5, 7); err != nil {
		t.Error(err)
	}
	if good, bad, err := checkOpen(padded); good != 2 || bad != nil || err != nil {
		t.Error(good, bad, err)
	}
	if err := checkClosed(whole, 5, 8); !errors.Is(err, errMissing) {
		t.Error(err)
	}
	if err := checkClosed(whole[:len(whole)-8], 5, 7); err == nil {
		t.Error("a short closed segment was accepted")
	}
	for i := range whole {
		flipped := append([]byte(nil), padded...)
		flipped[i] ^= 0x10
		if checkClosed(flipped[:len(whole)], 5, 7) == nil {
			t.Errorf("closed: the flip at %d was not noticed", i)
		}
		good, bad, err := checkOpen(flipped)
		switch {
		case i < 8+len(a):
			if err == nil {
				t.Errorf("open: the flip at %d, before a good batch, was not noticed", i)
			}
		case good != 1 || bad == nil || err != nil:
			t.Errorf("open: the flip at %d, at the end: %d, %v, %v", i, good, bad, err)
		}
	}
	for n := 8; n < len(whole); n += 8 { // what a crash leaves
		torn := append(append([]byte(nil), whole[:n]...), make([]byte, 4096)...)
		if _, _, err := checkOpen(torn); err != nil {
			t.Errorf("torn at %d: %v", n, err)
		}
	}
}

func TestCheckFiles(t *testing.T) {
	metadata := append(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, diskFormat), 1), make([]byte, 16)...)
	good := segment(makeBatch("x"))
	bad := append([]byte(nil), good...)
	bad[len(bad)-1] ^= 1
	open := func(written []byte) []byte {
		return append(append(make([]byte, 0, openSize), written...), make([]byte, openSize-len(written))...)
	}
	for _, tc := range []struct {
		name  string
		files map[string][]byte
		want  string
	}{
		{"empty", nil, ""},
		{"only prepared segments", map[string][]byte{"open-1": make([]byte, 4096)}, ""},
		{"healthy", map[string][]byte{"0000000000000001-0000000000000001": good, "open-2": open(good), "metadata1": metadata}, ""},
		{"one metadata file torn", map[string][]byte{"open-1": open(good), "metadata1": metadata, "metadata2": nil}, ""},
		{"torn end", map[string][]byte{"open-1": open(bad), "open-2": make([]byte, 64), "metadata1": metadata}, ""},
		{"bad segment before a good one", map[string][]byte{"open-9": open(bad), "open-10": open(good), "metadata1": metadata}, "open-9"},
		{"bad closed segment", map[string][]byte{"0000000000000001-0000000000000001": bad, "metadata1": metadata}, "0000000000000001-0000000000000001"},
		{"zeroed closed segment", map[string][]byte{"0000000000000001-0000000000000001": make([]byte, 100), "metadata1": metadata}, "0000000000000001-0000000000000001"},
		{"open segment about to be closed", map[string][]byte{"open-1": good, "metadata1": metadata}, ""},
		{"open segment cut off", map[string][]byte{"open-1": append(open(good)[:len(good):len(good)], good[8:30]...), "metadata1": metadata}, "open-1"},
		{"no metadata", map[string][]byte{"open-1": open(good)}, "metadata1"},
		{"short metadata", map[string][]byte{"open-1": open(good), "metadata1": metadata[:31]}, "metadata1"},
		{"bad snapshot", map[string][]byte{"snapshot-1-2-3.meta": make([]byte, 40), "metadata1": metadata}, "snapshot-1-2-3.meta"},
	} {
		dir := t.TempDir()
		for name, data := range tc.files {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := CheckFiles(dir)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

// A crash while the end of the log is cut off leaves a segment twice; the shorter one may be
// half written.
func TestFinishCut(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"0000000000000001-0000000000000003": segment(makeBatch("a", "b", "c")),
		"0000000000000004-0000000000000004": segment(makeBatch("d"))[:20],
		"0000000000000004-0000000000000005": segment(makeBatch("d", "e")),
		"0000000000000006-0000000000000006": segment(makeBatch("f")),
		"open-1":                            {},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := finishCut(dir); err != nil {
		t.Fatal(err)
	}
	var left []string
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	want := "0000000000000001-0000000000000003 0000000000000004-0000000000000005 0000000000000006-0000000000000006 open-1"
	if got := strings.Join(left, " "); err != nil || got != want {
		t.Errorf("left: %s, %v", got, err)
	}
}

func FuzzYAML(f *testing.F) {
	for _, s := range []string{"Address: 127.0.0.1:19001\n", "ID: 1\nAddress: a:1\nRole: 0\n", "- Address: a:1\n  ID: 2\n  Role: 1\n", "snapshot: {trailing: 512}", "7\n", "\x00", "&a [*a]"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if tu, _, err := parseTuning(data); err == nil && (tu.Trailing < 512 || tu.Threshold < 384 || tu.Threshold > tu.Trailing || tu.NetworkLatency <= 0) {
			t.Errorf("accepted %+v", tu)
		}
		_, _ = parseFailureDomain(data)
	})
}

func FuzzSegments(f *testing.F) {
	f.Add(segment(makeBatch("a"), makeBatch("b", "c")))
	f.Add([]byte{})
	f.Add(termVote{3, 2, 1}.bytes())
	f.Add(append([]byte(lz4Magic), make([]byte, 32)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _, _ = checkOpen(data)
		_ = checkClosed(data, 1, 1)
		_ = checkSnapshotMeta(data)
		_ = checkSnapshotData(data)
		if v, ok := parseTermVote(data); ok && !bytes.Equal(v.bytes(), data[:metadataSize]) {
			t.Errorf("%+v was read from %x", v, data)
		}
	})
}
