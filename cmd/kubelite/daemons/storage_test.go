package daemons

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/storage/cacher/consistency"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	apiserverapp "k8s.io/kubernetes/cmd/kube-apiserver/app"

	"microk8s/internal/args"
	"microk8s/internal/pki/pkitest"
	"microk8s/internal/setup"
	"microk8s/internal/snapenv"
)

// checkPeriod is how often the API server under test compares its caches with the datastore,
// instead of every five minutes.
const checkPeriod = 2 * time.Second

// The test binary is also the API server: its feature gates belong to a process.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_KUBE_CONTROLLERS") != "" {
		os.Exit(controllersMain())
	}
	if os.Getenv("TEST_KUBE_APISERVER") == "" {
		os.Exit(m.Run())
	}
	consistency.CheckPeriod = checkPeriod
	if os.Getenv("TEST_WITHOUT_GATE") != "" {
		putInFront = func(*apiserverapp.Config) error { return nil }
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	d, err := Parse(map[string][]string{APIServer: os.Args[1:]})
	if err == nil {
		err = d[APIServer].Run(ctx)
	}
	if err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// storage is an API server with the node's own arguments, on the real datastore.
type storage struct {
	*kubernetes.Clientset
	cfg *rest.Config // the administrator's
	env snapenv.Env
	log string
}

// kubeconfig writes the administrator's, with the port of this API server.
func (s *storage) kubeconfig(t *testing.T) string {
	t.Helper()
	c, err := clientcmd.LoadFromFile(s.env.AdminKubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	for _, cluster := range c.Clusters {
		cluster.Server = s.cfg.Host
	}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*c, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// process runs a program until the test ends; its output goes to a file.
func process(t *testing.T, log string, cmd *exec.Cmd) {
	t.Helper()
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v; run `make build` first", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_ = cmd.Wait()
		if t.Failed() {
			if data, err := os.ReadFile(log); err == nil {
				t.Logf("the end of %s:\n%s", filepath.Base(log), data[max(0, len(data)-4000):])
			}
		}
	})
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// newStorage sets a node up in a temporary folder and starts its datastore and its API server, the
// latter with environment variables besides its own.
func newStorage(t *testing.T, environ ...string) *storage {
	t.Helper()
	build, err := filepath.Abs("../../../build")
	if err != nil {
		t.Fatal(err)
	}
	env := snapenv.Under(t.TempDir())
	env.Snap = filepath.Join(build, "snap")
	for path, text := range map[string]string{
		"etc/group": "root:x:0:\n", "etc/gshadow": "root:*::\n", "proc/meminfo": "MemTotal: 4048000 kB\n", "var/lib/none": "",
	} {
		path = env.HostPath(path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	node := &setup.Installer{
		Env: env, Maker: pkitest.Maker(time.Now), Log: slog.New(slog.DiscardHandler),
		Hostname:  func() (string, error) { return "n1", nil },
		Addresses: func() ([]net.IP, error) { return []net.IP{net.IPv4(127, 0, 0, 1)}, nil },
	}
	if err := node.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	words := func(name string) []string {
		f, err := args.Load(env.Args(name), args.GrammarFor(name))
		if err != nil {
			t.Fatal(err)
		}
		return f.Words(env.Lookup)
	}

	init := filepath.Join(env.BackendLive(), "init.yaml")
	if err := os.WriteFile(init, []byte("Address: 127.0.0.1:"+freePort(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &storage{env: env, log: filepath.Join(env.Data, "kube-apiserver.log")}
	process(t, filepath.Join(env.Data, "k8s-dqlite.log"), exec.Command(filepath.Join(build, "bin/k8s-dqlite"), words("k8s-dqlite")...))
	eventually(t, "the datastore listens", func() error { _, err := os.Stat(env.DatastoreSocket()); return err })

	port := freePort(t)
	server := exec.Command(os.Args[0], append(words(APIServer), "--secure-port="+port, "--bind-address=127.0.0.1",
		"--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none",
		// Otherwise a token of a list expires after five minutes only.
		"--etcd-compaction-interval=5s")...)
	server.Env = append(append(os.Environ(), "TEST_KUBE_APISERVER=1"), environ...)
	process(t, s.log, server)

	cfg, err := clientcmd.BuildConfigFromFlags("https://127.0.0.1:"+port, env.AdminKubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS, cfg.Burst = -1, -1
	s.cfg = cfg
	if s.Clientset, err = kubernetes.NewForConfig(cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the API server is ready", func() error {
		_, err := s.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(t.Context())
		return err
	})
	return s
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// configMap is one with a size that objects usually have.
func configMap(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"text": strings.Repeat("x", 512)}}
}

// churn changes objects whose names begin with "moving-" until ctx ends.
func (s *storage) churn(ctx context.Context, ns string) error {
	g, ctx := errgroup.WithContext(ctx)
	for worker := range 4 {
		g.Go(func() error {
			c := s.CoreV1().ConfigMaps(ns)
			for n := 0; ctx.Err() == nil; n++ {
				// Among the others in the order of names.
				name := fmt.Sprintf("object-%04d-moving-%d-%d", rand.IntN(objects), worker, n)
				_, err := c.Create(ctx, configMap(name), metav1.CreateOptions{})
				if err == nil {
					_, err = c.Patch(ctx, name, "application/merge-patch+json", []byte(`{"data":{"n":"`+strconv.Itoa(n)+`"}}`), metav1.PatchOptions{})
				}
				if err == nil && n%2 == 0 {
					err = c.Delete(ctx, name, metav1.DeleteOptions{})
				}
				if err != nil && ctx.Err() == nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// objects is how many stay as they are.
const objects = 3000

var still = regexp.MustCompile(`^object-\d{4}$`)

// checkList says what is wrong with the names of a whole list, in their order.
func checkList(names []string) error {
	if !slices.IsSorted(names) {
		return errors.New("the list is not in order")
	}
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		return errors.New("objects are listed twice")
	}
	n := 0
	for _, name := range names {
		if still.MatchString(name) {
			n++
		}
	}
	if n != objects {
		return fmt.Errorf("%d of the %d objects that do not change are listed", n, objects)
	}
	return nil
}

// pages lists everything in chunks of limit; between is called after each.
func (s *storage) pages(ctx context.Context, ns string, limit int64, between func(token string) (string, error)) (names []string, versions map[string]bool, err error) {
	versions = map[string]bool{}
	opt := metav1.ListOptions{Limit: limit}
	for {
		list, err := s.CoreV1().ConfigMaps(ns).List(ctx, opt)
		if err != nil {
			return names, versions, err
		}
		versions[list.ResourceVersion] = true
		for _, o := range list.Items {
			names = append(names, o.Name)
		}
		if list.Continue == "" {
			return names, versions, nil
		}
		if opt.Continue, err = between(list.Continue); err != nil {
			return names, versions, err
		}
	}
}

// TestStorage runs an API server with its feature gates at their defaults on the datastore, and
// looks at it as the judge: what it serves from its caches must be what is stored.
func TestStorage(t *testing.T) {
	s := newStorage(t)
	ctx := t.Context()
	const ns = "chunks"
	if _, err := s.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	g, fill := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range objects {
		g.Go(func() error {
			_, err := s.CoreV1().ConfigMaps(ns).Create(fill, configMap(fmt.Sprintf("object-%04d", i)), metav1.CreateOptions{})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}

	churn, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.churn(churn, ns); err != nil {
			t.Error(err)
		}
	})

	t.Run("lists in chunks while objects change", func(t *testing.T) {
		for _, limit := range []int64{100, 250, 999, 100, 250, 999, 50} {
			names, versions, err := s.pages(ctx, ns, limit, func(token string) (string, error) { return token, nil })
			if err == nil {
				err = checkList(names)
			}
			if err != nil {
				t.Fatalf("chunks of %d: %v", limit, err)
			}
			if len(versions) != 1 {
				t.Errorf("the chunks of %d of one list have %d resource versions", limit, len(versions))
			}
		}
	})

	// As the conformance case has it: a token that is too old is answered with one for the rest
	// at a later version.
	t.Run("a list goes on after its version was compacted", func(t *testing.T) {
		expired := false
		names, versions, err := s.pages(ctx, ns, 500, func(token string) (string, error) {
			if expired {
				return token, nil
			}
			var next string
			eventually(t, "the token expires", func() error {
				_, err := s.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{Limit: 1, Continue: token})
				var status *apierrors.StatusError
				if !apierrors.IsResourceExpired(err) || !errors.As(err, &status) {
					return fmt.Errorf("answer: %w", errors.Join(err, errors.New("not expired yet")))
				}
				next = status.ErrStatus.Continue
				return nil
			})
			if next == "" {
				return "", errors.New("the answer to an expired token has no token to go on with")
			}
			expired = true
			return next, nil
		})
		if err == nil {
			err = checkList(names)
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(versions) != 2 {
			t.Errorf("the list has %d resource versions, want that before and that after", len(versions))
		}
	})

	t.Run("caches agree with the datastore", func(t *testing.T) {
		sample := regexp.MustCompile(`(?m)^apiserver_storage_consistency_checks_total\{(.*)\} (\d+)`)
		eventually(t, "the caches are compared three times", func() error {
			metrics, err := s.Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
			if err != nil {
				return err
			}
			checks := 0
			for _, m := range sample.FindAllStringSubmatch(string(metrics), -1) {
				n, _ := strconv.Atoi(m[2])
				if strings.Contains(m[1], `status="failure"`) && n > 0 {
					t.Fatalf("a cache differs from the datastore: %s", m[0])
				}
				if strings.Contains(m[1], `resource="configmaps"`) && strings.Contains(m[1], `status="success"`) {
					checks = n
				}
			}
			if checks < 3 {
				return fmt.Errorf("%d successful comparisons of configmaps", checks)
			}
			return nil
		})
	})

	stop()
	wg.Wait()
	log, err := os.ReadFile(s.log)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if line := regexp.MustCompile(`(?m)^.*(Cache consistency check failed|error parsing compact_rev_key|is unsupported).*$`).Find(log); line != nil {
		t.Errorf("the API server complains: %s", line)
	}
}
