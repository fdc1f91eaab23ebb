package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"microk8s/internal/longtest"
)

// failedSeeds are those with which a test of this package ever failed; they always run.
var failedSeeds []int64

// withSeeds runs a random test once for each seed that ever failed, and once with that of
// MICROK8S_TEST_SEED, or with a new one; the subtest's name is the seed.
func withSeeds(t *testing.T, test func(t *testing.T, rnd *rand.Rand)) {
	n := time.Now().UnixNano()
	if s := os.Getenv("MICROK8S_TEST_SEED"); s != "" {
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		n = v
	}
	for _, n := range append(slices.Clone(failedSeeds), n) {
		t.Run(fmt.Sprintf("seed-%d", n), func(t *testing.T) { test(t, rand.New(rand.NewPCG(uint64(n), 0))) })
	}
}

// launch runs the daemon as a process of its own, whose log a failed test shows.
func launch(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, append([]string{"--storage-dir", dir, "--listen", "unix://" + filepath.Join(dir, "kine.sock:12379")}, args...)...)
	// The name of the C node's socket is free in each test by its instance name.
	cmd.Env = append(os.Environ(), "TEST_K8S_DQLITE=1")
	// As on a node, where a marker outside of the directory says how far it has come.
	common := dir + ".common"
	if err := os.MkdirAll(filepath.Join(common, "var/kubernetes"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, filepath.Join(common, "var/kubernetes/backend")); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	cmd.Env = append(cmd.Env, "SNAP_COMMON="+common)
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("log of the daemon:\n%s", text)
		}
	})
	return cmd
}

// spawn runs the daemon as a process of its own and waits until it serves.
func spawn(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	socket := filepath.Join(dir, "kine.sock:12379")
	os.Remove(socket)
	cmd := launch(t, dir, args...)
	deadline := time.Now().Add(30 * time.Second)
	for {
		if _, err := os.Stat(socket); err == nil {
			return cmd
		}
		if time.Now().After(deadline) || syscall.Kill(cmd.Process.Pid, 0) != nil {
			t.Fatal("the daemon does not serve")
		}
		time.Sleep(5 * time.Millisecond) // the loop has a deadline; there is nothing to wait on
	}
}

// Killed with -9 under load, again and again: no acknowledged write is lost, and revisions go
// on strictly.
func TestKillUnderLoad(t *testing.T) {
	t.Parallel()
	withSeeds(t, killUnderLoad)
}

