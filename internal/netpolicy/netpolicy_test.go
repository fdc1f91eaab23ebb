package netpolicy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

// The cluster of the tables: node n1 (10.0.0.1) with pods web, db and dual of namespace shop, node n2
// (10.0.0.2) with client of shop and probe of monitoring, and agent, which is of n2's own network.
func tableInput(t *testing.T, policies string) Input {
	t.Helper()
	pod := func(namespace, name, node string, labels map[string]string, ips string, ports ...NamedPort) *Pod {
		p := &Pod{Namespace: namespace, Name: name, Node: node, Labels: labels, Ports: ports}
		for ip := range strings.SplitSeq(ips, " ") {
			p.IPs = append(p.IPs, netip.MustParseAddr(ip))
		}
		return p
	}
	in := Input{
		Node: "n1",
		Namespaces: map[string]map[string]string{
			"shop":       {"kubernetes.io/metadata.name": "shop", "team": "a"},
			"monitoring": {"kubernetes.io/metadata.name": "monitoring", "team": "b"},
		},
		Nodes: []*Node{
			{Name: "n1", Addresses: addrs("10.0.0.1"), PodCIDRs: prefixes("10.1.0.0/24", "fd01::/64")},
			{Name: "n2", Addresses: addrs("10.0.0.2"), PodCIDRs: prefixes("10.1.1.0/24", "fd01:0:0:1::/64")},
		},
		Closed: prefixes("10.1.0.0/24", "fd01::/64"),
		Pods: []*Pod{
			pod("shop", "web", "n1", map[string]string{"app": "web"}, "10.1.0.2", NamedPort{"http", TCP, 8080}, NamedPort{"dns", UDP, 53}),
			pod("shop", "db", "n1", map[string]string{"app": "db"}, "10.1.0.3", NamedPort{"http", TCP, 9090}),
			pod("shop", "dual", "n1", map[string]string{"app": "dual"}, "10.1.0.4 fd01::4"),
			pod("shop", "client", "n2", map[string]string{"app": "client"}, "10.1.1.2 fd01:0:0:1::2", NamedPort{"http", TCP, 7070}),
			pod("monitoring", "probe", "n2", map[string]string{"app": "probe"}, "10.1.1.3"),
			{Namespace: "monitoring", Name: "agent", Node: "n2", Labels: map[string]string{"app": "agent"}, HostNetwork: true, IPs: addrs("10.0.0.2")},
		},
	}
	for i, doc := range strings.Split(policies, "---") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		p := &Policy{Namespace: "shop", Name: fmt.Sprintf("p%d", i)}
		if err := yaml.UnmarshalStrict([]byte(doc), &p.Spec); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		in.Policies = append(in.Policies, p)
	}
	return in
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

var names = map[string]string{
	"web": "10.1.0.2", "db": "10.1.0.3", "dual": "10.1.0.4", "dual6": "fd01::4", "client": "10.1.1.2", "client6": "fd01:0:0:1::2", "probe": "10.1.1.3",
	"n1": "10.0.0.1", "n2": "10.0.0.2", "tunnel1": "10.1.0.0", "bridge1": "10.1.0.1", "tunnel2": "10.1.1.0",
	"unknown": "10.1.0.77", "world": "203.0.113.9", "world6": "2001:db8::9", "lan": "10.0.0.200",
}

// flow reads "FROM TO:PORT" or "FROM TO:PROTOCOL/PORT".
func flow(t *testing.T, s string) Flow {
	t.Helper()
	from, rest, _ := strings.Cut(s, " ")
	to, port, _ := strings.Cut(rest, ":")
	f := Flow{Protocol: TCP}
	for i, name := range []string{from, to} {
		ip, ok := names[name]
		if !ok {
			t.Fatalf("no %q", name)
		}
		*[]*netip.Addr{&f.Src, &f.Dst}[i] = netip.MustParseAddr(ip)
	}
	if proto, p, ok := strings.Cut(port, "/"); ok {
		port = p
		f.Protocol = map[string]Protocol{"udp": UDP, "sctp": SCTP, "icmp": 1}[proto]
	}
	fmt.Sscan(port, &f.Port)
	return f
}

