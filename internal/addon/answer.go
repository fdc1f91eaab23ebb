package addon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"
)

// oneAnswer bounds one try to get an answer; another follows after [look].
const oneAnswer = 2 * time.Second

var (
	podResource = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	apiServices = schema.GroupVersionResource{Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"}
	namespaces  = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
)

// question is something that an enabled addon is to answer.
type question struct {
	name string // of who answers, as in "localhost:32000"
	ask  func(ctx context.Context) error
}

// NoAnswerError is a part of an addon that runs and did not answer in time.
type NoAnswerError struct {
	Name string
	Why  error
}

func (e *NoAnswerError) Error() string { return e.Name + " does not answer: " + e.Why.Error() }
func (e *NoAnswerError) Unwrap() error { return e.Why }

// Answers returns when everything answers by which people and pods reach the addon, as seen from the
// node called here: ports of Services and host ports by a connection, name servers by a lookup,
// registries by a request, extensions of the API by the API server's word. Pods that are ready are not
// enough: kube-proxy and the CNI plugins let traffic through to them a little later. It returns a
// *NoAnswerError when ctx ends first, and calls say with each new reason to wait.
func (s *Set) Answers(ctx context.Context, applied Applied, here string, say func(reason string)) error {
	questions, err := s.questions(ctx, applied, here)
	if err != nil {
		return err
	}
	for _, q := range questions {
		if err := await(ctx, q, say); err != nil {
			return err
		}
	}
	return nil
}

func await(ctx context.Context, q question, say func(string)) error {
	tick := time.NewTicker(look)
	defer tick.Stop()
	began, last := time.Now(), error(nil)
	for said := false; ; {
		try, cancel := context.WithTimeout(ctx, oneAnswer)
		err := q.ask(try)
		cancel()
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil { // the last one was cut short
			last = err
		}
		if !said && time.Since(began) > time.Second {
			said = true
			say("waiting for an answer of " + q.name)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return &NoAnswerError{Name: q.name, Why: last}
		}
	}
}

// questions returns what the applied objects promise to answer.
func (s *Set) questions(ctx context.Context, applied Applied, here string) (out []question, err error) {
	addresses := s.nodeAddresses(ctx, here)
	if applied.asks != nil {
		defer func() { out = append(out, applied.asks(s)) }() // last: it needs the ports
	}
	for _, o := range applied.Objects {
		switch o.GetKind() {
		case "Service":
			got, err := s.client.Resource(services).Namespace(o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
			if err != nil {
				return nil, fmt.Errorf("cannot read the Service %s: %w", o.GetName(), err)
			}
			out = append(out, serviceQuestions(got, addresses, applied)...)
		case "DaemonSet", "Deployment":
			ports := hostPorts(o)
			if len(ports) == 0 || !s.runsHere(ctx, o, here) {
				continue
			}
			for _, p := range ports {
				for _, a := range addresses {
					out = append(out, connects(net.JoinHostPort(a, p)))
				}
			}
		case "APIService":
			name := o.GetName()
			out = append(out, question{name: "the API " + name, ask: func(ctx context.Context) error {
				got, err := s.client.Resource(apiServices).Get(ctx, name, metav1.GetOptions{})
				if err != nil || conditionTrue(got, "Available") {
					return err
				}
				return errors.New(conditionMessage(got, "Available"))
			}})
		case "ConfigMap":
			if host := registryHost(o); host != "" {
				out = append(out, question{name: host, ask: func(ctx context.Context) error { return registryAnswers(ctx, host) }})
			}
		}
	}
	return out, nil
}

// serviceQuestions are the ports of a Service at its own address, and its node ports at the node's that are of
// its families.
func serviceQuestions(service *unstructured.Unstructured, addresses []string, applied Applied) (out []question) {
	own, _, _ := unstructured.NestedString(service.Object, "spec", "clusterIP")
	if own == "" || own == "None" {
		return nil
	}
	ports, _, _ := unstructured.NestedSlice(service.Object, "spec", "ports")
	families, _, _ := unstructured.NestedStringSlice(service.Object, "spec", "ipFamilies")
	for _, p := range ports {
		m, _ := p.(map[string]any)
		port, _, _ := unstructured.NestedInt64(m, "port")
		at := net.JoinHostPort(own, strconv.FormatInt(port, 10))
		switch protocol, _, _ := unstructured.NestedString(m, "protocol"); {
		case protocol == "UDP" && port == 53:
			_, domain, _ := applied.DNS()
			out = append(out, question{name: "the name server " + at, ask: func(ctx context.Context) error { return resolves(ctx, at, domain) }})
		case protocol == "" || protocol == "TCP":
			out = append(out, connects(at))
		}
		if node, _, _ := unstructured.NestedInt64(m, "nodePort"); node > 0 {
			for _, a := range addresses {
				family := "IPv4"
				if strings.Contains(a, ":") {
					family = "IPv6"
				}
				if len(families) == 0 || slices.Contains(families, family) {
					out = append(out, connects(net.JoinHostPort(a, strconv.FormatInt(node, 10))))
				}
			}
		}
	}
	return out
}

// nodeAddresses returns the addresses that the node called name is known by; none where the API server
// has no such node.
func (s *Set) nodeAddresses(ctx context.Context, name string) (out []string) {
	node, err := s.client.Resource(nodes).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil
	}
	all, _, _ := unstructured.NestedSlice(node.Object, "status", "addresses")
	for _, a := range all {
		if m, ok := a.(map[string]any); ok && m["type"] == "InternalIP" {
			out = append(out, fmt.Sprint(m["address"]))
		}
	}
	return out
}

// hostPorts returns the TCP ports that the pods of a workload have on their node.
func hostPorts(o *unstructured.Unstructured) (out []string) {
	containers, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "containers")
	for _, c := range containers {
		m, _ := c.(map[string]any)
		ports, _, _ := unstructured.NestedSlice(m, "ports")
		for _, p := range ports {
			port, _ := p.(map[string]any)
			n, _, _ := unstructured.NestedInt64(port, "hostPort")
			if protocol, _, _ := unstructured.NestedString(port, "protocol"); n > 0 && (protocol == "" || protocol == "TCP") {
				out = append(out, strconv.FormatInt(n, 10))
			}
		}
	}
	return out
}

