package snap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/longtest"
	"microk8s/internal/turn"
)

// Three machines make a cluster and are refreshed one by one, under steady writing through
// whichever API server answers. It takes many minutes, so the gate leaves it out (scripts/test).
func TestClusterIsRefreshedNodeByNode(t *testing.T) {
	longtest.Only(t)
	prepare(t)
	var nodes []*machine
	for _, name := range []string{"n1", "n2", "n3"} {
		m := newMachine(t, name)
		nodes = append(nodes, m)
		m.run(t, "snap", "install", "--dangerous", "--classic", packed(t))
		m.connect(t)
		m.waitReady(t)
		if name == "n1" {
			continue
		}
		line := strings.Fields(nodes[0].run(t, "microk8s", "add-node", "--format", "short"))
		m.run(t, line[:3]...)
		m.connect(t)
		m.waitReady(t)
	}
	for _, m := range nodes {
		m.waitVoters(t, 3)
	}
	next := nodes[0].repack(t, "v1.37.99", nil)
	for _, m := range nodes[1:] {
		if err := os.Link(filepath.Join(nodes[0].scratch, filepath.Base(next)), filepath.Join(m.scratch, filepath.Base(next))); err != nil {
			t.Fatal(err)
		}
	}
	tr := startClusterTraffic(t, nodes)

	// While one is down, no other may be taken away.
	if out, err := snapdHost(t.Context(), "kill", "n2").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	eventually(t, 2*time.Minute, func() error {
		if n := nodes[2].voters(t); n != 2 {
			return fmt.Errorf("%d voters live", n)
		}
		return nil
	})
	if out, code := nodes[2].try(t, "snap", "install", "--dangerous", "--classic", next); code == 0 || !strings.Contains(out, "cannot refresh this node now") {
		t.Fatalf("a refresh that costs the quorum: exit code %d\n%s", code, out)
	}
	if out := nodes[2].run(t, "microk8s", "version"); !strings.Contains(out, "revision x1") {
		t.Errorf("after the refused refresh: %s", out)
	}
	nodes[1].up(t)
	for _, m := range nodes {
		m.waitReady(t)
		m.waitVoters(t, 3)
	}

	// While another node has the turn, nobody is refreshed, and the refusal says who has it and what to type.
	holder := "n1-elsewhere"
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: turn.Name, Namespace: "kube-system"}}
	now, seconds := metav1.NowMicro(), int32(turn.RefreshLimit/time.Second)
	lease.Spec = coordinationv1.LeaseSpec{HolderIdentity: &holder, LeaseDurationSeconds: &seconds, RenewTime: &now, AcquireTime: &now}
	lease.Annotations = map[string]string{"microk8s.io/why": turn.ForRefresh}
	leases := nodes[0].client.CoordinationV1().Leases("kube-system")
	if err := leases.Delete(t.Context(), turn.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	if _, err := leases.Create(t.Context(), lease, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if out, code := nodes[2].try(t, "snap", "install", "--dangerous", "--classic", next); code == 0 || !strings.Contains(out, holder+" has the turn") {
		t.Fatalf("a refresh while another node is refreshed: exit code %d\n%s", code, out)
	}
	nodes[2].run(t, "microk8s", "kubectl", "-n", "kube-system", "delete", "lease", turn.Name)

	for _, m := range nodes {
		written := tr.written()
		m.run(t, "snap", "install", "--dangerous", "--classic", next)
		m.waitReady(t)
		if out := m.run(t, "microk8s", "version"); !strings.Contains(out, "v1.37.99") {
			t.Errorf("%s after its refresh: %s", m.name, out)
		}
		for _, other := range nodes {
			other.waitVoters(t, 3)
		}
		eventually(t, 2*time.Minute, func() error { // the next revision's agent ends the turn
			l, err := leases.Get(t.Context(), turn.Name, metav1.GetOptions{})
			if err == nil && l.Spec.HolderIdentity != nil && *l.Spec.HolderIdentity != "" {
				err = fmt.Errorf("%s has the turn yet", *l.Spec.HolderIdentity)
			}
			return err
		})
		if tr.written() == written {
			t.Errorf("nothing was written while %s was refreshed", m.name)
		}
	}
	// One goes back: two releases in one cluster.
	nodes[1].run(t, "snap", "revert", "microk8s")
	nodes[1].waitReady(t)
	nodes[1].waitVoters(t, 3)
	tr.check(t, nodes)
}

// A node that was refreshed and has joined a cluster after that cannot go back to the revision
// from before: that has the certificates of the single node. It says how to go forward again.
func TestRevertToBeforeTheJoin(t *testing.T) {
	longtest.Only(t)
	prepare(t)
	n1, n2 := newMachine(t, "n1"), newMachine(t, "n2")
	for _, m := range []*machine{n1, n2} {
		m.run(t, "snap", "install", "--dangerous", "--classic", packed(t))
		m.connect(t)
		m.waitReady(t)
	}
	n2.run(t, "snap", "install", "--dangerous", "--classic", n2.repack(t, "v1.37.99", nil))
	n2.waitReady(t)
	n2.run(t, strings.Fields(n1.run(t, "microk8s", "add-node", "--format", "short"))[:3]...)
	n2.connect(t)
	n2.waitReady(t)
	tr := startClusterTraffic(t, []*machine{n1, n2})

	n2.run(t, "snap", "revert", "microk8s")
	for _, service := range []string{"kubelite", "k8s-dqlite"} {
		eventually(t, 2*time.Minute, func() error {
			out := n2.run(t, "journalctl", "--no-pager", "--output=cat", "-t", "microk8s.daemon-"+service)
			if !strings.Contains(out, "sudo snap revert microk8s --revision=x2") {
				return fmt.Errorf("%s does not say what to do", service)
			}
			return nil
		})
	}
	if conn, err := n2.dial(t.Context(), "tcp", "127.0.0.1:16443"); err == nil {
		conn.Close()
		t.Error("the API server runs with the certificates from before the join")
	}

	n2.run(t, "snap", "revert", "microk8s", "--revision=x2")
	n2.waitReady(t)
	tr.check(t, []*machine{n1, n2})
}

// Machines join by launch configurations, as images of clouds have them: one of the control plane by the file that is there
// before the snap is installed, a worker by one that appears on a running node. The cluster agent, which applies them,
// is stopped by the join that it begins.
func TestJoinByLaunchConfiguration(t *testing.T) {
	longtest.Only(t)
	prepare(t)
	const secret = "5d0c6e1f9b7a48e2a3c4f60718293b5d"
	n1, n2, n3 := newMachine(t, "n1"), newMachine(t, "n2"), newMachine(t, "n3")
	install := func(m *machine) { m.run(t, "snap", "install", "--dangerous", "--classic", packed(t)) }
	install(n1)
	n1.connect(t)
	n1.waitReady(t)
	n1.run(t, "microk8s", "add-node", "--token", secret, "--token-ttl", "7200")
	address := "10.77.0.11:25000/" + secret
	const common = "/var/snap/microk8s/common/"
	put := func(m *machine, path, text string) {
		m.runIn(t, strings.NewReader(text), "sh", "-c", "install -D -m 600 /dev/stdin "+path)
	}
	joined := func(m *machine) {
		t.Helper()
		eventually(t, 6*time.Minute, func() error {
			node, err := n1.client.CoreV1().Nodes().Get(t.Context(), m.name, metav1.GetOptions{})
			if err != nil {
				said, _ := m.try(t, "sh", "-c", "cat "+common+"var/log/detached.log "+common+"etc/launcher/*.error")
				return fmt.Errorf("%w\n%s", err, said)
			}
			for _, c := range node.Status.Conditions {
				if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
					return nil
				}
			}
			return fmt.Errorf("%s is not Ready", m.name)
		})
		eventually(t, 3*time.Minute, func() error { // done, and taken note of
			if out, code := m.try(t, "sh", "-c", "ls "+common+"etc/launcher"); code != 0 || !strings.Contains(out, ".applied") || strings.Contains(out, ".error") {
				return fmt.Errorf("etc/launcher has %s", out)
			}
			return nil
		})
		if out := m.run(t, "systemctl", "list-units", "--failed", "--no-legend", "--plain", "snap.*"); out != "" {
			t.Errorf("units of %s failed:\n%s", m.name, out)
		}
	}

	put(n2, common+".microk8s.yaml", "version: 0.2.0\njoin:\n  url: "+address+"\n")
	install(n2)
	joined(n2)
	eventually(t, 3*time.Minute, func() error { // of two members one votes
		if out, _ := n1.try(t, "env", "MICROK8S_STATUS_BUDGET=5s", "microk8s", "status", "-o", "json"); !strings.Contains(out, "10.77.0.12:19001") {
			return fmt.Errorf("n2 is not a member of the datastore:\n%s", out)
		}
		return nil
	})
	n2.connect(t)
	n2.waitReady(t)
	n2.testServicesActive(t)

	install(n3)
	n3.connect(t)
	n3.waitReady(t)
	put(n3, common+"etc/launcher/join.json", `{"version": "0.2.0", "join": {"url": "`+address+`", "worker": true}}`)
	joined(n3)
	if got := n3.services(t)["apiserver-proxy"]; got != "enabled active" {
		t.Errorf("the proxy of the worker is %s", got)
	}
}

