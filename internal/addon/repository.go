package addon

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"sigs.k8s.io/yaml"

	"microk8s/internal/fileaccess"
	"microk8s/internal/snapenv"
)

// Repositories are the addon repositories of one installation: folders in $SNAP_COMMON/addons,
// most of them checkouts of git. The program git of the host does the fetching.
type Repositories struct {
	Env snapenv.Env
	Out io.Writer // what is removed, and what git says
	Err io.Writer
	// Term: Err is a terminal, which sees how git proceeds.
	Term bool
	// Stall is how long git may show no progress; 0 means a minute.
	Stall time.Duration
}

const (
	// gitStall is how long git may show no progress, which it does each second while anything comes.
	gitStall = time.Minute
	// gitEnd is how long git may take to clear up when it is ended.
	gitEnd = 3 * time.Second
)

// Repository is one of them as `addons repo list` shows it.
type Repository struct {
	Name        string `json:"name"`
	Addons      int    `json:"addons"`
	Source      string `json:"source"`
	Description string `json:"description"`
}

// RefusedError is a repository that cannot be added, updated or removed; the text is
// upstream's.
type RefusedError struct {
	Text string
	Hint string
}

func (e *RefusedError) Error() string { return e.Text }

// builtIn is the source of a repository that came from no other place.
const builtIn = "(built-in)"

// repositoryName keeps names out that would be another folder, or an option of git's.
var repositoryName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

// List returns all repositories by name, the product's own among them, and what was wrong with
// those that cannot be read.
func (r *Repositories) List(ctx context.Context) (all []Repository, broken []error) {
	for _, name := range slices.Sorted(slices.Values(append(repositoryNames(r.Env), CoreRepository))) {
		dir, source := r.Env.AddonRepository(name), builtIn
		if name == CoreRepository {
			dir = r.Env.CoreAddons()
		} else if s, ok := r.source(ctx, dir); ok {
			source = s
		}
		m, err := readRepository(name, dir)
		if err != nil {
			broken = append(broken, err)
			continue
		}
		all = append(all, Repository{Name: name, Addons: len(m.usable()), Source: source, Description: m.Description})
	}
	return all, broken
}

// source is where a checkout came from, and the beginning of its commit.
func (r *Repositories) source(ctx context.Context, dir string) (string, bool) {
	if !isCheckout(dir) {
		return "", false
	}
	url, err := r.ask(ctx, dir, "config", "--get", "remote.origin.url")
	if err != nil {
		return "", false
	}
	commit, err := r.ask(ctx, dir, "rev-parse", "HEAD")
	if err != nil || len(commit) < 6 {
		return "", false
	}
	return url + "@" + commit[:6], true
}

func isCheckout(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, ".git"))
	return err == nil
}

// Add clones a repository and checks it. It takes its place under its name when it is found
// good; with force it takes that of one that is there.
func (r *Repositories) Add(ctx context.Context, name, source, reference string, force bool) error {
	if !repositoryName.MatchString(name) {
		return &RefusedError{Text: fmt.Sprintf("Error: '%s' is not a valid name of a repository", name), Hint: "use letters, digits, _, . and -"}
	}
	dir := r.Env.AddonRepository(name)
	_, err := os.Lstat(dir)
	exists := err == nil
	if name == CoreRepository || exists && !force {
		refused := &RefusedError{Text: fmt.Sprintf("Error: repository '%s' already exists!", name), Hint: "Use the --force flag to overwrite it"}
		if name == CoreRepository {
			refused.Hint = "It is part of the product: choose another name"
		}
		return refused
	}
	// Beside the others, hidden, until it is complete.
	fresh, err := os.MkdirTemp(r.Env.AddonRepositories(), ".new-")
	if err != nil {
		return fmt.Errorf("cannot add a repository: %w", err)
	}
	defer os.RemoveAll(fresh)
	clone := filepath.Join(fresh, name)
	args := []string{"clone", "--progress"}
	if reference != "" {
		args = append(args, "-b", reference)
	}
	if err := r.git(ctx, source, "", append(args, "--", source, clone)...); err != nil {
		next := "try: git ls-remote " + source
		if reference != "" {
			next += " " + reference
		}
		return fmt.Errorf("cannot fetch %s: %w; %s, and then the same command again", source, err, next)
	}
	if err := Validate(clone); err != nil {
		fmt.Fprintf(r.Out, "Removing %s\n", dir)
		return err
	}
	if err := r.share(clone); err != nil {
		return fmt.Errorf("cannot add repository %s: %w", name, err)
	}
	if exists {
		fmt.Fprintf(r.Out, "Removing %s\n", dir)
		if err := os.Rename(dir, filepath.Join(fresh, "old")); err != nil {
			return fmt.Errorf("cannot replace repository %s: %w", name, err)
		}
	}
	if err := os.Rename(clone, dir); err != nil {
		return fmt.Errorf("cannot add repository %s: %w", name, err)
	}
	return nil
}

