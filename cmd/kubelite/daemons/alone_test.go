package daemons

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"microk8s/internal/args"
)

// observer prints what it is told, a line each.
type observer struct{}

func (observer) Down(daemon string, why error, _ time.Time) {
	fmt.Printf("down %s: %s\n", daemon, strings.Join(strings.Fields(why.Error()), " "))
}
func (observer) Without(daemon string, why error, _ time.Time) {
	fmt.Printf("without %s: %s\n", daemon, strings.Join(strings.Fields(why.Error()), " "))
}
func (observer) Up(string) {}

// controllersMain is the controller manager and the scheduler in one process, as kubelite has them;
// their words are in the environment, one on each line.
func controllersMain() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	words := map[string][]string{}
	for name, text := range map[string]string{ControllerManager: os.Getenv("TEST_CONTROLLER_MANAGER"), Scheduler: os.Getenv("TEST_SCHEDULER")} {
		words[name] = strings.Split(text, "\n")
	}
	parsed, err := Parse(words)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	g := NewGroup(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	g.restart, g.whole = 500*time.Millisecond, 20*time.Second
	g.StartAlone(parsed[ControllerManager], observer{})
	g.StartAlone(parsed[Scheduler], observer{})
	if err := g.Wait(time.Second); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// lines collects what a process prints.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) count(prefix, part string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.all {
		if strings.HasPrefix(line, prefix) && strings.Contains(line, part) {
			n++
		}
	}
	return n
}

// TestRestartedAlone runs the real controller manager and scheduler in one process: what makes one
// of them end, a node with a foreign subnet or a lost lease, ends neither the process nor the other,
// and both do their work again afterwards.
func TestRestartedAlone(t *testing.T) {
	t.Parallel() // it waits for leases most of the time
	s := newStorage(t)
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	bad := testNode("bad", "10.0.0.66")
	bad.Spec.PodCIDR, bad.Spec.PodCIDRs = "192.168.77.0/24", []string{"192.168.77.0/24"}
	must(s.CoreV1().Nodes().Create(ctx, bad, metav1.CreateOptions{}))

	words := func(name string, more ...string) string {
		f, err := args.Load(s.env.Args(name), args.GrammarFor(name))
		if err != nil {
			t.Fatal(err)
		}
		kubeconfig := s.kubeconfig(t)
		all := append(f.Words(s.env.Lookup), "--kubeconfig="+kubeconfig, "--authentication-kubeconfig="+kubeconfig, "--authorization-kubeconfig="+kubeconfig,
			"--bind-address=127.0.0.1", "--secure-port="+freePort(t),
			"--leader-elect-lease-duration=6s", "--leader-elect-renew-deadline=4s", "--leader-elect-retry-period=1s")
		return strings.Join(append(all, more...), "\n")
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "TEST_KUBE_CONTROLLERS=1",
		"TEST_CONTROLLER_MANAGER="+words(ControllerManager), "TEST_SCHEDULER="+words(Scheduler))
	out, err := cmd.StdoutPipe()
	must(out, err)
	log, err := os.Create(s.log + ".controllers")
	must(log, err)
	defer log.Close()
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(cmd, cmd.Start())
	said := &lines{}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for in := bufio.NewScanner(out); in.Scan(); {
			said.mu.Lock()
			said.all = append(said.all, in.Text())
			said.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		if cmd.Process.Signal(syscall.SIGTERM) != nil {
			t.Error("the process has ended")
		}
		kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		<-read
		if err := cmd.Wait(); err != nil {
			t.Errorf("the process ended with %v", err)
		}
		if t.Failed() {
			if data, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("said: %q\n%s", said.all, data[max(0, len(data)-6000):])
			}
		}
	})
	until := func(what string, ok func() bool) {
		t.Helper()
		eventually(t, what, func() error {
			if !ok() {
				return errors.New("not yet")
			}
			return nil
		})
	}

	// works shows that controllers work: a namespace gets its ServiceAccount.
	namespaces := 0
	works := func(when string) {
		t.Helper()
		namespaces++
		ns := fmt.Sprintf("ns-%d", namespaces)
		must(s.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}))
		eventually(t, "the controllers work "+when, func() error {
			_, err := s.CoreV1().ServiceAccounts(ns).Get(ctx, "default", metav1.GetOptions{})
			return err
		})
	}
	// schedules shows that pods get nodes.
	pods := 0
	schedules := func(when string) {
		t.Helper()
		pods++
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("pod-%d", pods)}, Spec: corev1.PodSpec{
			Containers:                   []corev1.Container{{Name: "c", Image: "x"}},
			AutomountServiceAccountToken: ptr.To(false),
			Tolerations:                  []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		}}
		eventually(t, "a pod is made", func() error {
			_, err := s.CoreV1().Pods("kube-system").Create(ctx, pod, metav1.CreateOptions{})
			return err
		})
		eventually(t, "pods get nodes "+when, func() error {
			p, err := s.CoreV1().Pods("kube-system").Get(ctx, pod.Name, metav1.GetOptions{})
			if err == nil && p.Spec.NodeName == "" {
				err = errors.New("no node")
			}
			return err
		})
	}
	// steal takes a lease away for longer than its holder may fail to renew it.
	steal := func(name string) {
		t.Helper()
		eventually(t, "the lease "+name+" is taken", func() error {
			leases := s.CoordinationV1().Leases("kube-system")
			lease, err := leases.Get(ctx, name, metav1.GetOptions{})
			if err == nil {
				lease.Spec.HolderIdentity, lease.Spec.LeaseDurationSeconds = ptr.To("thief"), ptr.To[int32](8)
				lease.Spec.RenewTime = &metav1.MicroTime{Time: time.Now()}
				_, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
			}
			return err
		})
	}

	until("the controller manager fails for the node's subnet, and says what it goes on without", func() bool {
		return said.count("without "+ControllerManager+": "+missingSubnets, "192.168.77.0/24") >= 1
	})
	works("with a node's subnet that is outside of the range")
	node := testNode("good", "10.0.0.7")
	node.Status.Allocatable = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("4Gi"), corev1.ResourcePods: resource.MustParse("100")}
	node.Status.Capacity = node.Status.Allocatable
	must(s.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}))
	schedules("with such a node")

	if err := s.CoreV1().Nodes().Delete(ctx, "bad", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nodes get subnets again when the cause is gone", func() error {
		n, err := s.CoreV1().Nodes().Get(ctx, "good", metav1.GetOptions{})
		if err == nil && n.Spec.PodCIDR == "" {
			err = errors.New("it has none")
		}
		return err
	})
	works("when the cause is gone")

	for _, name := range []string{ControllerManager, Scheduler} {
		steal(name)
		until(name+" notices that it does not lead", func() bool { return said.count("down "+name, ErrLease.Error()) >= 1 })
	}
	works("when the lease was lost")
	schedules("when the lease was lost")
	steal(Scheduler)
	until("the scheduler notices a second time", func() bool { return said.count("down "+Scheduler, ErrLease.Error()) >= 2 })
	schedules("when the lease was lost twice")
}

