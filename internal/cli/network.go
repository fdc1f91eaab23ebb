package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"microk8s/internal/kube"
	"microk8s/internal/netpolicy"
)

func (a *App) newNetwork() *cobra.Command {
	root := &cobra.Command{
		Use:   "network check|why|api-address",
		Short: "Answer questions about the pod network; set an address for the API",
		Long: `Answer questions about the pod network, and keep one address for the API of all control plane nodes.

    microk8s network check                         whether packets get to every other node, and back
    microk8s network why shop/web shop/db:5432     which network policy lets this pass, or stops it
    microk8s network api-address 10.64.140.5       an address that moves when its node dies`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var out *output
	why := &cobra.Command{
		Use:   "why FROM TO:PORT[/PROTOCOL] [-o json|yaml]",
		Short: "Say which network policy lets a connection pass, or stops it, and on which node",
		Long: `Say which network policy lets a connection pass, or stops it, and on which node. The answer comes
from the rules that the nodes have, not from a packet that is sent.

FROM and TO are a pod (NAME in the namespace default, NAMESPACE/NAME in another), node/NAME, or an
address. PORT is a number, or the name of a port of the pod TO; PROTOCOL is tcp (default), udp or
sctp. For a Service name a pod behind it, and the pod's port: policies see those.

    microk8s network why shop/web shop/db:5432
    microk8s network why web kube-system/coredns-6f8b9-x2k4p:53/udp
    microk8s network why shop/db 203.0.113.9:443
    microk8s network why node/n2 shop/db:postgres`,
		Args: exactArgs("FROM", "TO:PORT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.worker("\nPlease use the master node.", ExitError)(); err != nil {
				return err
			}
			return a.networkWhy(cmd.Context(), cmd, args[0], args[1], out)
		},
		ValidArgsFunction: a.flowEnds,
	}
	out = addOutput(why, "text")
	root.AddCommand(a.newNetworkCheck(), why, a.newAPIAddress())
	return root
}

// exactArgs wants one argument of each name.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return &usageError{cmd, fmt.Errorf("missing argument %s", names[len(args)])}
		case len(args) > len(names):
			return &usageError{cmd, fmt.Errorf("unexpected argument: %s", args[len(names)])}
		}
		return nil
	}
}

// flowDocument is the kind FlowReport.
type flowDocument struct {
	documentMeta
	From     string           `json:"from"`
	To       string           `json:"to"`
	Source   string           `json:"source"`      // the address
	Target   string           `json:"destination"` // the address
	Port     uint16           `json:"port"`
	Protocol string           `json:"protocol"`
	Allowed  bool             `json:"allowed"`
	Sides    []netpolicy.Side `json:"sides"`
}

func (a *App) networkWhy(ctx context.Context, cmd *cobra.Command, from, to string, out *output) error {
	to, port, protocol, err := splitPort(to)
	if err != nil {
		return &usageError{cmd, err}
	}
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return err
	}
	in, err := clusterInput(ctx, core)
	if err != nil {
		return err
	}
	f, err := findFlow(in, from, to, port, protocol)
	if err != nil {
		return err
	}
	if _, err := os.Stat(a.Env.CNIManifest()); err == nil {
		fmt.Fprintf(a.Err, "warning: policies are left to the pod network of %s; this is what they mean\n", a.Env.CNIManifest())
	}
	doc := flowDocument{
		documentMeta: documentOf("FlowReport"), From: from, To: to, Source: f.Src.String(), Target: f.Dst.String(),
		Port: f.Port, Protocol: f.Protocol.String(), Allowed: true, Sides: new(netpolicy.Compiler).Explain(in, f),
	}
	for _, s := range doc.Sides {
		doc.Allowed = doc.Allowed && s.Allowed
	}
	if out.document() {
		if err := a.print(out, doc); err != nil {
			return err
		}
	} else {
		a.printFlow(doc)
	}
	if !doc.Allowed {
		return exitError(ExitError)
	}
	return nil
}

