package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/spf13/cobra"

	"microk8s/internal/cli"
	"microk8s/internal/datastore/backup"
	"microk8s/internal/datastore/migrator"
	"microk8s/internal/encryption"
	"microk8s/internal/pack"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// frozenLimit is what no command may reach, whoever does not answer it. It says nothing about speed.
const frozenLimit = 4 * time.Minute

// frozenRow is a command whose far side is frozen: all that it may call accept connections, as the
// kernel does for a frozen process, and never answer.
type frozenRow struct {
	command string // of the tree
	run     string // what is run, FROZEN is an address of a frozen end, WORK a folder; "" is the command alone
	says    string // pattern of what it says: who did not answer, and what to do
	asks    string // "" and a reason here: the command asks nobody, and ends well or with its usage
	alone   bool   // the node is the only one of its cluster
	skip    string // where else the row is shown, or why the command has no end by design
}

const (
	silentAPI        = `API server.* (did not answer within|does not answer in time)|did not answer within .*API server`
	silentSupervisor = `the supervisor of the services \(pid \d+\) did not answer within .*microk8s logs supervisor`
	silentDatastore  = `the datastore at unix://\S+ does not answer: .*see: microk8s status`
	silentContainerd = `containerd did not answer within .*microk8s logs containerd`
)

// frozenRows has a row for each command at least.
var frozenRows = []frozenRow{
	{command: "add-node", says: silentAPI},
	{command: "add-node", run: "add-node --list", says: silentAPI},
	{command: "add-node", run: "add-node --revoke 12345678", says: silentAPI},
	{command: "addons", asks: "help"},
	{command: "addons import", run: "addons import --stall 1s WORK/fifo", says: `its disk or network file system brought nothing for 1s.*dmesg`},
	{command: "addons import", run: "addons import WORK/pack.tar", says: silentAPI},
	{command: "addons bundle", run: "addons bundle --images docker.io/library/a:1 -o WORK/bundle.tar", says: silentContainerd},
	{command: "addons carry-out", run: "addons carry-out dns", says: silentAPI},
	{command: "addons repo", asks: "help"},
	{command: "addons repo add", run: "addons repo add x http://FROZEN/x", says: `http://127.0.0.1:\d+/x brought nothing for .*; check the address`},
	{command: "addons repo list", asks: "files of this node"},
	{command: "addons repo remove", run: "addons repo remove x", asks: "files of this node"},
	{command: "addons repo update", run: "addons repo update x", skip: "the same call of git as repo add; internal/addon"},
	{command: "backup", says: silentAPI},
	{command: "backup create", says: silentAPI},
	{command: "backup list", says: silentAPI},
	{command: "backup verify", run: "backup verify NAME --passphrase-file WORK/passphrase", says: silentAPI},
	{command: "backup schedule", says: silentAPI},
	{command: "backup key", run: "backup key WORK/backup.key", asks: "nobody"},
	{command: "backup run", says: silentAPI},
	{command: "certs", says: silentAPI},
	{command: "certs rotate", says: silentAPI},
	{command: "completion", run: "completion bash", asks: "nobody"},
	{command: "config", asks: "files of this node"},
	{command: "config", run: "config --user ann", says: silentAPI},
	{command: "config", run: "config --list", says: silentAPI},
	{command: "config", run: "config --revoke ann", says: silentAPI},
	{command: "ctr", run: "ctr images ls", says: silentContainerd + `(.|\n)*exec .*ctr .*--timeout 30s images ls`},
	{command: "dashboard-proxy", skip: "it serves until it is interrupted; internal/console bounds each call"},
	{command: "dbctl", run: "dbctl backup -o WORK/b", says: silentDatastore},
	{command: "dbctl", run: "dbctl restore WORK/kept.tar.gz", says: `cannot keep a copy(.|\n)*` + silentDatastore},
	{command: "dbctl", run: "dbctl restore WORK/kept.tar.gz --no-copy", says: `Restore process failed(.|\n)*` + silentDatastore},
	{command: "dbctl", run: "dbctl disarm", skip: "k8s-dqlite's sub-command alarm needs its C library: TestNode, frozen daemons"},
	{command: "disable", run: "disable dns", says: silentAPI},
	{command: "enable", run: "enable dns", says: silentAPI},
	{command: "encryption", asks: "help"},
	{command: "encryption status", asks: "files of this node"},
	{command: "encryption rotate", says: silentAPI},
	{command: "helm", run: "helm list", says: silentAPI},
	{command: "helm", run: "helm template x", says: `exec .*helm .* template x`},
	{command: "helm3", run: "helm3 list", says: silentAPI},
	{command: "images", asks: "help"},
	{command: "images import", run: "images import --stall 1s", says: `standard input brought nothing for 1s`},
	{command: "images import", run: "images import WORK/web.tar", says: silentAPI},
	{command: "images import", run: "images import --stall 1s WORK/fifo", says: `its disk or network file system brought nothing for 1s.*dmesg`},
	{command: "images list", says: silentContainerd},
	{command: "images export-local", run: "images export-local WORK/out.tar", says: silentContainerd},
	{command: "inspect", says: silentSupervisor + `(.|\n)*` + silentAPI},
	{command: "inspect", run: "inspect --security", says: `the API server did not answer`},
	{command: "join", run: "join FROZEN/0123456789abcdef0123456789abcdef", alone: true, says: `the cluster agent at 127.0.0.1:\d+ did not answer in time; .*microk8s logs cluster-agent`},
	{command: "kubectl", run: "kubectl get pods", says: silentAPI + `(.|\n)*exec .*kubectl .*--request-timeout=30s get pods`},
	{command: "kubectl", run: "kubectl get pods -w --request-timeout=0", says: `exec .*kubectl get pods -w --request-timeout=0`},
	{command: "leave", says: `the datastore did not answer within .*microk8s logs k8s-dqlite`},
	{command: "logs", asks: "files of this node"},
	{command: "network", asks: "help"},
	{command: "network check", says: silentAPI},
	{command: "network why", run: "network why default/a default/b:80", says: silentAPI},
	{command: "network api-address", says: silentAPI},
	{command: "network api-address", run: "network api-address 10.99.0.5", says: silentAPI},
	{command: "network api-address", run: "network api-address none", says: silentAPI},
	{command: "pod-security", asks: "help"},
	{command: "pod-security status", says: silentAPI},
	{command: "pod-security enforce", says: silentAPI},
	{command: "pod-security relax", says: silentAPI},
	{command: "refresh-certs", run: "refresh-certs -e server.crt", says: silentSupervisor},
	{command: "remove-node", run: "remove-node n2", says: silentAPI},
	{command: "reset", says: silentAPI},
	{command: "recover", skip: "the far sides are k8s-dqlite examine, which has an end, and agents: cluster-agent/fanout"},
	{command: "restore", run: "restore NAME --passphrase-file WORK/passphrase", says: silentAPI},
	{command: "start", says: silentSupervisor},
	{command: "status", says: `the service manager did not answer within(.|\n)*the API server did not answer within`},
	{command: "stop", says: silentSupervisor},
	{command: "version", asks: "files of this node"},

	{command: "daemon", skip: "becomes a service, which has no end"},
	{command: "find-resolv-conf", asks: "files of this node"},
	{command: "hook", skip: "internal/hook bounds each"},
	{command: "node-config", asks: "help"},
	{command: "node-config arch", asks: "nobody"},
	{command: "node-config get", run: "node-config get kubelet x", asks: "files of this node"},
	{command: "node-config set", run: "node-config set kubelet x y", asks: "files of this node"},
	{command: "node-config unset", run: "node-config unset kubelet x", asks: "files of this node"},
	{command: "node-config restart", run: "node-config restart kubelet", says: silentSupervisor},
	{command: "node-config restart-all", run: "node-config restart-all kubelet", says: silentSupervisor},
	{command: "node-config set-all", run: "node-config set-all kubelet x y", says: silentAPI},
	{command: "node-config unset-all", run: "node-config unset-all kubelet x", says: silentAPI},
	{command: "node-config enable-all", run: "node-config enable-all dns", says: silentAPI},
	{command: "node-config disable-all", run: "node-config disable-all dns", says: silentAPI},
	{command: "node-config wait", run: "node-config wait kubelet", says: silentSupervisor},
	{command: "supervise", skip: "a service, which has no end"},
}

