package launchconf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/backoff"
	"microk8s/internal/filewatch"
	"microk8s/internal/snapenv"
)

// Dir is where a running node looks for configurations: files with one of these endings, in the order of their names.
func Dir(env snapenv.Env) string { return env.LaunchDir() }

var endings = []string{".yaml", ".yml", ".json"}

func isConfiguration(path string) bool { return slices.Contains(endings, filepath.Ext(path)) }

// Times of a Watch.
const (
	settle    = time.Second      // after the last change of a file
	firstWait = 10 * time.Second // after a file that failed; then twice as long each time
	lastWait  = 10 * time.Minute
)

// Suffixes of what Watch leaves behind.
const (
	Applied = ".applied" // the file, when all of it was done
	Failed  = ".error"   // why it was not, beside the file
)

// Watch applies the files of Dir as they appear, until ctx ends. A file that was applied gets
// the suffix .applied and can be read by root only, for it may hold a token. One that fails
// keeps its name, has the reason beside it in a file with the suffix .error, and is tried again
// later and later, or when it changes.
func (a *Applier) Watch(ctx context.Context) error {
	dir := Dir(a.Env)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("cannot watch for launch configurations: %w", err)
	}
	files, err := filewatch.Watch(ctx, filewatch.Options{
		Settle: settle, Written: true, Match: isConfiguration,
	}, dir)
	if err != nil {
		return fmt.Errorf("cannot watch for launch configurations: %w", err)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	waits := backoff.New(firstWait, lastWait)
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-files:
			if !open {
				if ctx.Err() == nil {
					return errors.New("watching for launch configurations has ended")
				}
				return nil
			}
			waits = backoff.New(firstWait, lastWait)
			timer.Reset(0)
		case <-timer.C:
			if a.Look(ctx) {
				timer.Reset(waits.Step())
			} else {
				waits = backoff.New(firstWait, lastWait)
			}
		}
	}
}

// Look applies every file of Dir once; failed says that one of them must be tried again.
func (a *Applier) Look(ctx context.Context) (failed bool) {
	entries, err := os.ReadDir(Dir(a.Env)) // sorted
	if err != nil {
		return false
	}
	for _, e := range entries {
		path := filepath.Join(Dir(a.Env), e.Name())
		if !isConfiguration(path) {
			continue
		}
		if err := a.file(ctx, path); err != nil {
			failed = true
			if ctx.Err() != nil {
				return true
			}
			a.Log.Error("a launch configuration was not applied", "file", path, "err", err)
			if err := atomicfile.Write(path+Failed, []byte(err.Error()+"\n"+whatNext), 0o600, nil); err != nil {
				a.Log.Warn("cannot say so beside it", "err", err)
			}
		}
	}
	return failed
}

// whatNext ends the file that says why a configuration was not applied.
const whatNext = "It is tried again when the file changes, and from time to time. What it may say is in docs/launch.md; see this node with: microk8s status\n"

func (a *Applier) file(ctx context.Context, path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Size() > MaxSize {
		return fmt.Errorf("it is not a file of at most %d bytes", MaxSize)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := a.Apply(ctx, data); err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	if err := os.Rename(path, path+Applied); err != nil {
		return err
	}
	if err := os.Remove(path + Failed); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return Forget(a.Env, data) // the same file put here again is to be applied again
}