func (a *App) printFlow(d flowDocument) {
	verdict := "allowed"
	if !d.Allowed {
		verdict = "stopped"
	}
	fmt.Fprintf(a.Out, "%s: %s (%s) to %s (%s), %s\n", verdict, d.From, d.Source, d.To, netip.AddrPortFrom(netip.MustParseAddr(d.Target), d.Port), d.Protocol)
	for _, s := range d.Sides {
		fmt.Fprintf(a.Out, "  %s of %s on %s: %s\n", s.Direction, s.Pod, s.Node, sideText(s))
	}
	if len(d.Sides) == 0 {
		fmt.Fprintln(a.Out, "  neither end is a pod, and policies are about pods")
	}
}

func sideText(s netpolicy.Side) string {
	switch {
	case s.OwnNode:
		return "allowed, it comes from the pod itself or its node"
	case s.Rule != "" && s.Allowed:
		return fmt.Sprintf("allowed by the cluster's policy %s (tier %s)", s.Rule, s.Tier)
	case s.Rule != "":
		return fmt.Sprintf("stopped by the cluster's policy %s (tier %s)", s.Rule, s.Tier)
	case !s.Isolated:
		return "allowed, no policy isolates the pod"
	case s.Allowed:
		return "allowed by " + strings.Join(s.AllowedBy, ", ")
	}
	return "stopped, none of its policies allows it: " + strings.Join(s.Policies, ", ")
}

// splitPort reads TO:PORT[/PROTOCOL].
func splitPort(s string) (to, port string, protocol netpolicy.Protocol, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.HasSuffix(s, ":") || strings.HasPrefix(s, "[") && !strings.Contains(s, "]:") {
		return "", "", 0, fmt.Errorf("%s has no port: write TO:PORT, such as %s:80", s, strings.TrimSuffix(s, ":"))
	}
	to, port = strings.TrimSuffix(strings.TrimPrefix(s[:i], "["), "]"), s[i+1:]
	port, name, given := strings.Cut(port, "/")
	protocol, ok := netpolicy.ProtocolOf(corev1.Protocol(strings.ToUpper(name)))
	if !ok || given && name == "" {
		return "", "", 0, fmt.Errorf("unknown protocol %q: choose from tcp, udp, sctp", name)
	}
	return to, port, protocol, nil
}

// clusterInput reads what policies are made of.
func clusterInput(ctx context.Context, core *kube.Core) (in netpolicy.Input, err error) {
	list := func(path string, into any) {
		if err != nil {
			return
		}
		var data []byte
		data, err = core.Get().AbsPath(path).SetHeader("Accept", "application/json").DoRaw(ctx)
		if err == nil {
			err = json.Unmarshal(data, into)
		}
		if err != nil {
			err = fmt.Errorf("cannot list the cluster's %s: %w", path[strings.LastIndexByte(path, '/')+1:], err)
		}
	}
	var pods corev1.PodList
	var nodes corev1.NodeList
	var namespaces corev1.NamespaceList
	var policies networkingv1.NetworkPolicyList
	list("/api/v1/pods", &pods)
	list("/api/v1/nodes", &nodes)
	list("/api/v1/namespaces", &namespaces)
	list("/apis/networking.k8s.io/v1/networkpolicies", &policies)
	if err != nil {
		return in, err
	}
	var cluster unstructured.UnstructuredList
	resource := netpolicy.ClusterPolicies
	list("/apis/"+resource.GroupVersion().String()+"/"+resource.Resource, &cluster)
	if apierrors.IsNotFound(err) { // the cluster is without this kind
		err = nil
	}
	for i := range cluster.Items {
		p, wrong := netpolicy.ClusterPolicyOf(&cluster.Items[i])
		if wrong != nil {
			return in, wrong
		}
		in.Cluster = append(in.Cluster, p)
	}
	in.Namespaces = map[string]map[string]string{}
	for i := range namespaces.Items {
		in.Namespaces[namespaces.Items[i].Name] = namespaces.Items[i].Labels
	}
	for i := range pods.Items {
		if p := netpolicy.PodOf(&pods.Items[i]); p != nil {
			in.Pods = append(in.Pods, p)
		}
	}
	for i := range nodes.Items {
		in.Nodes = append(in.Nodes, netpolicy.NodeOf(&nodes.Items[i]))
	}
	for i := range policies.Items {
		in.Policies = append(in.Policies, netpolicy.PolicyOf(&policies.Items[i]))
	}
	return in, err
}

