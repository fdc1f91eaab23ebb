package images

import (
	"context"
	"log/slog"
	"os"
	"time"

	"microk8s/internal/snapenv"
)

// sideloadEvery is how often it is looked for archives (cli.md 7.1).
const sideloadEvery = 5 * time.Second

// Sideload imports the archives that are in [snapenv.Env.SideloadDir], or come there, until
// ctx ends. Each gets .loaded added to its name afterwards; a pack of addons goes: it is in the node's
// folder of packs then. One that cannot be imported is
// reported, and tried again when it has changed.
func Sideload(ctx context.Context, env snapenv.Env, log *slog.Logger) {
	failed := map[string]time.Time{} // when the file was changed last
	for ctx.Err() == nil {
		archives := snapenv.SideloadArchives(env.SideloadDir())
		for _, path := range archives {
			st, err := os.Stat(path)
			if err != nil || !st.Mode().IsRegular() || failed[path].Equal(st.ModTime()) {
				continue
			}
			got, err := sideload(ctx, env, path)
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				failed[path] = st.ModTime()
				log.Error("cannot load the images of an archive; it is tried again when it changes", "archive", path, "err", err)
			default:
				log.Info("loaded the images of an archive", "archive", path, "names", got.Names, "skipped", got.Skipped)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(sideloadEvery):
		}
	}
}

func sideload(ctx context.Context, env snapenv.Env, path string) (Imported, error) {
	f, err := os.Open(path)
	if err != nil {
		return Imported{}, err
	}
	defer f.Close()
	got, err := Import(ctx, env, f)
	if err != nil {
		return got, err
	}
	if got.Pack != "" {
		return got, os.Remove(path)
	}
	return got, os.Rename(path, path+".loaded")
}
