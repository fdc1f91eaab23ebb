// Package status finds out how a node is, from everything that can be asked at once: the
// service manager, the API server, the datastore, containerd, the certificates, the disks and
// the ports. [Probe] never waits longer than [Budget]; what did not answer by then is reported
// as such, and so are the causes that can be seen from outside, each with what to do.
//
// It prints nothing; the forms of `microk8s status` are in internal/cli.
package status

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/hostinfo"
	"microk8s/internal/journal"
	"microk8s/internal/kubelitestate"
	"microk8s/internal/nodecheck"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/serverargs"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

// Budget is how long each question may take; they are asked at the same time, and the report is
// made as soon as all are answered. What is slow is waited for so long, and then called slow (design,
// promise 6).
const Budget = time.Second

// Report is the state of this node.
type Report struct {
	// Ready: the API server answers, has the service `kubernetes`, and some node is Ready.
	Ready bool
	// Slow: the API server did not answer in time, its process runs or the service manager does not say, and no
	// service that it may wait for keeps failing, so that nothing is known of the node and of the addons. Ready is
	// then false.
	Slow bool

	// NetworkPolicy is whether this node enforces network policies, and if not, why.
	NetworkPolicy NetworkPolicy

	HA       HA
	Services []service.State // nil when the manager did not answer
	Addons   []Addon
	// AddonsKnown: the cluster said which addons are on. Otherwise those that it has are reported as off.
	AddonsKnown bool
	Problems    []Problem // worst first
	Unseen      []Unseen  // what could not be looked at
	// Backup is what the cluster knows of its archives.
	Backup Backup
	// Differences are arguments in which the API servers of the cluster do not agree and should.
	Differences []serverargs.Difference
}

// HA is the datastore as seen from this node.
type HA struct {
	// Datastore is false where the API server uses an external etcd; Endpoints then has its
	// addresses as host:port.
	Datastore bool
	// Enabled: one node may be lost, whichever. It takes three voters that live.
	Enabled bool
	// Asked: the datastore's daemon said who lives; otherwise only its files were read.
	Asked     bool
	Quorum    bool // a majority of the voters lives
	Nodes     []Member
	Endpoints []string

	space  *peers.Space  // nil where it is not known
	memory *peers.Memory // nil where it is not limited
}

// Member is one member of the datastore.
type Member struct {
	Address string
	Role    storedir.Role
	Alive   bool

	full bool // its disk
}

// RoleName is the role as the outputs of `microk8s status` have it: a stand-by is one word there.
func (m Member) RoleName() string { return strings.ReplaceAll(m.Role.String(), "-", "") }

// Addon is one addon and whether it is on.
type Addon struct {
	Name, Repository, Description, Version string
	Enabled                                bool
}

// Problem is something wrong with the node, in a sentence without a full stop, and what a
// person can do about it ("" where there is nothing).
type Problem struct {
	// ID names the check that found it. It never changes: see [Looks].
	ID       string
	What, Do string
}

// Looked says what was looked at to find the problem.
func (p Problem) Looked() string { return Looks[p.ID] }

// Unseen is a check that could not be made, so that nothing is known of what it looks at.
type Unseen struct{ ID, Why string }

// Looked says what could not be looked at.
func (u Unseen) Looked() string { return Looks[u.ID] }

func (p Problem) String() string {
	if p.Do == "" {
		return p.What
	}
	return p.What + "; " + p.Do
}

// Prober asks the questions. The zero values of the optional fields are what production uses.
type Prober struct {
	Env     snapenv.Env
	Manager service.Manager
	Now     func() time.Time

	// Budget bounds each question; 0 means [Budget].
	Budget time.Duration

	// Node, if not nil, changes what is looked at by the checks of this node. It is for tests.
	Node func(*nodecheck.Node)

	mu      sync.Mutex
	api     *apiClient // made when first needed
	version string     // of the node list seen last, "" when the API server gave none
}

// Probe asks everything at once.
func (p *Prober) Probe(ctx context.Context) Report {
	budget := p.Budget
	if budget == 0 {
		budget = Budget
	}
	return p.probe(ctx, budget)
}

