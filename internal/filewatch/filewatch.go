// Package filewatch tells a loop that files have changed: [Watch] watches folders, since files are
// replaced by others of their names, and reports many changes at once as one, when they have settled. What a
// change means is left to the loop, which looks at the files again.
package filewatch

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Options of a watch. The zero value reports each change of any file at once.
type Options struct {
	// Settle is how long the files must be left alone before a change is reported: programs and
	// people write in several steps.
	Settle time.Duration
	// Match chooses files by their paths, which begin with the folder's as it was passed to Watch;
	// nil means all.
	Match func(path string) bool
	// Written leaves out files that are removed or renamed.
	Written bool
	// Missing allows folders that do not exist; nothing is noticed in them, also later.
	Missing bool
}

// Files returns an Options.Match for these paths, and their folders, each once.
func Files(paths ...string) (match func(string) bool, folders []string) {
	var clean []string
	for _, p := range paths {
		clean = append(clean, filepath.Clean(p))
		folders = append(folders, filepath.Dir(p))
	}
	slices.Sort(folders)
	return func(path string) bool { return slices.Contains(clean, path) }, slices.Compact(folders)
}

// Watch returns a channel that has a value after files in the folders, not below them, have changed,
// until ctx ends or watching fails; then it is closed. Several changes may be one value; when the
// kernel has lost some, as it may, there is a value, too. A change of modes or owners alone is none.
// What happened before Watch returns is not reported.
func Watch(ctx context.Context, o Options, folders ...string) (<-chan struct{}, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("cannot watch files: %w", err)
	}
	for _, dir := range folders {
		if err := w.Add(dir); err != nil && !o.Missing {
			w.Close()
			return nil, fmt.Errorf("cannot watch files in %s: %w", dir, err)
		}
	}
	changed := make(chan struct{}, 1)
	go func() {
		defer close(changed)
		defer w.Close()
		timer := time.NewTimer(0)
		timer.Stop()
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case e := <-w.Events:
				if o.concerns(e) {
					timer.Reset(o.Settle)
				}
			case err := <-w.Errors:
				if !errors.Is(err, fsnotify.ErrEventOverflow) {
					return
				}
				timer.Reset(o.Settle)
			case <-timer.C:
				select {
				case changed <- struct{}{}:
				default: // one that nobody has taken yet
				}
			}
		}
	}()
	return changed, nil
}

func (o Options) concerns(e fsnotify.Event) bool {
	if e.Op == fsnotify.Chmod || o.Written && !e.Has(fsnotify.Create) && !e.Has(fsnotify.Write) {
		return false
	}
	return o.Match == nil || o.Match(filepath.Clean(e.Name))
}