// TestFrozen runs every command with all of its far side frozen: it ends, and says who did not answer.
func TestFrozen(t *testing.T) {
	t.Parallel() // it waits
	leaves := map[string]bool{}
	var walk func(*cobra.Command, string)
	walk = func(c *cobra.Command, path string) {
		for _, sub := range c.Commands() {
			if name := strings.TrimSpace(path + " " + sub.Name()); name != "no-help" {
				leaves[name] = true
				walk(sub, name)
			}
		}
	}
	walk((&cli.App{Env: snapenv.Under(t.TempDir()), Out: io.Discard, Err: io.Discard, Group: snapenv.Group}).Tree(), "")
	for _, r := range frozenRows {
		if !leaves[r.command] {
			t.Errorf("a row is for the command %q, which does not exist", r.command)
		}
	}
	for name := range leaves {
		if !has(name) {
			t.Errorf("there is no row for the command %q", name)
		}
	}
	root, err := os.MkdirTemp("", "fr") // short: unix sockets below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	frozen := listen(t, "tcp", "127.0.0.1:0")
	var all sync.WaitGroup
	for i, r := range frozenRows {
		if r.skip != "" {
			continue
		}
		dir := filepath.Join(root, fmt.Sprint(i))
		a, out := freeze(t, dir, r.alone)
		line := r.run
		if line == "" {
			line = r.command
		}
		line = strings.NewReplacer("FROZEN", frozen, "WORK", dir).Replace(line)
		all.Go(func() { // all at once: they wait
			ctx, cancel := context.WithTimeoutCause(t.Context(), frozenLimit, errors.New("it had no end of its own"))
			defer cancel()
			code := a.Main(ctx, append([]string{"microk8s"}, strings.Fields(line)...))
			switch said := out.String(); {
			case ctx.Err() != nil:
				t.Errorf("%s: %v\n%s", line, context.Cause(ctx), said)
			case r.asks == "" && !regexp.MustCompile(r.says).MatchString(said):
				t.Errorf("%s: exit code %d, and nothing of %s\n%s", line, code, r.says, said)
			case r.asks != "" && strings.Contains(said, "did not answer"):
				t.Errorf("%s asks somebody:\n%s", line, said)
			}
		})
	}
	all.Wait()
}

