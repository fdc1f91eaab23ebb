package pack

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"microk8s/internal/diskspace"
)

// Kept is a pack in a node's folder.
type Kept struct {
	Path string
	Manifest
}

// List returns the packs in a folder, by name. broken are the files that end in .tar and cannot be
// read as packs; a folder that does not exist has none. Their contents are not checked again: see [Verify].
func List(dir string) (kept []Kept, broken []error) {
	files, _ := filepath.Glob(filepath.Join(dir, "*.tar")) // the only error is a bad pattern
	for _, path := range files {
		m, err := manifestOf(path)
		if err != nil {
			broken = append(broken, fmt.Errorf("%s: %w", path, err))
			continue
		}
		kept = append(kept, Kept{path, m})
	}
	return kept, broken
}

func manifestOf(path string) (Manifest, error) {
	f, err := os.Open(path)
	if err != nil {
		return Manifest{}, err
	}
	defer f.Close()
	return ReadManifest(f)
}

// Incoming is a pack that was checked and is on its way into a folder.
type Incoming struct {
	Manifest
	Path string // of the file, complete, not yet under its name
	dir  string
	lock *os.File // shows that the file is in use, until Commit or Discard
}

// Receive writes a pack from a stream to a file in dir, which is made if it is not there, and checks it: one that is
// damaged, cut off or for another architecture than this machine's is an error, and leaves nothing. Call
// Commit or Discard.
func Receive(dir string, r io.Reader) (*Incoming, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot keep the pack: %w", err)
	}
	f, err := lockedTemp(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot keep the pack: %w", err)
	}
	in := &Incoming{Path: f.Name(), dir: dir, lock: f}
	write := &writer{f: f}
	in.Manifest, err = Verify(io.TeeReader(r, write), runtime.GOARCH)
	if write.err != nil {
		err = fmt.Errorf("cannot keep the pack: %w", write.err)
	}
	if err == nil {
		_, err = io.Copy(write, r) // what follows the end of an archive is nothing, but the sender is to get it off
	}
	if err == nil {
		if write.n > in.Size()+3*maxManifest+int64(len(in.Blobs)+16)*4096 {
			err = damaged("data follows its end")
		}
	}
	if err = errors.Join(err, f.Chmod(0o644), f.Sync()); err != nil {
		in.Discard()
		return nil, err
	}
	return in, nil
}

// lockedTemp makes a file that Clean of another process, or of this one, leaves alone until it is closed.
func lockedTemp(dir string) (*os.File, error) {
	for {
		f, err := os.CreateTemp(dir, ".incoming-*")
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if _, gone := os.Lstat(f.Name()); err == nil && gone == nil {
			return f, nil
		}
		f.Close() // Clean came between the two
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(err, os.Remove(f.Name()))
		}
	}
}

// roomEvery is after how many bytes the disk is looked at again.
const roomEvery = 16 << 20

// writer writes to a file while its disk has room for as much again, which containerd needs.
type writer struct {
	f       *os.File
	n, next int64
	err     error
}

func (w *writer) Write(p []byte) (int, error) {
	if w.n >= w.next {
		w.next = w.n + roomEvery
		if w.err = diskspace.Check(filepath.Dir(w.f.Name()), diskspace.Need{Bytes: uint64(w.n) + roomEvery, Files: 1}); w.err != nil {
			return 0, w.err
		}
	}
	n, err := w.f.Write(p)
	w.n += int64(n)
	if err != nil {
		w.err = err
	}
	return n, err
}

// Commit puts the file under its name, in the place of one that was there.
func (in *Incoming) Commit() error {
	defer in.lock.Close()
	return os.Rename(in.Path, filepath.Join(in.dir, in.File()))
}

// Discard removes the file, unless it was committed.
func (in *Incoming) Discard() {
	_ = os.Remove(in.Path)
	in.lock.Close()
}

// Clean removes what a node that stopped in the middle of receiving has left (what is received now stays), and packs that neither
// the running version of the product nor a newer import needs: of each name the latest two stay.
func Clean(dir string) error {
	left, _ := filepath.Glob(filepath.Join(dir, ".incoming-*"))
	var errs []error
	for _, path := range left {
		errs = append(errs, removeUnlocked(path))
	}
	kept, _ := List(dir)
	byName := map[string][]Kept{}
	for _, k := range kept {
		byName[k.Name] = append(byName[k.Name], k)
	}
	for _, same := range byName {
		for len(same) > 2 {
			oldest := 0
			for i := range same {
				if modified(same[i].Path) < modified(same[oldest].Path) {
					oldest = i
				}
			}
			errs = append(errs, os.Remove(same[oldest].Path))
			same = append(same[:oldest:oldest], same[oldest+1:]...)
		}
	}
	return errors.Join(errs...)
}

func modified(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.ModTime().UnixNano()
}

// removeUnlocked removes a file unless somebody has it locked, or it is gone already.
func removeUnlocked(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
