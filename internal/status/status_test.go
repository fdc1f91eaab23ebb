package status

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/kubelitestate"
	"microk8s/internal/nodecopy"
	"microk8s/internal/service"
	"microk8s/internal/service/servicetest"
	"microk8s/internal/snapenv"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestHangingAnswersAreLeftBehind has a manager that answers when it wants, after the probe.
func TestHangingAnswersAreLeftBehind(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	release, late := make(chan struct{}), make(chan struct{})
	m := &servicetest.Manager{Answer: func(string) error {
		<-release
		close(late)
		return nil
	}}
	p := &Prober{Env: env, Manager: m, Now: time.Now, Budget: time.Millisecond}
	r := p.Probe(t.Context())
	close(release)
	<-late
	if r.Ready || r.Services != nil {
		t.Errorf("report: %+v", r)
	}
	if len(r.Problems) == 0 || !strings.Contains(r.Problems[0].What, "did not answer within 1ms") {
		t.Errorf("problems: %v", r.Problems)
	}
}

// TestEndedQuestionsAreMissed: a question that ends with its context says only that the time was over,
// whoever of the two is seen first.
func TestEndedQuestionsAreMissed(t *testing.T) {
	for range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		if missed := gather(ctx, map[string]func(){"ends": cancel}); !missed["ends"] {
			t.Fatal("an answer that was none")
		}
	}
}

func TestManagerError(t *testing.T) {
	m := &servicetest.Manager{Answer: servicetest.Failing("status", errors.New("no socket"))}
	p := &Prober{Env: snapenv.Under(t.TempDir()), Manager: m, Now: time.Now, Budget: time.Minute}
	r := p.Probe(t.Context())
	if len(r.Problems) == 0 || r.Problems[0].What != "no socket" {
		t.Errorf("problems: %v", r.Problems)
	}
}

func TestReadHA(t *testing.T) {
	member := func(n, role int) string {
		return fmt.Sprintf("- {Address: \"10.0.0.%d:19001\", ID: %d, Role: %d}\n", n, n, role)
	}
	for _, tc := range []struct {
		name    string
		files   map[string]string
		lock    bool
		enabled bool
		nodes   []string
	}{
		{"never started", nil, false, false, nil},
		{"nothing yet", nil, true, false, nil},
		{"before the first start", map[string]string{"init.yaml": "Address: 127.0.0.1:19001\n"}, true, false, []string{"127.0.0.1:19001 voter"}},
		{"one", map[string]string{"info.yaml": "Address: 127.0.0.1:19001\nID: 7\nRole: 0\n"}, true, false, []string{"127.0.0.1:19001 voter"}},
		{"two", map[string]string{"cluster.yaml": member(1, 0) + member(2, 2)}, true, false, []string{"10.0.0.1:19001 voter", "10.0.0.2:19001 spare"}},
		{"two voters", map[string]string{"cluster.yaml": member(1, 0) + member(2, 0)}, true, false, []string{"10.0.0.1:19001 voter", "10.0.0.2:19001 voter"}},
		{"three", map[string]string{"cluster.yaml": member(1, 0) + member(2, 0) + member(3, 0) + member(4, 1)}, true, true,
			[]string{"10.0.0.1:19001 voter", "10.0.0.2:19001 voter", "10.0.0.3:19001 voter", "10.0.0.4:19001 standby"}},
		{"broken", map[string]string{"cluster.yaml": "\x00{", "info.yaml": "]"}, true, false, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := snapenv.Under(t.TempDir())
			for name, text := range tc.files {
				write(t, filepath.Join(env.Backend(), name), text)
			}
			if tc.lock {
				write(t, env.Lock(snapenv.LockHA), "")
			}
			ha := readHA(env)
			var nodes []string
			for _, n := range ha.Nodes {
				nodes = append(nodes, n.Address+" "+n.RoleName())
			}
			if ha.Enabled != tc.enabled || ha.Datastore != tc.lock || !slices.Equal(nodes, tc.nodes) {
				t.Errorf("got %+v", ha)
			}
		})
	}
}

func TestExpected(t *testing.T) {
	for _, tc := range []struct {
		locks []string
		want  []string
	}{
		{nil, []string{"containerd", "k8s-dqlite", "cluster-agent", "kubelite"}},
		{[]string{snapenv.LockWorker}, []string{"containerd", "cluster-agent", "kubelite", "apiserver-proxy"}},
		{[]string{snapenv.LockNoDqlite}, []string{"containerd", "cluster-agent", "kubelite"}},
	} {
		env := snapenv.Under(t.TempDir())
		for _, l := range tc.locks {
			write(t, env.Lock(l), "")
		}
		got := slices.DeleteFunc(service.Names(), func(n string) bool { return !Expected(env, n) })
		if !slices.Equal(got, tc.want) {
			t.Errorf("with %v: %v, want %v", tc.locks, got, tc.want)
		}
	}
}

func TestPortsInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	env := snapenv.Under(t.TempDir())
	write(t, env.Args("kube-apiserver"), fmt.Sprintf("--secure-port=%d\n", port))
	find := func(running ...string) *PortProblem {
		for _, p := range PortsInUse(env, running) {
			if p.Port == port {
				return &p
			}
		}
		return nil
	}
	p := find()
	if p == nil {
		t.Fatalf("port %d was not found", port)
	}
	want := fmt.Sprintf("port %d, which kubelite needs, is in use by", port)
	if !strings.HasPrefix(p.What, want) || !strings.HasSuffix(p.What, fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("problem: %s", p)
	}
	if p := find(service.Kubelite); p != nil {
		t.Errorf("our own port is a problem: %s", p)
	}
}

func TestProbeHTTP2(t *testing.T) {
	dir, err := os.MkdirTemp("", "st") // short: a unix socket below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	serve := func(name string, talk func(net.Conn)) string {
		path := filepath.Join(dir, name)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				talk(c)
			}
		}()
		return path
	}
	if err := probeHTTP2(t.Context(), serve("good", func(c net.Conn) { _, _ = c.Write([]byte{0, 0, 0, settingsFrame, 0, 0, 0, 0, 0}) })); err != nil {
		t.Errorf("a server: %v", err)
	}
	if err := probeHTTP2(t.Context(), serve("web", func(c net.Conn) { fmt.Fprint(c, "HTTP/1.1 400 Bad Request\r\n\r\n") })); err == nil {
		t.Error("an HTTP/1 server passed")
	}
	if err := probeHTTP2(t.Context(), serve("closes", func(c net.Conn) { c.Close() })); err == nil {
		t.Error("a server that hangs up passed")
	}
	if err := probeHTTP2(t.Context(), filepath.Join(dir, "none")); err == nil {
		t.Error("no server passed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := probeHTTP2(ctx, serve("mute", func(net.Conn) {})); err == nil {
		t.Error("a frozen server passed")
	}
}

func TestWords(t *testing.T) {
	for line, want := range map[string]string{
		"microk8s: cannot read /x: line 1: bad": "cannot read /x: line 1: bad",
		`time=2026-01-02T03:04:05.678Z level=ERROR msg="kubelite ends" error="kubelet: \"a\" is bad\nso is b"`: `kubelet: "a" is bad; so is b`,
		`time=2026-01-02T03:04:05.678Z level=ERROR msg="kubelite ends" err="no \"x\"" retry_in=1s`:             `no "x"`,
		`time=2026-01-02T03:04:05.678Z level=ERROR msg=ends error=EOF`:                                         "EOF",
		`E0102 03:04:05.678901      41 run.go:72] "command failed" err="no port"`:                              `"command failed" err="no port"`,
		"k8s-dqlite: cannot open the log":                                                                      "k8s-dqlite: cannot open the log",
	} {
		if got := words(line); got != want {
			t.Errorf("words(%s)\n got %s\nwant %s", line, got, want)
		}
	}
}

// TestRestartedService has a service that runs for a moment at a time.
func TestRestartedService(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	state := service.State{Name: service.Kubelite, Phase: service.Running, Since: now.Add(-time.Second), Restarts: 2, LastExit: "exit status 1", LastWords: "microk8s: no port"}
	var r Report
	r.Services = []service.State{state}
	env := snapenv.Under(t.TempDir())
	r.serviceProblems(env, now)
	if len(r.Problems) != 1 || !strings.Contains(r.Problems[0].What, "last log line: no port") {
		t.Errorf("problems: %v", r.Problems)
	}
	old := Report{Services: r.Services}
	if old.serviceProblems(env, now.Add(time.Hour)); len(old.Problems) != 0 {
		t.Errorf("an hour later: %v", old.Problems)
	}
	if name, _ := r.Failing(env); name != "" {
		t.Errorf("%s is running and called failing", name)
	}
	r.Services[0].Phase, r.Services[0].Restarts = service.Backoff, 3
	if name, why := r.Failing(env); name != service.Kubelite || why != "exit status 1" {
		t.Errorf("failing: %q, %q", name, why)
	}
}

