// Package etcdargs knows which datastore the API server's arguments name: the product's own, or
// an etcd of the user's.
package etcdargs

import (
	"strings"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

// Own is the value of --etcd-servers for the product's own datastore.
const Own = "unix://${SNAP_DATA}/" + ownSocket

// ownSocket is in --etcd-servers where the datastore is the product's own; other programs look
// for it too.
const ownSocket = "var/kubernetes/backend/kine.sock:12379"

// External gives the endpoints, host:port, of an etcd that is not the product's; external is
// false where --etcd-servers names our own, or is not there to be read.
func External(env snapenv.Env) (endpoints []string, external bool) {
	f, err := args.Load(env.Args("kube-apiserver"), args.GrammarFor("kube-apiserver"))
	if err != nil {
		return nil, false
	}
	value, ok := f.Value("etcd-servers", env.Lookup)
	if !ok || strings.Contains(value, ownSocket) {
		return nil, false
	}
	for ep := range strings.SplitSeq(value, ",") {
		ep = strings.Trim(ep, `"' `)
		if _, after, ok := strings.Cut(ep, "://"); ok {
			ep = after
		}
		if ep = strings.TrimRight(ep, "/"); ep != "" {
			endpoints = append(endpoints, ep)
		}
	}
	return endpoints, len(endpoints) > 0
}
