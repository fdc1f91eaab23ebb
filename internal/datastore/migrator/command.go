package migrator

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"microk8s/internal/datastore/backup"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// DefaultEndpoint is upstream's default; the socket's real name ends in ":12379", which is
// tried as well.
const DefaultEndpoint = "unix:///var/snap/microk8s/current/var/kubernetes/backend/kine.sock"

const connectTimeout = 5 * time.Second

// modes are upstream's names for the two directions. All endpoints speak the same API.
var modes = map[string]bool{ // → whether it is a restore
	"backup": false, "backup-etcd": false, "backup-dqlite": false,
	"restore": true, "restore-to-dqlite": true, "restore-dqlite": true, "restore-to-etcd": true, "restore-etcd": true,
}

// NewCommand returns the subcommand.
func NewCommand() *cobra.Command {
	var mode, endpoint, dir string
	var debug, prune, cluster bool
	cmd := &cobra.Command{
		Use:   "migrator --mode MODE --db-dir DIR",
		Short: "Copy the datastore to a directory, or a directory back to the datastore",
		Long: `Copy all keys of a running datastore, as of one revision, to a new directory, or write the
keys of such a directory back. Modes: backup, backup-dqlite, backup-etcd; restore,
restore-to-dqlite, restore-dqlite, restore-to-etcd, restore-etcd.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			restore, known := modes[mode]
			if !known {
				return fmt.Errorf("--mode is %q; it must be backup or restore, or one of upstream's names for these", mode)
			}
			if dir == "" {
				return fmt.Errorf("--db-dir is missing: the directory of the backup")
			}
			if (prune || cluster) && !restore {
				return fmt.Errorf("--prune and --cluster are for restores")
			}
			level := slog.LevelInfo
			if debug {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			var set *backup.Set
			if restore { // before anything is touched
				var err error
				if set, err = backup.Open(dir); err != nil {
					return err
				}
			}
			c, err := Connect(cmd.Context(), endpoint)
			if err != nil {
				return err
			}
			defer c.Close()
			if !restore {
				m, err := Backup(cmd.Context(), c, dir, log)
				if err != nil {
					return err
				}
				log.Info("backed up", "keys", m.Keys, "revision", m.Revision, "sha256", m.SHA256)
				return nil
			}
			var r *Result
			if cluster {
				r, err = RestoreCluster(cmd.Context(), c, set, log)
			} else {
				r, err = Restore(cmd.Context(), c, set, prune, log)
			}
			if err != nil {
				return err
			}
			log.Info("restored", "keys", r.Keys, "written", r.Written, "deleted", r.Deleted, "kept", r.Kept, "changed_since", r.Contended, "revision", r.Revision)
			return nil
		},
	}
	cmd.Flags().StringVar(&mode, "mode", "", "backup or restore")
	cmd.Flags().StringVar(&endpoint, "endpoint", DefaultEndpoint, "where the datastore listens")
	cmd.Flags().StringVar(&dir, "db-dir", "", "directory of the backup")
	cmd.Flags().BoolVar(&prune, "prune", false, "delete the keys that are not in the backup")
	cmd.Flags().BoolVar(&cluster, "cluster", false, "restore a whole cluster: delete what is not in the backup, and leave nodes, their admission and tokens as they are")
	cmd.Flags().BoolVar(&debug, "debug", false, "say more")
	return cmd
}

// Connect makes a client of the datastore at an endpoint and waits until it answers. Its calls are bound in
// time. The caller closes it.
func Connect(ctx context.Context, endpoint string) (*clientv3.Client, error) {
	if path, ok := strings.CutPrefix(endpoint, "unix://"); ok && !strings.HasSuffix(path, ":12379") {
		if _, err := os.Stat(path); err != nil {
			if _, err := os.Stat(path + ":12379"); err == nil {
				endpoint += ":12379"
			}
		}
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{endpoint}, Context: ctx, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())},
	})
	if err == nil {
		c.KV, c.Lease = boundKV{c.KV, answerTimeout}, boundLease{c.Lease, answerTimeout}
		// The client would go on trying to connect for ever.
		limited, cancel := context.WithTimeout(ctx, connectTimeout)
		_, err = c.Get(limited, Prefix, clientv3.WithLimit(1))
		cancel()
		if err != nil {
			c.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the datastore at %s does not answer: %w; is it running? see: microk8s status", endpoint, err)
	}
	return c, nil
}