func (p *Prober) probe(ctx context.Context, budget time.Duration) Report {
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()

	var (
		services []service.State
		svcErr   error
		api      apiState
		store    error
		runtime  error
		ha       HA
		local    []Problem
		ports    []PortProblem
		away     elsewhere
	)
	config := nodeconfig.Load(p.Env)
	var checks []nodecheck.Result
	known := make(chan []service.State, 1)
	missed := gather(ctx, map[string]func(){
		"services": func() {
			services, svcErr = p.Manager.Status(ctx)
			known <- services
		},
		"node": func() {
			select {
			case states := <-known:
				checks = nodecheck.Run(ctx, p.node(config, states), false)
			case <-ctx.Done():
			}
		},
		"API": func() {
			// What it answered in time is known, whatever else it owes.
			ctx, cancel := context.WithTimeout(ctx, budget*9/10)
			defer cancel()
			api = p.probeAPI(ctx, config.NodeName)
		},
		"datastore":  func() { store = probeHTTP2(ctx, p.Env.DatastoreSocket()) },
		"containerd": func() { runtime = probeHTTP2(ctx, p.Env.ContainerdSocket()) },
		"members": func() {
			// Where the daemon is silent, what the files say is still in time.
			ctx, cancel := context.WithTimeout(ctx, budget*9/10)
			defer cancel()
			ha = askHA(ctx, p.Env)
		},
		"address": func() {
			if own, err := hostinfo.Addresses(); err == nil {
				away = memberElsewhere(p.Env, own).ask(ctx)
			}
		},
		"disk": func() {
			local = slices.Concat(diskProblems(p.Env), certProblems(p.Env, p.Now()), networkProblems(p.Env, p.Now()))
		},
		"ports": func() { ports = busyPorts(p.Env) },
	})
	// A probe past its deadline may still be writing; do not read its result.
	r := Report{}
	if !missed["members"] {
		r.HA = ha
	}
	switch {
	case missed["services"]:
		r.add("services.manager", "the service manager did not answer within %s", budget)("see the services' logs with: microk8s logs")
	case svcErr != nil:
		r.add("services.manager", "%v", svcErr)("start it with microk8s start, or see microk8s logs")
	default:
		r.Services = services
	}
	running := func(name string) bool { return phaseOf(r.Services, name) == service.Running }
	if !missed["disk"] {
		r.Problems = append(r.Problems, local...)
	}
	if err := config.Err(nodeconfig.PartName); err != nil {
		r.add("node.name", "%v", err)("set a name with --hostname-override in " + p.Env.Args("kubelet") + " and run microk8s start")
	}
	r.changeProblems(p.Env)
	r.serviceProblems(p.Env, p.Now())
	if running(service.Kubelite) {
		r.daemonProblems(p.Env)
	}
	if !missed["ports"] && !missed["services"] { // without these there is no telling whose a port is
		for _, pr := range ports {
			if !running(pr.service) {
				r.Problems = append(r.Problems, pr.describe().Problem)
			}
		}
	}
	if running(service.Containerd) && (missed["containerd"] || runtime != nil) {
		r.add("containerd.answers", "containerd does not answer on its socket")("see microk8s logs containerd")
	}
	storeOK := !missed["datastore"] && store == nil
	if r.HA.Datastore {
		for i := range r.HA.Nodes {
			if !r.HA.Asked {
				r.HA.Nodes[i].Alive = storeOK && len(r.HA.Nodes) == 1
			}
		}
		if !r.HA.Asked {
			r.HA.Enabled = false // nobody knows who lives
		}
		r.haProblems()
		r.damageProblem(p.Env, p.Now())
		if !missed["address"] {
			r.addressProblem(away)
		}
		if !storeOK && running(service.Datastore) {
			r.add("datastore.answers", "the datastore does not answer on its socket")("see microk8s logs k8s-dqlite")
		}
	}
	if missed["node"] {
		r.Unseen = append(r.Unseen, Unseen{ID: "node.checks", Why: fmt.Sprintf("no answer within %s", budget)})
	} else {
		r.checked(checks)
	}
	answer := apiState{late: true, err: fmt.Errorf("the API server did not answer within %s", budget)}
	if !missed["API"] && !api.late {
		answer = api
	}
	answer.started, answer.local = startedAt(r.Services, p.Now()), config.NodeName
	if running(service.Kubelite) || r.Services == nil {
		r.apiProblems(answer, p.Now())
		if answer.err == nil {
			r.weakProblems(answer, p.Now())
			r.backupProblems(answer.backups, answer.backupErr, p.Now())
		}
		r.Differences = answer.differences
		r.argumentProblems()
		r.portProblem(answer.agentPorts)
	}
	r.addons(p.Env, answer)
	p.seen(answer)
	r.Ready = answer.ready()
	r.Slow = answer.late && (running(service.Kubelite) || r.Services == nil) && !keepsFailing(r.Services)
	if !r.Ready && len(r.Problems) == 0 {
		r.add("api.answers", "%s", answer.why())("wait a moment, or see microk8s logs kubelite")
	}
	return r
}

