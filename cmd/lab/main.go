// Program lab runs many hosts with the product on one Linux machine. See docs/lab.md.
package main

import (
	"os"

	"microk8s/tests/lab/labcli"
)

func main() {
	os.Exit(labcli.Run(os.Args[1:], labcli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
}
