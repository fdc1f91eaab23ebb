// Package keyrotation replaces the certificates and keys of a cluster while it runs, node by node. Each kind is
// a journal of steps that only go forward: interrupted anywhere, by kill -9 too, it goes on when it is run again.
// At every moment each part of the cluster takes what any other part shows. What is done on one node is in
// internal/certs and cluster-agent/worker; here is the order.
package keyrotation

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/internal/certs"
	"microk8s/internal/journal"
	"microk8s/internal/pki"
	"microk8s/internal/service"
)

// Kinds of what can be rotated, in the order in which all are.
const (
	Leaves         = "leaves"
	FrontProxy     = "front-proxy"
	Datastore      = "datastore"
	ServiceAccount = "service-account"
)

// Kinds lists them.
func Kinds() []string { return []string{Leaves, FrontProxy, Datastore, ServiceAccount} }

const operation = "certs-"

// KindOf is the kind of a rotation in a journal; "" where the journal has something else.
func KindOf(r *journal.Record) string {
	if r == nil {
		return ""
	}
	kind, _ := strings.CutPrefix(r.Operation, operation)
	if slices.Contains(Kinds(), kind) {
		return kind
	}
	return ""
}

// Cluster is what a rotation changes. All fields are set.
type Cluster struct {
	// Self is this node's name.
	Self string
	// List has the certificates of every node. A node that does not answer is an error that names it.
	List func(ctx context.Context) ([]certs.Inventory, error)
	// Change has one node do something and restart a service, "" for none. It returns when the node's API
	// server, if it has one, is ready again.
	Change func(ctx context.Context, node string, change api.CertificateChange, restart string) error
	// SigningKeys are those of this node.
	SigningKeys func() (certs.SigningKeys, error)
	// NewKey makes a key of tokens.
	NewKey func() (certs.SigningKeys, error)
	// Pair and NextPair are those of the datastore on this node: the present one, and the one to come, which is
	// made where there is none. ForgetPair forgets that it was to come.
	Pair, NextPair func() (certs.Pair, error)
	ForgetPair     func() error
	// TrustedProxies are the IDs of the CAs of front proxies that extension API servers are told to trust.
	TrustedProxies func(ctx context.Context) ([]string, error)
	// KeepProxies has them told to trust no others than these.
	KeepProxies func(ctx context.Context, ids []string) error
	// Resign has tokens in Secrets that were signed with one of these keys signed again, and returns
	// the names of all Secrets with tokens.
	Resign func(ctx context.Context, ids []string) ([]string, error)
	// Pause waits for what nobody can see from outside: that programs have read a file again.
	Pause func(ctx context.Context, d time.Duration) error
	// Say tells a person how far it is.
	Say func(format string, a ...any)
	// Poll is the pause between two looks, and Patience how long a thing that is looked for may take.
	Poll, Patience time.Duration
}

// Programs read certificates and tokens again once a minute: API servers when a change of the file was
// not reported to them, clients of client-go always.
const readAgain = 75 * time.Second

// Done is what a rotation has done.
type Done struct {
	Kind  string   `json:"kind"`
	Nodes []string `json:"nodes"` // with new certificates or keys
	// Fetch are those whose token or kubeconfig has ended and who must fetch it again.
	Fetch []string `json:"fetch"`
}

// params is what the journal keeps: which public keys are replaced, by node, and no key.
type params struct {
	Old map[string][]string `json:"old"`
}

// Rotate rotates one kind, or goes on with the rotation in the journal, which must be of that kind.
func (c *Cluster) Rotate(ctx context.Context, j *journal.Journal, kind string) (Done, error) {
	done := Done{Kind: kind, Nodes: []string{}, Fetch: []string{}}
	record, err := j.Pending()
	if err != nil {
		return done, err
	}
	var p params
	if record != nil {
		if KindOf(record) != kind {
			return done, fmt.Errorf("cannot rotate %s: %q of %s has not ended", kind, record.At(), record.Operation)
		}
		if err := json.Unmarshal(record.Params, &p); err != nil || len(p.Old) == 0 {
			return done, fmt.Errorf("the journal of the rotation is damaged: %w", err)
		}
		return done, j.Resume(ctx, c.plan(kind, p, &done))
	}
	nodes, err := c.List(ctx)
	if err != nil {
		return done, err
	}
	if p.Old = olds(kind, nodes); len(p.Old) == 0 {
		return done, fmt.Errorf("no node has %s", kind)
	}
	return done, j.Run(ctx, c.plan(kind, p, &done), p)
}