// flowEnd is what FROM or TO names.
type flowEnd struct {
	pod   *netpolicy.Pod
	node  *netpolicy.Node
	addrs []netip.Addr
}

func findEnd(in netpolicy.Input, s string) (flowEnd, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		return flowEnd{addrs: []netip.Addr{addr.Unmap()}}, nil
	}
	if name, ok := strings.CutPrefix(s, "node/"); ok {
		for _, n := range in.Nodes {
			if n.Name == name && len(n.Addresses) > 0 {
				return flowEnd{node: n, addrs: n.Addresses}, nil
			}
		}
		return flowEnd{}, failf("microk8s kubectl get nodes lists them", "there is no node %s", name)
	}
	namespace, name, ok := strings.Cut(s, "/")
	if !ok {
		namespace, name = corev1.NamespaceDefault, s
	}
	for _, p := range in.Pods {
		if p.Namespace != namespace || p.Name != name {
			continue
		}
		if len(p.IPs) == 0 {
			return flowEnd{}, failf("wait until it runs: microk8s kubectl get pod -n "+namespace+" "+name, "the pod %s/%s has no address yet", namespace, name)
		}
		end := flowEnd{pod: p, addrs: p.IPs}
		if p.HostNetwork { // it is its node
			for _, n := range in.Nodes {
				if n.Name == p.Node {
					end.node = n
				}
			}
		}
		return end, nil
	}
	return flowEnd{}, failf("microk8s kubectl get pods -n "+namespace+" lists them", "there is no pod %s in namespace %s that runs", name, namespace)
}

// findFlow makes a flow of what the command line names.
func findFlow(in netpolicy.Input, from, to, port string, protocol netpolicy.Protocol) (f netpolicy.Flow, err error) {
	src, err := findEnd(in, from)
	if err != nil {
		return f, err
	}
	dst, err := findEnd(in, to)
	if err != nil {
		return f, err
	}
	f.Protocol = protocol
	number, err := strconv.ParseUint(port, 10, 16)
	switch {
	case err == nil && number > 0:
		f.Port = uint16(number)
	case dst.pod == nil:
		return f, failf("name a number from 1 to 65535; see microk8s network --help", "%s is no port: only ports of pods have names", port)
	default:
		i := slices.IndexFunc(dst.pod.Ports, func(p netpolicy.NamedPort) bool { return p.Name == port && p.Protocol == protocol })
		if i < 0 {
			return f, failf("see its ports with: microk8s kubectl get pods -A -o custom-columns=NAME:.metadata.name,PORTS:.spec.containers[*].ports", "the pod %s has no %s port %s", dst.pod.Key(), protocol, port)
		}
		f.Port = dst.pod.Ports[i].Port
	}
	sources := src.addrs
	if src.node != nil && dst.pod != nil && !dst.pod.HostNetwork && dst.pod.Node != src.node.Name {
		// What a node sends to pods of other nodes comes from its address in the tunnel.
		sources = nil
		for _, c := range src.node.PodCIDRs {
			sources = append(sources, c.Masked().Addr())
		}
	}
	for _, d := range dst.addrs {
		for _, s := range sources {
			if s.Is4() == d.Is4() {
				f.Src, f.Dst = s, d
				return f, nil
			}
		}
	}
	return f, errors.New(from + " and " + to + " have no address of the same family")
}

// flowEnds completes names of pods and nodes.
func (a *App) flowEnds(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), namesWait)
	defer cancel()
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	in, err := clusterInput(ctx, core)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	end, directive := "", cobra.ShellCompDirectiveNoFileComp
	if len(args) == 1 {
		end, directive = ":", directive|cobra.ShellCompDirectiveNoSpace
	}
	var out []cobra.Completion
	for _, p := range in.Pods {
		out = append(out, cobra.CompletionWithDesc(p.Key()+end, "on "+p.Node))
	}
	for _, n := range in.Nodes {
		out = append(out, "node/"+n.Name+end)
	}
	slices.Sort(out)
	return out, directive
}
