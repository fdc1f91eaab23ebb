package cli

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// endless is an input without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestInputOfAnImport feeds the import what a broken program before the pipe would: nothing at all,
// and without an end.
func TestInputOfAnImport(t *testing.T) {
	a := newApp(t)
	room := func(int64) error { return nil }
	var got bytes.Buffer
	a.In = strings.NewReader("an archive")
	if err := a.copyInput(t.Context(), &got, time.Minute, room); err != nil || got.String() != "an archive" {
		t.Errorf("%q, %v", got.String(), err)
	}

	r, w := io.Pipe()
	defer w.Close()
	a.In = r
	go func() { _, _ = io.WriteString(w, "begun") }()
	err := a.copyInput(t.Context(), io.Discard, 100*time.Millisecond, room)
	if err == nil || !strings.Contains(err.Error(), "standard input brought nothing for 100ms, after 5 bytes") {
		t.Errorf("an input that stalls: %v", err)
	}

	a.In = endless{}
	full := errors.New("the disk has no room")
	err = a.copyInput(t.Context(), io.Discard, time.Minute, func(size int64) error {
		if size >= 4*roomEvery {
			return full
		}
		return nil
	})
	if !errors.Is(err, full) {
		t.Errorf("an input without an end: %v", err)
	}

	// A file system that does not answer: opening a pipe that nobody writes to blocks as well.
	fifo := filepath.Join(t.TempDir(), "archive")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkArchive(fifo, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), "brought nothing for 50ms, after 0 bytes") {
		t.Errorf("a file that cannot be read: %v", err)
	}
}
