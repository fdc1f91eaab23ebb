// Command components builds the third-party programs of the product from the pinned modules in
// the folders beside it, as scripts/catalog says.
//
//	go run ./scripts/components                 # everything that is shipped
//	go run ./scripts/components helm runc etcd  # these
//	go run ./scripts/components image           # all of a place: snap, image, pack, peer
//
// Programs go to build/components/bin, those that are only compared with to build/peers. What
// a stamp beside them says is up to date is not built again.
package main

import (
	"flag"
	"fmt"
	"os"

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
	var chosen []catalog.Component
	for _, name := range names {
		if all := catalog.At(catalog.Place(name)); len(all) > 0 {
			chosen = append(chosen, all...)
			continue
		}
		c, err := catalog.Find(name)
		if err != nil {
			return err
		}
		chosen = append(chosen, c)
	}
	if len(names) == 0 {
		chosen = append(catalog.At(catalog.Snap), catalog.At(catalog.Image)...)
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
