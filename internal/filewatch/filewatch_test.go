package filewatch

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"microk8s/internal/atomicfile"
)

// TestWatch makes a change that is to be reported after each that is not: were the first one
// reported, a value would be left over at the end.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	write := func(t *testing.T, path string) {
		t.Helper()
		if err := atomicfile.Write(path, []byte(time.Now().String()), 0o600, nil); err != nil {
			t.Fatal(err)
		}
	}
	wait := func(t *testing.T, changed <-chan struct{}) {
		t.Helper()
		select {
		case _, open := <-changed:
			if !open {
				t.Fatal("watching has ended")
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the change is not reported")
		}
	}
	match, folders := Files(a)
	if len(folders) != 1 || folders[0] != dir {
		t.Fatalf("folders: %q", folders)
	}
	for _, tc := range []struct {
		name   string
		o      Options
		change func(t *testing.T)
	}{
		{"replaced", Options{Match: match}, func(t *testing.T) { write(t, a) }},
		{"removed", Options{Match: match, Settle: time.Millisecond}, func(t *testing.T) {
			if err := os.Remove(a); err != nil {
				t.Fatal(err)
			}
		}},
		{"written", Options{Match: match, Written: true}, func(t *testing.T) { write(t, a) }},
		{"many", Options{Settle: 50 * time.Millisecond}, func(t *testing.T) {
			for range 100 {
				write(t, b)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			write(t, a)
			ctx, cancel := context.WithCancel(t.Context())
			changed, err := Watch(ctx, tc.o, folders...)
			if err != nil {
				t.Fatal(err)
			}
			tc.change(t)
			wait(t, changed)
			cancel()
			for range changed { // closed when it has ended
			}
		})
	}
	t.Run("others", func(t *testing.T) {
		changed, err := Watch(t.Context(), Options{Match: match, Written: true}, dir)
		if err != nil {
			t.Fatal(err)
		}
		write(t, a)
		wait(t, changed)
		for drained := false; !drained; { // the writes of one replacement
			select {
			case <-changed:
			case <-time.After(200 * time.Millisecond):
				drained = true
			}
		}
		for _, change := range []func() error{
			func() error { return os.WriteFile(b, nil, 0o600) },
			func() error { return os.Chmod(a, 0o640) },
			func() error { return os.Remove(a) },
			func() error { return os.WriteFile(filepath.Join(dir, "c"), nil, 0o600) },
		} {
			if err := change(); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case <-changed:
			t.Error("a change of another file, a mode or a removal is reported")
		case <-time.After(200 * time.Millisecond):
		}
	})
	if _, err := Watch(t.Context(), Options{}, filepath.Join(dir, "none")); err == nil {
		t.Error("a folder that does not exist is watched")
	}
	if _, err := Watch(t.Context(), Options{Missing: true}, filepath.Join(dir, "none")); err != nil {
		t.Error(err)
	}
}
