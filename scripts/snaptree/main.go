// Command snaptree assembles the tree of the snap from what the build made: programs,
// images, default arguments, hooks, the bill of materials, and meta/snap.yaml derived from
// snapcraft.yaml in the way snapcraft derives it.
//
// Files whose content and mode are right are left alone, so a node that runs from the tree
// is not disturbed by a build that changed nothing, and files that nothing put there are
// removed. With -built programs are left out that are not built yet and that a node is Ready without.
// With -check it looks for mistakes in snapcraft.yaml that neither the published
// schema nor `snap pack` finds.
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
)

func main() {
	out := flag.String("out", "build/snap", "directory of the tree")
	root := flag.String("root", ".", "root of the repository, holding build/")
	check := flag.Bool("check", false, "look for mistakes in snapcraft.yaml and write nothing")
	built := flag.Bool("built", false, "leave out what is not built yet and a node is Ready without (helm)")
	flag.Parse()
	if *check {
		if err := Check(*root, runtime.GOARCH); err != nil {
			fmt.Fprintf(os.Stderr, "snapcraft.yaml:\n%v\n", err)
			os.Exit(1)
		}
		return
	}
	n, err := Assemble(*root, *out, runtime.GOARCH, *built)
	if err != nil {
		fmt.Fprintln(os.Stderr, "snaptree:", err)
		os.Exit(1)
	}
	fmt.Printf("%s: %d files changed\n", *out, n)
}
