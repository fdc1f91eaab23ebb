package daemon

import (
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"microk8s/internal/datastore/backup"
	"microk8s/internal/datastore/migrator"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/pki"

	"github.com/spf13/cobra"
)

// Proof is what was found when a backup was restored into a datastore of its own. It is printed as JSON.
type Proof struct {
	Revision int64  `json:"revision"` // of the backup
	Keys     int    `json:"keys"`     // that the datastore had afterwards
	SHA256   string `json:"sha256"`   // of all its keys and values
	Seconds  int64  `json:"seconds"`  // that it took
}

// newProve makes the command that restores a backup into a scratch member.
func newProve() *cobra.Command {
	var dir, work string
	cmd := &cobra.Command{
		Use:   "prove --db-dir DIR --work DIR",
		Short: "Restore a backup into a datastore of its own, and compare",
		Long: `Restore the directory of a backup into a new datastore that serves nobody, read that again, and
compare number and hash of all keys. The datastore is made below --work, listens on this machine
alone, and is removed afterwards. The result is one line of JSON.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			set, err := backup.Open(dir)
			if err != nil {
				return err
			}
			proof, err := Prove(cmd.Context(), set, work)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(proof)
		},
	}
	cmd.Flags().StringVar(&dir, "db-dir", "", "directory of the backup")
	cmd.Flags().StringVar(&work, "work", "", "directory to work in, with a short path and room for the data three times")
	_ = cmd.MarkFlagRequired("db-dir")
	_ = cmd.MarkFlagRequired("work")
	return cmd
}

// lasting is how long leases last in a scratch member: longer than any comparison.
const lasting = 24 * time.Hour

// Prove restores a backup into a member that is made for it, reads all keys of that again, and compares
// their number and hash. Nothing is left in work, which must exist; the path of its sockets must be
// shorter than 108 bytes.
func Prove(ctx context.Context, set *backup.Set, work string) (_ *Proof, err error) {
	began := time.Now()
	tmp, err := os.MkdirTemp(work, "m")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	c := &Config{
		StorageDir: filepath.Join(tmp, "d"), Listen: "unix://" + filepath.Join(tmp, "s"), EnableTLS: true, Level: slog.LevelError,
		StorageAction: "none", ProgressInterval: time.Minute,
	}
	if err := scratch(c.StorageDir); err != nil {
		return nil, err
	}
	log := slog.New(slog.DiscardHandler)
	ctx, stop := context.WithCancel(ctx)
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- Run(ctx, c, "", log, func() { close(ready) }) }()
	defer func() {
		stop()
		if ended != nil {
			err = errors.Join(err, <-ended)
		}
	}()
	select {
	case <-ready:
	case err := <-ended:
		ended = nil
		return nil, fmt.Errorf("the scratch member did not start: %w", errors.Join(err, ctx.Err()))
	}
	client, err := migrator.Connect(ctx, c.Listen)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	if _, err := migrator.Copy(ctx, client, set.Lasting(lasting), log); err != nil {
		return nil, err
	}
	got, err := migrator.Backup(ctx, client, filepath.Join(tmp, "k"), log)
	if err != nil {
		return nil, err
	}
	want := set.Manifest
	if got.Keys != want.Keys || got.SHA256 != want.SHA256 || len(got.Leases) != len(want.Leases) {
		return nil, fmt.Errorf("%w: restored, it has %d keys (%d that expire) with hash %s; it must have %d (%d) with hash %s",
			backup.ErrIncomplete, got.Keys, len(got.Leases), got.SHA256, want.Keys, len(want.Leases), want.SHA256)
	}
	return &Proof{Revision: want.Revision, Keys: got.Keys, SHA256: got.SHA256, Seconds: int64(time.Since(began).Round(time.Second) / time.Second)}, nil
}

// scratch makes the directory of a new member that only this machine reaches, and only with a key that
// nobody else has.
func scratch(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(storedir.Loopback, "0")) //nolint:noctx // it ends at once
	if err != nil {
		return fmt.Errorf("cannot find a free port: %w", err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		return err
	}
	var maker pki.Maker
	key, err := maker.Key(2048)
	if err != nil {
		return err
	}
	der, err := maker.Issue(pki.Request{
		Subject: pkix.Name{CommonName: "scratch"}, DNSNames: []string{"scratch"}, IPs: []net.IP{net.ParseIP(storedir.Loopback)},
		Days: 1, ServerAuth: true, ClientAuth: true,
	}, key.Public(), nil, key)
	if err != nil {
		return err
	}
	first, err := storedir.Init{Address: address}.Encode()
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{storedir.CertFile: pki.EncodeCert(der), storedir.KeyFile: pki.EncodeKey(key), storedir.InitFile: first} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}
