package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"microk8s/internal/certs"
)

// Exit codes of refresh-certs (cli.md 1.12).
const (
	exitNothingChosen = 3
	exitCertInfo      = 4 // also: undo failed
	exitBackup        = 10
	exitReissue       = 20
	exitCAMissing     = 30
	exitCAKey         = 31
	exitCACert        = 32
)

type refreshOptions struct {
	undo, check bool
	out         *output
	force       bool
	cert        string
	caDir       string
}

// refreshable are the values of --cert and what their certificates are called.
var refreshable = []struct{ file, title string }{
	{"ca.crt", "CA"}, {"server.crt", "server"}, {"front-proxy-client.crt", "front proxy client"},
}

func (a *App) newRefreshCerts() *cobra.Command {
	o := refreshOptions{}
	cmd := &cobra.Command{
		Use:   "refresh-certs [CA_DIR] [-u|--undo] [-c|--check [-o json|yaml]] [-e|--cert server.crt|front-proxy-client.crt|ca.crt] [--force]",
		Short: "Check, renew or replace the certificates of this node",
		Long: `Check, renew or replace the certificates of this node. Certificates other than that of the
CA are renewed automatically before they expire.

Replace the CA certificates with the ca.crt and ca.key found in CA_DIR, or renew one
certificate with --cert. A new CA has a new key, and nodes of one cluster must have the same: with
other nodes the command refuses, since they would have to leave and join again. --force does it all
the same.

Before a change the certificates and credentials are copied to certs-backup, which --undo restores.
The backups of before are kept beside it, with their dates, up to five.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return &usageError{cmd, fmt.Errorf("Got unexpected extra argument (%s)", args[1])}
			}
			if len(args) == 1 {
				if fi, err := os.Stat(args[0]); err != nil || !fi.IsDir() {
					return &usageError{cmd, fmt.Errorf("Invalid value for '[CA_DIR]': Path '%s' does not exist.", args[0])}
				}
				o.caDir = args[0]
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.refreshOptionsOK(cmd, o); err != nil {
				return err
			}
			if err := a.rootOnly(); err != nil {
				return err
			}
			return a.refreshCerts(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVarP(&o.undo, "undo", "u", false, "restore the certificates from the last backup")
	cmd.Flags().BoolVarP(&o.check, "check", "c", false, "show when the certificates expire")
	cmd.Flags().BoolVar(&o.force, "force", false, "replace the CA although other nodes are in the cluster")
	cmd.Flags().StringVarP(&o.cert, "cert", "e", "", "renew this certificate: server.crt, front-proxy-client.crt or ca.crt")
	completeFlag(cmd, "cert", "server.crt", "front-proxy-client.crt", "ca.crt")
	o.out = addOutput(cmd, "text")
	return cmd
}

// refreshOptionsOK refuses combinations, in upstream's order and words.
func (a *App) refreshOptionsOK(cmd *cobra.Command, o refreshOptions) error {
	chosen := 0
	for _, on := range []bool{o.undo, o.check, o.cert != ""} {
		if on {
			chosen++
		}
	}
	switch {
	case o.out.document() && !o.check:
		return &usageError{cmd, errors.New("-o is for --check")}
	case o.caDir != "" && chosen > 0:
		fmt.Fprintln(a.Out, "Please do not set any options in combination with the CA_DIR.")
		fmt.Fprintln(a.Err, "Try 'microk8s refresh-certs --help' for help.")
		return exitError(ExitError)
	case chosen > 1:
		fmt.Fprintln(a.Out, "Please select only one of the options -c, -u or -e.")
		fmt.Fprintln(a.Err, "Try 'microk8s refresh-certs --help' for help.")
		return exitError(ExitUsage)
	case o.cert != "" && !slices.ContainsFunc(refreshable, func(r struct{ file, title string }) bool { return r.file == o.cert }):
		return &usageError{cmd, fmt.Errorf("Invalid value for '-e' / '--cert': '%s' is not one of 'server.crt', 'front-proxy-client.crt', 'ca.crt'.", o.cert)}
	}
	return nil
}

func (a *App) refreshCerts(ctx context.Context, o refreshOptions) error {
	store := certs.New(a.Env, certs.Options{Log: a.log()})
	if o.caDir != "" || o.cert == "ca.crt" || o.undo && a.undoesShared(store) {
		err := a.soleNode(ctx, o.force, "replace the CA or the keys of tokens", "they would not trust this node, nor it them: logs, Services and joins would fail here and there",
			"then each of them must leave and join again")
		if err != nil {
			return err
		}
	}
	if kind, err := a.interruptedRotation(); kind != "" && !o.check {
		return failf("go on with it first: sudo microk8s certs rotate "+kind, "a rotation of %s was interrupted, whose old and new keys must both stay", kind)
	} else if err != nil && !o.check {
		return err
	}
	switch {
	case o.check:
		return a.checkCerts(store, o.out)
	case o.undo:
		return a.undoCerts(ctx, store)
	case o.cert != "":
		return a.renewCert(ctx, store, o.cert)
	case o.caDir != "":
		return a.installCA(ctx, store, o.caDir)
	}
	fmt.Fprint(a.Out, `Please choose what to refresh with one of:
    microk8s refresh-certs --cert server.crt
    microk8s refresh-certs --cert front-proxy-client.crt
    microk8s refresh-certs --cert ca.crt
Refreshing ca.crt makes a new CA: nodes that joined this one must leave and join again.
See when they expire with: microk8s refresh-certs --check
`)
	return exitError(exitNothingChosen)
}

// undoesShared reports whether the last backup has another CA than this node, or other keys of service account
// tokens, which all nodes of a cluster must have the same.
func (a *App) undoesShared(store *certs.Store) bool {
	for _, name := range []string{"ca.crt", "serviceaccount.key"} {
		old, err := store.BackedUp(name)
		if err != nil {
			continue // there is none
		}
		if now, err := os.ReadFile(a.Env.Cert(name)); err == nil && !bytes.Equal(old, now) {
			return true
		}
	}
	return false
}

// listedCert is one item of the kind CertificateList.
type listedCert struct {
	File     string `json:"file"` // in $SNAP_DATA/certs
	Title    string `json:"title"`
	DaysLeft int    `json:"daysLeft"`
	Expires  string `json:"expires"`
}

func (a *App) checkCerts(store *certs.Store, out *output) error {
	var items []listedCert
	for _, r := range refreshable {
		days, err := store.DaysLeft(strings.TrimSuffix(r.file, ".crt"))
		if err != nil {
			f := &Failure{Err: fmt.Errorf("Failed to get certificate info. %w", err), Code: exitCertInfo}
			if errors.Is(err, os.ErrNotExist) {
				f.Hints = []string{"set up the node, or restore a lost certificate, with: sudo microk8s start"}
			}
			return f
		}
		c := listedCert{File: r.file, Title: r.title, DaysLeft: days}
		if end, err := store.Expiry(strings.TrimSuffix(r.file, ".crt")); err == nil {
			c.Expires = end.UTC().Format(time.RFC3339)
		}
		items = append(items, c)
	}
	if out.document() {
		return a.print(out, listOf("CertificateList", items))
	}
	for _, c := range items {
		fmt.Fprintf(a.Out, "The %s certificate will expire in %d days.\n", c.Title, c.DaysLeft)
	}
	return nil
}

func (a *App) undoCerts(ctx context.Context, store *certs.Store) error {
	if _, err := os.Stat(store.BackupDir()); errors.Is(err, os.ErrNotExist) {
		fmt.Fprintln(a.Out, "No previous backup found")
		fmt.Fprintln(a.Err, "  the certificates were never renewed here; see them with: microk8s refresh-certs --check")
		return exitError(ExitError)
	}
	if err := store.Undo(); err != nil {
		return &Failure{Err: fmt.Errorf("Failed to recover certificates: %w", err), Code: exitCertInfo,
			Hints: []string{"fix this and run the same command again"}}
	}
	fmt.Fprintln(a.Out, "Restarting, please wait.")
	err := a.stop(ctx)
	if err == nil {
		err = a.start(ctx, startOptions{})
	}
	if err != nil {
		return &Failure{Err: fmt.Errorf("Failed to start MicroK8s after reverting the certificates: %w", err), Code: exitCertInfo}
	}
	return nil
}

func (a *App) backupCerts(store *certs.Store) error {
	fmt.Fprintf(a.Out, "Taking a backup of the current certificates under %s\n", store.BackupDir())
	earlier, err := store.Backup()
	if err != nil {
		return &Failure{Err: err, Code: exitBackup}
	}
	if earlier != "" {
		fmt.Fprintf(a.Out, "The backup of before is kept as %s, one of at most %d\n", earlier, certs.KeptBackups)
	}
	return nil
}

func (a *App) renewCert(ctx context.Context, store *certs.Store, file string) error {
	if err := a.backupCerts(store); err != nil {
		return err
	}
	fmt.Fprintln(a.Out, "Creating new certificates")
	var err error
	restart := []string{"kubelite"}
	switch file {
	case "ca.crt":
		fmt.Fprintln(a.Out, "Creating new kubeconfig file")
		_, err = store.ReplaceCA(ctx, "")
		restart = append(restart, "cluster-agent")
	case "server.crt":
		_, err = store.Reissue(ctx, strings.TrimSuffix(file, ".crt"))
		restart = append(restart, "cluster-agent")
	default:
		_, err = store.Reissue(ctx, strings.TrimSuffix(file, ".crt"))
	}
	if err != nil {
		fmt.Fprintln(a.Err, "Failed to produce new certificates. Reverting.")
		return &Failure{Err: errors.Join(err, store.Undo()), Code: exitReissue}
	}
	if err := a.restart(ctx, restart); err != nil {
		return err
	}
	if file == "ca.crt" {
		a.newCANotice()
	}
	return nil
}

func (a *App) installCA(ctx context.Context, store *certs.Store, dir string) error {
	fmt.Fprintln(a.Out, "Validating provided certificates")
	if err := store.ValidateCA(dir); err != nil {
		f := &Failure{Err: err, Code: exitCAMissing}
		switch {
		case errors.Is(err, certs.ErrKey):
			f.Code = exitCAKey
		case errors.Is(err, certs.ErrCert):
			f.Code = exitCACert
		}
		return f
	}
	if err := a.backupCerts(store); err != nil {
		return err
	}
	fmt.Fprintln(a.Out, "Installing provided certificates")
	fmt.Fprintln(a.Out, "Creating new kubeconfig file")
	if _, err := store.ReplaceCA(ctx, dir); err != nil {
		fmt.Fprintln(a.Err, "Failed to produce new certificates. Reverting.")
		return &Failure{Err: errors.Join(err, store.Undo()), Code: exitReissue}
	}
	if err := a.restart(ctx, []string{"kubelite", "cluster-agent"}); err != nil {
		return err
	}
	a.newCANotice()
	return nil
}

func (a *App) newCANotice() {
	fmt.Fprint(a.Out, `
The CA certificates have been replaced. Kubernetes will restart the pods of your workloads.
Any worker nodes you may have in your cluster need to be removed and re-joined to become
aware of the new CA.
`)
}

// restart restarts services so that they use what has changed. On a stopped node nothing runs
// that would have to.
func (a *App) restart(ctx context.Context, names []string) error {
	if a.state().Stopped {
		return nil
	}
	for _, n := range names {
		fmt.Fprintf(a.Out, "Restarting service %s.\n", n)
		if err := a.Services.Restart(ctx, n); err != nil {
			return failf("the certificates are in place; restart the node with microk8s stop and microk8s start", "cannot restart %s: %w", n, err)
		}
	}
	return nil
}
