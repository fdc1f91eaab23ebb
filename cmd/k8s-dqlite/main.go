// Program k8s-dqlite is the datastore of a control-plane node: the etcd v3 API over dqlite.
// Called as dqlite it is the tool that asks the members of the cluster.
package main

import (
	"context"
	"os"
	"path/filepath"

	"microk8s/internal/datastore/daemon"
	"microk8s/internal/workingset"
)

func main() {
	if filepath.Base(os.Args[0]) == "dqlite" {
		os.Exit(daemon.Tool(os.Args[1:], os.Stdout, os.Stderr))
	}
	workingset.Pace(32<<20, 25) // most of the heap is values, in which a collection has nothing to look at
	go workingset.TrimAfterStart(context.Background())
	os.Exit(daemon.Main(os.Args[1:], os.Stdout, os.Stderr, os.Getenv))
}