// Steps are the titles of what a rotation would do, for people, and which nodes it would change.
func (c *Cluster) Steps(kind string, nodes []certs.Inventory) (titles, names []string) {
	p := params{Old: olds(kind, nodes)}
	for _, s := range c.plan(kind, p, &Done{}).Steps {
		titles = append(titles, s.Title)
	}
	return titles, sorted(p.Old)
}

// IDs are those of the steps of a kind, for tests that interrupt each.
func IDs(kind string) []string { return (&Cluster{}).plan(kind, params{}, &Done{}).IDs() }

// olds are the public keys that a kind replaces, by node.
func olds(kind string, nodes []certs.Inventory) map[string][]string {
	out := map[string][]string{}
	for _, n := range nodes {
		var ids []string
		switch kind {
		case Leaves:
			ids = certs.Leaves(n)
		case FrontProxy:
			ids = named(n, certs.FrontProxyCA)
		case Datastore:
			ids = named(n, certs.Datastore)
		case ServiceAccount:
			ids = named(n, certs.ServiceAccount)
		}
		if len(ids) > 0 && (n.Role != "worker" || kind == Leaves) {
			out[n.Node] = ids
		}
	}
	return out
}

func named(n certs.Inventory, name string) (ids []string) {
	for _, l := range n.Items {
		if l.Name == name && l.ID != "" {
			ids = append(ids, l.ID)
		}
	}
	return ids
}