// add appends a problem that the check called id found; the returned function takes what to do.
func (r *Report) add(id, what string, a ...any) func(do string) {
	return func(do string) {
		r.Problems = append(r.Problems, Problem{ID: id, What: fmt.Sprintf(what, a...), Do: do})
	}
}

// gather runs the questions side by side and gives the names of those that had not come back
// when ctx ended. One that comes back because ctx ended has no answer, however fast it is.
func gather(ctx context.Context, questions map[string]func()) (missed map[string]bool) {
	done := make(chan string, len(questions))
	missed = map[string]bool{}
	for name, ask := range questions {
		missed[name] = true
		go func() {
			if ask(); ctx.Err() == nil {
				done <- name
			}
		}()
	}
	for range questions {
		select {
		case name := <-done:
			delete(missed, name)
		case <-ctx.Done():
			for {
				select {
				case name := <-done:
					delete(missed, name)
					continue
				default:
				}
				return missed
			}
		}
	}
	return missed
}

// keepsFailing reports whether a service does not start: then waiting for the API server is of no use.
func keepsFailing(states []service.State) bool {
	return slices.ContainsFunc(states, func(s service.State) bool { return s.Phase == service.Backoff || s.Phase == service.Failed })
}

func phaseOf(states []service.State, name string) service.Phase {
	for _, s := range states {
		if s.Name == name {
			return s.Phase
		}
	}
	return service.Stopped
}

// startedAt returns the time at which the kubelet was started; zero where it is not known, or
// where the clock has been set back since.
func startedAt(states []service.State, now time.Time) time.Time {
	for _, s := range states {
		if s.Name == service.Kubelite && s.Phase == service.Running && !s.Since.After(now) {
			return s.Since
		}
	}
	return time.Time{}
}

// changeProblems says that a change of membership was begun and has not ended.
func (r *Report) changeProblems(env snapenv.Env) {
	pending, err := journal.Read(env.Journal())
	switch {
	case errors.Is(err, fs.ErrPermission): // only root may know
	case err != nil:
		r.add("change.pending", "%v", err)("see docs/cluster.md, or report it with the tarball of microk8s inspect")
	case pending != nil && strings.HasPrefix(pending.Operation, "join"):
		r.add("change.pending", "microk8s join is under way or was interrupted, at %q", pending.At())("if it was interrupted: run it again, or undo it with microk8s leave")
	case pending != nil:
		r.add("change.pending", "microk8s %s is under way or was interrupted, at %q", pending.Operation, pending.At())("if it was interrupted: run it again")
	}
}

// serviceProblems says which services should run and do not, with their own last words.
func (r *Report) serviceProblems(env snapenv.Env, now time.Time) {
	var down []string
	for _, s := range r.Services {
		var what string
		switch s.Phase {
		case service.Backoff:
			what = fmt.Sprintf("service %s keeps failing and is restarted (%s)", s.Name, s.LastExit)
		case service.Failed:
			what = fmt.Sprintf("service %s could not be started (%s)", s.Name, s.LastExit)
		case service.Stopped:
			if Expected(env, s.Name) {
				down = append(down, s.Name)
			}
			continue
		case service.Running:
			// One that takes a while to fail runs most of the time.
			if s.Restarts > 0 && now.Sub(s.Since) < justStarted {
				what = fmt.Sprintf("service %s ended and was restarted", s.Name)
				if s.LastExit != "" {
					what += " (" + s.LastExit + ")"
				}
				if s.LastWords != "" {
					what += ", last log line: " + words(s.LastWords)
				}
				r.add("services.failing", "%s", what)("see microk8s logs " + s.Name)
			}
			continue
		default:
			continue
		}
		if why := lastWordsOf(env, s); why != "" {
			what += ", last log line: " + why
		}
		r.add("services.failing", "%s", what)("see microk8s logs " + s.Name)
	}
	switch len(down) {
	case 0:
	case 1:
		r.add("services.stopped", "service %s is not running", down[0])("start it with microk8s start")
	default:
		r.add("services.stopped", "services %s are not running", strings.Join(down, ", "))("start them with microk8s start")
	}
}

