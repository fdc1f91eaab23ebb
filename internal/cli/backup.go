package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/archive"
	"microk8s/internal/archive/job"
	"microk8s/internal/archive/place"
	"microk8s/internal/archive/schedule"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
)

// exitNotProven is how backup ends where an archive could not be made or proven, and restore where the
// archive cannot be used (cli.md 1.14).
const exitNotProven = 4

// backupOptions are the flags of backup and of its verbs.
type backupOptions struct {
	place          string
	recipients     []string
	recipientsFile string
	passphraseFile string
	identityFile   string
	credentials    string
	keep           int
	every          time.Duration
	off            bool
	out            *output
}

func (a *App) newBackup() *cobra.Command {
	var o backupOptions
	root := &cobra.Command{
		Use:   "backup [create|list|verify|schedule|key]",
		Short: "Back up the whole cluster, now or on a schedule, and prove that it can be restored",
		Long: `Back up the whole cluster: all objects as of one moment, and what a new machine needs to become
this cluster (its CA and keys, arguments, addons, launch configuration). An archive is encrypted.
It counts only after it was read back from where it is stored, restored into a datastore of its
own, and compared with the running one by number and hash of all keys.

    microk8s backup key FILE        make a key pair: the secret half in FILE
    microk8s backup [create]        make one archive now
    microk8s backup list            the archives of a place
    microk8s backup verify NAME     prove one of them again
    microk8s backup schedule        make them on a schedule; without flags: show it

Archives are kept in a place: a directory (/DIR), a network file system that is mounted at a
directory (nfs:/DIR), or an S3 server (s3://BUCKET/FOLDER?endpoint=https://HOST[&region=R][&ca=FILE]).
They are encrypted for age recipients (age1..., from microk8s backup key or age-keygen), whose
secret half is best kept away from the cluster, or with a passphrase.

    sudo microk8s backup key /root/backup.key
    sudo microk8s backup schedule --every 12h --keep 14 --to nfs:/mnt/backups --recipient age1...

microk8s restore brings an archive back, on this machine or a new one. microk8s dbctl backup
archives the datastore alone, without encryption.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.backupCreate(cmd.Context(), o) },
	}
	to := func(c *cobra.Command) {
		c.Flags().StringVar(&o.place, "to", "", "where archives are kept: /DIR, nfs:/DIR or s3://BUCKET/FOLDER?endpoint=URL; without it, as scheduled")
		c.Flags().StringSliceVar(&o.recipients, "recipient", nil, "encrypt for this age recipient (age1...); may be repeated")
		c.Flags().StringVar(&o.recipientsFile, "recipients-file", "", "encrypt for the age recipients in this file, one a line")
		c.Flags().StringVar(&o.passphraseFile, "passphrase-file", "", "encrypt with the first line of this file")
	}
	from := func(c *cobra.Command) {
		c.Flags().StringVar(&o.place, "from", "", "where archives are kept: /DIR, nfs:/DIR or s3://BUCKET/FOLDER?endpoint=URL; without it, as scheduled")
	}
	keys := func(c *cobra.Command) {
		c.Flags().StringVar(&o.credentials, "s3-credentials-file", "", "file with aws_access_key_id and aws_secret_access_key, as ~/.aws/credentials has them")
	}
	to(root)
	keys(root)
	create := &cobra.Command{
		Use: "create [--to PLACE] [--recipient R... | --recipients-file FILE | --passphrase-file FILE] [-o json|yaml]", Short: "Make one archive now, and prove it", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.backupCreate(cmd.Context(), o) },
	}
	to(create)
	keys(create)
	list := &cobra.Command{
		Use: "list [--from PLACE] [-o json|yaml]", Short: "List the archives of a place", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.backupList(cmd.Context(), o) },
	}
	from(list)
	keys(list)
	verify := &cobra.Command{
		Use: "verify NAME [--from PLACE] (--identity-file FILE | --passphrase-file FILE) [-o json|yaml]", Short: "Prove a stored archive: restore it into a datastore of its own, and compare",
		Args: one("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error { return a.backupVerify(cmd.Context(), args[0], o) },
	}
	from(verify)
	keys(verify)
	addOpening(verify, &o)
	plan := &cobra.Command{
		Use:   "schedule [--every 12h --keep 14 --to PLACE (--recipient R... | --passphrase-file FILE)] [--off] [-o json|yaml]",
		Short: "Make archives on a schedule, or show it",
		Long: `Make archives on a schedule that the cluster keeps. One of the control-plane nodes makes each
archive; when it dies, another one does. A directory must therefore be the same one on all of
them. Without flags the schedule and the last archives are shown.

A passphrase and the keys of an S3 server are kept as a Secret in the cluster. For recipients the
cluster has nothing with which its archives could be read.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.backupSchedule(cmd, o) },
	}
	to(plan)
	keys(plan)
	plan.Flags().DurationVar(&o.every, "every", 12*time.Hour, "time from one archive to the next, at least 10m")
	plan.Flags().IntVar(&o.keep, "keep", 14, "how many of the newest proven archives are kept")
	plan.Flags().BoolVar(&o.off, "off", false, "make no more archives; those that there are stay")
	key := &cobra.Command{
		Use: "key FILE", Short: "Make a key pair for archives: the secret half in FILE, the recipient is printed", Args: one("FILE"),
		RunE: func(_ *cobra.Command, args []string) error { return a.backupKey(args[0]) },
	}
	run := &cobra.Command{
		Use: "run", Short: "Make the archive that is due, as scheduled", Args: noArgs, Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.backupRun(cmd.Context()) },
	}
	outs := map[*cobra.Command]*output{}
	for _, c := range []*cobra.Command{create, list, plan, verify} {
		outs[c] = addOutput(c, "text")
		inner := c.RunE
		c.RunE = func(cmd *cobra.Command, args []string) error {
			o.out = outs[cmd]
			return inner(cmd, args)
		}
	}
	o.out = &output{}
	root.AddCommand(create, list, verify, plan, key, run)
	return root
}

