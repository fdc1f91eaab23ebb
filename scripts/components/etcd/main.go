// Command etcd is etcd's server, for tests and measurements beside it. Its own module has a
// main package only in a module that cannot be required.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
