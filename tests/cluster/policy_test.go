package cluster

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
)

// testPolicies has network policies of a pod on the worker enforced there: by the pods asker-NODE, which
// answer HTTP, and by the nodes themselves.
func (c *cluster) testPolicies(t *testing.T, control, worker string) {
	pods, policies := c.client(t, control).CoreV1().Pods("default"), c.client(t, control).NetworkingV1().NetworkPolicies("default")
	for _, h := range []string{control, worker} {
		patch := fmt.Sprintf(`{"metadata":{"labels":{"on":%q}}}`, h)
		if _, err := pods.Patch(t.Context(), "asker-"+h, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	server, err := pods.Get(t.Context(), "asker-"+worker, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string // of each family
	for _, a := range server.Status.PodIPs {
		addresses = append(addresses, net.JoinHostPort(a.IP, "8080"))
	}
	api, err := c.client(t, control).CoreV1().Services("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	from := map[string]func(address string) error{
		"the pod of " + control: func(address string) error {
			r := c.try(t, control, "microk8s", "kubectl", "exec", "asker-"+control, "--", "/web", "wget", "http://"+address+"/", "1")
			if r.code != 0 {
				return errors.New(r.String())
			}
			return nil
		},
		control: func(address string) error { return c.answers(control, address) },
		worker:  func(address string) error { return c.answers(worker, address) },
	}
	want := func(when string, reached map[string]bool) {
		t.Helper()
		for who, want := range reached {
			for _, address := range addresses {
				eventually(t, 20*time.Second, func() error {
					if err := from[who](address); (err == nil) != want {
						return fmt.Errorf("%s: %s reaches %s, the pod of %s: %v, want %v (%v)", when, who, address, worker, err == nil, want, fmt.Sprint(err))
					}
					return nil
				})
			}
		}
	}
	selected := metav1.LabelSelector{MatchLabels: map[string]string{"on": worker}}
	create := func(name string, spec networkingv1.NetworkPolicySpec) {
		t.Helper()
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
		if _, err := policies.Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	allow := func(peers ...networkingv1.NetworkPolicyPeer) networkingv1.NetworkPolicySpec {
		return networkingv1.NetworkPolicySpec{PodSelector: selected, Ingress: []networkingv1.NetworkPolicyIngressRule{{
			From: peers, Ports: []networkingv1.NetworkPolicyPort{{Port: ptr.To(intstr.FromInt32(8000)), EndPort: ptr.To(int32(8080))}},
		}}}
	}
	pod := "the pod of " + control
	want("without a policy", map[string]bool{pod: true, control: true, worker: true})
	create("deny", networkingv1.NetworkPolicySpec{PodSelector: selected, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}})
	want("all denied", map[string]bool{pod: false, control: false, worker: true})
	if r := c.try(t, control, "microk8s", "network", "why", "node/"+control, "asker-"+worker+":8080"); r.code != 1 || !strings.Contains(r.out, "none of its policies allows it: default/deny") {
		t.Errorf("network why: %s", r)
	}
	create("allow-pod", allow(networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"on": control}}}))
	want("a pod allowed", map[string]bool{pod: true, control: false, worker: true})
	var node []networkingv1.NetworkPolicyPeer
	for _, a := range c.internalIPs(t, control, control) {
		node = append(node, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: bits(a)}})
	}
	create("allow-node", allow(node...))
	want("a node allowed", map[string]bool{pod: true, control: true})

	// A policy of the whole cluster comes before those of the namespace.
	c.runIn(t, control, `{"apiVersion": "policy.networking.k8s.io/v1beta1", "kind": "ClusterNetworkPolicy", "metadata": {"name": "apart"}, "spec": {
		"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "ingress": [{"action": "Deny", "from": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"on": "`+control+`"}}}}]}]}}`,
		"microk8s", "kubectl", "apply", "-f", "-")
	want("denied by the cluster", map[string]bool{pod: false, control: true})
	if r := c.try(t, control, "microk8s", "network", "why", "asker-"+control, "asker-"+worker+":8080"); r.code != 1 || !strings.Contains(r.out, "stopped by the cluster's policy apart, rule 1 (tier Admin)") {
		t.Errorf("network why: %s", r)
	}
	c.run(t, control, "microk8s", "kubectl", "delete", "clusternetworkpolicies", "apart")
	want("allowed again", map[string]bool{pod: true})

	// A connection that runs is cut when it is not allowed any more.
	conn, err := c.dialer(control)(t.Context(), "tcp", addresses[len(addresses)-1])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answers := bufio.NewReader(conn)
	ask := func() error {
		if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: web\r\n\r\n"); err != nil {
			return err
		}
		conn.SetReadDeadline(time.Now().Add(700 * time.Millisecond))
		resp, err := http.ReadResponse(answers, nil)
		if err == nil {
			err = resp.Body.Close()
		}
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	if err := policies.Delete(t.Context(), "allow-node", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, func() error {
		if ask() == nil {
			return errors.New("a connection that is forbidden goes on")
		}
		return nil
	})

	// What somebody else removes comes back, and what the process leaves stays.
	c.run(t, worker, "nft", "flush", "ruleset")
	want("after a flush of the rules", map[string]bool{control: false, pod: true})
	c.run(t, worker, "pkill", "-KILL", "-x", "kubelite")
	for _, address := range addresses {
		if err := from[control](address); err == nil {
			t.Errorf("with kubelite killed, what was denied is open: %s", address)
		}
	}
	c.waitReady(t, control, worker)
	want("after a restart of kubelite", map[string]bool{pod: true, control: false, worker: true})

	// Egress, of a pod on the control-plane node; the address of a Service is judged by what is behind it.
	create("egress", networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"on": control}}, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		Egress: []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{PodSelector: &selected}, {IPBlock: &networkingv1.IPBlock{CIDR: bits(api.Spec.ClusterIP)}}}}},
	})
	eventually(t, 20*time.Second, func() error {
		r := c.try(t, control, "microk8s", "kubectl", "exec", "asker-"+control, "--", "/web", "wget", "http://"+net.JoinHostPort(api.Spec.ClusterIP, "443")+"/", "1")
		if r.code == 0 || strings.Contains(r.err, "answered") {
			return fmt.Errorf("a pod that may only reach another pod reaches the API server: %s", r)
		}
		return nil
	})
	want("egress to one pod", map[string]bool{pod: true})
	if err := policies.DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	want("without policies again", map[string]bool{pod: true, control: true, worker: true})
}

// answers asks a web server from inside a host, on a connection of its own.
func (c *cluster) answers(host, address string) error {
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: c.dialer(host)}}
	resp, err := client.Get("http://" + address + "/")
	if err == nil {
		err = resp.Body.Close()
	}
	return err
}
