package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/utils/ptr"

	"microk8s/tests/lab"
)

const (
	image     = "microk8s.test/web:1"
	namespace = "default"
	port      = 8090
	patience  = 10 * time.Minute
)

// The hosts: a control-plane node, where the client is, and a worker.
var hosts = []string{"n1", "n2"}

// cluster is one of two nodes: a client and a sink on the first, a sink on the second and a Service of that.
type cluster struct {
	lab      *lab.Lab
	api      *kubernetes.Clientset
	near     string // addresses with port
	far      string
	service  string
	policies int
}

// flow is a way from the client to a sink.
type flow struct {
	name string
	to   func(*cluster) string
}

var flows = []flow{
	{"one node", func(c *cluster) string { return c.near }},
	{"across nodes", func(c *cluster) string { return c.far }},
	{"a Service", func(c *cluster) string { return c.service }},
}

// measure is one line of the table.
type measure struct {
	title, key, wanted string
	scale              float64
}

func (f flow) measures() []measure {
	return []measure{
		{f.name + ": throughput, Gbit/s", f.name + " stream", "−2 %; policies −5 %", 1e9 / 8},
		{f.name + ": latency p50, µs", f.name + " p50", "+2 %", 1},
		{f.name + ": latency p99, µs", f.name + " p99", "", 1},
		{f.name + ": new connections/s", f.name + " connect", "−2 %; policies −10 %", 1},
	}
}

// newCluster starts one; also after an error what there is of it has to be taken down.
func newCluster(ctx context.Context, instance, build, launch string) (*cluster, error) {
	l, err := lab.New(lab.Config{Instance: instance, Snap: filepath.Join(build, "snap")})
	if err != nil {
		return nil, err
	}
	c := &cluster{lab: l}
	if err := l.Down(ctx); err != nil {
		return c, err
	}
	for i, host := range hosts {
		if err := l.Up(ctx, host, lab.Options{}); err != nil {
			return c, err
		}
		if i == 0 && launch != "" {
			if err := os.WriteFile(filepath.Join(l.Root(host), "var/snap/microk8s/common/.microk8s.yaml"), []byte(launch), 0o600); err != nil {
				return c, err
			}
		}
		if _, err := l.Output(ctx, host, "microk8s", "start"); err != nil {
			return c, err
		}
	}
	out, err := l.Output(ctx, hosts[0], "microk8s", "add-node", "--format", "short")
	if err != nil {
		return c, err
	}
	if _, err := l.Output(ctx, hosts[1], append(strings.Fields(first(out)), "--worker")...); err != nil {
		return c, err
	}
	if err := c.connect(ctx); err != nil {
		return c, err
	}
	for _, host := range hosts {
		if err := c.importImage(ctx, host, filepath.Join(build, "test-images/web.tar")); err != nil {
			return c, err
		}
	}
	return c, c.deploy(ctx)
}

func (c *cluster) down(ctx context.Context) error {
	if c == nil {
		return nil
	}
	return c.lab.Down(context.WithoutCancel(ctx))
}

func (c *cluster) connect(ctx context.Context) error {
	text, err := c.lab.Output(ctx, hosts[0], "microk8s", "config", "--use-loopback")
	if err != nil {
		return err
	}
	cfg, err := clientcmd.RESTConfigFromKubeConfig([]byte(text))
	if err != nil {
		return err
	}
	cfg.QPS = -1
	cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return c.lab.Dial(ctx, hosts[0], network, address)
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	c.api, err = kubernetes.NewForConfig(cfg)
	return err
}

func (c *cluster) importImage(ctx context.Context, host, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	var out bytes.Buffer
	if err := c.lab.Exec(ctx, host, lab.Command{Args: []string{"microk8s", "ctr", "images", "import", "-"}, Stdin: f, Stdout: &out, Stderr: &out}); err != nil {
		return fmt.Errorf("cannot import %s: %w\n%s", archive, err, &out)
	}
	return nil
}

