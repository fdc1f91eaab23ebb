package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/platforms"

	"microk8s/internal/snapenv"
)

// sideloadEvery is how often it is looked for archives (cli.md 7.1).
const sideloadEvery = 5 * time.Second

// Sideload imports the archives *.tar that are in [snapenv.Env.SideloadDir], or come there, until
// ctx ends. Each gets .loaded added to its name afterwards. One that cannot be imported is
// reported, and tried again when it has changed.
func Sideload(ctx context.Context, env snapenv.Env, log *slog.Logger) {
	failed := map[string]time.Time{} // when the file was changed last
	for ctx.Err() == nil {
		archives, _ := filepath.Glob(filepath.Join(env.SideloadDir(), "*.tar"))
		for _, path := range archives {
			st, err := os.Stat(path)
			if err != nil || !st.Mode().IsRegular() || failed[path].Equal(st.ModTime()) {
				continue
			}
			names, err := sideload(ctx, env, path)
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				failed[path] = st.ModTime()
				log.Error("cannot load the images of an archive; it is tried again when it changes", "archive", path, "err", err)
			default:
				log.Info("loaded the images of an archive", "archive", path, "names", names)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(sideloadEvery):
		}
	}
}

func sideload(ctx context.Context, env snapenv.Env, path string) (names []string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := connect(env)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	platform, snapshotter := platforms.Default(), configuredSnapshotter(env)
	imported, err := c.Import(ctx, f, client.WithImportPlatform(platform))
	if err != nil {
		return nil, err
	}
	if len(imported) == 0 {
		return nil, errors.New("there is no image with a name in it")
	}
	for _, img := range imported {
		if err := client.NewImageWithPlatform(c, img, platform).Unpack(ctx, snapshotter); err != nil {
			return nil, fmt.Errorf("cannot unpack %s: %w", img.Name, err)
		}
		names = append(names, img.Name)
	}
	return names, os.Rename(path, path+".loaded")
}