// addOpening adds the flags with which an archive is opened.
func addOpening(c *cobra.Command, o *backupOptions) {
	c.Flags().StringVar(&o.identityFile, "identity-file", "", "age identity file, the secret half of a recipient's pair")
	c.Flags().StringVar(&o.passphraseFile, "passphrase-file", "", "the passphrase is the first line of this file; on a terminal it is asked for")
}

// archives makes what works with archives at a place.
func (a *App) archives(p place.Place) (*job.Job, error) {
	config := nodeconfig.Load(a.Env)
	if !config.Datastore.Own() {
		return nil, failf("back it up with its own tools, for instance: etcdctl snapshot save", "the datastore is not on this cluster's nodes")
	}
	progress := a.progress()
	return &job.Job{
		Env: a.Env, Place: p, Node: config.NodeName, Encryption: a.encryptionFile(), Version: a.Env.Version, Now: a.Now,
		Datastore: a.datastoreTool, Step: progress.step,
	}, nil
}

// datastoreTool runs k8s-dqlite and returns what it printed.
func (a *App) datastoreTool(ctx context.Context, args ...string) ([]byte, error) {
	var out, said bytes.Buffer
	cmd := exec.CommandContext(ctx, a.Env.Bin("k8s-dqlite"), args...)
	cmd.Env = a.Env.Environ(a.Environ)
	cmd.Stdout, cmd.Stderr = &out, &said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if text := strings.TrimSpace(said.String()); text != "" {
			lines := strings.Split(text, "\n")
			return nil, errors.New(strings.TrimPrefix(lines[len(lines)-1], "k8s-dqlite: "))
		}
		return nil, err
	}
	return out.Bytes(), nil
}

// scheduled reads the schedule; an API server that does not answer is an error only where need says so.
func (a *App) scheduled(ctx context.Context, need bool) (*kube.Core, *schedule.State, schedule.Secrets, error) {
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	var s *schedule.State
	var secrets schedule.Secrets
	if err == nil {
		s, err = schedule.Load(ctx, core)
	}
	if err == nil {
		secrets, err = schedule.LoadSecrets(ctx, core)
	}
	if err != nil && !need {
		a.log().Debug("the schedule of backups is not known", "err", err)
		return nil, &schedule.State{}, secrets, nil
	}
	return core, s, secrets, err
}