// until repeats a question.
func until(ctx context.Context, what string, ask func() error) error {
	for deadline := time.Now().Add(patience); ; {
		err := ask()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func container(args ...string) []corev1.Container {
	return []corev1.Container{{Name: "web", Image: image, ImagePullPolicy: corev1.PullNever, Args: args}}
}

// pod starts one and returns it with its address.
func (c *cluster) pod(ctx context.Context, name, node string, labels map[string]string, args ...string) (*corev1.Pod, error) {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec:       corev1.PodSpec{NodeName: node, TerminationGracePeriodSeconds: new(int64), Containers: container(args...)},
	}
	if err := until(ctx, "a pod is made", func() error { // a new namespace has no account yet
		_, err := c.api.CoreV1().Pods(namespace).Create(ctx, p, metav1.CreateOptions{})
		return err
	}); err != nil {
		return nil, err
	}
	err := until(ctx, "pod "+name, func() (err error) {
		if p, err = c.api.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{}); err == nil && (p.Status.Phase != corev1.PodRunning || p.Status.PodIP == "") {
			err = fmt.Errorf("is %s: %v", p.Status.Phase, p.Status.ContainerStatuses)
		}
		return err
	})
	return p, err
}

var sinks = map[string]string{"app": "sink"}

func (c *cluster) deploy(ctx context.Context) error {
	at := func(ip string) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }
	near, err := c.pod(ctx, "near", hosts[0], sinks, "sink", strconv.Itoa(port))
	if err != nil {
		return err
	}
	far, err := c.pod(ctx, "far", hosts[1], map[string]string{"app": "sink", "far": "yes"}, "sink", strconv.Itoa(port))
	if err != nil {
		return err
	}
	if _, err := c.pod(ctx, "client", hosts[0], map[string]string{"app": "client"}, "sleep", "forever"); err != nil {
		return err
	}
	svc, err := c.api.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "far"},
		Spec: corev1.ServiceSpec{Selector: map[string]string{"far": "yes"}, Ports: []corev1.ServicePort{
			{Name: "tcp", Port: port}, {Name: "udp", Port: port, Protocol: corev1.ProtocolUDP},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	c.near, c.far, c.service = at(near.Status.PodIP), at(far.Status.PodIP), at(svc.Spec.ClusterIP)
	return until(ctx, "the Service answers", func() error {
		_, err := c.exec(ctx, "load", "echo", c.service, "0.1")
		return err
	})
}

// exec runs a command of the test's image in the client.
func (c *cluster) exec(ctx context.Context, args ...string) (string, error) {
	return c.lab.Output(ctx, hosts[0], append([]string{"microk8s", "kubectl", "exec", "client", "--", "/web"}, args...)...)
}

// measure takes the figures of one flow.
func (c *cluster) measure(ctx context.Context, f flow, during time.Duration, into figures) error {
	for _, what := range []string{"stream", "echo", "connect"} {
		out, err := c.exec(ctx, "load", what, f.to(c), during.String())
		if err != nil {
			return err
		}
		keys := []string{what}
		if what == "echo" {
			keys = []string{"p50", "p99"}
		}
		words := strings.Fields(out)
		if len(words) != len(keys) {
			return fmt.Errorf("load %s printed %q", what, out)
		}
		for i, k := range keys {
			if into[f.name+" "+k], err = strconv.ParseFloat(words[i], 64); err != nil {
				return err
			}
		}
	}
	return nil
}

// together does something n times, by several callers.
func together(n int, do func(i int) error) error {
	var group sync.WaitGroup
	errs := make([]error, n)
	next := make(chan int)
	for range 16 {
		group.Go(func() {
			for i := range next {
				errs[i] = do(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	group.Wait()
	return errors.Join(errs...)
}

// havePolicies sees to it that so many policies select the sinks and are in force. The first one lets the client in, each rule of
// the others one address at one port.
func (c *cluster) havePolicies(ctx context.Context, n int) error {
	policies := c.api.NetworkingV1().NetworkPolicies(namespace)
	if n == c.policies {
		return nil
	}
	if n < c.policies {
		if err := policies.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "bench=many"}); err != nil {
			return err
		}
		c.policies = 0
	}
	from := c.policies
	if err := together(n-from, func(i int) error {
		i += from
		p := &networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("many-%d", i), Labels: map[string]string{"bench": "many"}},
			Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: sinks}},
		}
		for rule := range rulesEach {
			r := networkingv1.NetworkPolicyIngressRule{
				From:  []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("172.%d.%d.%d/32", 16+rule, i/250, 1+i%250)}}},
				Ports: []networkingv1.NetworkPolicyPort{{Port: ptr.To(intstr.FromInt(2000 + i))}},
			}
			if i == 0 && rule == 0 {
				r = networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "client"}}}}}
			}
			p.Spec.Ingress = append(p.Spec.Ingress, r)
		}
		_, err := policies.Create(ctx, p, metav1.CreateOptions{})
		return err
	}); err != nil {
		return err
	}
	c.policies = n
	return c.quiet(ctx)
}

