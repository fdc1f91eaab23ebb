// Package cis compares a node with the CIS Kubernetes Benchmark, as kube-bench's controls for
// its edition 1.12 number them, and with what a new node of this product has beyond it.
//
// [Controls] is the table. [Run] checks a node against it and reports, for each control, what is
// wanted and what was found. The checks read argument files, configuration files, modes and
// owners, and a few objects of the API; they change nothing. docs/cis.md is made from the table.
package cis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	rbacv1 "k8s.io/api/rbac/v1"

	"microk8s/internal/args"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// Edition is the edition of the benchmark whose numbers are used.
const Edition = "CIS Kubernetes Benchmark 1.12"

// Status is how a control stands.
type Status string

// How a control may stand.
const (
	Pass     Status = "pass"
	Fail     Status = "fail"
	Accepted Status = "accepted"       // differs on purpose, see Reason
	Manual   Status = "manual"         // only a person can say
	None     Status = "not-applicable" // there is no such thing on this node, see Reason
)

// Control is one row of the table.
type Control struct {
	ID     string // the benchmark's number; those of this product begin with M
	Title  string // in our words
	How    string // how it is checked
	Wanted string
	Reason string // why it does not apply, is left to a person, or may differ

	check func(*Node) finding // nil: no check; then Status is fixed
	fixed Status
}

// Result is what was found about one control.
type Result struct {
	ID     string `json:"id"`
	Title  string `json:"title"`
	Status Status `json:"status"`
	Wanted string `json:"wanted"`
	Found  string `json:"found"`
	Reason string `json:"reason,omitempty"`
	Do     string `json:"do,omitempty"` // how a failed control is brought in order
}

// finding is a check's answer.
type finding struct {
	found  string
	ok     bool
	accept string // set: it differs on purpose, because of this
	do     string
	status Status // set: this one, whatever ok says
}

// Node is what is looked at.
type Node struct {
	Env snapenv.Env
	// Bindings lists the cluster's ClusterRoleBindings. nil, or an error: the controls about
	// objects are left to a person.
	Bindings func(context.Context) ([]rbacv1.ClusterRoleBinding, error)

	// Get reads a path of the API, a list. nil, or an error: as with Bindings.
	Get func(ctx context.Context, path string) ([]byte, error)

	ctx    context.Context
	files  map[string]*args.File
	lists  map[string][]byte // what Get has returned, by path
	silent bool              // Get has failed
}

// Run checks every control, in the order of the table. On a worker those of the control plane
// do not apply.
func Run(ctx context.Context, n *Node) []Result {
	n.ctx, n.files, n.lists, n.silent = ctx, map[string]*args.File{}, map[string][]byte{}, false
	worker := nodeconfig.ReadState(n.Env).Worker
	var out []Result
	for _, c := range Controls() {
		r := Result{ID: c.ID, Title: c.Title, Wanted: c.Wanted, Reason: c.Reason, Status: c.fixed, Found: "-"}
		switch {
		case worker && c.controlPlane():
			r.Status, r.Reason = None, "this node is a worker"
		case c.check != nil:
			f := c.check(n)
			r.Found, r.Reason = f.found, ""
			switch {
			case f.status != "":
				r.Status, r.Reason = f.status, cmp.Or(f.accept, c.Reason)
			case f.ok:
				r.Status = Pass
			case f.accept != "":
				r.Status, r.Reason = Accepted, f.accept
			default:
				r.Status, r.Do = Fail, f.do
			}
		}
		out = append(out, r)
	}
	return out
}

// Count returns how many results there are of each status.
func Count(results []Result) map[Status]int {
	n := map[Status]int{}
	for _, r := range results {
		n[r.Status]++
	}
	return n
}

// controlPlane reports whether the control is about a control-plane node.
func (c Control) controlPlane() bool {
	return !strings.HasPrefix(c.ID, "4.") && c.ID != "M.1" && c.ID != "M.2"
}

// args loads an argument file once; nil where it cannot be read.
func (n *Node) args(service string) *args.File {
	f, known := n.files[service]
	if !known {
		f, _ = nodeconfig.File(n.Env, service)
		n.files[service] = f
	}
	return f
}

// flag returns the value of a flag, variables expanded; "" and false where it is not set.
func (n *Node) flag(service, name string) (string, bool) {
	f := n.args(service)
	if f == nil {
		return "", false
	}
	v, ok := f.Value(name, n.Env.Lookup)
	return strings.Trim(v, `'"`), ok
}

// setFlag says how a flag is set, for the person that reads the report.
func setFlag(service, flag, value string) string {
	return fmt.Sprintf("write --%s=%s into args/%s, then: microk8s stop && microk8s start", flag, value, service)
}

// flagIs wants a flag to have a value. otherwise is accepted where it is not set, because it is
// the daemon's default; "" means that the flag must be set.
func flagIs(service, flag, want, otherwise string) func(*Node) finding {
	return func(n *Node) finding {
		v, set := n.flag(service, flag)
		if !set {
			v = otherwise
			return finding{found: cmp.Or(otherwise, "not set"), ok: v == want, do: setFlag(service, flag, want)}
		}
		return finding{found: v, ok: v == want, do: setFlag(service, flag, want)}
	}
}

// flagsSet wants flags to have a value, and the files that they name to be there.
func flagsSet(service string, flags ...string) func(*Node) finding {
	return func(n *Node) finding {
		var found []string
		for _, flag := range flags {
			v, _ := n.flag(service, flag)
			if v == "" {
				return finding{found: "--" + flag + " is not set", do: setFlag(service, flag, "FILE")}
			}
			if strings.HasPrefix(v, "/") {
				if _, err := os.Stat(v); err != nil {
					return finding{found: v + " is missing", do: "restore that file"}
				}
				v = filepath.Base(v)
			}
			found = append(found, v)
		}
		return finding{found: strings.Join(found, ", "), ok: true}
	}
}