func TestShorten(t *testing.T) {
	long := strings.Repeat("ä", lastWords+10)
	if got := shorten(long); len([]rune(got)) != lastWords+1 {
		t.Errorf("%d runes", len([]rune(got)))
	}
}

// TestOldReportsDoNotCount has an API server that still says what was before a restart.
func TestOldReportsDoNotCount(t *testing.T) {
	started := time.Date(2026, 1, 2, 3, 4, 5, 500, time.UTC)
	node := func(name string, beat time.Time) corev1.Node {
		n := corev1.Node{}
		n.Name = name
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.NewTime(beat)}}
		return n
	}
	old, young := started.Add(-time.Minute), started.Truncate(time.Second)
	for _, tc := range []struct {
		name    string
		nodes   []corev1.Node
		started time.Time
		want    bool
	}{
		{"before", []corev1.Node{node("me", old)}, started, false},
		{"in the same second, which its API server was not ready in", []corev1.Node{node("me", young)}, started, false},
		{"in the next second", []corev1.Node{node("me", young.Add(time.Second))}, started, true},
		{"start not known", []corev1.Node{node("me", old)}, time.Time{}, true},
		{"only node, other name", []corev1.Node{node("renamed", old)}, started, false},
		{"another node", []corev1.Node{node("me", old), node("other", old)}, started, true},
	} {
		s := apiState{nodes: tc.nodes, started: tc.started, local: "me"}
		if got := s.ready(); got != tc.want {
			t.Errorf("%s: ready %t", tc.name, got)
		}
	}
	states := []service.State{{Name: service.Kubelite, Phase: service.Running, Since: started}}
	if got := startedAt(states, started.Add(time.Hour)); got != started {
		t.Errorf("started at %s", got)
	}
	if got := startedAt(states, started.Add(-time.Hour)); !got.IsZero() {
		t.Errorf("with the clock set back: %s", got)
	}
}

// TestHighAvailability asks a datastore that says who lives.
// TestKeepsFailing: an API server that waits for a datastore which does not start is not slow.
func TestKeepsFailing(t *testing.T) {
	for phase, want := range map[service.Phase]bool{service.Running: false, service.Stopped: false, service.Backoff: true, service.Failed: true} {
		states := []service.State{{Name: service.Kubelite, Phase: service.Running}, {Name: service.Datastore, Phase: phase}}
		if got := keepsFailing(states); got != want {
			t.Errorf("%v: %v", phase, got)
		}
	}
}

// TestCopies: a cluster's agents have found two machines that run as one node.
func TestCopies(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	node := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "w1", Annotations: map[string]string{
		nodecopy.Annotation: `{"machines":["10.0.0.5","10.0.0.6"],"seen":"2026-11-29T11:59:00Z"}`}}}
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	for _, tc := range []struct {
		when time.Time
		want int
	}{{now, 1}, {now.Add(time.Hour), 0}} {
		var r Report
		r.apiProblems(apiState{nodes: []corev1.Node{node}}, tc.when)
		if len(r.Problems) != tc.want || tc.want == 1 && (r.Problems[0].ID != "node.copies" || !strings.Contains(r.Problems[0].String(), "at 10.0.0.5 and 10.0.0.6")) {
			t.Errorf("at %s: %v", tc.when, r.Problems)
		}
	}
}