// seal is for whom archives are encrypted, by the flags. On a terminal a passphrase is asked for where
// they say nothing.
func (a *App) seal(o backupOptions) (archive.Seal, error) {
	s := archive.Seal{Recipients: o.recipients}
	if o.recipientsFile != "" {
		data, err := os.ReadFile(o.recipientsFile)
		if err != nil {
			return s, err
		}
		for _, line := range strings.Split(string(data), "\n") {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				s.Recipients = append(s.Recipients, line)
			}
		}
	}
	var err error
	if o.passphraseFile != "" {
		if s.Passphrase, err = readPassphrase(o.passphraseFile); err != nil {
			return s, err
		}
	}
	return s, nil
}

func readPassphrase(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("cannot read the passphrase: %w", err)
	}
	p := archive.Passphrase(data)
	if p == "" {
		return "", fmt.Errorf("the first line of %s is empty; it must be the passphrase", file)
	}
	return p, nil
}

// askPassphrase asks a person for a passphrase, twice where it is a new one.
func (a *App) askPassphrase(fresh bool) (string, error) {
	f, file := a.In.(*os.File)
	if !a.asks() || !file {
		return "", nil
	}
	ask := func(what string) (string, error) {
		fmt.Fprint(a.Err, what)
		line, err := term.ReadPassword(int(f.Fd()))
		fmt.Fprintln(a.Err)
		return string(line), err
	}
	first, err := ask("Passphrase of the archive: ")
	if err != nil || !fresh {
		return first, err
	}
	second, err := ask("Once more: ")
	if err == nil && first != second {
		err = errors.New("the two passphrases differ; run the command again")
	}
	return first, err
}

const howToSeal = "make a key pair with microk8s backup key FILE and name its recipient with --recipient, or use --passphrase-file"

func (a *App) backupCreate(ctx context.Context, o backupOptions) error {
	seal, err := a.seal(o)
	if err != nil {
		return err
	}
	core, state, secrets, err := a.scheduled(ctx, true)
	if err != nil {
		return err
	}
	word := o.place
	if s := state.Settings; s != nil {
		if word == "" {
			word = s.To
		}
		if seal.Passphrase == "" && len(seal.Recipients) == 0 {
			seal = archive.Seal{Passphrase: secrets.Passphrase, Recipients: s.Recipients}
		}
	}
	if word == "" {
		return &Failure{Err: errors.New("nothing says where the archive is to be kept"), Code: ExitUsage,
			Hints: []string{"name a place, for instance: microk8s backup create --to /var/backups/microk8s", "or set a schedule: microk8s backup schedule --help"}}
	}
	if seal.Passphrase == "" && len(seal.Recipients) == 0 {
		if seal.Passphrase, err = a.askPassphrase(true); err != nil {
			return err
		}
	}
	if err := seal.Check(); err != nil {
		return &Failure{Err: err, Code: ExitUsage, Hints: []string{howToSeal}}
	}
	p, err := a.openPlace(word, o, secrets)
	if err != nil {
		return err
	}
	keep := 0
	if s := state.Settings; s != nil && s.To == word {
		keep = s.Keep
	}
	note, err := a.makeArchive(ctx, core, p, word, seal, keep)
	if err != nil {
		return err
	}
	if o.out.document() {
		return a.print(o.out, noteDocument{documentOf("ClusterBackup"), itemOf(job.Stored{Name: note.Name, Cluster: note.Cluster, Created: note.Created, Size: note.Size, Note: note}), word})
	}
	fmt.Fprintf(a.Out, "%s: %d keys at revision %d, %s, proven\nbring it back with: microk8s restore %s --from %s\n", note.Name, note.Keys, note.Revision, size(note.Size), note.Name, quoted(word))
	return nil
}

// quoted is a word for a shell.
func quoted(word string) string {
	if strings.ContainsAny(word, "?&;* ") {
		return "'" + word + "'"
	}
	return word
}

