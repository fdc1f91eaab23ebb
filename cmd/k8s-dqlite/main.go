// Program k8s-dqlite is the datastore of a control-plane node: the etcd v3 API over dqlite.
package main

import (
	"os"

	"microk8s/internal/datastore/daemon"
)

func main() { os.Exit(daemon.Main(os.Args[1:], os.Stdout, os.Stderr, os.Getenv)) }