func TestHighAvailability(t *testing.T) {
	member := func(n int, role storedir.Role, online bool) peers.Member {
		return peers.Member{ID: uint64(n), Address: fmt.Sprintf("10.0.0.%d:19001", n), Role: role, Online: online}
	}
	full := func(n int) peers.Member {
		m := member(n, storedir.Voter, true)
		m.DiskFull = true
		return m
	}
	limits := func(space *peers.Space, memory *peers.Memory) []peers.Member {
		m := member(1, storedir.Voter, true)
		m.Self, m.Space, m.Memory = true, space, memory
		return []peers.Member{m}
	}
	v, s, sp := storedir.Voter, storedir.StandBy, storedir.Spare
	for _, tc := range []struct {
		name           string
		members        []peers.Member
		enabled        bool
		note, problems string // parts of them, "" for none
	}{
		{"one", []peers.Member{member(1, v, true)}, false, "", ""},
		{"two", []peers.Member{member(1, v, true), member(2, sp, true)}, false, "two nodes do not tolerate a loss", ""},
		{"three", []peers.Member{member(1, v, true), member(2, v, true), member(3, v, true)}, true, "any one node", ""},
		{"three titles and two lives", []peers.Member{member(1, v, true), member(2, v, true), member(3, v, false)}, false, "no further loss", "10.0.0.3:19001 does not answer"},
		{"no majority", []peers.Member{member(1, v, true), member(2, v, false), member(3, v, false)}, false, "lost its majority", "10.0.0.2:19001, voter 10.0.0.3:19001 do not answer, and without a majority"},
		{"four", []peers.Member{member(1, v, true), member(2, v, true), member(3, v, true), member(4, s, true)}, true, "any one node", ""},
		{"a silent stand-by", []peers.Member{member(1, v, true), member(2, v, true), member(3, v, true), member(4, s, false)}, true, "any one node", "10.0.0.4:19001 does not answer"},
		{"a full disk", []peers.Member{member(1, v, true), full(2), member(3, v, true)}, true, "any one node", "is full at 10.0.0.2:19001; free some space"},
		{"full disks", []peers.Member{member(1, v, true), full(2), full(3)}, true, "any one node", "is full at 10.0.0.2:19001, 10.0.0.3:19001, and nothing can be written"},
		{"far from its limits", limits(&peers.Space{Bytes: 700, Quota: 1000}, &peers.Memory{Used: 10, Limit: 20}), false, "", ""},
		{"near its limit", limits(&peers.Space{Bytes: 900 << 20, Quota: 1000 << 20, Largest: []peers.Prefix{{Prefix: "/registry/events/", Keys: 7, Bytes: 800 << 20}}}, nil), false, "",
			"is near its limit: it holds 900 of 1000 MiB, most of it in /registry/events/ (800 MiB in 7 keys)"},
		{"at its limit", limits(&peers.Space{Bytes: 1000 << 20, Quota: 1000 << 20, Refused: true, Largest: []peers.Prefix{{Prefix: "/registry/events/"}, {Prefix: "/registry/leases/", Bytes: 9}}}, nil), false, "", "(0 MiB in 0 keys); delete what is not needed, or set a larger --quota-backend-bytes in args/k8s-dqlite of each control-plane node and restart it; then run: microk8s dbctl disarm"},
		{"little memory", limits(nil, &peers.Memory{Used: 90 << 20, Limit: 100 << 20, Low: true}), false, "", "it uses 90 of 100 MiB; raise MemoryMax="},
		{"roles not given yet", []peers.Member{member(1, v, true), member(2, sp, true), member(3, sp, true)}, false, "until there are three voters", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root, err := os.MkdirTemp("", "ha") // short: a socket below it
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(root) })
			env := snapenv.Under(root)
			write(t, env.Lock(snapenv.LockHA), "")
			write(t, filepath.Join(env.BackendLive(), "info.yaml"), "Address: 10.0.0.1:19001\nID: 1\nRole: 0\n")
			ctx, cancel := context.WithCancel(t.Context())
			wait, err := peers.Serve(ctx, env.BackendLive(), slog.New(slog.DiscardHandler), func() []peers.Member { return tc.members })
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { cancel(); wait() })
			r := Report{HA: askHA(t.Context(), env)}
			r.haProblems()
			if r.HA.Enabled != tc.enabled || len(r.HA.Nodes) != len(tc.members) {
				t.Errorf("HA: %+v", r.HA)
			}
			if note := r.HA.Tolerates(); (note == "") != (tc.note == "") || !strings.Contains(note, tc.note) {
				t.Errorf("note: %q, want %q", note, tc.note)
			}
			if text := fmt.Sprint(r.Problems); (len(r.Problems) == 0) != (tc.problems == "") || !strings.Contains(text, tc.problems) {
				t.Errorf("problems: %s, want %q", text, tc.problems)
			}
			r.Problems = nil
			r.addressProblem(memberElsewhere(env, []net.IP{net.ParseIP("10.0.0.1")}))
			if len(r.Problems) != 0 {
				t.Errorf("with its address: %v", r.Problems)
			}
			if r.addressProblem(memberElsewhere(env, nil)); (len(r.Problems) == 1 && strings.Contains(r.Problems[0].What, "no address but the loopback's")) != (len(tc.members) > 1) {
				t.Errorf("without any address: %v", r.Problems)
			}
			r.Problems = nil
			if r.addressProblem(memberElsewhere(env, []net.IP{net.ParseIP("10.0.0.77")})); (len(r.Problems) == 1) != (len(tc.members) > 1) {
				t.Errorf("without its address: %v", r.Problems)
			}
		})
	}
}