// daemonProblems says which daemons inside kubelite are down while the others go on, with their own
// words, and that the cluster has removed this node.
func (r *Report) daemonProblems(env snapenv.Env) {
	state, err := kubelitestate.Read(env)
	if err != nil {
		r.add("kubelite.daemons", "%v", err)("have it written again with microk8s stop; microk8s start")
		return
	}
	if state.Refused != "" {
		r.add("node.removed", "the cluster has removed this node: %s", shorten(state.Refused))(removedAdvice)
	}
	r.NetworkPolicy.Enforced = true
	if _, err := os.Stat(env.CNIManifest()); err == nil {
		r.NetworkPolicy = NetworkPolicy{Why: "left to the pod network of " + env.CNIManifest()}
	} else if state.Policies != "" {
		r.NetworkPolicy = NetworkPolicy{Why: state.Policies}
		r.add("network.policies", "network policies are not enforced on this node as the cluster has them: %s", shorten(state.Policies))("see microk8s logs kubelite")
	}
	if state.Manifests != "" {
		r.add("manifests.failed", "not all of %s is in the cluster: %s", env.UserManifests(), shorten(state.Manifests))("correct or remove the file; it is tried again when it changes, and from time to time")
	}
	for _, d := range state.Down {
		if d.Runs {
			r.add("kubelite.daemons", "%s inside kubelite runs, but %s", d.Name, shorten(d.Why))(
				"correct --cluster-cidr in " + env.Args(d.Name) + " and run microk8s stop; microk8s start; or remove the node that is named with microk8s remove-node, and let it join again")
			continue
		}
		times := ""
		if d.Times > 1 {
			times = fmt.Sprintf(" %d times", d.Times)
		}
		r.add("kubelite.daemons", "%s inside kubelite has ended%s and is started again, the other daemons go on; its error: %s", d.Name, times, shorten(d.Why))(
			"if that names an argument, correct it in " + env.Args(d.Name) + " and run microk8s stop; microk8s start; or see microk8s logs kubelite")
	}
}

// NetworkPolicy is what a node does about NetworkPolicy objects.
type NetworkPolicy struct {
	Enforced bool
	Why      string // it does not
}

// removedAdvice is what to do on a node that the cluster has removed.
const removedAdvice = "to use this machine again: microk8s leave --force, and for a cluster: microk8s add-node on one of its control-plane nodes, and here the command which that prints"

// Removed returns what is wrong with a node that the cluster has removed, as one sentence; "" while
// it is in the cluster, or nothing is known.
func Removed(env snapenv.Env) string {
	state, err := kubelitestate.Read(env)
	if err != nil || state.Refused == "" {
		return ""
	}
	return Problem{ID: "node.removed", What: "the cluster has removed this node: " + shorten(state.Refused), Do: removedAdvice}.String()
}

// justStarted is how long after a restart its cause is told.
const justStarted = 30 * time.Second

func lastWordsOf(env snapenv.Env, s service.State) string {
	if env.Snapd {
		return words(s.LastWords) // the journal has the logs
	}
	return words(service.LastLine(env.ServiceLog(s.Name)))
}

// failuresToGiveUp is how many failures in a row show that waiting does not help.
const failuresToGiveUp = 4

// Failing returns a service that fails whenever it is started, and why, as one sentence; "" if
// there is none.
func (r Report) Failing(env snapenv.Env) (name, why string) {
	for _, s := range r.Services {
		if s.Phase == service.Backoff && s.Restarts+1 >= failuresToGiveUp {
			if why = lastWordsOf(env, s); why == "" {
				why = s.LastExit
			}
			return s.Name, why
		}
	}
	return "", ""
}

// Expected reports whether a service has something to do on this node (cli.md 7.1).
func Expected(env snapenv.Env, name string) bool {
	switch name {
	case service.Datastore:
		return nodeconfig.Load(env).Datastore.Own()
	case service.Proxy:
		return nodeconfig.ReadState(env).Worker
	}
	return true
}

// lastWords bounds a log line in a message.
const lastWords = 480

func shorten(line string) string {
	if r := []rune(line); len(r) > lastWords {
		return string(r[:lastWords]) + "…"
	}
	return line
}