// quiet waits until the rules of both nodes stay as they are.
func (c *cluster) quiet(ctx context.Context) error {
	last := ""
	return until(ctx, "rules that stay", func() error {
		sum := ""
		for _, host := range hosts {
			out, err := c.lab.Output(ctx, host, "sh", "-c", "nft -s list ruleset | sha256sum")
			if err != nil {
				return err
			}
			sum += out
		}
		if sum != last {
			last = sum
			time.Sleep(2 * time.Second)
			return errors.New("they change")
		}
		return nil
	})
}

// haveServices makes Services that each have the sink on the second node behind them.
func (c *cluster) haveServices(ctx context.Context, n int) error {
	host, _, err := net.SplitHostPort(c.far)
	if err != nil {
		return err
	}
	if err := together(n, func(i int) error {
		name := fmt.Sprintf("many-%d", i)
		if _, err := c.api.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
		}, metav1.CreateOptions{}); err != nil {
			return err
		}
		_, err := c.api.DiscoveryV1().EndpointSlices(namespace).Create(ctx, &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{host}}},
			Ports:       []discoveryv1.EndpointPort{{Name: ptr.To(""), Port: ptr.To(int32(port))}},
		}, metav1.CreateOptions{})
		return err
	}); err != nil {
		return err
	}
	return c.quiet(ctx)
}

// crowd sees to it that there are so many pods besides those of the bench, half on each node.
func (c *cluster) crowd(ctx context.Context, n int) error {
	deployments := c.api.AppsV1().Deployments(namespace)
	if n == 0 {
		if err := deployments.Delete(ctx, "crowd", metav1.DeleteOptions{PropagationPolicy: ptr.To(metav1.DeletePropagationForeground)}); err != nil {
			return err
		}
		return until(ctx, "pods end", func() error {
			list, err := c.api.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=crowd"})
			if err == nil && len(list.Items) > 0 {
				err = fmt.Errorf("%d are left", len(list.Items))
			}
			return err
		})
	}
	labels := map[string]string{"app": "crowd"}
	if _, err := deployments.Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "crowd"},
		Spec: appsv1.DeploymentSpec{
			Replicas: ptr.To(int32(n - 3)),
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					TerminationGracePeriodSeconds: new(int64), Containers: container("sleep", "forever"),
					TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{
						MaxSkew: 5, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule,
						LabelSelector: &metav1.LabelSelector{MatchLabels: labels},
					}},
				},
			},
		},
	}, metav1.CreateOptions{}); err != nil {
		return err
	}
	if err := until(ctx, "pods start", func() error {
		d, err := deployments.Get(ctx, "crowd", metav1.GetOptions{})
		if err == nil && int(d.Status.ReadyReplicas) != n-3 {
			err = fmt.Errorf("%d of %d run", d.Status.ReadyReplicas, n-3)
		}
		return err
	}); err != nil {
		return err
	}
	return c.quiet(ctx)
}

// event is a line of the test image's probe.
type event struct {
	at   time.Time
	what string
}

func parseEvent(line string) (event, bool) {
	number, what, ok := strings.Cut(strings.TrimSpace(line), " ")
	at, err := strconv.ParseInt(number, 10, 64)
	return event{time.Unix(0, at), what}, ok && err == nil
}

