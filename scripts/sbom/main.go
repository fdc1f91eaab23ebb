// Command sbom writes the bill of materials of the snap: every program of its tree and of the
// images in it, with what is linked into each, versions and licences, as SPDX 2.3 and as
// CycloneDX 1.6, both in JSON.
//
//	go run ./scripts/sbom --tree build/snap --out build
//	go run ./scripts/sbom --packs build/packs            # of the packs of addons, beside them
//
// What is in a Go program is read from the program itself (debug/buildinfo); licences from the
// modules' licence files; C libraries and third-party programs from scripts/catalog. The same
// tree makes the same documents: their date is SOURCE_DATE_EPOCH, their identity a digest.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"sigs.k8s.io/yaml"

	"microk8s/internal/atomicfile"
	"microk8s/scripts/catalog"
)

func main() {
	root := flag.String("root", ".", "root of the repository, holding build/")
	tree := flag.String("tree", "build/snap", "tree of the snap")
	out := flag.String("out", "build", "folder of the documents")
	packs := flag.String("packs", "", "folder of the packs, of which the documents are to be instead")
	flag.Parse()
	do := func() error { return run(*root, *tree, *out) }
	if *packs != "" {
		do = func() error { return runPacks(*root, *packs) }
	}
	if err := do(); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func run(root, tree, out string) error {
	data, err := os.ReadFile(filepath.Join(tree, "meta/snap.yaml"))
	if err != nil {
		return fmt.Errorf("there is no tree of the snap; run: make build: %w", err)
	}
	var meta struct {
		Version       string
		Architectures []string
	}
	if err := yaml.Unmarshal(data, &meta); err != nil {
		return err
	}
	if len(meta.Architectures) != 1 {
		return errors.New("meta/snap.yaml names not one architecture")
	}
	inv, err := Collect("microk8s", root, tree, meta.Version, meta.Architectures[0])
	if err != nil {
		return err
	}
	return write(inv, out)
}

// runPacks writes the documents about the packs that scripts/images made in dir.
func runPacks(root, dir string) error {
	version, err := catalog.Required(filepath.Join(root, "go.mod"), "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	inv, err := Collect("microk8s-addons", root, dir, version, runtime.GOARCH)
	if err != nil {
		return err
	}
	if len(inv.Images) == 0 {
		return fmt.Errorf("there are no images in %s; run: make addons", filepath.Join(dir, "images"))
	}
	return write(inv, dir)
}

func write(inv Inventory, out string) error {
	created, err := epoch(os.Getenv("SOURCE_DATE_EPOCH"))
	if err != nil {
		return err
	}
	for _, doc := range []struct {
		ending string
		write  func(Inventory, time.Time) ([]byte, error)
	}{{"spdx.json", SPDX}, {"cdx.json", CycloneDX}} {
		text, err := doc.write(inv, created)
		if err != nil {
			return fmt.Errorf("%s: %w", doc.ending, err)
		}
		file := filepath.Join(out, inv.file()+"."+doc.ending)
		if err := atomicfile.Write(file, text, 0o644, nil); err != nil {
			return err
		}
		fmt.Printf("%s: %d programs, %d images, %d packages\n", file, len(inv.Programs), len(inv.Images), len(inv.Packages))
	}
	return nil
}

// epoch is the time that SOURCE_DATE_EPOCH names, 1970 without it.
func epoch(seconds string) (time.Time, error) {
	n, err := strconv.ParseInt(cmp.Or(seconds, "0"), 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH is no number of seconds: %w", err)
	}
	return time.Unix(n, 0).UTC(), nil
}