func TestVerdict(t *testing.T) {
	for _, tc := range []struct {
		name, policies string
		allowed        []string
		denied         []string
	}{
		{"no policy", "", []string{"client web:80", "web world:443", "world web:icmp/0"}, nil},
		{"deny all ingress", `{podSelector: {}, policyTypes: [Ingress]}`,
			[]string{"web world:443", "n1 web:80", "bridge1 web:80", "tunnel1 db:1", "web n1:16443", "web web:80", "web client:80"},
			[]string{"client web:80", "web db:80", "world db:1", "client6 dual6:80", "n2 web:80", "client web:icmp/0"}},
		{"policyTypes default to ingress", `{podSelector: {}}`, []string{"web world:443"}, []string{"client web:80"}},
		{"policyTypes default to both with egress rules", `{podSelector: {}, egress: [{}]}`, []string{"web world:443"}, []string{"client web:80"}},
		{"deny all egress", `{podSelector: {}, policyTypes: [Egress]}`,
			[]string{"client web:80", "n1 web:80", "web web:80"},
			[]string{"web world:443", "web client:80", "web n1:16443", "dual6 world6:1", "web bridge1:53", "web db:80"}},
		{"empty rule allows all", `{podSelector: {}, ingress: [{}]}`, []string{"client web:80", "world web:icmp/0", "client6 dual6:udp/1"}, nil},
		{"other pods stay open", `{podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress]}`,
			[]string{"client web:80", "web client:80"}, []string{"client db:80", "db client:80", "web db:80"}},
		{"pod selector is of the own namespace", `{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`,
			[]string{"client web:80", "db web:1", "client6 dual6:1"}, []string{"probe web:80", "world web:80", "n2 web:1", "tunnel2 web:1"}},
		{"namespace selector", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}]}]}`,
			[]string{"probe web:80"}, []string{"client web:80", "n2 web:80", "tunnel2 web:80"}},
		{"both selectors together", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchLabels: {app: agent}}}]}]}`,
			nil, []string{"probe web:80", "n2 web:80", "tunnel2 web:80"}},
		{"selectors one by one", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}, {podSelector: {matchLabels: {app: client}}}]}]}`,
			[]string{"probe web:80", "client web:80"}, []string{"db web:80"}},
		{"empty namespace selector", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}`,
			[]string{"probe web:80", "client web:80"}, []string{"world web:80", "n2 web:80"}},
		{"expressions", `{podSelector: {matchExpressions: [{key: app, operator: In, values: [web, db]}]}, ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [client]}]}}]}]}`,
			[]string{"db web:80", "client dual:80"}, []string{"client web:80", "client db:80"}},
		{"ports", `{podSelector: {}, ingress: [{ports: [{port: 80}, {protocol: UDP, port: 53}, {protocol: SCTP, port: 9}]}]}`,
			[]string{"client web:80", "world web:udp/53", "world web:sctp/9"}, []string{"client web:81", "client web:53", "client web:udp/80", "client web:icmp/0"}},
		{"protocol without port", `{podSelector: {}, ingress: [{ports: [{protocol: UDP}]}]}`,
			[]string{"client web:udp/0", "client web:udp/65535"}, []string{"client web:80", "client web:icmp/0"}},
		{"endPort", `{podSelector: {}, egress: [{ports: [{port: 100, endPort: 200}]}], policyTypes: [Egress]}`,
			[]string{"web world:100", "web world:150", "web world:200"}, []string{"web world:99", "web world:201", "web world:udp/150"}},
		{"named port of the receiver", `{podSelector: {}, ingress: [{ports: [{port: http}]}]}`,
			[]string{"client web:8080", "client db:9090"}, []string{"client web:9090", "client db:8080", "client dual:8080", "client web:udp/8080"}},
		{"named port with its protocol", `{podSelector: {}, ingress: [{ports: [{port: dns, protocol: UDP}]}]}`,
			[]string{"client web:udp/53"}, []string{"client web:53"}},
		{"named port to peers", `{podSelector: {}, egress: [{to: [{podSelector: {}}], ports: [{port: http}]}], policyTypes: [Egress]}`,
			[]string{"web client:7070", "web db:9090", "db web:8080", "dual6 client6:7070"}, []string{"web client:8080", "web probe:7070", "web world:7070"}},
		{"named port to everybody", `{podSelector: {}, egress: [{ports: [{port: http}]}], policyTypes: [Egress]}`,
			[]string{"web client:7070"}, []string{"web world:7070", "web world:80", "web n2:7070"}},
		{"named port to a block", `{podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.1.1.0/24}}], ports: [{port: http}]}], policyTypes: [Egress]}`,
			[]string{"web client:7070"}, []string{"db web:8080", "web client:8080", "dual6 client6:7070"}},
		{"block with exceptions", `{podSelector: {}, egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8, 203.0.113.8/30]}}]}], policyTypes: [Egress]}`,
			nil, []string{"web world:80", "web n2:80", "web db:80", "dual6 world6:80"}},
		{"an exception does not take from another block", `{podSelector: {}, egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [203.0.113.0/24]}}, {ipBlock: {cidr: 203.0.113.9/32}}], ports: [{port: 1}]}], policyTypes: [Egress]}`,
			[]string{"web world:1", "web db:1"}, []string{"web world:2", "dual6 world6:1"}},
		{"IPv6 block", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "2001:db8::/32"}}]}]}`,
			[]string{"world6 dual6:80"}, []string{"client6 dual6:80", "world dual:80"}},
		{"block holds pods too", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.1.1.0/24}}], ports: [{port: 80}]}, {from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 81}]}]}`,
			[]string{"client web:80", "client web:81", "probe web:80"}, []string{"probe web:81", "db web:80"}},
		{"block of nodes", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/24}}], ports: [{port: 9443}]}]}`,
			[]string{"n2 web:9443", "tunnel2 web:9443", "lan web:9443"}, []string{"client web:9443", "tunnel2 web:80"}},
		{"policies add up", `{podSelector: {}, policyTypes: [Ingress]}