// Remove deletes a repository; what its addons brought into the cluster stays.
func (r *Repositories) Remove(name string) error {
	dir, err := r.existing(name)
	if err != nil {
		return err
	}
	if name == CoreRepository {
		return &RefusedError{Text: "Error: built-in repository 'core' cannot be removed", Hint: "It is part of the product; switch its addons off with: microk8s disable ADDON"}
	}
	fmt.Fprintf(r.Out, "Removing %s\n", dir)
	// Out of sight first: an interrupted removal leaves nothing that looks like a repository.
	hidden, err := os.MkdirTemp(r.Env.AddonRepositories(), ".old-")
	if err != nil {
		return fmt.Errorf("cannot remove repository %s: %w", name, err)
	}
	if err := os.Rename(dir, filepath.Join(hidden, name)); err != nil {
		return errors.Join(fmt.Errorf("cannot remove repository %s: %w", name, err), os.Remove(hidden))
	}
	return os.RemoveAll(hidden)
}

// Update fetches what is new, and goes back where that is no good.
func (r *Repositories) Update(ctx context.Context, name string) error {
	dir, err := r.existing(name)
	if err != nil {
		return err
	}
	if name == CoreRepository || !isCheckout(dir) {
		return &RefusedError{Text: fmt.Sprintf("Error: built-in repository '%s' cannot be updated", name), Hint: "It comes with the product: update that, or add a git repository with: microk8s addons repo add NAME URL"}
	}
	fmt.Fprintf(r.Out, "Updating repository %s\n", name)
	before, err := r.ask(ctx, dir, "rev-parse", "HEAD")
	if err != nil {
		return fmt.Errorf("cannot update repository %s: %w", name, err)
	}
	source, err := r.ask(ctx, dir, "remote", "get-url", "origin")
	if err != nil {
		return fmt.Errorf("cannot update repository %s: %w", name, err)
	}
	if err := r.git(ctx, source, dir, "pull", "--progress", "--ff-only"); err != nil {
		return fmt.Errorf("cannot update repository %s: %w", name, err)
	}
	if err := Validate(dir); err != nil {
		fmt.Fprintf(r.Out, "Rolling back repository %s\n", name)
		if back := r.git(context.WithoutCancel(ctx), dir, dir, "reset", "--hard", before); back != nil {
			return errors.Join(err, fmt.Errorf("cannot roll back to %s: %w", before, back))
		}
		return err
	}
	return r.share(dir)
}

// existing returns the folder of a repository, which must be there.
func (r *Repositories) existing(name string) (string, error) {
	if name == CoreRepository {
		return r.Env.CoreAddons(), nil
	}
	dir := r.Env.AddonRepository(name)
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() || !repositoryName.MatchString(name) {
		return "", &RefusedError{Text: fmt.Sprintf("Error: repository '%s' does not exist", name), Hint: "See those that do with: microk8s addons repo list"}
	}
	return dir, nil
}

// Clean removes what interrupted commands have left.
func (r *Repositories) Clean() {
	for _, pattern := range []string{".new-*", ".old-*"} {
		left, _ := filepath.Glob(filepath.Join(r.Env.AddonRepositories(), pattern))
		for _, dir := range left {
			_ = os.RemoveAll(dir)
		}
	}
}

// share gives a tree to the group of the product.
func (r *Repositories) share(dir string) error {
	gid := -1
	if id, ok, err := fileaccess.GroupID(r.Env.HostPath("etc/group"), snapenv.Group); err == nil && ok {
		gid = id
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || gid < 0 {
			return err
		}
		return os.Lchown(path, -1, gid)
	})
}

// git runs git with its words shown. from is where the data comes from: it is named when nothing
// comes any more.
func (r *Repositories) git(ctx context.Context, from, dir string, args ...string) error {
	stall := cmp.Or(r.Stall, gitStall)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd, err := r.command(ctx, dir, args)
	if err != nil {
		return err
	}
	silent := time.AfterFunc(stall, func() {
		cancel(fmt.Errorf("%s brought nothing for %s; check the address and the network, and try again", from, stall))
	})
	defer silent.Stop()
	said := &progressLines{w: r.Err, all: r.Term, seen: func() { silent.Reset(stall) }}
	cmd.Stdout, cmd.Stderr = r.Out, said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it removes what is incomplete
	cmd.WaitDelay = gitEnd
	err = cmd.Run()
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// progressLines passes on what git writes, and calls seen each time. Unless all is wanted, the lines
// in which git overwrites its progress are left out.
type progressLines struct {
	w    io.Writer
	all  bool
	seen func()
	line []byte
}

func (p *progressLines) Write(data []byte) (int, error) {
	p.seen()
	if p.all {
		return p.w.Write(data)
	}
	for _, c := range data {
		p.line = append(p.line, c)
		switch c {
		case '\r':
			p.line = p.line[:0]
		case '\n':
			if !bytes.HasSuffix(bytes.TrimRight(p.line, " \n"), []byte("done.")) {
				if _, err := p.w.Write(p.line); err != nil {
					return 0, err
				}
			}
			p.line = p.line[:0]
		}
	}
	return len(data), nil
}

// ask returns git's answer.
func (r *Repositories) ask(ctx context.Context, dir string, args ...string) (string, error) {
	cmd, err := r.command(ctx, dir, args)
	if err != nil {
		return "", err
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(errOut.Bytes()))
	}
	return strings.TrimSpace(out.String()), nil
}