func has(command string) bool {
	for _, r := range frozenRows {
		if r.command == command {
			return true
		}
	}
	return false
}

// listen returns the address of a listener that nobody answers.
func listen(t *testing.T, network, address string) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// freeze makes a node all of whose ends are frozen, and the program in it. What the program would
// become is printed.
func freeze(t *testing.T, dir string, alone bool) (*cli.App, *safe) {
	t.Helper()
	env := snapenv.Under(dir)
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.MkdirAll(env.BackendLive(), 0o700), os.MkdirAll(filepath.Dir(env.Backend()), 0o755), os.Symlink(env.BackendLive(), env.Backend())); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{env.SupervisorSocket(), env.DatastoreSocket(), env.ContainerdSocket(), filepath.Join(env.Backend(), "members.sock")} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		listen(t, "unix", path)
	}
	config, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": "https://" + listen(t, "tcp", "127.0.0.1:0")}}},
		"contexts": []any{map[string]any{"name": "c", "context": map[string]any{"cluster": "c", "user": "u"}}},
		"users":    []any{map[string]any{"name": "u", "user": map[string]any{"token": "a-fake-token"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	write(env.AdminKubeconfig(), string(config))
	caOnce.Do(func() { makeCA(t) })
	for _, name := range []string{"ca.crt", "server.crt", "front-proxy-ca.crt", "front-proxy-client.crt"} {
		write(env.Cert(name), caCert)
	}
	for _, name := range []string{"ca.key", "server.key", "front-proxy-ca.key", "front-proxy-client.key"} {
		write(env.Cert(name), caKey)
	}
	write(filepath.Join(dir, "web.tar"), "")
	mkArchive(t, filepath.Join(dir, "web.tar"))
	mkPack(t, filepath.Join(dir, "pack.tar"))
	if err := mkfifo(filepath.Join(dir, "fifo")); err != nil {
		t.Fatal(err)
	}
	write(filepath.Join(dir, "passphrase"), "correct horse battery staple\n")
	write(env.Args("ctr"), "--address=${SNAP_COMMON}/run/containerd.sock\n")
	write(env.Args("kubelet"), "--x=y\n")
	write(env.Args("kube-apiserver"), "--encryption-provider-config=${SNAP_DATA}/var/kubernetes/backend/encryption.yaml\n")
	for _, lock := range []string{"ha-cluster"} {
		write(env.Lock(lock), "")
	}
	members := "- {Address: 127.0.0.1:19001, ID: 1, Role: 0}\n"
	if !alone {
		members += "- {Address: 127.0.0.2:19001, ID: 2, Role: 0}\n"
	}
	write(filepath.Join(env.Backend(), "cluster.yaml"), members)
	write(filepath.Join(env.Backend(), "info.yaml"), "{Address: 127.0.0.1:19001, ID: 1, Role: 0}\n")
	write(filepath.Join(env.Backend(), "encryption.yaml"), string(encryptionFile))
	for _, d := range []string{filepath.Join(env.Data, "tmp"), env.AddonRepositories(), filepath.Join(env.Snap, "bin")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, env.Bin(datastoreProgram)); err != nil {
		t.Fatal(err)
	}
	mkBackup(t, filepath.Join(dir, "kept.tar.gz"))
	addons, err := filepath.Abs("../../addons")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(addons, filepath.Join(env.Snap, "addons")); err != nil {
		t.Fatal(err)
	}
	out := &safe{}
	stalled, never := io.Pipe()
	t.Cleanup(func() { never.Close() })
	nothing := func(context.Context, snapenv.Env, *slog.Logger) error { return nil }
	return &cli.App{
		Env: env, In: stalled, Out: out, Err: out, UID: 0, Group: snapenv.Group, Now: time.Now,
		Environ: []string{"USER=ann", "HOME=" + dir}, Services: service.NewClient(env),
		Exec: func(_ string, argv, _ []string) error {
			fmt.Fprintln(out, "exec", strings.Join(argv, " "))
			return nil
		},
		Parts: cli.Parts{
			Install:        nothing, // it calls nobody
			StopContainers: func(context.Context, snapenv.Env) error { return nil },
			ResetNetwork:   func(context.Context, snapenv.Env) error { return nil },
		},
	}, out
}

// safe is a buffer that several goroutines may write to.
type safe struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safe) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safe) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