func killUnderLoad(t *testing.T, rnd *rand.Rand) {
	rounds := longtest.Of(60, 6)
	dir := newDir(t)
	const writers = 12
	var mu sync.Mutex
	acked := map[string]int64{} // key → revision of its last acknowledged write
	tried := map[string]bool{}  // written since then, with an unknown outcome
	highest := int64(0)
	counter := 0
	for round := range rounds {
		cmd := spawn(t, dir)
		ctx, cancel := context.WithCancel(testContext(t))
		c := dial(t, "unix://"+filepath.Join(dir, "kine.sock:12379"))

		// What the last life acknowledged is there.
		got, err := c.Get(ctx, "/k/", clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		if got.Header.Revision < highest {
			t.Fatalf("round %d: the revision went back from %d to %d", round, highest, got.Header.Revision)
		}
		stored := map[string]int64{}
		for _, kv := range got.Kvs {
			stored[string(kv.Key)] = kv.ModRevision
			if want := string(kv.Key) + "="; !strings.HasPrefix(string(kv.Value), want) {
				t.Fatalf("round %d: %s has the value %q", round, kv.Key, kv.Value)
			}
		}
		for k, rev := range acked {
			if stored[k] != rev && !(tried[k] && stored[k] > rev) {
				t.Fatalf("round %d: %s was acknowledged at %d and is at %d", round, k, rev, stored[k])
			}
		}
		acked, tried = stored, map[string]bool{}
		highest = got.Header.Revision

		acks := 0
		enough := make(chan struct{})
		target := 50 + rnd.IntN(800)
		var wg sync.WaitGroup
		for w := range writers {
			r := rand.New(rand.NewPCG(rnd.Uint64(), 0))
			wg.Add(1)
			go func() {
				defer wg.Done()
				for {
					mu.Lock()
					counter++
					key := fmt.Sprintf("/k/%d/%d", w, r.IntN(20))
					value := fmt.Sprintf("%s=%d %s", key, counter, strings.Repeat("x", r.IntN(6000)))
					tried[key] = true
					mu.Unlock()
					resp, err := c.Put(ctx, key, value)
					if err != nil {
						return
					}
					mu.Lock()
					delete(tried, key)
					acked[key] = resp.Header.Revision
					highest = max(highest, resp.Header.Revision)
					if acks++; acks == target {
						close(enough)
					}
					mu.Unlock()
				}
			}()
		}
		select {
		case <-enough:
		case <-ctx.Done():
			t.Fatal("too few writes were acknowledged")
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		cancel()
		wg.Wait()
		c.Close()
	}
}

// With a large database a snapshot, which holds all of it, is not taken for every few hundred
// writes, and the log since the last one is there after a kill.
func TestSnapshotsOfALargeDatabase(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	cmd := spawn(t, dir)
	ctx := testContext(t)
	c := dial(t, "unix://"+filepath.Join(dir, "kine.sock:12379"))
	const large, small = 100, 1600 // together, the small ones are log of less than a quarter of the large ones
	value := strings.Repeat("x", 1<<20)
	for i := range large {
		if _, err := c.Put(ctx, fmt.Sprintf("/large/%d", i), value); err != nil {
			t.Fatal(err)
		}
	}
	snapshots := map[string]bool{}
	look := func() {
		names, err := filepath.Glob(filepath.Join(dir, "snapshot-*.meta"))
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			snapshots[n] = true
		}
	}
	look()
	before := len(snapshots)
	for i := range small {
		if _, err := c.Put(ctx, fmt.Sprintf("/small/%d", i), "x"); err != nil {
			t.Fatal(err)
		}
		if i%50 == 0 {
			look()
		}
	}
	look()
	if n := len(snapshots) - before; n > 1 { // one may have been on its way
		t.Errorf("%d snapshots of some %d MiB were written for %d small writes", n, large, small)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	c.Close()
	spawn(t, dir)
	c = dial(t, "unix://"+filepath.Join(dir, "kine.sock:12379"))
	for prefix, want := range map[string]int64{"/large/": large, "/small/": small} {
		got, err := c.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			t.Fatal(err)
		}
		if got.Count != want {
			t.Errorf("%d keys in %s, want %d", got.Count, prefix, want)
		}
	}
}

func TestTerminates(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGPWR} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			dir := newDir(t)
			cmd := spawn(t, dir)
			c := dial(t, "unix://"+filepath.Join(dir, "kine.sock:12379"))
			w := c.Watch(testContext(t), "/", clientv3.WithPrefix(), clientv3.WithCreatedNotify()) // an open stream must not keep it
			<-w
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("it ended with %v", err)
			}
		})
	}
}

// Ended by SIGTERM under load, it ends cleanly and soon, and what it acknowledged is there.
func TestTerminatesUnderLoad(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	cmd := spawn(t, dir)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	c := dial(t, "unix://"+filepath.Join(dir, "kine.sock:12379"))
	var mu sync.Mutex
	acked := map[string]int64{}
	enough := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ; i++ {
				key := fmt.Sprintf("/t/%d/%d", w, i)
				r, err := c.Put(ctx, key, strings.Repeat("x", 1000))
				if err != nil {
					return
				}
				mu.Lock()
				acked[key] = r.Header.Revision
				if len(acked) == 500 {
					close(enough)
				}
				mu.Unlock()
			}
		}()
	}
	<-enough
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(shutdownTimeout):
		t.Error("it does not end")
	}
	cancel()
	wg.Wait()
	got, err := start(t, dir).client.Get(testContext(t), "/t/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	stored := map[string]int64{}
	for _, kv := range got.Kvs {
		stored[string(kv.Key)] = kv.ModRevision
	}
	for k, rev := range acked {
		if stored[k] != rev {
			t.Fatalf("%s was acknowledged at %d and is at %d", k, rev, stored[k])
		}
	}
}

// A first start that is interrupted between the two things that dqlite writes, the term and the
// membership, is finished by the next one.
func TestFirstStartInterrupted(t *testing.T) {
	t.Parallel()
	whole := start(t, newDir(t))
	whole.stop()
	dir := newDir(t)
	for _, name := range []string{"info.yaml", "cluster.yaml"} {
		data, err := os.ReadFile(filepath.Join(whole.cfg.StorageDir, name))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, name), data)
	}
	if err := os.Remove(filepath.Join(dir, "init.yaml")); err != nil {
		t.Fatal(err)
	}
	term1 := []byte{0: 1, 8: 1, 16: 1, 31: 0} // format, version, term, vote
	writeFile(t, filepath.Join(dir, "metadata1"), term1)
	p := start(t, dir)
	if _, err := p.client.Put(testContext(t), "/k", "v"); err != nil {
		t.Fatal(err)
	}
}
