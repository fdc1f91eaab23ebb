package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"microk8s/internal/filewatch"
	"microk8s/internal/service"
)

type logsOptions struct {
	services []string
	lines    int
	follow   bool
}

func (a *App) newLogs() *cobra.Command {
	o := logsOptions{}
	cmd := &cobra.Command{
		Use:   "logs [SERVICE...] [-n|--lines N] [-f|--follow]",
		Short: "Show the logs of this node's services",
		Long: `Show what the services of this node have logged: containerd, k8s-dqlite, cluster-agent,
kubelite, apiserver-proxy. Without a name all of them are shown, one after the other.
The logs of pods are shown by microk8s kubectl logs.`,
		ValidArgs: service.Names(),
		RunE: func(cmd *cobra.Command, names []string) error {
			for _, n := range names {
				if n == "supervisor" && !a.Env.Snapd {
					o.services = append(o.services, n)
					continue
				}
				s, err := service.Resolve(n)
				if err != nil {
					return &usageError{cmd, err}
				}
				o.services = append(o.services, s)
			}
			if o.lines < 0 {
				return &usageError{cmd, fmt.Errorf("%d is not a number of lines", o.lines)}
			}
			if len(o.services) == 0 {
				o.services = service.Names()
			}
			return a.logs(cmd.Context(), o)
		},
	}
	cmd.Flags().IntVarP(&o.lines, "lines", "n", 100, "number of last lines to show")
	cmd.Flags().BoolVarP(&o.follow, "follow", "f", false, "keep showing new lines until interrupted")
	return cmd
}

func (a *App) logs(ctx context.Context, o logsOptions) error {
	if a.Env.Snapd {
		journalctl, err := exec.LookPath("journalctl")
		if err != nil {
			return failf("read the system's log with other tools", "there is no journalctl on this machine")
		}
		argv := []string{"journalctl", "--no-pager", "-n", strconv.Itoa(o.lines)}
		if o.follow {
			argv = append(argv, "-f")
		}
		for _, s := range o.services {
			argv = append(argv, "-u", "snap."+a.Env.Name+".daemon-"+s)
		}
		return a.replace(journalctl, argv, a.Environ)
	}
	offsets := map[string]int64{}
	for _, s := range o.services {
		path := a.Env.ServiceLog(s)
		data, end, err := tail(path, o.lines)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return explain("cannot read the log of "+s, err)
		}
		offsets[path] = end
		if len(o.services) > 1 && len(data) > 0 {
			fmt.Fprintf(a.Out, "==> %s <==\n", s)
		}
		if _, err := a.Out.Write(data); err != nil {
			return err
		}
	}
	if !o.follow {
		return nil
	}
	return a.follow(ctx, offsets)
}

// tail returns the last n lines of a file and its length. Only complete lines count, except at
// the end.
func tail(path string, n int) ([]byte, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, 0, err
	}
	const block = 64 << 10
	var data []byte
	for start := end; start > 0 && bytes.Count(data, []byte("\n")) <= n; {
		size := min(start, block)
		start -= size
		part := make([]byte, size, int(size)+len(data))
		if _, err := f.ReadAt(part, start); err != nil && err != io.EOF {
			return nil, 0, err
		}
		data = append(part, data...)
	}
	cut := len(bytes.TrimSuffix(data, []byte("\n")))
	if n == 0 {
		return nil, end, nil
	}
	for ; n > 0 && cut >= 0; n-- {
		cut = bytes.LastIndexByte(data[:max(cut, 0)], '\n')
	}
	return data[cut+1:], end, nil
}

// follow shows what is added to the files until ctx ends; it survives their rotation.
func (a *App) follow(ctx context.Context, offsets map[string]int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	paths := slices.Sorted(maps.Keys(offsets))
	match, _ := filewatch.Files(paths...)
	changed, err := filewatch.Watch(ctx, filewatch.Options{Match: match}, a.Env.LogDir())
	if err != nil {
		return fmt.Errorf("cannot follow the logs: %w", err)
	}
	last := ""
	show := func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return nil // between the two halves of a rotation
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		if fi.Size() < offsets[path] {
			offsets[path] = 0
		}
		if fi.Size() == offsets[path] {
			return nil
		}
		if len(offsets) > 1 && path != last {
			fmt.Fprintf(a.Out, "==> %s <==\n", trimLog(path))
			last = path
		}
		n, err := io.Copy(a.Out, io.NewSectionReader(f, offsets[path], fi.Size()-offsets[path]))
		offsets[path] += n
		return err
	}
	all := func() error {
		for _, path := range paths {
			if err := show(path); err != nil {
				return err
			}
		}
		return nil
	}
	if err := all(); err != nil { // written between the first look and the watch
		return err
	}
	for range changed {
		if err := all(); err != nil {
			return err
		}
	}
	if ctx.Err() == nil {
		return errors.New("cannot follow the logs: watching their folder has ended")
	}
	return nil
}

func trimLog(path string) string {
	base := filepath.Base(path)
	return base[:len(base)-len(filepath.Ext(base))]
}