// voters counts the living voters that a node's datastore knows of.
func (m *machine) voters(t *testing.T) int {
	t.Helper()
	out, _ := m.try(t, "env", "MICROK8S_STATUS_BUDGET=5s", "microk8s", "status", "--format", "json")
	var report struct {
		HighAvailability struct {
			Nodes []struct {
				Role  string `json:"role"`
				Alive bool   `json:"alive"`
			} `json:"nodes"`
		} `json:"high-availability"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		return 0
	}
	n := 0
	for _, node := range report.HighAvailability.Nodes {
		if node.Role == "voter" && node.Alive {
			n++
		}
	}
	return n
}

func (m *machine) waitVoters(t *testing.T, want int) {
	t.Helper()
	eventually(t, 4*time.Minute, func() error {
		if n := m.voters(t); n != want {
			return fmt.Errorf("%s knows of %d living voters, want %d", m.name, n, want)
		}
		return nil
	})
}

// clusterTraffic writes through any API server that answers.
type clusterTraffic struct {
	stop    context.CancelFunc
	wg      sync.WaitGroup
	mu      sync.Mutex
	acked   []string
	longest time.Duration // without a write
}

func (tr *clusterTraffic) written() int {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return len(tr.acked)
}

func startClusterTraffic(t *testing.T, nodes []*machine) *clusterTraffic {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(stop)
	tr := &clusterTraffic{stop: stop}
	tr.wg.Go(func() {
		last, at := time.Now(), 0
		for i := 0; ctx.Err() == nil; i++ {
			name := fmt.Sprintf("cluster-%d", i)
			try, cancel := context.WithTimeout(ctx, 3*time.Second)
			_, err := nodes[at].client.CoreV1().ConfigMaps("default").Create(try, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
			cancel()
			if err != nil {
				at = (at + 1) % len(nodes)
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
				continue
			}
			tr.mu.Lock()
			tr.acked = append(tr.acked, name)
			tr.longest = max(tr.longest, time.Since(last))
			tr.mu.Unlock()
			last = time.Now()
		}
	})
	return tr
}

// check ends the traffic; what was acknowledged must be seen by every node.
func (tr *clusterTraffic) check(t *testing.T, nodes []*machine) {
	t.Helper()
	tr.stop()
	tr.wg.Wait()
	for _, m := range nodes {
		eventually(t, time.Minute, func() error {
			list, err := m.client.CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				return err
			}
			there := map[string]bool{}
			for _, c := range list.Items {
				there[c.Name] = true
			}
			for _, name := range tr.acked {
				if !there[name] {
					if _, err := m.client.CoreV1().ConfigMaps("default").Get(t.Context(), name, metav1.GetOptions{}); apierrors.IsNotFound(err) {
						t.Fatalf("%s was acknowledged and is lost, says %s", name, m.name)
					}
					return errors.New("a list without " + name)
				}
			}
			return nil
		})
	}
	t.Logf("%d objects written, the longest pause was %s", len(tr.acked), tr.longest.Round(time.Millisecond))
}