// command prepares git with a configuration of the product's: whoever calls it, the folders
// here belong to others of the group, which git would refuse.
func (r *Repositories) command(ctx context.Context, dir string, args []string) (*exec.Cmd, error) {
	git, err := exec.LookPath("git")
	if err != nil {
		return nil, errors.New("git is not installed; addon repositories need it: sudo apt install git")
	}
	home := r.Env.Args("git")
	config := filepath.Join(home, ".gitconfig")
	if _, err := os.Stat(config); errors.Is(err, fs.ErrNotExist) {
		a := fileaccess.For(r.Env)
		if err := errors.Join(a.SharedDir(home), a.WriteShared(config, []byte("[safe]\n\tdirectory = *\n"))); err != nil {
			return nil, err
		}
	}
	cmd := exec.CommandContext(ctx, git, args...)
	cmd.Dir = dir
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "GIT_") && !strings.HasPrefix(kv, "HOME=") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, "HOME="+home, "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0")
	return cmd, nil
}

// repositoryForm says where to read what a repository must look like.
const repositoryForm = "What a repository must have in it: docs/addons.md, \"Addons of others\""

// architectures are those that an addons.yaml may name.
var architectures = []string{"amd64", "arm64", "s390x", "ppc64le"}

// Validate says what is wrong with the repository in a folder, in upstream's words.
func Validate(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, "addons.yaml"))
	if errors.Is(err, fs.ErrNotExist) {
		return &RefusedError{Text: fmt.Sprintf("Error: repository %s does not contain an addons.yaml file", filepath.Base(dir)), Hint: repositoryForm}
	}
	if err != nil {
		return err
	}
	var file map[string]any
	if err := yaml.Unmarshal(data, &file); err != nil {
		return &RefusedError{Text: fmt.Sprintf("Yaml format error in addons.yaml file: %v", err), Hint: repositoryForm}
	}
	names, err := checkForm(file)
	if err != nil {
		return &RefusedError{Text: fmt.Sprintf("Invalid addons.yaml file: %v", err), Hint: repositoryForm}
	}
	for _, name := range names {
		for _, verb := range []string{"enable", "disable"} {
			fi, err := os.Stat(filepath.Join(dir, "addons", name, verb))
			switch {
			case err != nil || !fi.Mode().IsRegular():
				return &RefusedError{Text: fmt.Sprintf("Missing %s hook for %s addon", verb, name), Hint: repositoryForm}
			case fi.Mode()&0o100 == 0:
				return &RefusedError{Text: fmt.Sprintf("%s hook for %s addon needs execute permissions", verb, name), Hint: fmt.Sprintf("In the repository run: git update-index --chmod=+x addons/%s/%s; git commit -m 'hooks can be run'; then add it again", name, verb)}
			}
		}
	}
	return nil
}

// checkForm checks the form of an addons.yaml and gives the names of its addons.
func checkForm(file map[string]any) ([]string, error) {
	top, ok := file["microk8s-addons"].(map[string]any)
	if !ok {
		return nil, errors.New("'microk8s-addons' is a required property")
	}
	list, ok := top["addons"].([]any)
	if !ok {
		return nil, errors.New("'addons' is a required property and a list")
	}
	var names []string
	for i, item := range list {
		a, ok := item.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("addon %d is not an object", i+1)
		}
		for _, key := range []string{"name", "description", "version", "check_status"} {
			value, there := a[key]
			if !there {
				return nil, fmt.Errorf("'%s' is a required property of addon %d", key, i+1)
			}
			if _, ok := value.(string); !ok {
				return nil, fmt.Errorf("%v is not of type 'string', for '%s' of addon %d", value, key, i+1)
			}
		}
		name := a["name"].(string)
		if !repositoryName.MatchString(name) {
			return nil, fmt.Errorf("%q is not a valid name of an addon", name)
		}
		archs, ok := a["supported_architectures"].([]any)
		if !ok {
			return nil, fmt.Errorf("'supported_architectures' is a required property of addon %s and a list", name)
		}
		for _, arch := range archs {
			if s, _ := arch.(string); !slices.Contains(architectures, s) {
				return nil, fmt.Errorf("%v is not one of %q", arch, architectures)
			}
		}
		names = append(names, name)
	}
	return names, nil
}