// runsHere reports whether a pod of a workload is on the node called here.
func (s *Set) runsHere(ctx context.Context, o *unstructured.Unstructured, here string) bool {
	list, err := s.client.Resource(podResource).Namespace(o.GetNamespace()).List(ctx, metav1.ListOptions{
		LabelSelector: selectorOf(o), FieldSelector: "spec.nodeName=" + here})
	return err == nil && len(list.Items) > 0
}

func selectorOf(o *unstructured.Unstructured) string {
	match, _, _ := unstructured.NestedStringMap(o.Object, "spec", "selector", "matchLabels")
	return metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: match})
}

// registryHost returns the host of a registry that a ConfigMap announces in the form of KEP-1755, "" if it does not.
func registryHost(o *unstructured.Unstructured) string {
	if o.GetName() != "local-registry-hosting" {
		return ""
	}
	text, _, _ := unstructured.NestedString(o.Object, "data", "localRegistryHosting.v1")
	var hosting struct {
		Host string `json:"host"`
	}
	_ = yaml.Unmarshal([]byte(text), &hosting)
	return hosting.Host
}

func connects(address string) question {
	return question{name: address, ask: func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err != nil {
			return plainly(err)
		}
		return conn.Close()
	}}
}

// registryAnswers asks for the version of a registry's API, which each has (OCI distribution, 3.2).
func registryAnswers(ctx context.Context, host string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+"/v2/", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return plainly(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET /v2/: %s", resp.Status)
	}
	return nil
}

// resolves asks a name server for the name of the API server.
func resolves(ctx context.Context, server, domain string) error {
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, server)
	}}
	_, err := r.LookupHost(ctx, "kubernetes.default.svc."+strings.Trim(domain, ".")+".")
	var answer *net.DNSError
	if errors.As(err, &answer) && answer.IsTimeout {
		return errors.New("no answer in time")
	}
	return err
}

// plainly leaves out what repeats the address.
func plainly(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		if op.Timeout() {
			return errors.New("no answer in time")
		}
		return op.Err
	}
	return err
}

func conditionMessage(o *unstructured.Unstructured, name string) string {
	conditions, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range conditions {
		if m, ok := c.(map[string]any); ok && m["type"] == name {
			return fmt.Sprintf("%v: %v", m["reason"], m["message"])
		}
	}
	return "the API server has not looked at it yet"
}

// Leftover is what an addon's disable leaves for a while: pods that end, and namespaces with them.
type Leftover struct {
	set        *Set
	selectors  []podSelector
	namespaces []string
}

type podSelector struct{ namespace, labels string }

// Leftover finds out what [Set.Disable] of an addon will leave for a while; call it before that.
func (s *Set) Leftover(ctx context.Context, name string) (*Leftover, error) {
	l := &Leftover{set: s}
	for _, gvr := range workloads {
		list, err := s.client.Resource(gvr).List(ctx, metav1.ListOptions{LabelSelector: Label + "=" + name})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot list the workloads of %s: %w", name, err)
		}
		for i := range list.Items {
			l.selectors = append(l.selectors, podSelector{list.Items[i].GetNamespace(), selectorOf(&list.Items[i])})
		}
	}
	list, err := s.client.Resource(namespaces).List(ctx, metav1.ListOptions{LabelSelector: Label + "=" + name})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("cannot list the namespaces of %s: %w", name, err)
	}
	if err == nil {
		for i := range list.Items {
			l.namespaces = append(l.namespaces, list.Items[i].GetName())
		}
	}
	return l, nil
}

// Gone returns when nothing of it is left, or when ctx ends with what still is: pods as
// namespace/name, and namespaces that end.
func (l *Leftover) Gone(ctx context.Context) (left []string) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		now, err := l.now(ctx)
		if err == nil {
			if left = now; len(left) == 0 {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return left
		}
	}
}

func (l *Leftover) now(ctx context.Context) (left []string, err error) {
	for _, sel := range l.selectors {
		list, err := l.set.client.Resource(podResource).Namespace(sel.namespace).List(ctx, metav1.ListOptions{LabelSelector: sel.labels})
		if err != nil {
			return nil, err
		}
		for i := range list.Items {
			left = append(left, "pod "+list.Items[i].GetNamespace()+"/"+list.Items[i].GetName())
		}
	}
	for _, name := range l.namespaces {
		ns, err := l.set.client.Resource(namespaces).Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
		case err != nil:
			return nil, err
		case ns.GetDeletionTimestamp() != nil: // one that others use stays
			left = append(left, "namespace "+name)
		}
	}
	return left, nil
}