// probe asks an address from the client until the returned function is called.
func (c *cluster) probe(ctx context.Context, address string) (<-chan event, func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	read, write := io.Pipe()
	events := make(chan event, 1000)
	cmd, err := c.lab.Spawn(ctx, hosts[0], lab.Command{Args: []string{"microk8s", "kubectl", "exec", "client", "--", "/web", "probe", address}, Stdout: write, Stderr: os.Stderr})
	if err != nil {
		cancel()
		return nil, nil, err
	}
	go func() {
		defer close(events)
		lines := bufio.NewScanner(read)
		for lines.Scan() {
			if e, ok := parseEvent(lines.Text()); ok {
				events <- e
			}
		}
	}()
	return events, func() {
		_ = cmd.Process.Kill()
		write.Close()
		_ = cmd.Wait()
		// What kubectl started lives on in the pod.
		_, _ = c.lab.Output(context.WithoutCancel(ctx), hosts[0], "pkill", "-f", "^/web probe")
		cancel()
	}, nil
}

// calm is how long nothing may change before a change counts: on a busy machine a question may go unanswered once.
const calm = 500 * time.Millisecond

// await returns since when it is so that a probe finds a way open or closed: the last change to that, after a moment,
// behind which nothing changed.
func await(events <-chan event, what string, since time.Time, limit time.Duration) (at time.Time, err error) {
	deadline := time.After(limit)
	for {
		var quiet <-chan time.Time
		if !at.IsZero() {
			quiet = time.After(calm)
		}
		select {
		case e, ok := <-events:
			if !ok {
				return time.Time{}, errors.New("the probe ended")
			}
			switch {
			case e.what != what:
				at = time.Time{}
			case e.at.After(since):
				at = e.at
			}
		case <-quiet:
			return at, nil
		case <-deadline:
			return time.Time{}, fmt.Errorf("not %s within %v", what, limit)
		}
	}
}

// gate is a policy of the sinks that lets one label in.
func gate(label string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "gate"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: sinks},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
				PodSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpIn, Values: []string{"crowd", label}}}},
			}}}},
		},
	}
}

// toggle changes a policy and measures from before the request until the first packet is judged by it, and all that follow.
func (c *cluster) toggle(ctx context.Context, times int) (closed, opened []time.Duration, err error) {
	policies := c.api.NetworkingV1().NetworkPolicies(namespace)
	if _, err := policies.Create(ctx, gate("client"), metav1.CreateOptions{}); err != nil {
		return nil, nil, err
	}
	events, stop, err := c.probe(ctx, c.far)
	if err != nil {
		return nil, nil, err
	}
	defer stop()
	if _, err := await(events, "open", time.Time{}, patience); err != nil {
		return nil, nil, err
	}
	for range times {
		for _, step := range []struct {
			label, what string
			into        *[]time.Duration
		}{{"nobody", "closed", &closed}, {"client", "open", &opened}} {
			began := time.Now()
			if _, err := policies.Update(ctx, gate(step.label), metav1.UpdateOptions{}); err != nil {
				return nil, nil, err
			}
			at, err := await(events, step.what, began, patience)
			if err != nil {
				return nil, nil, err
			}
			*step.into = append(*step.into, at.Sub(began))
		}
	}
	return closed, opened, nil
}

// newPods starts pods that the policy lets in, one after the other, and measures in them from their first moment.
func (c *cluster) newPods(ctx context.Context, times int) (took []time.Duration, err error) {
	for i := range times {
		name := fmt.Sprintf("new-%d", i)
		if _, err := c.pod(ctx, name, hosts[0], map[string]string{"app": "client"}, "probe", c.far); err != nil {
			return nil, err
		}
		if err := until(ctx, "a new pod is let in", func() error {
			log, err := c.api.CoreV1().Pods(namespace).GetLogs(name, &corev1.PodLogOptions{}).DoRaw(ctx)
			if err != nil {
				return err
			}
			var begin time.Time
			for line := range strings.Lines(string(log)) {
				e, ok := parseEvent(line)
				switch {
				case ok && e.what == "begin":
					begin = e.at
				case ok && e.what == "open":
					took = append(took, e.at.Sub(begin))
					return nil
				}
			}
			return errors.New("not yet")
		}); err != nil {
			return nil, err
		}
		if err := c.api.CoreV1().Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			return nil, err
		}
	}
	err = c.api.NetworkingV1().NetworkPolicies(namespace).Delete(ctx, "gate", metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		err = nil
	}
	return took, err
}

