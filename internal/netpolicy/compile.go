package netpolicy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Compiler makes models, and remembers from one to the next what has not changed: a cluster has
// many selectors and many pods, and a change is of one of them. The zero value is ready; it is
// for one caller at a time.
type Compiler struct {
	classes  map[string]*class   // by their key
	podClass map[*Pod]*class     // as far as the namespace's labels are the same
	policies map[*Policy]*policy // compiled
	cluster  map[*ClusterPolicy]*clusterPolicy
	peers    map[string]*peer
	sets     map[string]*PortSet
	unions   map[[2]*PortSet]*PortSet
	live     []*class // classes in use, of the last run
	gen      int      // counts changes of live
}

// class is a kind of pods that no selector can tell apart.
type class struct {
	key       string
	namespace string
	nsLabels  labels.Set
	labels    labels.Set
	pods      []*Pod
}

// policy is a Policy with its selectors parsed.
type policy struct {
	*Policy
	pods                    labels.Selector
	egress, ingress         []*rule
	isolatesOut, isolatesIn bool
	selected                map[*class]bool
}

// rule is one rule of one side.
type rule struct {
	any    bool // no list of peers: everybody
	peers  []*peer
	blocks []block
	ports  *PortSet    // those given as numbers
	named  []NamedPort // Port is not set
}

// peer is a pair of selectors, shared by all rules that have the same.
type peer struct {
	namespace  string // with no namespace selector: the policy's own
	namespaces labels.Selector
	pods       labels.Selector
	known      map[*class]bool
	matched    []*class
	gen        int
}

// block is what is left of an ipBlock without its exceptions.
type block struct {
	ranges []addrRange
	cidr   netip.Prefix
	except []netip.Prefix
}

type addrRange struct{ from, to netip.Addr }

