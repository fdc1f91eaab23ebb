package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/mod/modfile"

	"microk8s/scripts/catalog"
)

// Package is a piece of software that is in a program or beside it.
type Package struct {
	Name, Version string
	PURL          string // package URL, the identity
	Licence       string // SPDX expression, or noAssertion
	Source        string // where it is published, or ""
	Note          string
}

// noAssertion is SPDX' word for a licence that was not found.
const noAssertion = "NOASSERTION"

// Program is one executable file.
type Program struct {
	Path   string // in the snap, or in the image
	Image  string // the image's reference, "" for files of the snap
	SHA256 string
	// Licence is that of the program's own source.
	Licence string
	// Uses are the PURLs of everything that is linked into it or that it is.
	Uses []string
}

// ID tells programs apart: several images may have one path.
func (p Program) ID() string {
	return strings.TrimPrefix(p.Image+"/"+strings.TrimPrefix(p.Path, "/"), "/")
}

// Image is a container image that travels with the product.
type Image struct{ Ref, Digest, Licence string }

// Inventory is everything that one snap, or the packs of addons, consist of.
type Inventory struct {
	Name     string // of what it is about
	Version  string // of the product
	Arch     string
	Programs []Program          // by ID
	Images   []Image            // by reference
	Packages map[string]Package // by PURL
}

// collector makes an inventory.
type collector struct {
	Inventory
	root     string
	licences licences
	owner    map[string]catalog.Component // by the name of a program
	nft      map[string]Package           // by the name of a file of lib/nft
}

// Collect makes the inventory called name of a tree, with the images in its folder images, that was built from the
// repository at root. A program of which nothing says what it is is an error.
func Collect(name, root, tree, version, arch string) (Inventory, error) {
	c := &collector{root: root, owner: map[string]catalog.Component{}, nft: map[string]Package{}}
	c.Name, c.Version, c.Arch, c.Packages = name, version, arch, map[string]Package{}
	for _, component := range catalog.Components {
		names, err := component.Binaries(root)
		if err != nil {
			return c.Inventory, err
		}
		for _, name := range names {
			c.owner[name] = component
		}
	}
	if err := c.readNFT(); err != nil {
		return c.Inventory, err
	}
	err := filepath.WalkDir(tree, func(file string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(tree, file)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if filepath.Dir(rel) == "images" && filepath.Ext(rel) == ".tar" {
			return c.image(rel, data)
		}
		return c.file("", filepath.ToSlash(rel), data)
	})
	if err != nil {
		return c.Inventory, err
	}
	slices.SortFunc(c.Programs, func(a, b Program) int { return cmp.Compare(a.ID(), b.ID()) })
	slices.SortFunc(c.Images, func(a, b Image) int { return cmp.Compare(a.Ref, b.Ref) })
	return c.Inventory, nil
}

// file adds a file if it is a program or a library.
func (c *collector) file(image, name string, data []byte) error {
	if !bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		return nil
	}
	sum := sha256.Sum256(data)
	p := Program{Path: name, Image: image, SHA256: hex.EncodeToString(sum[:]), Licence: productLicence}
	base := path.Base(name)
	if pkg, ok := c.nft[base]; ok && strings.HasPrefix(name, "lib/nft/") {
		p.Licence = pkg.Licence
		p.Uses = []string{c.add(pkg)}
		c.Programs = append(c.Programs, p)
		return nil
	}
	libraries := catalog.Linked[base]
	if owner, ok := c.owner[base]; ok {
		libraries, p.Licence = owner.Libraries, owner.Licence
	}
	info, err := buildinfo.Read(bytes.NewReader(data))
	switch {
	case err == nil:
		uses, err := c.modules(info)
		if err != nil {
			return fmt.Errorf("%s: %w", p.ID(), err)
		}
		p.Uses = uses
	case len(libraries) == 0:
		return fmt.Errorf("%s is a program, and nothing says what is in it: add it to scripts/catalog", p.ID())
	}
	for _, key := range libraries {
		pkg, err := c.library(key)
		if err != nil {
			return err
		}
		p.Uses = append(p.Uses, c.add(pkg))
	}
	slices.Sort(p.Uses)
	p.Uses = slices.Compact(p.Uses)
	c.Programs = append(c.Programs, p)
	return nil
}