// size is a number of bytes for people.
func size(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%d KiB", (n+1023)>>10)
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

// openPlace opens a place with the keys of a file, or those of the cluster.
func (a *App) openPlace(word string, o backupOptions, s schedule.Secrets) (place.Place, error) {
	keys := place.Keys{ID: s.ID, Secret: s.Secret}
	if o.credentials != "" {
		var err error
		if keys, err = place.ReadKeys(o.credentials); err != nil {
			return nil, err
		}
	}
	p, err := place.Open(word, keys)
	if err != nil {
		return nil, &Failure{Err: err, Code: ExitUsage, Hints: []string{"see microk8s backup --help"}}
	}
	return p, nil
}

// makeArchive makes one archive, removes those beyond keep (0: none), and writes down how it went.
func (a *App) makeArchive(ctx context.Context, core *kube.Core, p place.Place, word string, seal archive.Seal, keep int) (*archive.Note, error) {
	j, err := a.archives(p)
	if err != nil {
		return nil, err
	}
	began := a.Now().UTC()
	note, err := j.Create(ctx, seal)
	record := schedule.Record{Attempt: began, Node: j.Node, Proven: note, At: word}
	if err != nil {
		record.Error = err.Error()
	}
	// What it is and that it failed is written down also when the command was interrupted.
	told, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	recordErr := schedule.Change(told, core, func(s *schedule.State) error {
		if s.Record != nil && note == nil {
			record.Proven, record.At = s.Record.Proven, s.Record.At
		}
		s.Record = &record
		return nil
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Canceled
		}
		return nil, &Failure{Err: fmt.Errorf("there is no new archive: %w", err), Code: exitNotProven, Hints: []string{"the archives that there are stay; see them with: microk8s backup list"}}
	}
	if recordErr != nil {
		fmt.Fprintf(a.Err, "the archive is proven, but the cluster could not be told: %v; microk8s status does not know it\n", recordErr)
	}
	if keep > 0 {
		removed, err := j.Prune(ctx, note.Cluster, keep)
		for _, r := range removed {
			fmt.Fprintf(a.Err, "removed the old archive %s\n", r)
		}
		if err != nil {
			return nil, fmt.Errorf("the new archive is proven, but an old one cannot be removed: %w", err)
		}
	}
	return note, nil
}

// backupRun makes the archive that is due; the cluster agent runs it.
func (a *App) backupRun(ctx context.Context) error {
	core, state, secrets, err := a.scheduled(ctx, true)
	if err != nil {
		return err
	}
	s := state.Settings
	if s == nil {
		return failf("set one with: microk8s backup schedule", "there is no schedule")
	}
	p, err := place.Open(s.To, place.Keys{ID: secrets.ID, Secret: secrets.Secret})
	if err != nil {
		return err
	}
	note, err := a.makeArchive(ctx, core, p, s.To, archive.Seal{Passphrase: secrets.Passphrase, Recipients: s.Recipients}, s.Keep)
	if err != nil {
		return err
	}
	fmt.Fprintf(a.Out, "%s is proven\n", note.Name)
	return nil
}

// backupItem is an archive in a document.
type backupItem struct {
	Name     string     `json:"name"`
	Cluster  string     `json:"cluster"`
	Node     string     `json:"node,omitempty"`
	Version  string     `json:"version,omitempty"`
	Created  time.Time  `json:"created"`
	Proven   *time.Time `json:"proven,omitempty"`
	Revision int64      `json:"revision,omitempty"`
	Keys     int        `json:"keys,omitempty"`
	Bytes    int64      `json:"bytes"`
	SHA256   string     `json:"sha256,omitempty"`
	For      []string   `json:"for,omitempty"`
}

func itemOf(s job.Stored) backupItem {
	i := backupItem{Name: s.Name, Cluster: s.Cluster, Created: s.Created, Bytes: s.Size}
	if n := s.Note; n != nil {
		i.Node, i.Version, i.Proven, i.Revision, i.Keys, i.SHA256, i.For = n.Node, n.Version, &n.Proven, n.Revision, n.Keys, n.SHA256, n.For
	}
	return i
}

// noteDocument is the kind ClusterBackup.
type noteDocument struct {
	documentMeta
	backupItem
	Place string `json:"place"`
}

// fromPlace opens the place of --from, or the scheduled one.
func (a *App) fromPlace(ctx context.Context, o backupOptions) (*job.Job, string, error) {
	_, state, secrets, err := a.scheduled(ctx, o.place == "")
	if err != nil {
		return nil, "", failf("name the place with --from", "%w", err)
	}
	word := o.place
	if word == "" && state.Settings != nil {
		word = state.Settings.To
	}
	if word == "" && state.Record != nil {
		word = state.Record.At
	}
	if word == "" {
		return nil, "", &Failure{Err: errors.New("nothing says where the archives are"), Code: ExitUsage, Hints: []string{"name the place with --from"}}
	}
	p, err := a.openPlace(word, o, secrets)
	if err != nil {
		return nil, "", err
	}
	j, err := a.archives(p)
	return j, word, err
}

func (a *App) backupList(ctx context.Context, o backupOptions) error {
	j, word, err := a.fromPlace(ctx, o)
	if err != nil {
		return err
	}
	stored, err := j.List(ctx)
	if err != nil {
		return err
	}
	if o.out.document() {
		var items []backupItem
		for _, s := range stored {
			items = append(items, itemOf(s))
		}
		return a.print(o.out, listOf("ClusterBackupList", items))
	}
	if len(stored) == 0 {
		fmt.Fprintf(a.Out, "There are no archives in %s\n", word)
		return nil
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tCREATED\tPROVEN\tREVISION\tKEYS\tSIZE\tNODE")
	for _, s := range stored {
		if n := s.Note; n != nil {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%s\n", s.Name, s.Created.Format(time.RFC3339), n.Proven.UTC().Format(time.RFC3339), n.Revision, n.Keys, size(s.Size), n.Node)
		} else {
			fmt.Fprintf(w, "%s\t%s\tno\t-\t-\t%s\t-\n", s.Name, s.Created.Format(time.RFC3339), size(s.Size))
		}
	}
	return w.Flush()
}

// identities are those that open an archive, by the flags or a person.
func (a *App) identities(o backupOptions) ([]age.Identity, error) {
	switch {
	case o.identityFile != "" && o.passphraseFile != "":
		return nil, &Failure{Err: errors.New("--identity-file and --passphrase-file exclude each other"), Code: ExitUsage}
	case o.identityFile != "":
		f, err := os.Open(o.identityFile)
		if err != nil {
			return nil, fmt.Errorf("cannot read the identity file: %w", err)
		}
		defer f.Close()
		who, err := archive.Identities(f, false)
		if err != nil {
			return nil, failf("it is what microk8s backup key FILE or age-keygen wrote", "cannot use the identity file %s: %w", o.identityFile, err)
		}
		return who, nil
	}
	var pass string
	var err error
	if o.passphraseFile != "" {
		pass, err = readPassphrase(o.passphraseFile)
	} else {
		pass, err = a.askPassphrase(false)
	}
	if err != nil {
		return nil, err
	}
	if pass == "" {
		return nil, &Failure{Err: errors.New("nothing says with what the archive is decrypted"), Code: ExitUsage, Hints: []string{"name the secret half of its recipient with --identity-file, or use --passphrase-file"}}
	}
	return archive.Identities(strings.NewReader(pass), true)
}

// opened explains why an archive could not be opened.
func opened(err error) error {
	var nobody *age.NoIdentityMatchError
	switch {
	case errors.As(err, &nobody):
		return &Failure{Err: errors.New("the archive cannot be decrypted with that identity or passphrase"), Code: exitNotProven,
			Hints: []string{"microk8s backup list -o yaml says for whom each one was encrypted"}}
	case errors.Is(err, fs.ErrNotExist):
		return &Failure{Err: err, Code: exitNotProven, Hints: []string{"see what there is with: microk8s backup list"}}
	case errors.Is(err, context.Canceled):
		return err
	}
	return &Failure{Err: err, Code: exitNotProven}
}

func (a *App) backupVerify(ctx context.Context, name string, o backupOptions) error {
	who, err := a.identities(o)
	if err != nil {
		return err
	}
	j, word, err := a.fromPlace(ctx, o)
	if err != nil {
		return err
	}
	note, err := j.Verify(ctx, name, who...)
	if err != nil {
		return opened(err)
	}
	if o.out.document() {
		return a.print(o.out, noteDocument{documentOf("ClusterBackup"), itemOf(job.Stored{Name: note.Name, Cluster: note.Cluster, Created: note.Created, Size: note.Size, Note: note}), word})
	}
	fmt.Fprintf(a.Out, "%s can be restored: %d keys at revision %d, of %s\n", name, note.Keys, note.Revision, note.Created.Format(time.RFC3339))
	return nil
}

// scheduleDocument is the kind BackupSchedule.
type scheduleDocument struct {
	documentMeta
	Scheduled  bool        `json:"scheduled"`
	To         string      `json:"to,omitempty"`
	Every      string      `json:"every,omitempty"`
	Keep       int         `json:"keep,omitempty"`
	For        []string    `json:"for,omitempty"`
	Next       *time.Time  `json:"next,omitempty"`
	Attempt    *time.Time  `json:"attempt,omitempty"`
	Error      string      `json:"error,omitempty"`
	Proven     *backupItem `json:"proven,omitempty"`
	ProvenAt   string      `json:"place,omitempty"`
	AgeSeconds int64       `json:"ageSeconds,omitempty"`
	Running    string      `json:"running,omitempty"`
}

func (a *App) backupSchedule(cmd *cobra.Command, o backupOptions) error {
	ctx := cmd.Context()
	changes := false
	for _, name := range []string{"every", "keep", "to", "recipient", "recipients-file", "passphrase-file", "s3-credentials-file"} {
		changes = changes || cmd.Flags().Changed(name)
	}
	if o.off && changes {
		return &usageError{cmd, errors.New("--off excludes the other flags")}
	}
	core, state, secrets, err := a.scheduled(ctx, true)
	if err != nil {
		return err
	}
	switch {
	case o.off:
		if err := schedule.Change(ctx, core, func(s *schedule.State) error { s.Settings, s.Claim = nil, nil; return nil }); err != nil {
			return err
		}
		if err := schedule.StoreSecrets(ctx, core, schedule.Secrets{}); err != nil {
			return err
		}
		fmt.Fprintln(a.Out, "No more archives are made. Those that there are stay.")
		return nil
	case changes:
		return a.setSchedule(cmd, o, core, state, secrets)
	}
	return a.showSchedule(state, secrets, o.out)
}

// setSchedule changes what the flags name; the rest stays.
func (a *App) setSchedule(cmd *cobra.Command, o backupOptions, core *kube.Core, state *schedule.State, secrets schedule.Secrets) error {
	ctx := cmd.Context()
	seal, err := a.seal(o)
	if err != nil {
		return err
	}
	s := schedule.Settings{To: o.place, Every: metav1.Duration{Duration: o.every}, Keep: o.keep}
	if old := state.Settings; old != nil {
		if o.place == "" {
			s.To = old.To
		}
		if !cmd.Flags().Changed("every") {
			s.Every = old.Every
		}
		if !cmd.Flags().Changed("keep") {
			s.Keep = old.Keep
		}
		if seal.Passphrase == "" && len(seal.Recipients) == 0 {
			seal = archive.Seal{Passphrase: secrets.Passphrase, Recipients: old.Recipients}
		}
	}
	wrong := func(err error, hint string) error { return &Failure{Err: err, Code: ExitUsage, Hints: []string{hint}} }
	if err := s.Check(); err != nil {
		return wrong(err, "see microk8s backup schedule --help")
	}
	if err := seal.Check(); err != nil {
		return wrong(err, howToSeal)
	}
	if s.To == "" {
		return wrong(errors.New("nothing says where archives are to be kept"), "name a place with --to; see microk8s backup --help")
	}
	if o.credentials != "" {
		keys, err := place.ReadKeys(o.credentials)
		if err != nil {
			return err
		}
		secrets.ID, secrets.Secret = keys.ID, keys.Secret
	}
	if !strings.HasPrefix(s.To, "s3://") {
		secrets.ID, secrets.Secret = "", ""
	}
	p, err := a.openPlace(s.To, backupOptions{}, secrets)
	if err != nil {
		return err
	}
	if _, err := a.archives(p); err != nil { // an etcd of its own
		return err
	}
	// Now, and not at night, it is found out that nothing can be stored there.
	const probe = "write-test"
	if err := p.Put(ctx, probe, strings.NewReader("x"), 1); err != nil {
		return failf("nothing was changed", "%w", err)
	}
	if err := p.Remove(ctx, probe); err != nil {
		return failf("nothing was changed; archives could not be removed there either", "%w", err)
	}
	s.Recipients, secrets.Passphrase = seal.Recipients, seal.Passphrase
	if err := schedule.StoreSecrets(ctx, core, secrets); err != nil {
		return err
	}
	if err := schedule.Change(ctx, core, func(now *schedule.State) error { now.Settings = &s; return nil }); err != nil {
		return err
	}
	fmt.Fprintf(a.Out, "An archive is made every %s in %s; the newest %d are kept.\n", short(s.Every.Duration), s.To, s.Keep)
	if !strings.HasPrefix(s.To, "s3://") && !strings.HasPrefix(s.To, "nfs:") {
		fmt.Fprintf(a.Err, "The archives lie on the disk of the node that makes each; keep copies elsewhere, or mount a network file system there and use --to nfs:%s\n", s.To)
	}
	fmt.Fprintln(a.Err, "See how it goes with: microk8s backup schedule, and microk8s status")
	return nil
}

// short is a duration for people, without empty minutes and seconds.
func short(d time.Duration) string {
	s := d.Round(time.Second).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func (a *App) showSchedule(state *schedule.State, secrets schedule.Secrets, out *output) error {
	now := a.Now()
	d := scheduleDocument{documentMeta: documentOf("BackupSchedule")}
	if s := state.Settings; s != nil {
		next := state.Due()
		if next.Before(now) {
			next = now
		}
		next = next.UTC().Truncate(time.Second)
		d.Scheduled, d.To, d.Every, d.Keep, d.Next = true, s.To, short(s.Every.Duration), s.Keep, &next
		d.For = archive.Seal{Passphrase: secrets.Passphrase, Recipients: s.Recipients}.For()
	}
	if r := state.Record; r != nil {
		attempt := r.Attempt.UTC().Truncate(time.Second)
		d.Attempt, d.Error, d.ProvenAt = &attempt, r.Error, r.At
		if n := r.Proven; n != nil {
			item := itemOf(job.Stored{Name: n.Name, Cluster: n.Cluster, Created: n.Created, Size: n.Size, Note: n})
			d.Proven, d.AgeSeconds = &item, int64(now.Sub(n.Created)/time.Second)
		}
	}
	if c := state.Claim; c != nil && c.Until.After(now) {
		d.Running = c.Node
	}
	if out.document() {
		return a.print(out, d)
	}
	if d.Scheduled {
		fmt.Fprintf(a.Out, "every %s, the newest %d are kept, in %s, encrypted for %s\n", d.Every, d.Keep, d.To, strings.Join(d.For, ", "))
	} else {
		fmt.Fprintln(a.Out, "There is no schedule. Set one with: microk8s backup schedule --every 12h --keep 14 --to PLACE --recipient age1...")
	}
	if d.Running != "" {
		fmt.Fprintf(a.Out, "now: node %s makes an archive\n", d.Running)
	} else if d.Scheduled {
		fmt.Fprintf(a.Out, "next: %s\n", d.Next.Format(time.RFC3339))
	}
	if d.Proven != nil {
		fmt.Fprintf(a.Out, "newest proven archive: %s, %s old, %d keys at revision %d, in %s\n", d.Proven.Name, short(time.Duration(d.AgeSeconds)*time.Second), d.Proven.Keys, d.Proven.Revision, d.ProvenAt)
	} else {
		fmt.Fprintln(a.Out, "newest proven archive: none")
	}
	if d.Error != "" {
		fmt.Fprintf(a.Out, "the last one failed, at %s: %s\n", d.Attempt.Format(time.RFC3339), d.Error)
	}
	return nil
}

// backupKey makes a pair whose secret half nobody but its owner reads.
func (a *App) backupKey(file string) error {
	text, recipient, err := archive.NewIdentity()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return failf("name another file; archives for the old key could not be read without it", "%s exists", file)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.WriteString(f, text); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	full, err := filepath.Abs(file)
	if err != nil {
		full = file
	}
	fmt.Fprintf(a.Err, "The secret half is in %s. Keep a copy away from this cluster: without it no archive can be read.\nEncrypt archives with: microk8s backup schedule --recipient %s ...\n", full, recipient)
	fmt.Fprintln(a.Out, recipient)
	return nil
}
