package netcheck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/atomicfile"
	"microk8s/internal/hostnet"
	"microk8s/internal/snapenv"
)

// What flannel announces of a node, and how control-plane nodes are marked.
const (
	annotationType    = "flannel.alpha.coreos.com/backend-type"
	annotationData    = "flannel.alpha.coreos.com/backend-data"
	annotationData6   = "flannel.alpha.coreos.com/backend-v6-data"
	labelControlPlane = "node.kubernetes.io/microk8s-controlplane"
)

// FromNode reads a Node object as the others see it in each family that its pods have, in their order: the tunnels are different
// devices, with packets of different families outside. A node of a network without a tunnel is one node without.
func FromNode(n *corev1.Node) (out []Node) {
	first := Node{Name: n.Name}
	_, first.ControlPlane = n.Labels[labelControlPlane]
	addresses := map[bool]netip.Addr{} // by whether it is of IPv4
	for _, a := range n.Status.Addresses {
		ip, err := netip.ParseAddr(a.Address)
		if err != nil || a.Type != corev1.NodeInternalIP {
			continue
		}
		if !first.Address.IsValid() {
			first.Address = ip
		}
		if !addresses[ip.Is4()].IsValid() {
			addresses[ip.Is4()] = ip
		}
	}
	if n.Annotations[annotationType] != "vxlan" {
		return []Node{first}
	}
	all := n.Spec.PodCIDRs
	if len(all) == 0 {
		all = []string{n.Spec.PodCIDR}
	}
	for _, text := range all {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			continue
		}
		node := first
		node.Address, node.Tunnel = addresses[p.Addr().Is4()], p.Masked().Addr()
		annotation := annotationData
		if p.Addr().Is6() {
			annotation = annotationData6
		}
		var data struct{ VtepMAC string }
		if json.Unmarshal([]byte(n.Annotations[annotation]), &data) == nil {
			node.MAC = data.VtepMAC
		}
		if node.Address.IsValid() {
			out = append(out, node)
		}
	}
	if len(out) == 0 {
		return []Node{first}
	}
	return out
}

// Families returns a check for each family in which a node of the cluster has pods, that of its first range first; the ports
// are tried in that one, by which the nodes know each other. The error says that the node is not there.
func Families(nodes []*corev1.Node, self string, check Check) (out []Check, err error) {
	byFamily := map[bool][]Node{}
	var order []bool
	for _, n := range nodes {
		for _, f := range FromNode(n) {
			v4 := f.Address.Is4()
			byFamily[v4] = append(byFamily[v4], f)
			if n.Name == self {
				order = append(order, v4)
			}
		}
	}
	if len(order) == 0 {
		_, _, err := Split(nil, self)
		return nil, err
	}
	for i, v4 := range order {
		one := check
		if one.Self, one.Peers, err = Split(byFamily[v4], self); err != nil {
			return nil, err
		}
		one.Ports = check.Ports && i == 0
		out = append(out, one)
	}
	return out, nil
}

// RunAll runs the checks of all families and returns a result for each other node. What is wrong in one family is wrong; a node
// that does not answer at all is named once.
func RunAll(ctx context.Context, checks []Check) (results []Result, err error) {
	for _, c := range checks {
		more, err := c.Run(ctx)
		if err != nil {
			return nil, err
		}
		for _, r := range more {
			i := slices.IndexFunc(results, func(x Result) bool { return x.Node == r.Node })
			if i < 0 {
				results = append(results, r)
				continue
			}
			results[i].Tunnel = results[i].Tunnel && r.Tunnel
			for _, p := range r.Problems {
				if !slices.ContainsFunc(results[i].Problems, func(x Problem) bool { return x == p || x.Code == Unreachable && p.Code == Unreachable }) {
					results[i].Problems = append(results[i].Problems, p)
				}
			}
		}
	}
	return results, nil
}

// Split returns the node of a name, and the others that have an address.
func Split(nodes []Node, self string) (own Node, others []Node, err error) {
	found := false
	for _, n := range nodes {
		switch {
		case n.Name == self:
			own, found = n, true
		case n.Address.IsValid():
			others = append(others, n)
		}
	}
	if !found {
		return own, nil, fmt.Errorf("node %s is not in the cluster", self)
	}
	return own, others, nil
}

// PodMTU reads the MTU of this node's pods, which the pod network writes down.
func PodMTU(env snapenv.Env) (int, error) {
	data, err := os.ReadFile(hostnet.SubnetEnv(env))
	if err != nil {
		return 0, fmt.Errorf("the pod network is not up: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "FLANNEL_MTU="); ok {
			if mtu, err := strconv.Atoi(v); err == nil && mtu > headerSize+ipHeaders {
				return mtu, nil
			}
		}
	}
	return 0, errors.New("the pod network has not said its MTU in " + hostnet.SubnetEnv(env))
}

// Record is what this node's kubelite found last, for other programs.
type Record struct {
	Time    time.Time            `json:"time"`
	Results []Result             `json:"results"`
	Heard   map[string]time.Time `json:"heard"` // nodes whose questions came, by [HeardKey], and when
}

// HeardKey is how [Record] calls a node in one family.
func HeardKey(n Node) string {
	if n.Tunnel.Is6() {
		return n.Name + " IPv6"
	}
	return n.Name
}

// recordFile is where kubelite keeps the record.
func recordFile(env snapenv.Env) string { return filepath.Join(env.RunDir(), "network-check.json") }

// Write keeps a record.
func (r Record) Write(env snapenv.Env) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(env.RunDir(), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(recordFile(env), append(data, '\n'), 0o644, nil)
}

// ReadRecord returns the last record; the zero value where there is none, or one too old to count.
func ReadRecord(env snapenv.Env, now time.Time) Record {
	var r Record
	data, err := os.ReadFile(recordFile(env))
	if err != nil || json.Unmarshal(data, &r) != nil || now.Sub(r.Time) > 3*Interval {
		return Record{}
	}
	return r
}

// Interval is how often kubelite asks each other node: two datagrams.
const Interval = time.Minute