// A daemon that ends is started again, is told of, and takes no other with it.
func TestStartAlone(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	g := NewGroup(ctx, quiet)
	g.restart = time.Millisecond
	var mu sync.Mutex
	var down []string
	runs := 0
	run := func(context.Context) error {
		mu.Lock()
		defer mu.Unlock()
		if runs++; runs%2 == 0 {
			return nil
		}
		return fmt.Errorf("failure %d", runs)
	}
	other := make(chan struct{})
	g.Go(Kubelet, func(ctx context.Context) error { <-ctx.Done(); close(other); return nil })
	g.StartAlone(&Daemon{Name: Scheduler, Run: run, EndsProcess: true, again: func(error) (func(context.Context) error, string, error) { return run, "", nil }},
		downFunc(func(name string, err error) {
			mu.Lock()
			defer mu.Unlock()
			if down = append(down, name+": "+err.Error()); len(down) == 4 {
				cancel()
			}
		}))
	if err := g.Wait(time.Minute); err != nil {
		t.Fatal(err)
	}
	<-other
	mu.Lock()
	defer mu.Unlock()
	want := "[kube-scheduler: failure 1 kube-scheduler: ended by itself kube-scheduler: failure 3 kube-scheduler: ended by itself]"
	if fmt.Sprint(down) != want {
		t.Errorf("told: %v\nwant:  %s", down, want)
	}
}

type downFunc func(string, error)

func (f downFunc) Down(name string, err error, _ time.Time) { f(name, err) }
func (f downFunc) Without(string, error, time.Time)         {}
func (f downFunc) Up(string)                                {}