// ours are the programs whose CPU time counts, by the names that the kernel shows.
const ours = "kubelite k8s-dqlite containerd containerd-shim cluster-agent apiserver-proxy supervisor"

// ticks returns the CPU time of our programs on the first host, and of kubelite alone.
func (c *cluster) ticks(ctx context.Context) (all, kubelite time.Duration, err error) {
	out, err := c.lab.Output(ctx, hosts[0], "sh", "-c", `for p in /proc/[0-9]*; do echo "$(cat $p/comm) $(sed 's/.*) //' $p/stat | cut -d' ' -f12,13)"; done 2>/dev/null`)
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 3 || !strings.Contains(" "+ours+" ", " "+f[0]+" ") {
			continue
		}
		user, _ := strconv.Atoi(f[1])
		system, _ := strconv.Atoi(f[2])
		took := time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100 wherever we build for
		all += took
		if f[0] == "kubelite" {
			kubelite += took
		}
	}
	return all, kubelite, nil
}

func (c *cluster) used(ctx context.Context) (time.Duration, error) {
	_, kubelite, err := c.ticks(ctx)
	return kubelite, err
}

// atRest measures clusters at the same time: CPU of all our programs on the first host, and kubelite's memory. A
// cluster that is nil has "–".
func atRest(ctx context.Context, idle time.Duration, clusters ...*cluster) (cpu, memory []string, err error) {
	began := make([]time.Duration, len(clusters))
	for i, c := range clusters {
		if c == nil {
			continue
		}
		if began[i], _, err = c.ticks(ctx); err != nil {
			return nil, nil, err
		}
	}
	time.Sleep(idle)
	for i, c := range clusters {
		if c == nil {
			cpu, memory = append(cpu, "–"), append(memory, "–")
			continue
		}
		now, _, err := c.ticks(ctx)
		if err != nil {
			return nil, nil, err
		}
		cpu = append(cpu, fmt.Sprintf("%.1f %%", 100*(now-began[i]).Seconds()/idle.Seconds()))
		out, err := c.lab.Output(ctx, hosts[0], "sh", "-c", "awk '/^Pss:/ { print $2 }' /proc/$(pidof -s kubelite)/smaps_rollup")
		if err != nil {
			return nil, nil, err
		}
		kb, err := strconv.Atoi(strings.TrimSpace(out))
		if err != nil {
			return nil, nil, err
		}
		memory = append(memory, fmt.Sprintf("%d MB", kb/1024))
	}
	return cpu, memory, nil
}

// heal flushes the ruleset of the first host and measures until the Service answers.
func heal(ctx context.Context, clusters ...*cluster) (took []string, err error) {
	const limit = 30 * time.Second
	for _, c := range clusters {
		if c == nil {
			took = append(took, "–")
			continue
		}
		text, err := c.healed(ctx, limit)
		if err != nil {
			return nil, err
		}
		took = append(took, text)
	}
	return took, nil
}

func (c *cluster) healed(ctx context.Context, limit time.Duration) (string, error) {
	events, stop, err := c.probe(ctx, c.service)
	if err != nil {
		return "", err
	}
	defer stop()
	if _, err := await(events, "open", time.Time{}, patience); err != nil {
		return "", err
	}
	began := time.Now()
	if _, err := c.lab.Output(ctx, hosts[0], "nft", "flush", "ruleset"); err != nil {
		return "", err
	}
	closed := false
	gone := time.After(patience)
	for !closed {
		select {
		case e, ok := <-events:
			if !ok {
				return "", errors.New("the probe ended")
			}
			closed = e.what == "closed" && e.at.After(began)
		case <-gone:
			return "", errors.New("a flushed ruleset makes no difference")
		}
	}
	at, err := await(events, "open", began, limit)
	if err != nil {
		return fmt.Sprintf("not within %v", limit), nil
	}
	return fmt.Sprintf("%.1f s", at.Sub(began).Seconds()), nil
}
