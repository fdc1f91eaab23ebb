// Command components builds the third-party programs of the product from the pinned modules in
// the folders beside it, as scripts/catalog says.
//
//	go run ./scripts/components                 # everything that is shipped
//	go run ./scripts/components helm runc etcd  # these
//	go run ./scripts/components image           # all of a place: snap, image, pack, peer
//	go run ./scripts/components ready           # what a node needs to become Ready
//	go run ./scripts/components later           # the rest of what is shipped
//
// Programs go to build/components/bin, those that are only compared with to build/peers. What
// a stamp beside them says is up to date is not built again.
package main

import (
	"flag"
	"fmt"
	"os"
	"slices"

	"microk8s/scripts/catalog"
)

func main() {
	root := flag.String("root", ".", "root of the repository; build/ is below it")
	flag.Parse()
	if err := run(*root, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "components:", err)
		os.Exit(1)
	}
}

func run(root string, names []string) error {
	chosen, err := choose(names)
	if err != nil {
		return err
	}
	for _, c := range chosen {
		b, err := newBuild(root, c)
		if err == nil {
			err = b.bring()
		}
		if err != nil {
			return fmt.Errorf("cannot build %s: %w", c.Name, err)
		}
	}
	return nil
}

// choose returns the components of these names: of a component, of a place, or "ready" and "later" for the
// two halves of what is shipped. No names are all of that.
func choose(names []string) ([]catalog.Component, error) {
	shipped := append(catalog.At(catalog.Snap), catalog.At(catalog.Image)...)
	if len(names) == 0 {
		return shipped, nil
	}
	var chosen []catalog.Component
	for _, name := range names {
		all := catalog.At(catalog.Place(name))
		if name == "ready" || name == "later" {
			all = slices.DeleteFunc(slices.Clone(shipped), func(c catalog.Component) bool { return c.Later != (name == "later") })
		}
		if len(all) == 0 {
			c, err := catalog.Find(name)
			if err != nil {
				return nil, err
			}
			all = []catalog.Component{c}
		}
		chosen = append(chosen, all...)
	}
	return chosen, nil
}
