// Package nodecheck looks at one node for what is known to get in its way and does not announce itself:
// files, kernel settings, network devices, clocks, certificates. [Checks] is the table; each check says
// what it looks at, under a name that stays, and what to do about what it finds.
//
// It changes nothing, and asks neither the API server nor the datastore: that is internal/status.
package nodecheck

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/cluster-agent/api"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// Check is one thing that is looked at.
type Check struct {
	// ID is the check's name in machine-readable output. It never changes.
	ID string
	// Looks says what is looked at, as in "free space of …".
	Looks string
	// Slow is set for checks that are for `inspect` only: because they take longer, or because what
	// they find is common and harms only some.
	Slow bool

	run func(ctx context.Context, n *Node) ([]Finding, error)
}

// Finding is something wrong, in a sentence without a full stop, and the next step.
type Finding struct{ What, Do string }

// Result is what a check found.
type Result struct {
	Check    Check
	Findings []Finding
	// Unseen is why it could not be looked at; nil where it was.
	Unseen error
}

// Node is what is looked at. The functions may be nil, which is the real host.
type Node struct {
	Env      snapenv.Env
	Config   nodeconfig.Config
	Now      func() time.Time
	Services []service.State // nil: not known, and nothing is said of them
	Others   []string        // hosts of other nodes whose clocks are compared

	Addresses func(device string) ([]netip.Prefix, error) // fs.ErrNotExist: there is no such device
	Statfs    func(path string) (unix.Statfs_t, error)
	Synced    func() (bool, error)                                      // whether the clock is kept by a time service
	Date      func(ctx context.Context, host string) (time.Time, error) // the Date that the agent of a host answers with
}

// checkLimit bounds one check, whatever its caller's context allows: what does not answer may do so for ever.
const checkLimit = 3 * time.Second

// limit is the time of one check: half of what is left, so that one that waits leaves time for the others.
func limit(ctx context.Context) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return min(checkLimit, time.Until(end)/2)
	}
	return checkLimit
}

// Run runs the checks one after the other, those for `inspect` only if slow is set. What has not been
// looked at when ctx ends is reported as unseen.
func Run(ctx context.Context, n *Node, slow bool) []Result {
	return run(ctx, n, func(c Check) bool { return slow || !c.Slow })
}

// RunSlow is Run for those alone that are for `inspect` only.
func RunSlow(ctx context.Context, n *Node) []Result {
	return run(ctx, n, func(c Check) bool { return c.Slow })
}

func run(ctx context.Context, n *Node, wanted func(Check) bool) (out []Result) {
	n.complete()
	for _, c := range Checks {
		if !wanted(c) {
			continue
		}
		r := Result{Check: c}
		if err := ctx.Err(); err != nil {
			r.Unseen = errors.New("there was no time left")
		} else {
			limited, cancel := context.WithTimeout(ctx, limit(ctx))
			r.Findings, r.Unseen = c.run(limited, n)
			cancel()
		}
		out = append(out, r)
	}
	return out
}

func (n *Node) complete() {
	if n.Addresses == nil {
		n.Addresses = deviceAddresses
	}
	if n.Statfs == nil {
		n.Statfs = func(path string) (s unix.Statfs_t, err error) { err = unix.Statfs(path, &s); return s, err }
	}
	if n.Synced == nil {
		n.Synced = clockSynced
	}
	if n.Date == nil {
		n.Date = func(ctx context.Context, host string) (time.Time, error) {
			return agentDate(ctx, host, n.Config.AgentPort)
		}
	}
}

func (n *Node) running(name string) (service.State, bool) {
	for _, s := range n.Services {
		if s.Name == name {
			return s, s.Phase == service.Running
		}
	}
	return service.State{}, false
}

// number reads a file of the host with one number. A file that does not exist is no error: the kernel
// has no such setting.
func (n *Node) number(path string) (value uint64, ok bool, err error) {
	data, err := os.ReadFile(n.Env.HostPath(path))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	value, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return value, err == nil, err
}

func (n *Node) text(path string) string {
	data, err := os.ReadFile(n.Env.HostPath(path))
	if err != nil {
		return ""
	}
	return string(data)
}

func one(do, what string, a ...any) []Finding {
	return []Finding{{What: fmt.Sprintf(what, a...), Do: do}}
}

func deviceAddresses(device string) ([]netip.Prefix, error) {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return nil, fs.ErrNotExist
	}
	list, err := link.Addrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p)
		}
	}
	return out, nil
}

// clockSynced asks the kernel whether a time service keeps the clock (adjtimex(2), STA_UNSYNC).
func clockSynced() (bool, error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	return err == nil && state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0, err
}

// agentDate asks an agent how it is, and returns the time by its clock, in whole seconds. Nothing secret
// is sent and nothing that is answered is relied on, so the certificate is not checked: a node that was
// removed, or is to join, can be looked at too.
func agentDate(ctx context.Context, host string, port int) (time.Time, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+net.JoinHostPort(host, strconv.Itoa(port))+api.PathHealth, nil)
	if err != nil {
		return time.Time{}, err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // see above
	resp, err := client.Do(req)
	if err != nil {
		return time.Time{}, err
	}
	resp.Body.Close()
	return http.ParseTime(resp.Header.Get("Date"))
}