var (
	caOnce         sync.Once
	caCert, caKey  string
	encryptionFile = encryption.New()
)

func makeCA(t *testing.T) {
	t.Helper()
	maker := pkitest.Maker(nil)
	key, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "10.152.183.1"}, Days: 100, CA: true, ServerAuth: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	caCert, caKey = string(pki.EncodeCert(der)), string(pki.EncodeKey(key))
}

// mkPack makes a pack of one image without layers.
func mkPack(t *testing.T, path string) {
	t.Helper()
	cfg, err := empty.Image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.Architecture = runtime.GOARCH
	img, err := mutate.ConfigFile(empty.Image, cfg)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := pack.Write(&buf, pack.Manifest{Name: "x", Version: "v1", Architecture: runtime.GOARCH}, map[string]v1.Image{"a.test/a:1": img}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func mkfifo(path string) error { return syscall.Mkfifo(path, 0o600) }

// mkArchive writes the smallest archive that passes for one of images.
func mkArchive(t *testing.T, path string) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	manifest := `[{"RepoTags":["web:1"]}]`
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "manifest.json", Mode: 0o644, Size: int64(len(manifest))}), second(w.Write([]byte(manifest))), w.Close(), os.WriteFile(path, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func second(_ int, err error) error { return err }

// mkBackup writes an archive of a datastore with one key.
func mkBackup(t *testing.T, archive string) {
	t.Helper()
	keys := filepath.Join(t.TempDir(), "keys")
	w, err := backup.Create(keys)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(backup.Pair{Key: []byte("/registry/x"), Value: []byte("y")}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Close(1, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := backup.Pack(t.Context(), keys, archive); err != nil {
		t.Fatal(err)
	}
}

// datastoreProgram is the name under which the test's program is what dbctl runs: its sub-command
// migrator, the product's own. The rest of k8s-dqlite needs a C library.
const datastoreProgram = "k8s-dqlite"

func datastoreTool(args []string) int {
	root := &cobra.Command{Use: datastoreProgram, SilenceUsage: true}
	root.AddCommand(migrator.NewCommand())
	root.SetArgs(args)
	if err := root.ExecuteContext(context.Background()); err != nil {
		return 1
	}
	return 0
}
