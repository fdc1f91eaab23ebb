package netcheck

import (
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
	labelControlPlane = "node.kubernetes.io/microk8s-controlplane"
)

// FromNode reads a Node object. The tunnel is that of IPv4; a node of a network without one has none.
func FromNode(n *corev1.Node) Node {
	out := Node{Name: n.Name}
	_, out.ControlPlane = n.Labels[labelControlPlane]
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP && !out.Address.IsValid() {
			out.Address = ip
		}
	}
	if n.Annotations[annotationType] != "vxlan" {
		return out
	}
	for _, text := range append(slices.Clone(n.Spec.PodCIDRs), n.Spec.PodCIDR) {
		if p, err := netip.ParsePrefix(text); err == nil && p.Addr().Is4() && !out.Tunnel.IsValid() {
			out.Tunnel = p.Masked().Addr()
		}
	}
	var data struct{ VtepMAC string }
	if json.Unmarshal([]byte(n.Annotations[annotationData]), &data) == nil {
		out.MAC = data.VtepMAC
	}
	return out
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
			if mtu, err := strconv.Atoi(v); err == nil && mtu > headerSize+ipHeader {
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
	Heard   map[string]time.Time `json:"heard"` // nodes whose questions came, and when
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
