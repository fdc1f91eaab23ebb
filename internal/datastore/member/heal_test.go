package member

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"microk8s/internal/datastore/storedir"
)

// loads says how dqlite reads closed files (uvLoadSnapshotAndEntries of its raft/uv.c): from which entry on its
// log is whole, and which entry it takes the first one of an open segment for.
func (c closedFiles) loads() (open uint64, ok bool) {
	from := uint64(0)
	if n := len(c.snapshots); n > 0 {
		from = c.snapshots[n-1].index
	}
	if len(c.segments) == 0 {
		return from + 1, true
	}
	i := len(c.segments) - 1
	for i > 0 && c.segments[i-1].last == c.segments[i].first-1 {
		i--
	}
	if len(c.snapshots) == 0 && (i > 0 || c.segments[0].first != 1) || c.segments[i].first > from+1 {
		return 0, false
	}
	return c.segments[len(c.segments)-1].last + 1, true
}

// TestSuperfluous has random logs with random damage: without the files that are called superfluous dqlite
// reads the same log to the same end, from files that are whole.
func TestSuperfluous(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	bad := errors.New("bad")
	healed, not := 0, 0
	for range 20000 {
		var c closedFiles
		last := uint64(0)
		for range rnd.IntN(6) {
			n := 1 + rnd.Uint64N(9)
			c.segments = append(c.segments, closedSegment{name: fmt.Sprintf("%d-%d", last+1, last+n), first: last + 1, last: last + n})
			last += n
		}
		for i := range uint64(rnd.IntN(3)) { // also within the open segment
			index := 1 + rnd.Uint64N(last+6)
			if n := len(c.snapshots); n == 0 || c.snapshots[n-1].index < index {
				c.snapshots = append(c.snapshots, closedSnapshot{name: fmt.Sprint("s", index), term: 1, index: index, stamp: i})
			}
		}
		if n := len(c.snapshots); n > 0 && len(c.segments) > 0 { // what a snapshot covers may be gone
			c.segments = c.segments[rnd.IntN(len(c.segments)):]
		}
		open, ok := c.loads()
		if !ok {
			continue
		}
		for i := range c.segments {
			if rnd.IntN(4) == 0 {
				c.segments[i].bad = bad
			}
		}
		for i := range c.snapshots {
			if rnd.IntN(4) == 0 {
				c.snapshots[i].bad, c.snapshots[i].file = bad, c.snapshots[i].name
			}
		}
		names, ok := c.superfluous()
		if !ok {
			not++
			continue
		}
		healed++
		rest := closedFiles{
			segments:  slices.DeleteFunc(slices.Clone(c.segments), func(s closedSegment) bool { return slices.Contains(names, s.name) }),
			snapshots: slices.DeleteFunc(slices.Clone(c.snapshots), func(s closedSnapshot) bool { return slices.Contains(names, s.name) }),
		}
		if name, err := rest.damaged(); err != nil {
			t.Fatalf("%+v without %q: %s: %v", c, names, name, err)
		}
		if again, ok := rest.loads(); !ok || again != open {
			t.Fatalf("%+v without %q: an open segment began with entry %d, and begins with %d now (%v)", c, names, open, again, ok)
		}
	}
	if healed < 500 || not < 500 {
		t.Errorf("%d logs could be healed so, and %d not", healed, not)
	}
}