func TestInterruptedChanges(t *testing.T) {
	for text, want := range map[string]string{
		`{"operation":"join-worker","step":"Stop the services"}`: `microk8s join is under way or was interrupted, at "Stop the services"`,
		`{"operation":"leave","step":"x"}`:                       `microk8s leave is under way`,
		`{`:                                                      "damaged",
	} {
		env := snapenv.Under(t.TempDir())
		write(t, env.Journal(), text)
		r := Report{}
		if r.changeProblems(env); len(r.Problems) != 1 || !strings.Contains(r.Problems[0].What, want) {
			t.Errorf("%s: %v", text, r.Problems)
		}
	}
}

// What kubelite says about its daemons and about the node is a problem with its cause.
func TestDaemonsInsideKubelite(t *testing.T) {
	for _, tc := range []struct{ name, state, want string }{
		{"all run", `{}`, ""},
		{"one is down", `{"down":[{"name":"kube-controller-manager","why":"invalid CIDR","times":1}]}`,
			"kube-controller-manager inside kubelite has ended and is started again, the other daemons go on; its error: invalid CIDR; if that names an argument, correct it in"},
		{"again and again", `{"down":[{"name":"kube-scheduler","why":"lost","times":7}]}`, "has ended 7 times and is started again"},
		{"without a part of it", `{"down":[{"name":"kube-controller-manager","why":"it goes on without: invalid CIDR","times":3,"runs":true}]}`,
			"kube-controller-manager inside kubelite runs, but it goes on without: invalid CIDR; correct --cluster-cidr in"},
		{"the node was removed", `{"refused":"node w1 is not registered in this cluster"}`,
			"the cluster has removed this node: node w1 is not registered in this cluster; to use this machine again: microk8s leave --force"},
		{"policies are not enforced", `{"policies":"the disk of rules is full"}`,
			"network policies are not enforced on this node as the cluster has them: the disk of rules is full; see microk8s logs kubelite"},
		{"half a file", `{`, "cannot read what kubelite says"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := snapenv.Under(t.TempDir())
			write(t, kubelitestate.Path(env), tc.state)
			r := Report{}
			r.daemonProblems(env)
			if text := fmt.Sprint(r.Problems); (len(r.Problems) == 0) != (tc.want == "") || !strings.Contains(text, tc.want) {
				t.Errorf("problems: %s, want %q", text, tc.want)
			}
			if p := r.NetworkPolicy; strings.Contains(tc.state, "policies") && (p.Enforced || p.Why == "") {
				t.Errorf("network policy: %+v", p)
			}
			if removed := Removed(env); strings.Contains(tc.state, "refused") != (removed != "") {
				t.Errorf("removed: %q", removed)
			}
		})
	}
}

// TestNamesOfChecks holds that each problem is found by a check that says what it looks at.
func TestNamesOfChecks(t *testing.T) {
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\badd\("([^"]*)"|Problem\{(?:ID: +"([^"]*)")?`)
	count := 0
	for _, path := range sources {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllStringSubmatch(strings.ReplaceAll(string(text), "Problem{\n\t\tID:", "Problem{ID:"), -1) {
			if id := m[1] + m[2]; m[0] != "Problem{" && Looks[id] == "" {
				t.Errorf("%s: %q is not in Looks", path, id)
			}
			count++
		}
	}
	if count < 40 {
		t.Errorf("%d problems were found in the sources", count)
	}
}

// TestPodsOfAddons holds which workloads that lack pods are problems, in a report.
func TestPodsOfAddons(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, tc := range []struct {
		name string
		w    workload
		want string
	}{
		{"its pod crashes", workload{why: "pod coredns-1: CrashLoopBackOff: it ends", since: now}, "addon dns: deployment/coredns has 0 of 1 pods, pod coredns-1: CrashLoopBackOff: it ends"},
		{"it has just been made", workload{since: now.Add(-time.Second)}, ""},
		{"it takes long", workload{since: now.Add(-time.Hour)}, "its pods do not get ready"},
		{"a node is down", workload{kind: "daemonset", since: now.Add(-time.Hour)}, ""},
	} {
		w := tc.w
		w.addon, w.name, w.want, w.kind = "dns", "coredns", 1, cmp.Or(w.kind, "deployment")
		r := Report{}
		r.weakProblems(apiState{weak: []workload{w}}, now)
		if text := fmt.Sprint(r.Problems); (len(r.Problems) == 0) != (tc.want == "") || !strings.Contains(text, tc.want) {
			t.Errorf("%s: %s, want %q", tc.name, text, tc.want)
		}
	}
}
