package launchconf

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"microk8s/cluster-agent/node"
	"microk8s/internal/atomicfile"
	"microk8s/internal/certs"
	"microk8s/internal/journal"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/ranges"
	"microk8s/internal/service"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// fieldNames are the keys that a document may have.
var fieldNames = func() (out []string) {
	t := reflect.TypeFor[Document]()
	for i := range t.NumField() {
		out = append(out, t.Field(i).Tag.Get("yaml"))
	}
	return out
}()

// Restarter restarts services of this node.
type Restarter interface {
	Restart(ctx context.Context, names ...string) error
}

// Applier applies configurations to one node. Set Env; nil fields mean the real thing.
type Applier struct {
	Env      snapenv.Env
	Services Restarter
	// Run runs a program of the product with stdin, which may be nil.
	Run func(ctx context.Context, stdin io.Reader, argv ...string) error
	// Join runs a command that outlives this process; the real one is [service.Detach].
	Join func(ctx context.Context, stdin string, args ...string) error
	Log  *slog.Logger
	// PreInit is for a node that has not been started yet: files, names and tokens only;
	// nothing is restarted, switched or joined. What is left is done by a later run without it.
	PreInit bool
}

// Validate says everything that is wrong in a configuration, for this node, and does nothing.
func Validate(_ context.Context, env snapenv.Env, data []byte) error {
	docs, _, err := Parse(data)
	if err != nil {
		return err
	}
	return checkRanges(env, docs)
}

// checkRanges refuses ranges of pods and Services that cannot be used, or that a node has no choice of any more.
func checkRanges(env snapenv.Env, docs []Document) error {
	changes := map[string]*string{}
	for _, d := range docs {
		for key, value := range d.CNIEnv {
			changes[key] = (*string)(value)
		}
	}
	if len(changes) == 0 {
		return nil
	}
	if err := ranges.Try(env, changes); err != nil {
		return fmt.Errorf("extraCNIEnv: %w", err)
	}
	return nil
}

// Apply applies a configuration to a node that runs, as far as it was not applied before.
func Apply(ctx context.Context, env snapenv.Env, data []byte) error {
	return (&Applier{Env: env}).Apply(ctx, data)
}

// PreInit applies what can be applied before the first start.
func PreInit(ctx context.Context, env snapenv.Env, data []byte) error {
	return (&Applier{Env: env, PreInit: true}).Apply(ctx, data)
}

// step is one thing to do. Its name tells no secret.
type step struct {
	name  string
	later bool // not before the first start
	do    func(ctx context.Context) error
}

// state is what was done of one configuration.
type state struct {
	Done     []string `json:"done"`
	Restarts []string `json:"restarts,omitempty"` // still to be made
	Joining  []string `json:"joining,omitempty"`  // steps that have begun a join
	// Before is what argument files of Kubernetes' daemons had in them, by name, until the daemons have taken the new ones.
	Before map[string]string `json:"before,omitempty"`
	path   string
}

// StateDir is the folder with what was done of each configuration, by the hash of its text.
func StateDir(env snapenv.Env) string { return filepath.Join(env.Common, "var/launcher") }

func loadState(env snapenv.Env, data []byte) (*state, error) {
	sum := sha256.Sum256(data)
	s := &state{path: filepath.Join(StateDir(env), hex.EncodeToString(sum[:16])+".json")}
	text, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(text, s)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read what was applied before: %w; remove %s to start over", err, s.path)
	}
	return s, nil
}

func (s *state) save() error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
		return err
	}
	return atomicfile.Write(s.path, text, 0o600, nil)
}