// flagUnset wants a flag not to be there.
func flagUnset(service, flag string) func(*Node) finding {
	return func(n *Node) finding {
		v, set := n.flag(service, flag)
		if !set || v == "" {
			return finding{found: "not set", ok: true}
		}
		return finding{found: "set", do: fmt.Sprintf("remove --%s from args/%s, then: microk8s stop && microk8s start", flag, service)}
	}
}

// listHas wants a comma-separated flag to contain a word, or not to.
func listHas(service, flag, word string, want bool) func(*Node) finding {
	return func(n *Node) finding {
		v, _ := n.flag(service, flag)
		has := slices.Contains(strings.Split(v, ","), word)
		do := "add " + word + " to"
		if !want {
			do = "remove " + word + " from"
		}
		return finding{found: cmp.Or(v, "not set"), ok: has == want, do: fmt.Sprintf("%s --%s in args/%s, then: microk8s stop && microk8s start", do, flag, service)}
	}
}

// atLeast wants a number that is not smaller, and proposes one.
func atLeast(service, flag string, want, propose int) func(*Node) finding {
	return func(n *Node) finding {
		v, set := n.flag(service, flag)
		i, err := strconv.Atoi(v)
		return finding{found: cmp.Or(v, "not set"), ok: set && err == nil && i >= want, do: setFlag(service, flag, strconv.Itoa(propose))}
	}
}

// onlyFrom wants every word of a flag to be one of the given.
func onlyFrom(service, flag string, known []string) func(*Node) finding {
	return func(n *Node) finding {
		v, _ := n.flag(service, flag)
		if v == "" {
			return finding{found: "not set", do: setFlag(service, flag, strings.Join(known, ","))}
		}
		for _, w := range strings.Split(v, ",") {
			if !slices.Contains(known, w) {
				return finding{found: w, do: fmt.Sprintf("remove %s from --%s in args/%s, then: microk8s stop && microk8s start", w, flag, service)}
			}
		}
		return finding{found: fmt.Sprintf("%d of the wanted", strings.Count(v, ",")+1), ok: true}
	}
}

// groupReason is why files that the group microk8s may read are in order here.
const groupReason = "the group microk8s is root on this machine (docs/install.md); the lock cis-hardening takes the files from it"

// mode wants files to have no more than some bits, and to be root's. Patterns are those of
// filepath.Glob; no match is in order where none is allowed.
func mode(limit fs.FileMode, files func(snapenv.Env) []string) func(*Node) finding {
	return func(n *Node) finding {
		var all []string
		for _, pattern := range files(n.Env) {
			match, err := filepath.Glob(pattern)
			if err != nil {
				return finding{found: err.Error()}
			}
			all = append(all, match...)
		}
		if len(all) == 0 {
			return finding{found: "no such file", status: None, accept: "the file does not exist on this node"}
		}
		worst := finding{ok: true}
		for _, path := range all {
			f := n.owned(path, limit)
			if worst.found == "" || rank(f) > rank(worst) {
				worst = f
			}
		}
		if len(all) > 1 && !worst.ok {
			worst.found += fmt.Sprintf(" (%d files)", len(all))
		}
		return worst
	}
}

func rank(f finding) int {
	switch {
	case f.ok:
		return 0
	case f.accept != "":
		return 1
	}
	return 2
}

// owned checks mode and owner of one file.
func (n *Node) owned(path string, limit fs.FileMode) finding {
	st, err := os.Stat(path)
	if err != nil {
		return finding{found: filepath.Base(path) + " cannot be read", do: "restore " + path}
	}
	perm := st.Mode().Perm()
	sys, ok := st.Sys().(*syscall.Stat_t)
	root := os.Geteuid() != 0 || ok && sys.Uid == 0 // tests run as anybody
	group := ok && sys.Gid == 0 || os.Geteuid() != 0
	f := finding{found: fmt.Sprintf("%04o", perm), ok: perm&^limit == 0 && root && (group || perm&0o070 == 0)}
	if !root {
		f.found += fmt.Sprintf(", owner %d", sys.Uid)
	}
	if f.ok {
		return f
	}
	f.do = fmt.Sprintf("chown root:root %s && chmod %o %[1]s", path, limit)
	shared := root && perm&^(limit|0o070) == 0
	if shared && !nodeconfig.ReadState(n.Env).RootOnly {
		f.accept = groupReason
	}
	return f
}

// text reads a file that a flag names; "" where there is none.
func (n *Node) text(service, flag string) string {
	path, _ := n.flag(service, flag)
	if path == "" {
		return ""
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(data)
}

// adminBindings are those to cluster-admin that Kubernetes and this product make themselves.
var adminBindings = []string{"cluster-admin", "kubeadm:cluster-admins"}

func clusterAdmins(n *Node) finding {
	if n.Bindings == nil {
		return finding{found: "the API server was not asked", status: Manual}
	}
	list, err := n.Bindings(n.ctx)
	if err != nil {
		return finding{found: "the API server did not answer", status: Manual}
	}
	var others []string
	for _, b := range list {
		if b.RoleRef.Name == "cluster-admin" && !slices.Contains(adminBindings, b.Name) {
			others = append(others, b.Name)
		}
	}
	if len(others) == 0 {
		return finding{found: "none besides cluster-admin", ok: true}
	}
	slices.Sort(others)
	return finding{found: strings.Join(others, ", "), status: Manual, accept: "look at who is bound, and whether a smaller role would do"}
}

// exists reports whether a path is there.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
