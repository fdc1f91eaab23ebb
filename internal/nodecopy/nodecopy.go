// Package nodecopy finds out that a second machine runs with this node's identity, because the disk of one is a
// copy of the other's, and says so on both sides: on this machine in a file of state, and to the cluster in an
// annotation of the Node, where `microk8s status` of every control-plane node reads it.
//
// Two such kubelets write one Node object in turn, so a kubelet's node shows an address of another machine. A
// control-plane node whose datastore is its own cannot get so far: its copy knows by the member's address, which
// the host does not have, where to look. In both cases the other machine counts once its kubelet has proved, by
// its serving certificate, that it runs under this node's name.
package nodecopy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/atomicfile"
	"microk8s/internal/snapenv"
)

// Annotation of a Node has its [Sighting] as JSON.
const Annotation = "microk8s.io/copies"

// fresh is how old a sighting may be to be reported; it is written again every [again].
const (
	fresh = 3 * time.Minute
	again = time.Minute
)

// most bounds the machines of a sighting; nodes write their own annotations.
const most = 8

// Sighting is which machines run as one node, and when they were last seen.
type Sighting struct {
	Machines []netip.Addr `json:"machines"` // sorted, two or more
	Seen     time.Time    `json:"seen"`
}

// valid reports whether it may be shown at that time: what it says comes from a node.
func (s Sighting) valid(now time.Time) bool {
	return len(s.Machines) > 1 && len(s.Machines) <= most && now.Sub(s.Seen).Abs() < fresh
}

// What says it in a sentence about the node of that name.
func (s Sighting) What(node string) string {
	return fmt.Sprintf("%d machines run as node %s, at %s: the disk of one is a copy of another's",
		len(s.Machines), node, s.List())
}

// List returns the addresses in a sentence.
func (s Sighting) List() string {
	list := make([]string, len(s.Machines))
	for i, a := range s.Machines {
		list[i] = a.String()
	}
	return strings.Join(list, " and ")
}

// Do is what to do about it.
const Do = "on the copy run: microk8s leave, which leaves the other machine alone; to let it join as a node of its own: " +
	"hostnamectl set-hostname NAME; rm /etc/machine-id; systemd-machine-id-setup; microk8s stop; microk8s start --new-name"

// Of returns what the Node says at that time; ok is false where nothing is known of a copy.
func Of(n *corev1.Node, now time.Time) (s Sighting, ok bool) {
	text, ok := n.Annotations[Annotation]
	if !ok || json.Unmarshal([]byte(text), &s) != nil || !s.valid(now) {
		return Sighting{}, false
	}
	return s, true
}

func path(env snapenv.Env) string { return filepath.Join(env.RunDir(), "copies.json") }

// Here returns what this machine has seen by that time; ok is false where nothing is known of a copy.
func Here(env snapenv.Env, now time.Time) (s Sighting, ok bool) {
	data, err := os.ReadFile(path(env))
	if err != nil || json.Unmarshal(data, &s) != nil || !s.valid(now) {
		return Sighting{}, false
	}
	return s, true
}

func (s Sighting) write(env snapenv.Env) error {
	data, err := json.Marshal(s)
	if err == nil {
		err = os.MkdirAll(env.RunDir(), 0o755)
	}
	if err == nil {
		err = atomicfile.Write(path(env), append(data, '\n'), 0o644, nil)
	}
	return err
}

// Forget removes what this machine has seen: the node is another one now.
func Forget(env snapenv.Env) error {
	if err := os.Remove(path(env)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot forget the other machine: %w", err)
	}
	return nil
}

// with returns the machines of s, if it is fresh, and those given.
func (s Sighting) with(now time.Time, machines ...netip.Addr) Sighting {
	if s.valid(now) {
		machines = append(machines, s.Machines...)
	}
	slices.SortFunc(machines, netip.Addr.Compare)
	machines = slices.Compact(machines)
	return Sighting{Machines: machines[:min(len(machines), most)], Seen: now.UTC().Truncate(time.Second)}
}

// dialTimeout bounds one look at another machine.
const dialTimeout = 3 * time.Second

// prove reports whether a kubelet answers at host that serves as the node called name, by the cluster's CA, and
// from which address this machine reaches it.
func prove(ctx context.Context, host netip.Addr, port int, name string, roots *x509.CertPool) (local netip.Addr, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: name, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(host.String(), strconv.Itoa(port)))
	if err != nil {
		return netip.Addr{}, false
	}
	defer conn.Close()
	from, err := netip.ParseAddrPort(conn.LocalAddr().String())
	return from.Addr().Unmap(), err == nil
}
