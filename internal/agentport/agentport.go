// Package agentport knows on which port the cluster agents of a cluster listen.
package agentport

import (
	"net"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

// Default is the port where args/cluster-agent does not say otherwise.
const Default = "25000"

// Of gives the port of --bind in args/cluster-agent. All nodes of a cluster have the same.
func Of(env snapenv.Env) string {
	f, err := args.Load(env.Args("cluster-agent"), args.GrammarFor("cluster-agent"))
	if err == nil {
		if v, ok := f.Value("bind", env.Lookup); ok {
			if _, port, err := net.SplitHostPort(v); err == nil && port != "" {
				return port
			}
		}
	}
	return Default
}