---
{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 80}]}]}
---
{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 82}]}]}`,
			[]string{"db web:80", "db web:82"}, []string{"db web:81", "client web:80", "web db:80"}},
		{"both sides must agree", `{podSelector: {matchLabels: {app: web}}, egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}], policyTypes: [Egress]}
---
{podSelector: {matchLabels: {app: db}}, ingress: [{ports: [{port: 5432}]}]}`,
			[]string{"web db:5432", "client db:5432"}, []string{"web db:80", "web client:5432"}},
		{"an address of no known pod is closed", "", []string{"client web:1"}, []string{"unknown world:80", "client unknown:80", "unknown n1:16443"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := tableInput(t, tc.policies)
			var c Compiler
			m := c.Compile(in)
			for _, list := range []struct {
				flows []string
				want  bool
			}{{tc.allowed, true}, {tc.denied, false}} {
				for _, s := range list.flows {
					f := flow(t, s)
					if d := m.Verdict(f); d.Allowed != list.want {
						t.Errorf("%s: allowed %v (%+v)", s, d.Allowed, d)
					}
					allowed := true
					for _, side := range c.Explain(in, f) {
						if side.Node == in.Node {
							allowed = allowed && side.Allowed
						}
						if side.Allowed != (!side.Isolated || side.OwnNode || len(side.AllowedBy) > 0) {
							t.Errorf("%s: explained by %+v", s, side)
						}
					}
					if _, known := m.Egress[f.Src]; (known || !within(in.Closed, f.Src)) && names["unknown"] != f.Dst.String() && allowed != list.want {
						t.Errorf("%s: Explain says %v", s, c.Explain(in, f))
					}
				}
			}
		})
	}
}

// What was compiled before must not show in a later model.
func TestCompilerForgets(t *testing.T) {
	var c Compiler
	deny, allow := tableInput(t, `{podSelector: {}, policyTypes: [Ingress]}`), `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}, {namespaceSelector: {matchLabels: {team: c}}}]}]}`
	f := flow(t, "probe web:80")
	allowed := func(in Input) bool { return c.Compile(in).Verdict(f).Allowed }
	if allowed(deny) {
		t.Error("the first policy does not hold")
	}
	in := tableInput(t, allow)
	if allowed(in) {
		t.Error("a stranger was let in")
	}
	in.Namespaces["monitoring"] = map[string]string{"team": "c"}
	if !allowed(in) {
		t.Error("a namespace that got the label was not let in")
	}
	in.Namespaces["monitoring"] = map[string]string{"team": "b"}
	if allowed(in) {
		t.Error("a namespace that lost the label was let in")
	}
	g := flow(t, "db web:80")
	if c.Compile(in).Verdict(g).Allowed {
		t.Error("db was let in")
	}
	i := slices.IndexFunc(in.Pods, func(p *Pod) bool { return p.Name == "db" })
	friend := *in.Pods[i]
	friend.Labels = map[string]string{"role": "friend"}
	in.Pods[i] = &friend
	if !c.Compile(in).Verdict(g).Allowed {
		t.Error("a pod that got the label was not let in")
	}
	in.Pods = slices.Delete(in.Pods, i, i+1)
	if d := c.Compile(in).Verdict(g); d.Allowed || d.Side != Egress || d.Group != "" {
		t.Errorf("a pod that is gone: %+v", d)
	}
}

// Policies that grow in number must not rename the groups, nor make the sets of one peer more.
func TestGroupsKeepTheirNames(t *testing.T) {
	var c Compiler
	one := c.Compile(tableInput(t, `{podSelector: {}, ingress: [{ports: [{port: 80}]}]}`))
	many := c.Compile(tableInput(t, strings.Repeat("{podSelector: {}, ingress: [{ports: [{port: 80}]}]}\n---\n", 20)))
	for name := range one.Groups {
		g := many.Groups[name]
		if g == nil {
			t.Fatalf("group %s is gone; now %v", name, many.Groups)
		}
		if len(g.Nets) != 2 || len(g.Peers) != 0 {
			t.Errorf("group %s has %d nets and %d peers, want one net for each family", name, len(g.Nets), len(g.Peers))
		}
	}
}

func TestPodOf(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	p := &corev1.Pod{
		Spec: corev1.PodSpec{
			NodeName:       "n1",
			InitContainers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "no", ContainerPort: 1}}}, {RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "side", ContainerPort: 2}}}},
			Containers:     []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "main", ContainerPort: 3, Protocol: corev1.ProtocolUDP}, {ContainerPort: 4}}}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.1.0.2"}, {IP: "fd01::2"}}},
	}
	got := PodOf(p)
	if fmt.Sprint(got.Ports) != "[{side tcp 2} {main udp 3}]" || fmt.Sprint(got.IPs) != "[10.1.0.2 fd01::2]" {
		t.Errorf("got %+v", got)
	}
	p.Status.Phase = corev1.PodSucceeded
	if PodOf(p) != nil {
		t.Error("a pod that has ended still has its addresses")
	}
}

func TestBlocks(t *testing.T) {
	for _, tc := range []struct {
		cidr   string
		except []string
		want   string
	}{
		{"10.0.0.0/8", nil, "10.0.0.0-10.255.255.255"},
		{"10.0.0.0/30", []string{"10.0.0.1/32"}, "10.0.0.0-10.0.0.0 10.0.0.2-10.0.0.3"},
		{"10.0.0.0/30", []string{"10.0.0.2/31", "10.0.0.0/31"}, ""},
		{"0.0.0.0/0", []string{"128.0.0.0/1", "200.0.0.0/8"}, "0.0.0.0-127.255.255.255"},
		{"::/0", []string{"fd00::/8"}, "::-fcff:ffff:ffff:ffff:ffff:ffff:ffff:ffff fe00::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
		{"10.0.0.7/24", []string{"10.0.0.0/32"}, "10.0.0.1-10.0.0.255"},
	} {
		b, ok := parseBlock(&networkingv1.IPBlock{CIDR: tc.cidr, Except: tc.except})
		var got []string
		for _, r := range b.ranges {
			got = append(got, fmt.Sprintf("%s-%s", r.from, r.to))
		}
		if !ok || strings.Join(got, " ") != tc.want {
			t.Errorf("%s without %v is %v, want %s", tc.cidr, tc.except, got, tc.want)
		}
	}
}