func sorted(m map[string][]string) []string {
	out := make([]string, 0, len(m))
	for name := range m {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func (c *Cluster) plan(kind string, p params, done *Done) journal.Plan {
	steps := map[string]func(params, *Done) []journal.Step{Leaves: c.leaves, FrontProxy: c.frontProxy, Datastore: c.datastore, ServiceAccount: c.serviceAccount}[kind](p, done)
	return journal.Plan{Operation: operation + kind, Commit: steps[0].ID, Steps: steps}
}

// on does something on each node, one after the other.
func (c *Cluster) on(ctx context.Context, names []string, do func(name string) error) error {
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		c.Say("  on %s", name)
		if err := do(name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// await looks until there is nothing left to wait for, which a person is told.
func (c *Cluster) await(ctx context.Context, left func(ctx context.Context) (string, error)) error {
	limit, cancel := context.WithTimeout(ctx, c.Patience)
	defer cancel()
	last := ""
	for {
		what, err := left(limit)
		if err == nil && what == "" {
			return nil
		}
		if err != nil {
			what = err.Error()
		}
		if what != last {
			c.Say("  waiting: %s", what)
			last = what
		}
		select {
		case <-limit.Done():
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("after %s still: %s", c.Patience, what)
		case <-time.After(c.Poll):
		}
	}
}

// leaves: what the CA signs. Old and new are of the same CA, so nothing else has to know.
func (c *Cluster) leaves(p params, done *Done) []journal.Step {
	names := sorted(p.Old)
	return []journal.Step{{ID: "leaves", Title: "Replace keys and certificates, and restart Kubernetes, one node after the other", Do: func(ctx context.Context) error {
		done.Nodes = names
		return c.on(ctx, names, func(name string) error {
			return c.Change(ctx, name, api.CertificateChange{Leaves: p.Old[name]}, service.Kubelite)
		})
	}}}
}

// frontProxy: each control-plane node has a CA of its own for the calls that its API server passes on to
// extension API servers. They learn all CAs from one ConfigMap, which the API servers write.
func (c *Cluster) frontProxy(p params, done *Done) []journal.Step {
	names := sorted(p.Old)
	step := func(ctx context.Context, what string) error {
		return c.on(ctx, names, func(name string) error {
			return c.Change(ctx, name, api.CertificateChange{FrontProxy: what, FrontProxyOld: p.Old[name][0]}, "")
		})
	}
	present := func(ctx context.Context) (ids []string, err error) {
		nodes, err := c.List(ctx)
		for _, n := range nodes {
			if n.Role != "worker" {
				ids = append(ids, named(n, certs.FrontProxyCA)...)
			}
		}
		return ids, err
	}
	return []journal.Step{
		{ID: "add", Title: "Have a new CA of the front proxy trusted beside the present one", Do: func(ctx context.Context) error {
			done.Nodes = names
			if err := step(ctx, certs.FrontProxyAdd); err != nil {
				return err
			}
			return c.await(ctx, func(ctx context.Context) (string, error) {
				nodes, err := c.List(ctx)
				if err != nil {
					return "", err
				}
				trusted, err := c.TrustedProxies(ctx)
				for _, n := range nodes {
					for _, id := range named(n, certs.NextFrontProxy) {
						if !slices.Contains(trusted, id) {
							return "extension API servers are not told of the new CA of " + n.Node, err
						}
					}
				}
				return "", err
			})
		}},
		{ID: "use", Title: "Sign with the new CA", Do: func(ctx context.Context) error { return step(ctx, certs.FrontProxyUse) }},
		{ID: "wait", Title: "Wait until API servers have read it again", Do: func(ctx context.Context) error { return c.Pause(ctx, readAgain) }},
		{ID: "drop", Title: "Trust the other one no more", Do: func(ctx context.Context) error {
			if err := step(ctx, certs.FrontProxyDrop); err != nil {
				return err
			}
			keep, err := present(ctx)
			if err != nil {
				return err
			}
			return c.await(ctx, func(ctx context.Context) (string, error) {
				if err := c.KeepProxies(ctx, keep); err != nil {
					return "", err
				}
				trusted, err := c.TrustedProxies(ctx)
				for _, id := range trusted {
					if !slices.Contains(keep, id) {
						return "extension API servers are still told of the CA " + id, err
					}
				}
				return "", err
			})
		}},
	}
}

// selfFirst are the nodes with this one first, whose files say which the new keys are.
func (c *Cluster) selfFirst(p params) []string {
	names := sorted(p.Old)
	if i := slices.Index(names, c.Self); i > 0 {
		names = append([]string{c.Self}, slices.Delete(names, i, i+1)...)
	}
	return names
}

// datastore: all members have one pair, which is what they trust as well. The file of the certificate may have
// several: the first one is shown, all are taken.
func (c *Cluster) datastore(p params, done *Done) []journal.Step {
	names := c.selfFirst(p)
	// spread has the members use the present pair, or the next one, and take those of both, or of the next alone.
	spread := func(ctx context.Context, useNext, both bool) error {
		have, err := c.Pair()
		if err != nil {
			return err
		}
		next, err := c.NextPair()
		if err != nil {
			return err
		}
		use := next
		i := slices.IndexFunc(have.Certs, func(cert *x509.Certificate) bool { return slices.Contains(p.Old[c.Self], certs.KeyID(cert.PublicKey)) })
		switch {
		case !both:
		case i < 0:
			return errors.New("the present certificate of the datastore is not on this node any more; its files were restored")
		case useNext:
			use.Certs = []*x509.Certificate{next.Certs[0], have.Certs[i]}
		default:
			use = certs.Pair{Certs: []*x509.Certificate{have.Certs[i], next.Certs[0]}, Key: have.Key}
		}
		crt, key := use.Encode()
		return c.on(ctx, names, func(name string) error {
			return c.Change(ctx, name, api.CertificateChange{DatastoreCert: string(crt), DatastoreKey: string(key)}, service.Datastore)
		})
	}
	return []journal.Step{
		{ID: "add", Title: "Have the datastore's members take a new certificate beside the present one", Do: func(ctx context.Context) error {
			done.Nodes = names
			return spread(ctx, false, true)
		}},
		{ID: "use", Title: "Use the new one", Do: func(ctx context.Context) error { return spread(ctx, true, true) }},
		{ID: "drop", Title: "Take the other one no more", Do: func(ctx context.Context) error { return spread(ctx, true, false) }},
		// A step of its own: what was dropped must not be followed by a third pair.
		{ID: "forget", Title: "Forget that it was to come", Do: func(context.Context) error { return c.ForgetPair() }},
	}
}

// serviceAccount: API servers take tokens of both keys until no pod has one of the old key.
func (c *Cluster) serviceAccount(p params, done *Done) []journal.Step {
	names := c.selfFirst(p)
	old := p.Old[c.Self]
	spread := func(ctx context.Context, keys certs.SigningKeys) error {
		return c.on(ctx, names, func(name string) error {
			return c.Change(ctx, name, api.CertificateChange{SigningKeys: string(keys.Encode())}, service.Kubelite)
		})
	}
	// split returns the present keys: those of before, and the new ones.
	split := func() (before, fresh certs.SigningKeys, err error) {
		keys, err := c.SigningKeys()
		for i, id := range keys.IDs() {
			if slices.Contains(old, id) {
				before = append(before, keys[i])
			} else {
				fresh = append(fresh, keys[i])
			}
		}
		return before, fresh, err
	}
	return []journal.Step{
		{ID: "add", Title: "Have tokens of a new key taken beside those of the present one", Do: func(ctx context.Context) error {
			done.Nodes = names
			before, fresh, err := split()
			if err != nil {
				return err
			}
			if len(fresh) == 0 {
				if fresh, err = c.NewKey(); err != nil {
					return err
				}
			}
			return spread(ctx, append(before, fresh...))
		}},
		{ID: "sign", Title: "Sign with the new key", Do: func(ctx context.Context) error {
			before, fresh, err := split()
			if err != nil {
				return err
			}
			if len(fresh) == 0 {
				return errors.New("this node has no new key any more; its certificates were restored")
			}
			return spread(ctx, append(fresh, before...))
		}},
		{ID: "renew", Title: "Have the tokens of pods and Secrets signed again", Do: func(ctx context.Context) error {
			secrets, err := c.Resign(ctx, old)
			if err != nil {
				return err
			}
			for _, s := range secrets {
				done.Fetch = append(done.Fetch, "who has copied the token of the Secret "+s)
			}
			nodes, err := c.List(ctx)
			if err != nil {
				return err
			}
			var stale []string // kubelets that started before the new key signed keep their tokens for an hour
			for _, n := range nodes {
				if count(n, old) > 0 && n.Role == "worker" {
					stale = append(stale, n.Node)
				}
			}
			err = c.on(ctx, stale, func(name string) error { return c.Change(ctx, name, api.CertificateChange{}, service.Kubelite) })
			if err != nil {
				return err
			}
			return c.await(ctx, func(ctx context.Context) (string, error) {
				nodes, err := c.List(ctx)
				for _, n := range nodes {
					if left := count(n, old); left > 0 {
						return fmt.Sprintf("%d pods of %s have a token of the old key", left, n.Node), err
					}
				}
				return "", err
			})
		}},
		{ID: "wait", Title: "Wait until programs in pods have read their tokens again", Do: func(ctx context.Context) error { return c.Pause(ctx, readAgain) }},
		{ID: "drop", Title: "Take tokens of the old key no more", Do: func(ctx context.Context) error {
			_, fresh, err := split()
			if err != nil {
				return err
			}
			if len(fresh) == 0 {
				return errors.New("this node has no new key any more; its certificates were restored")
			}
			return spread(ctx, fresh)
		}},
	}
}

// count is how many pods' tokens of a node are of these keys.
func count(n certs.Inventory, ids []string) (sum int) {
	for _, id := range ids {
		sum += n.Tokens[id]
	}
	return sum
}

// NewSigningKey makes a key of service account tokens.
func NewSigningKey() (certs.SigningKeys, error) {
	key, err := pki.Maker{}.Key(2048)
	return certs.SigningKeys{key}, err
}
