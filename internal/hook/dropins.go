package hook

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// dropInLimit bounds one program of a user.
const dropInLimit = 2 * time.Minute

// dropIns runs the programs that users put into $SNAP_COMMON/hooks/<event>.d, in the order of
// their names. What becomes of one is told and changes nothing for the others.
func (r *Runner) dropIns(ctx context.Context, event string) {
	dir := filepath.Join(r.Env.Common, "hooks", event+".d")
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		r.Log.Warn("cannot read the directory of drop-in programs", "err", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		st, err := os.Stat(path)
		if err != nil || !st.Mode().IsRegular() || st.Mode()&fs.FileMode(0o100) == 0 {
			continue
		}
		if err := r.dropIn(ctx, path); err != nil {
			r.Log.Warn("a drop-in program failed", "program", path, "err", err)
		}
	}
}

func (r *Runner) dropIn(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, dropInLimit)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = r.Env.Environ(os.Environ())
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 5 * time.Second // for what it started and left behind with its pipe
	err := cmd.Run()
	if text := strings.TrimSpace(out.String()); text != "" {
		r.Log.Info("a drop-in program said", "program", path, "output", text)
	}
	return err
}