// TestIdentityIsRestored: files that say who a member is, and cannot be read, are replaced by their copies.
func TestIdentityIsRestored(t *testing.T) {
	self := storedir.Member{ID: 77, Address: "127.0.0.1:19001"}
	for name, tc := range map[string]struct {
		file    string
		content string // "-" removes it
		stays   bool
	}{
		"who it is, empty":        {storedir.InfoFile, "", false},
		"who it is, cut":          {storedir.InfoFile, "Address: 127.0.0.1:19001\nID: 7\n", false},
		"who it is, removed":      {storedir.InfoFile, "-", false},
		"another digit":           {storedir.InfoFile, "Address: 127.0.0.1:19001\nID: 79\nRole: 0\n", false},
		"another role":            {storedir.InfoFile, "Address: 127.0.0.1:19001\nID: 77\nRole: 2\n", true},
		"another machine's":       {storedir.InfoFile, "Address: 127.0.0.2:19001\nID: 9\nRole: 0\n", true},
		"who the others are":      {storedir.ClusterFile, "\x00\x00", false},
		"the others, by somebody": {storedir.ClusterFile, "- {Address: '127.0.0.1:19001', ID: 77, Role: 0}\n", true},
	} {
		t.Run(name, func(t *testing.T) {
			d := at(t.TempDir())
			if err := d.identify(self); err != nil {
				t.Fatal(err)
			}
			path := d.File(tc.file)
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if tc.stays {
				want = []byte(tc.content)
			}
			if tc.content == "-" {
				err = os.Remove(path)
			} else {
				err = os.WriteFile(path, []byte(tc.content), 0o660)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := d.restoreIdentity(slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); err != nil || string(got) != string(want) {
				t.Errorf("%q, %v, want %q", got, err, want)
			}
			kept, err := filepath.Glob(d.File(".damaged-*"))
			if err != nil || (len(kept) > 0) == tc.stays {
				t.Errorf("kept: %q, %v", kept, err)
			}
		})
	}
}

// TestReseedIsFinished: a start after an interrupted reseed finishes it, wherever it was interrupted.
func TestReseedIsFinished(t *testing.T) {
	for _, moved := range []bool{false, true} {
		d := at(t.TempDir())
		for _, name := range []string{storedir.InfoFile, "metadata1", "open-1"} {
			if err := os.WriteFile(d.File(name), []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if moved {
			if _, err := d.quarantine([]string{storedir.InfoFile, "metadata1"}); err != nil {
				t.Fatal(err)
			}
		}
		data, err := storedir.Init{Address: "127.0.0.1:1", Cluster: []string{"127.0.0.1:2"}}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := d.write(storedir.ReseedFile, string(data)); err != nil {
			t.Fatal(err)
		}
		if _, found, err := d.finishReseed(); !found || err != nil {
			t.Fatalf("%v, %v", found, err)
		}
		ini, ok, err := read(d, storedir.InitFile, storedir.ParseInit)
		if err != nil || !ok || ini.Address != "127.0.0.1:1" || d.Has("open-1") || d.Has(storedir.ReseedFile) {
			t.Errorf("%+v, %v, %v", ini, ok, err)
		}
		if _, found, err := d.finishReseed(); found || err != nil {
			t.Errorf("again: %v, %v", found, err)
		}
	}
}

// TestUnreadable: what dqlite cannot load is damage, and names the file; what the system refuses is none.
func TestUnreadable(t *testing.T) {
	for text, file := range map[string]string{
		"cannot start dqlite in /d: raft_start(): io: load open segment open-4: unexpected format version 0; if the files are damaged, restore": "open-4",
		"cannot start dqlite in /d: raft_start(): io: closed segment 0000000000000009-0000000000000012 is past last snapshot snapshot-1-2-3":    "0000000000000009-0000000000000012",
		"cannot start dqlite in /d: raft_start(): io: last entry on disk has index 3, which is behind last snapshot's index 9":                  "metadata1",
		"cannot start dqlite in /d: raft_start(): io: open open-1: too many open files":                                                         "",
		"cannot start dqlite in /d: raft_start(): io: open open-1: permission denied":                                                           "",
		"cannot create the dqlite node in /d: raft_init(): io: decode content of metadata2: bad format version 0":                               "metadata1",
		"cannot start dqlite in /d: failed to bind":                                                                                             "",
	} {
		var d *Damage
		if got := errors.As(unreadable(errors.New(text)), &d); got != (file != "") || got && d.File != file {
			t.Errorf("%s: %+v", text, d)
		}
	}
}
