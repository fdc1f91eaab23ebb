package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/migrator"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"

	"github.com/spf13/cobra"
)

// newExamine makes the command that says how far a directory has come.
func newExamine() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "examine --storage-dir DIR",
		Short: "Say whose a storage directory is and how far it has come, as JSON",
		Long: `Say whose a storage directory is, which members it knows, and how far it has come: term and entry
of its log, and the revision of the datastore. The directory is not changed; its daemon may run.
What cannot be read is said in the field damaged.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			real, err := filepath.EvalSymlinks(dir)
			if err != nil {
				return fmt.Errorf("cannot find the storage directory: %w", err)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), examineLimit)
			defer cancel()
			x, err := Examine(ctx, real)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(x)
		},
	}
	cmd.Flags().StringVar(&dir, "storage-dir", "", "the directory")
	_ = cmd.MarkFlagRequired("storage-dir")
	return cmd
}

// examineLimit bounds the command.
const examineLimit = 10 * time.Minute

// Examine finds out how far a storage directory has come, from a copy that it makes beside it: a directory
// whose daemon runs may change while it is copied, so that it tries again before it calls it damaged. The
// error is for what is no storage directory.
func Examine(ctx context.Context, dir string) (*peers.Examined, error) {
	d := storedir.Dir(dir)
	self, err := d.Self()
	if err != nil {
		return nil, fmt.Errorf("%s is not the directory of a member: %w", dir, err)
	}
	x := &peers.Examined{Member: self}
	if x.Members, err = d.Members(); err != nil {
		x.Members = []storedir.Member{self}
	}
	for attempt := 1; ; attempt++ {
		x.Damaged = ""
		err := examine(ctx, dir, x)
		if err == nil {
			return x, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		x.Damaged = err.Error()
		if attempt == examineTries {
			x.Index = max(x.Index, member.AtLeast(dir))
			return x, nil
		}
		time.Sleep(time.Second / 2)
	}
}

const examineTries = 3

func examine(ctx context.Context, dir string, x *peers.Examined) error {
	work := filepath.Dir(dir)
	copies, err := member.Judge(dir)
	if err != nil {
		return err
	}
	x.Term, x.Index = copies[0].Term, copies[0].Index
	if x.Index == 0 {
		return member.ErrNoData // a spare has none
	}
	tmp, err := os.MkdirTemp(work, ".x") // short, for its sockets
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	store := filepath.Join(tmp, "d")
	l, err := net.Listen("tcp", net.JoinHostPort(storedir.Loopback, "0")) //nolint:noctx // it ends at once
	if err != nil {
		return err
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		return err
	}
	if err := member.CopyAlone(dir, store, address); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	c := &Config{StorageDir: store, Listen: "unix://" + filepath.Join(tmp, "s"), EnableTLS: true, StorageAction: "none", ProgressInterval: time.Minute}
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- Run(ctx, c, "", slog.New(slog.DiscardHandler), func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-ended:
		stop()
		return fmt.Errorf("it cannot be started: %w", errors.Join(err, ctx.Err()))
	}
	defer func() { stop(); <-ended }()
	client, err := migrator.Connect(ctx, c.Listen)
	if err != nil {
		return err
	}
	defer client.Close()
	got, err := client.Get(ctx, HealthKey)
	if err != nil {
		return err
	}
	x.Revision = got.Header.Revision
	return nil
}