// Forget makes a configuration apply again, from its first step.
func Forget(env snapenv.Env, data []byte) error {
	s, err := loadState(env, data)
	if err != nil {
		return err
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Apply validates the whole configuration and does its steps that were not done yet. The first
// one that fails ends it; the next run goes on there.
func (a *Applier) Apply(ctx context.Context, data []byte) error {
	if a.Log == nil {
		a.Log = slog.New(slog.DiscardHandler)
	}
	if a.Services == nil {
		a.Services = service.New(a.Env)
	}
	if a.Run == nil {
		a.Run = node.Runner(a.Env)
	}
	if a.Join == nil {
		a.Join = func(ctx context.Context, stdin string, args ...string) error {
			return service.Detach(ctx, a.Env, stdin, args...)
		}
	}
	docs, warnings, err := Parse(data)
	for _, w := range warnings {
		a.Log.Warn("launch configuration", "warning", w)
	}
	if err != nil {
		return err
	}
	st, err := loadState(a.Env, data)
	if err != nil {
		return err
	}
	if err := checkRanges(a.Env, docs); err != nil {
		return fmt.Errorf("failed to apply configuration: %w", err)
	}
	for _, s := range a.steps(docs, st) {
		if slices.Contains(st.Done, s.name) || s.later && a.PreInit {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("failed to apply configuration: %s: %w", s.name, err)
		}
		st.Done = append(st.Done, s.name)
		if err := st.save(); err != nil {
			return fmt.Errorf("failed to apply configuration: cannot record what was done: %w", err)
		}
		a.Log.Info("launch configuration", "done", s.name)
	}
	return nil
}

// steps lists what the documents ask for: first everything that is a file, then the services
// that read changed files, then what needs them: the cluster to join, and addons, which are
// the cluster's. (Upstream switches addons before the arguments are in use.)
func (a *Applier) steps(docs []Document, st *state) (out []step) {
	for i, d := range docs {
		name := func(what string) string { return fmt.Sprintf("document %d: %s", i+1, what) }
		if d.PersistentClusterToken != "" {
			out = append(out, step{name("persistent token"), false, func(ctx context.Context) error { return a.persistentToken(ctx, string(d.PersistentClusterToken)) }})
		}
		for _, f := range slices.Sorted(maps.Keys(d.ExtraConfigFiles)) {
			out = append(out, step{name("file args/" + f), false, func(context.Context) error {
				return a.write(a.Env.Args(f), []byte(d.ExtraConfigFiles[f]), 0o660)
			}})
		}
		for _, f := range d.files() {
			if len(f.changes) > 0 {
				out = append(out, step{name("file args/" + f.name), false, func(context.Context) error { return a.change(f, st) }})
			}
		}
		if d.ExtraSANs != nil {
			out = append(out, step{name("names of the certificate"), false, func(context.Context) error {
				return a.write(a.Env.Cert("csr.conf.template"), csrTemplate(*d.ExtraSANs), 0o660)
			}})
		}
		for _, r := range slices.Sorted(maps.Keys(d.ContainerdRegistryFiles)) {
			out = append(out, step{name("registry " + r), false, func(context.Context) error {
				return a.write(filepath.Join(a.Env.Args("certs.d"), r, "hosts.toml"), []byte(d.ContainerdRegistryFiles[r]), 0o644)
			}})
		}
	}
	if slices.ContainsFunc(docs, func(d Document) bool { return len(d.CNIEnv) > 0 }) {
		out = append(out, step{"ranges of pods and Services", false, func(ctx context.Context) error { return setup.Ranges(ctx, a.Env, a.Log) }})
	}
	if slices.ContainsFunc(docs, func(d Document) bool {
		return slices.ContainsFunc(d.files(), func(f file) bool { return len(f.changes) > 0 && f.kubernetes() })
	}) {
		out = append(out, step{"arguments that Kubernetes takes", false, func(ctx context.Context) error { return a.accepted(ctx, st) }})
	}
	out = append(out, step{"restart of services", true, func(ctx context.Context) error { return a.restart(ctx, st, false) }})
	microk8s := a.Env.Bin("microk8s")
	for i, d := range docs {
		if d.Join == nil {
			continue
		}
		name := fmt.Sprintf("document %d: join", i+1)
		out = append(out, step{name, true, func(ctx context.Context) error { return a.join(ctx, name, d, st) }})
	}
	for i, d := range docs {
		for _, r := range d.AddonRepositories {
			out = append(out, step{fmt.Sprintf("document %d: addon repository %s", i+1, r.Name), true, func(ctx context.Context) error {
				argv := []string{microk8s, "addons", "repo", "add", string(r.Name), string(r.URL)}
				if r.Reference != "" {
					argv = append(argv, "--reference", string(r.Reference))
				}
				return a.Run(ctx, nil, append(argv, "--force")...)
			}})
		}
		for n, x := range d.Addons {
			verb := "enable"
			if x.Disable {
				verb = "disable"
			}
			out = append(out, step{fmt.Sprintf("document %d: %s %s (%d)", i+1, verb, x.Name, n+1), true, func(ctx context.Context) error {
				argv := []string{microk8s, verb, string(x.Name)}
				for _, arg := range x.Args {
					argv = append(argv, string(arg))
				}
				return a.Run(ctx, nil, argv...)
			}})
		}
	}
	// The agent may be who applies this, and ends with it: so it is last.
	return append(out, step{"restart of the cluster agent", true, func(ctx context.Context) error { return a.restart(ctx, st, true) }})
}

// join makes the node one of a cluster. A join stops this agent and starts it again, so the next
// run finds one that was begun. Run again it is resumed where it was interrupted, refused while
// it runs, and not needed once it is done.
func (a *Applier) join(ctx context.Context, name string, d Document, st *state) error {
	begun := slices.Contains(st.Joining, name)
	if begun { // it starts this agent before it ends
		if err := a.awaitChange(ctx); err != nil {
			return err
		}
	}
	s := nodeconfig.ReadState(a.Env)
	member := (s.Worker || s.Clustered) && !s.Changing
	if member && begun {
		return nil
	}
	if !member && !begun { // a member of another cluster is refused by the join
		st.Joining = append(st.Joining, name)
		if err := st.save(); err != nil {
			return err
		}
	}
	args := []string{"join", "-"} // the token goes through standard input
	if d.Join.Worker {
		args = append(args, "--worker")
	}
	return a.Join(ctx, string(d.Join.URL)+"\n", args...)
}

// changePoll is how often a change of membership that another process carries out is looked at; its lock has no
// event to wait for.
const changePoll = 200 * time.Millisecond

// awaitChange waits until no process carries out a change of this node's membership.
func (a *Applier) awaitChange(ctx context.Context) error {
	for {
		j, err := journal.Open(a.Env.Journal())
		if err == nil {
			return j.Close()
		}
		if !errors.Is(err, journal.ErrBusy) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(changePoll):
		}
	}
}

// write replaces a file of the node, and makes its folder.
func (a *Applier) write(path string, data []byte, perm os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if st, err := os.Stat(path); err == nil {
		perm = st.Mode().Perm()
	}
	return atomicfile.Write(path, data, perm, nil)
}

// change edits one argument or -env file, and notes the services that must be restarted if it
// is another one then.
func (a *Applier) change(f file, st *state) error {
	path := a.Env.Args(f.name)
	before, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if f.env {
		err = a.write(path, editEnv(before, f.changes), 0o660)
	} else {
		update, remove := map[string]string{}, []string{}
		for key, value := range f.changes {
			if value == nil {
				remove = append(remove, key)
			} else {
				update[key] = string(*value)
			}
		}
		err = node.Update(a.Env, f.name, []map[string]string{update}, remove)
	}
	if err != nil {
		return err
	}
	after, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if bytes.Equal(before, after) {
		return nil
	}
	if _, kept := st.Before[f.name]; !kept && f.kubernetes() {
		if st.Before == nil {
			st.Before = map[string]string{}
		}
		st.Before[f.name] = string(before)
	}
	if a.PreInit {
		return nil
	}
	for _, s := range f.restarts {
		if !slices.Contains(st.Restarts, s) {
			st.Restarts = append(st.Restarts, s)
		}
	}
	return nil
}

// exitArguments is how `kubelite check` ends where a daemon does not take its arguments.
const exitArguments = 3

// kubernetes reports whether the file has arguments of one of Kubernetes' daemons.
func (f file) kubernetes() bool { return !f.env && slices.Contains(f.restarts, service.Kubelite) }

// accepted asks kubelite whether Kubernetes' daemons take the arguments that are in the files now. If not, the node
// would not start with them: the files get back what they had, and the configuration counts as not applied.
func (a *Applier) accepted(ctx context.Context, st *state) error {
	program := filepath.Join(a.Env.Snap, "kubelite")
	if _, err := os.Stat(program); err != nil || len(st.Before) == 0 {
		return nil
	}
	err := a.Run(ctx, nil, program, "check")
	var exit interface{ ExitCode() int }
	if !errors.As(err, &exit) || exit.ExitCode() != exitArguments {
		return nil // or it could not find out, and a start says why
	}
	_, why, _ := strings.Cut(err.Error(), ": ")
	err = fmt.Errorf("%s; the files in %s are as they were: correct the launch configuration, see docs/launch.md", strings.ReplaceAll(why, "\n", "; "), a.Env.ArgsDir())
	for name, text := range st.Before {
		err = errors.Join(err, a.write(a.Env.Args(name), []byte(text), 0o660))
	}
	if e := os.Remove(st.path); e != nil && !errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// restart restarts what is noted, except the agent or only it, and strikes it off.
func (a *Applier) restart(ctx context.Context, st *state, agent bool) error {
	// In the order in which services are started.
	for _, name := range service.Names() {
		i := slices.Index(st.Restarts, name)
		if i < 0 || (name == service.ClusterAgent) != agent {
			continue
		}
		if agent { // written down before, for this process may not come back
			st.Restarts = nil
			st.Done = append(st.Done, "restart of the cluster agent")
			if err := st.save(); err != nil {
				return err
			}
		}
		if err := a.Services.Restart(ctx, name); err != nil {
			return fmt.Errorf("cannot restart %s: %w", name, err)
		}
		if !agent {
			st.Restarts = slices.Delete(st.Restarts, i, i+1)
			if err := st.save(); err != nil {
				return err
			}
		}
	}
	return nil
}

// editEnv sets and removes variables of an -env file; other lines stay as they are.
func editEnv(text []byte, changes Arguments) []byte {
	var out strings.Builder
	written := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		key, _, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "=")
		value, mentioned := changes[strings.TrimSpace(key)]
		if !ok || !mentioned {
			out.WriteString(strings.TrimSuffix(line, "\n") + "\n")
			continue
		}
		if value != nil && !written[key] {
			out.WriteString(assignment(key, string(*value)))
			written[key] = true
		}
	}
	for _, key := range slices.Sorted(maps.Keys(changes)) {
		if value := changes[key]; value != nil && !written[key] {
			out.WriteString(assignment(key, string(*value)))
		}
	}
	return []byte(out.String())
}