// productLicence is that of our own source (LICENSE).
const productLicence = "Apache-2.0"

// add notes a package and returns its PURL.
func (c *collector) add(p Package) string {
	c.Packages[p.PURL] = p
	return p.PURL
}

// modules notes the Go modules of a program, and Go's own library.
func (c *collector) modules(info *debug.BuildInfo) ([]string, error) {
	goVersion := strings.TrimPrefix(strings.Fields(info.GoVersion)[0], "go")
	uses := []string{c.add(Package{Name: "stdlib", Version: goVersion, PURL: "pkg:golang/stdlib@" + goVersion, Licence: "BSD-3-Clause", Source: "https://go.dev"})}
	all := info.Deps
	if !ours(info.Main.Path) {
		all = append([]*debug.Module{&info.Main}, all...)
	}
	for _, m := range all {
		from, note := m, ""
		switch {
		case m.Replace == nil:
		case strings.HasPrefix(m.Replace.Path, "./"): // beside the component's go.mod: ours, in place of it
			continue
		case modfile.IsDirectoryPath(m.Replace.Path):
			note = "with changes of this repository"
		default:
			from = m.Replace
			note = "in place of " + m.Path
		}
		if ours(from.Path) {
			continue
		}
		licence, err := c.licences.of(from.Path, from.Version)
		if err != nil {
			return nil, err
		}
		uses = append(uses, c.add(Package{
			Name: from.Path, Version: from.Version, PURL: "pkg:golang/" + from.Path + "@" + from.Version,
			Licence: licence, Source: "https://pkg.go.dev/" + from.Path + "@" + from.Version, Note: note,
		}))
	}
	return uses, nil
}

// ours reports whether a module is of this repository.
func ours(module string) bool {
	return module == "microk8s" || strings.HasPrefix(module, "microk8s/") ||
		slices.ContainsFunc(catalog.Components, func(c catalog.Component) bool { return module == c.Own() })
}

func (c *collector) library(key string) (Package, error) {
	l, err := catalog.LibraryOf(key)
	if err != nil {
		return Package{}, err
	}
	version, err := l.Installed(c.root)
	if err != nil {
		return Package{}, err
	}
	p := Package{Name: l.Name, Version: version, Licence: l.Licence, PURL: "pkg:generic/" + l.Name + "@" + escape(version)}
	if l.Package != "" {
		p.PURL = debian(l.Package, version)
	} else {
		p.Note = "with the patches of scripts/components/dqlite"
	}
	return p, nil
}

// debian is the PURL of a Debian or Ubuntu package.
func debian(name, version string) string { return "pkg:deb/debian/" + name + "@" + escape(version) }

// escape makes a version fit for a PURL.
func escape(version string) string {
	return strings.NewReplacer("+", "%2B", ":", "%3A", "~", "~").Replace(version)
}

// nftLicences are those of the packages whose files travel with nft.
var nftLicences = map[string]string{
	"nftables": "GPL-2.0-only", "libnftables1": "GPL-2.0-only", "libnftnl11": "GPL-2.0-or-later", "libmnl0": "LGPL-2.1-or-later",
	"libxtables12": "GPL-2.0-or-later", "libjansson4": "MIT", "libgmp10": "LGPL-3.0-or-later OR GPL-2.0-or-later",
	"libedit2": "BSD-3-Clause", "libbsd0": "BSD-3-Clause", "libmd0": "BSD-3-Clause", "libtinfo6": "X11", "libc6": "LGPL-2.1-or-later",
}

// readNFT reads which package each file of nft is from, as its build wrote it down.
func (c *collector) readNFT() error {
	data, err := os.ReadFile(filepath.Join(c.root, "build/components/nft/packages"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a tree without nft; with it, its files are not known
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			return fmt.Errorf("build/components/nft/packages: %q is not file, package, version", line)
		}
		licence := nftLicences[f[1]]
		if licence == "" {
			licence = noAssertion
		}
		c.nft[f[0]] = Package{Name: f[1], Version: f[2], PURL: debian(f[1], f[2]), Licence: licence, Source: "https://packages.debian.org/" + f[1]}
	}
	return nil
}
