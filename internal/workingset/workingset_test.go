package workingset

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestUnchanged holds that only private mappings of files that nobody wrote to are taken.
func TestUnchanged(t *testing.T) {
	const smaps = `00400000-01000000 r-xp 00000000 08:01 77         /snap/bin/x
Rss:                 128 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
01000000-02000000 r--p 00c00000 08:01 77         /snap/bin/name with space
Anonymous:             0 kB
02000000-02100000 rw-p 01c00000 08:01 77         /snap/bin/x
Anonymous:            40 kB
02100000-02200000 r--p 01d00000 08:01 77         /snap/bin/relocated
Anonymous:             8 kB
03000000-03100000 r--s 00000000 08:01 78         /data
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 00:00 0          [vvar]
Anonymous:             0 kB
7f0000002000-7f0000003000 r--p 00000000 00:00 0
Anonymous:             0 kB
`
	got, err := unchanged(strings.NewReader(smaps))
	want := []span{{0x400000, 0x1000000}, {0x1000000, 0x2000000}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %x, %v, want %x", got, err, want)
	}
	if _, err := unchanged(strings.NewReader("what is this\n")); err == nil {
		t.Error("took a text that is no list of mappings")
	}
}

// TestTrim holds that pages of a file leave the memory and come back with the same content, and
// that a mapping which was written to keeps what was written.
func TestTrim(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	mapped := func(protection int) []byte {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, len(content), protection, unix.MAP_PRIVATE|unix.MAP_POPULATE)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Munmap(m) })
		return m
	}
	file, written := mapped(unix.PROT_READ), mapped(unix.PROT_READ|unix.PROT_WRITE)
	copy(written, "changed")
	if err := unix.Mprotect(written, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}

	if n := resident(t, file); n < len(content)/os.Getpagesize() {
		t.Fatalf("before: %d pages are mapped", n)
	}
	if err := Trim(); err != nil {
		t.Fatal(err)
	}
	if n := resident(t, file); n != 0 {
		t.Errorf("%d pages of the file are still mapped", n)
	}
	if !bytes.Equal(file, content) {
		t.Error("the file has another content")
	}
	if !bytes.HasPrefix(written, []byte("changed")) || !bytes.Equal(written[16:], content[16:]) {
		t.Error("what was written to a mapping is lost")
	}
}

// resident counts the pages of m that this process has mapped, from /proc/self/pagemap.
func resident(t *testing.T, m []byte) int {
	t.Helper()
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := os.Getpagesize()
	entries := make([]byte, len(m)/page*8)
	if _, err := f.ReadAt(entries, int64(uintptr(unsafe.Pointer(&m[0])))/int64(page)*8); err != nil {
		t.Fatal(err)
	}
	n := 0
	for i := 7; i < len(entries); i += 8 {
		n += int(entries[i] >> 7) // bit 63: present
	}
	return n
}