// Compile returns the model of an input.
func (c *Compiler) Compile(in Input) *Model {
	c.begin(in)
	m := &Model{
		Closed: slices.Clone(in.Closed), Egress: map[netip.Addr]string{}, Ingress: map[netip.Addr]string{}, Groups: map[string]*Group{},
	}
	for _, n := range in.Nodes {
		if n.Name == in.Node {
			m.Own = append(slices.Clone(n.Addresses), n.Own()...)
		}
	}
	var local []*Pod
	for _, p := range in.Pods {
		if p.Node == in.Node && !p.HostNetwork && len(p.IPs) > 0 {
			local = append(local, p)
		}
	}
	slices.SortFunc(local, func(a, b *Pod) int {
		return cmp.Or(cmp.Compare(a.Created, b.Created), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	policies := make([]*policy, 0, len(in.Policies))
	for _, p := range in.Policies {
		policies = append(policies, c.policies[p])
	}
	slices.SortFunc(policies, func(a, b *policy) int { return cmp.Compare(a.Key(), b.Key()) })
	byNamespace := map[string][]*policy{}
	for _, p := range policies {
		byNamespace[p.Namespace] = append(byNamespace[p.Namespace], p)
	}
	owner := owners(in.Pods)
	cluster := c.clusterPolicies(in)
	c.compileSide(m, Egress, local, byNamespace, cluster, owner, in)
	c.compileSide(m, Ingress, local, byNamespace, cluster, owner, in)
	return m
}

// owners maps each address to its pod: the one that was created last, if a pod that is gone
// still has it.
func owners(pods []*Pod) map[netip.Addr]*Pod {
	owner := make(map[netip.Addr]*Pod, len(pods))
	for _, p := range pods {
		if p.HostNetwork {
			continue
		}
		for _, ip := range p.IPs {
			if o := owner[ip]; o == nil || cmp.Or(cmp.Compare(o.Created, p.Created), cmp.Compare(o.Key(), p.Key())) < 0 {
				owner[ip] = p
			}
		}
	}
	return owner
}

// compileSide groups the node's pods by the policies that judge them on one side, and makes
// the groups.
func (c *Compiler) compileSide(m *Model, d Direction, local []*Pod, byNamespace map[string][]*policy, cluster []*clusterPolicy, owner map[netip.Addr]*Pod, in Input) {
	type draft struct {
		first    *Pod
		pods     []*Pod
		policies []*policy
		tiers    []*tierRule
	}
	drafts := map[string]*draft{}
	var order []*draft
	addresses := m.Egress
	if d == Ingress {
		addresses = m.Ingress
	}
	for _, pod := range local {
		var selecting []*policy
		var key strings.Builder
		named := false
		for _, p := range byNamespace[pod.Namespace] {
			isolates, rules := p.isolatesOut, p.egress
			if d == Ingress {
				isolates, rules = p.isolatesIn, p.ingress
			}
			if !isolates || !p.selects(c.podClass[pod]) {
				continue
			}
			selecting = append(selecting, p)
			key.WriteString(p.Name + "\n")
			for _, r := range rules {
				named = named || len(r.named) > 0
			}
		}
		var tiers []*tierRule
		for _, p := range cluster {
			if rules := p.side(d); len(rules) > 0 && p.subject.matches(c.podClass[pod]) {
				tiers = append(tiers, rules...)
				key.WriteString("cluster " + p.Name + "\n") // no name of a policy has a blank
			}
		}
		if len(selecting)+len(tiers) == 0 {
			for _, ip := range pod.IPs {
				if owner[ip] == pod {
					addresses[ip] = ""
				}
			}
			continue
		}
		key.WriteString(pod.Namespace)
		if d == Ingress && named {
			data, _ := json.Marshal(pod.Ports) // cannot fail: strings and numbers
			key.Write(data)
		}
		g := drafts[key.String()]
		if g == nil {
			g = &draft{first: pod, policies: selecting, tiers: tiers}
			drafts[key.String()] = g
			order = append(order, g)
		}
		g.pods = append(g.pods, pod)
	}
	for _, draft := range order {
		g := c.group(d, draft.first, draft.policies, in, owner)
		if len(draft.tiers) > 0 {
			c.applyTiers(g, draft.tiers, owner)
		}
		for _, p := range draft.pods {
			g.Pods = append(g.Pods, p.Key())
			for _, ip := range p.IPs {
				if owner[ip] == p {
					addresses[ip] = g.Name
				}
			}
		}
		slices.Sort(g.Pods)
		m.Groups[g.Name] = g
	}
}

// groupName follows from the group's oldest pod, so that a policy that is added to all pods of a
// group, or a pod that joins it, does not rename it: then only the differences are to be applied.
func groupName(d Direction, first *Pod) string {
	sum := sha256.Sum256([]byte(string(d) + "\n" + first.Key()))
	return hex.EncodeToString(sum[:5]) + "-" + first.Key()
}

// group makes what the policies allow to pods like this one, on one side.
func (c *Compiler) group(d Direction, pod *Pod, policies []*policy, in Input, owner map[netip.Addr]*Pod) *Group {
	g := &Group{Name: groupName(d, pod), Direction: d, Peers: map[netip.Addr]*PortSet{}}
	byClass := map[*class]*PortSet{}
	type naming struct {
		ports  []NamedPort
		any    bool
		peers  []*peer
		blocks []block
	}
	var namings []naming
	var ranges []portedRange
	for _, p := range policies {
		g.Policies = append(g.Policies, p.Key())
		rules := p.egress
		if d == Ingress {
			rules = p.ingress
		}
		for _, r := range rules {
			ports := r.ports
			if len(r.named) > 0 && d == Ingress { // the names are those of the pod itself
				ports = c.union(ports, c.resolve(r.named, pod))
			} else if len(r.named) > 0 { // they are those of each peer
				namings = append(namings, naming{r.named, r.any, r.peers, r.blocks})
			}
			if ports.Empty() {
				continue
			}
			if r.any {
				ranges = append(ranges, portedRange{whole4, ports}, portedRange{whole6, ports})
			}
			for _, q := range r.peers {
				for _, cl := range c.matched(q) {
					byClass[cl] = c.union(byClass[cl], ports)
				}
			}
			for _, b := range r.blocks {
				for _, ar := range b.ranges {
					ranges = append(ranges, portedRange{ar, ports})
				}
				if d == Ingress {
					for _, ar := range b.nodes(in.Nodes, in.Node) {
						ranges = append(ranges, portedRange{ar, ports})
					}
				}
			}
		}
	}
	g.Nets = c.partition(ranges)
	add := func(cl *class, q *Pod) {
		for _, ip := range q.IPs {
			if owner[ip] != q {
				continue
			}
			base := at(g.Nets, ip)
			ports := c.union(byClass[cl], base)
			for _, n := range namings {
				if len(q.Ports) > 0 && (n.any || slices.ContainsFunc(n.peers, func(p *peer) bool { return p.matches(cl) }) ||
					slices.ContainsFunc(n.blocks, func(b block) bool { return b.contains(ip) })) {
					ports = c.union(ports, c.resolve(n.ports, q))
				}
			}
			if ports != base {
				g.Peers[ip] = ports
			}
		}
	}
	for _, cl := range c.live {
		if byClass[cl] == nil && len(namings) == 0 {
			continue
		}
		for _, q := range cl.pods {
			add(cl, q)
		}
	}
	return g
}

// resolve returns the ports of a pod that have one of the names, with the protocol named.
func (c *Compiler) resolve(named []NamedPort, pod *Pod) *PortSet {
	var out []PortRange
	for _, n := range named {
		for _, p := range pod.Ports {
			if p.Name == n.Name && p.Protocol == n.Protocol {
				out = append(out, PortRange{p.Protocol, p.Port, p.Port})
			}
		}
	}
	return c.intern(newPortSet(false, out))
}

func (c *Compiler) intern(s *PortSet) *PortSet {
	switch {
	case s.All:
		return everything
	case s.Empty():
		return nothing
	}
	if old := c.sets[s.key]; old != nil {
		return old
	}
	c.sets[s.key] = s
	return s
}

// union of two interned sets, nil being the empty one; the result is interned.
func (c *Compiler) union(a, b *PortSet) *PortSet {
	switch {
	case a == nil && b == nil:
		return nothing
	case a == nil:
		return b
	case b == nil:
		return a
	case a == b || a == nothing:
		return b
	case b == nothing:
		return a
	case a == everything || b == everything:
		return everything
	}
	key := [2]*PortSet{a, b}
	if u := c.unions[key]; u != nil {
		return u
	}
	u := c.intern(newPortSet(a.Others || b.Others, slices.Concat(a.Ranges, b.Ranges)))
	c.unions[key] = u
	return u
}

// begin brings what is remembered in line with the input.
func (c *Compiler) begin(in Input) {
	const remembered = 1 << 16 // of each kind; more are of times long past
	if c.classes == nil || len(c.sets) > remembered || len(c.unions) > remembered || len(c.peers) > remembered {
		*c = Compiler{
			classes: map[string]*class{}, podClass: map[*Pod]*class{}, policies: map[*Policy]*policy{}, cluster: map[*ClusterPolicy]*clusterPolicy{},
			peers: map[string]*peer{}, sets: map[string]*PortSet{}, unions: map[[2]*PortSet]*PortSet{}, gen: c.gen + 1,
		}
	}
	namespaces := map[string]string{} // name → key of its labels
	classes, podClass := make(map[string]*class, len(c.classes)), make(map[*Pod]*class, len(in.Pods))
	for _, cl := range c.live {
		cl.pods = cl.pods[:0]
	}
	changed := false
	var live []*class
	for _, pod := range in.Pods {
		nsKey, ok := namespaces[pod.Namespace]
		if !ok {
			nsKey = labels.Set(in.Namespaces[pod.Namespace]).String()
			namespaces[pod.Namespace] = nsKey
		}
		cl := c.podClass[pod]
		if cl == nil || cl.nsLabels.String() != nsKey {
			key := pod.Namespace + "\n" + nsKey + "\n" + labels.Set(pod.Labels).String()
			if cl = classes[key]; cl == nil {
				cl = c.classes[key]
			}
			if cl == nil {
				cl = &class{key: key, namespace: pod.Namespace, nsLabels: in.Namespaces[pod.Namespace], labels: pod.Labels}
				changed = true
			}
		}
		if classes[cl.key] == nil {
			classes[cl.key] = cl
			live = append(live, cl)
		}
		cl.pods = append(cl.pods, pod)
		podClass[pod] = cl
	}
	if changed || len(live) != len(c.live) {
		c.gen++
	}
	c.classes, c.podClass, c.live = classes, podClass, live

	policies := make(map[*Policy]*policy, len(in.Policies))
	for _, p := range in.Policies {
		compiled := c.policies[p]
		if compiled == nil {
			compiled = c.compilePolicy(p)
		}
		policies[p] = compiled
	}
	c.policies = policies
}

// selects reports whether a policy's pod selector selects pods of a class.
func (p *policy) selects(cl *class) bool {
	if cl.namespace != p.Namespace {
		return false
	}
	known, ok := p.selected[cl]
	if !ok {
		known = p.pods.Matches(cl.labels)
		p.selected[cl] = known
	}
	return known
}

// matches reports whether pods of a class are meant by the peer.
func (q *peer) matches(cl *class) bool {
	known, ok := q.known[cl]
	if !ok {
		if q.namespaces != nil {
			known = q.namespaces.Matches(cl.nsLabels)
		} else {
			known = cl.namespace == q.namespace
		}
		known = known && q.pods.Matches(cl.labels)
		q.known[cl] = known
	}
	return known
}

// matched returns the classes that a peer means.
func (c *Compiler) matched(q *peer) []*class {
	if q.gen == c.gen {
		return q.matched
	}
	known := make(map[*class]bool, len(c.live))
	q.matched = nil
	for _, cl := range c.live {
		if q.matches(cl) {
			q.matched = append(q.matched, cl)
		}
		known[cl] = q.known[cl]
	}
	q.known, q.gen = known, c.gen // forgets classes that are gone
	return q.matched
}

func (c *Compiler) compilePolicy(p *Policy) *policy {
	out := &policy{Policy: p, selected: map[*class]bool{}}
	out.isolatesOut, out.isolatesIn = p.Types()
	selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	if err != nil { // the API server refuses it; if it ever is there, it isolates
		selector = labels.Everything()
	}
	out.pods = selector
	for _, r := range p.Spec.Egress {
		out.egress = append(out.egress, c.compileRule(p.Namespace, r.Ports, r.To))
	}
	for _, r := range p.Spec.Ingress {
		out.ingress = append(out.ingress, c.compileRule(p.Namespace, r.Ports, r.From))
	}
	return out
}

func (c *Compiler) compileRule(namespace string, ports []networkingv1.NetworkPolicyPort, peers []networkingv1.NetworkPolicyPeer) *rule {
	r := &rule{any: len(peers) == 0, ports: everything}
	if len(ports) > 0 {
		var ranges []PortRange
		for _, p := range ports {
			proto := TCP
			if p.Protocol != nil {
				var ok bool
				if proto, ok = ProtocolOf(*p.Protocol); !ok {
					continue
				}
			}
			switch {
			case p.Port == nil:
				ranges = append(ranges, PortRange{proto, 0, 65535})
			case p.Port.StrVal != "":
				r.named = append(r.named, NamedPort{Name: p.Port.StrVal, Protocol: proto})
			default:
				from, to := p.Port.IntVal, p.Port.IntVal
				if p.EndPort != nil {
					to = *p.EndPort
				}
				if from >= 0 && to <= 65535 && from <= to {
					ranges = append(ranges, PortRange{proto, uint16(from), uint16(to)})
				}
			}
		}
		r.ports = c.intern(newPortSet(false, ranges))
	}
	for _, p := range peers {
		switch {
		case p.IPBlock != nil:
			if b, ok := parseBlock(p.IPBlock); ok {
				r.blocks = append(r.blocks, b)
			}
		case p.PodSelector != nil || p.NamespaceSelector != nil:
			if q := c.peer(namespace, p); q != nil {
				r.peers = append(r.peers, q)
			}
		}
	}
	return r
}

// peer returns the shared pair of selectors; nil for one that means nobody.
func (c *Compiler) peer(namespace string, p networkingv1.NetworkPolicyPeer) *peer {
	if p.NamespaceSelector != nil {
		namespace = ""
	}
	return c.selectors(namespace, p.NamespaceSelector, p.PodSelector)
}

func (c *Compiler) selectors(namespace string, namespaces, pods *metav1.LabelSelector) *peer {
	data, err := json.Marshal([]any{namespace, namespaces, pods})
	if err != nil {
		return nil
	}
	key := string(data)
	if q := c.peers[key]; q != nil {
		return q
	}
	q := &peer{namespace: namespace, pods: labels.Everything(), known: map[*class]bool{}, gen: -1}
	if namespaces != nil {
		if q.namespaces, err = metav1.LabelSelectorAsSelector(namespaces); err != nil {
			return nil
		}
	}
	if pods != nil {
		if q.pods, err = metav1.LabelSelectorAsSelector(pods); err != nil {
			return nil
		}
	}
	c.peers[key] = q
	return q
}