// assignment is a line of an -env file. What a shell would take apart is quoted.
func assignment(key, value string) string {
	if strings.ContainsAny(value, " \t;&|<>#'*?()[]{}~") && !strings.HasPrefix(value, `"`) {
		value = `"` + strings.ReplaceAll(value, `"`, `\"`) + `"`
	}
	return key + "=" + value + "\n"
}

// csrTemplate is the shipped template with further names, in sections that end with the mark
// for the node's own addresses (cluster-agent.md 6.5).
func csrTemplate(names []Text) []byte {
	dns, ip := 1, 100 // the marker's addresses are numbered from 3 on
	for line := range strings.Lines(string(certs.CSRTemplate)) {
		var n int
		if _, err := fmt.Sscanf(line, "DNS.%d", &n); err == nil {
			dns = max(dns, n+1)
		}
	}
	var lines strings.Builder
	for _, name := range names {
		if net.ParseIP(string(name)) != nil {
			fmt.Fprintf(&lines, "IP.%d = %s\n", ip, name)
			ip++
		} else {
			fmt.Fprintf(&lines, "DNS.%d = %s\n", dns, name)
			dns++
		}
	}
	return []byte(strings.Replace(string(certs.CSRTemplate), "\n#MOREIPS\n", "\n"+lines.String()+"#MOREIPS\n", 1))
}

// persistentToken notes a token that is good for ever. Where there is no API server yet that
// could keep it, this node does until its agent hands it over.
func (a *Applier) persistentToken(ctx context.Context, text string) error {
	tok, err := token.Parse(text)
	if err != nil {
		return err
	}
	store := &tokenstore.Store{Backends: []tokenstore.Backend{tokenstore.File{Path: a.Env.Credential(tokenstore.PersistentFile)}}}
	_, err = store.Add(ctx, tok, tokenstore.Options{Persist: true})
	return err
}
