// Package catalog is the table of what the product takes from others and builds: the one place
// that says which third-party programs there are, how each is built, under which licence, and
// where it goes. Builder, tree of the snap, images and bill of materials read it.
//
// Versions, and main packages where a component has no program of our own around it, are in the
// go.mod of the component's folder (scripts/components/NAME): its require and tool lines.
package catalog

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/mod/modfile"
)

// Place is where the programs of a component go.
type Place string

// The places.
const (
	Snap  Place = "snap"  // into the tree of the snap
	Image Place = "image" // into a container image
	Pack  Place = "pack"  // into a container image that is in a pack of addons, not in the snap
	Peer  Place = "peer"  // not shipped: what tests and measurements compare with
)

// Folder holds the components' modules, below the root of the repository.
const Folder = "scripts/components"

// Component is one third-party module that is built into programs.
type Component struct {
	// Name is that of the folder below [Folder].
	Name string
	// Row is the component's name in `microk8s version`, where it is not Name.
	Row string
	// Module is the Go module that the programs are from.
	Module string
	// Inside says that the component's own module is named as if it were below Module, whose internal packages it imports.
	Inside bool
	// Licence is the module's, as an SPDX licence expression.
	Licence string
	// Source is where the module's source is published.
	Source string
	// Place is where the programs go; Dir is the folder there, and below build/components/bin.
	Place Place
	Dir   string
	// Tags are Go build tags.
	Tags []string
	// Variables are those that the module's own build sets at link time.
	Variables []Variable
	// Unset are variables that the module's own build sets and ours does not: why.
	Unset map[string]string
	// Cgo says that C code is linked, statically; Libraries are the keys of [Libraries] that are.
	Cgo       bool
	Libraries []string
	// Vendored are modules of which changed copies are built.
	Vendored []Vendored
	// Objects are files of Kubernetes objects in the module that every cluster has (internal/bootstrap): path in
	// the module by the name of the manifest. A component with some may have no program.
	Objects map[string]string
	// Annotations are added to each of those objects.
	Annotations map[string]string
	// Later says that a node is Ready without it: `make run` builds it when the node runs. It is
	// no part of what makes a component up to date.
	Later bool `json:"-"`
}

// Variable is a string variable of a program that the linker sets. In Value, {version} is the
// component's version (v1.2.3), {number} the same without v, {kubernetes} the version of
// Kubernetes in the product (v1.37.1), {major} and {minor} its first two numbers.
type Variable struct{ Name, Value string }

// Vendored is a module that is copied to build/components/src/DIR and changed there; the
// component's go.mod replaces the module by that folder.
type Vendored struct {
	Module, Version, Sum string
	Dir                  string
	// Files replace files of the module, or are added: path in the component's folder by path in the module.
	Files map[string]string
	// Edits are changes of single lines in other files.
	Edits []Edit
}

// Edit replaces a text, which the file has exactly once.
type Edit struct{ File, Old, New string }

const commit = "the commit is not part of a module; the version says the same"

// Components is the table, in the order of `microk8s version`.
var Components = []Component{
	{
		Name: "containerd", Module: "github.com/containerd/containerd/v2", Licence: "Apache-2.0",
		Source: "https://github.com/containerd/containerd", Place: Snap, Dir: "bin",
		// File systems that need kernel modules few hosts have; overlayfs and native remain.
		Tags:      []string{"no_btrfs", "no_devmapper", "no_zfs", "no_aufs", "urfave_cli_no_docs"},
		Variables: []Variable{{"github.com/containerd/containerd/v2/version.Version", "{version}"}},
		Unset: map[string]string{
			"Revision": commit,
			"Package":  "its value is right in the source",
		},
	},
	{
		Name: "runc", Module: "github.com/opencontainers/runc", Licence: "Apache-2.0",
		Source: "https://github.com/opencontainers/runc", Place: Snap, Dir: "bin",
		// libseccomp is C; linked statically, so that the program runs on any distribution.
		Cgo: true, Libraries: []string{"seccomp", "libc"},
		Tags: []string{"seccomp", "netgo", "osusergo"},
		// Its source embeds the version.
		Unset: map[string]string{"gitCommit": commit, "extraVersion": "for releases of others"},
	},
	{
		Name: "cni", Row: "cni-plugins", Module: "github.com/containernetworking/plugins", Licence: "Apache-2.0",
		Source: "https://github.com/containernetworking/plugins", Place: Snap, Dir: "opt/cni/bin",
		Variables: []Variable{{"github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion", "{version}"}},
	},
	{
		Name: "coredns", Module: "github.com/coredns/coredns", Licence: "Apache-2.0",
		Source: "https://github.com/coredns/coredns", Place: Image,
		Unset: map[string]string{"GitCommit": commit},
	},
	{
		Name: "metrics-server", Module: "sigs.k8s.io/metrics-server", Licence: "Apache-2.0",
		Source: "https://github.com/kubernetes-sigs/metrics-server", Place: Image, Later: true,
		Variables: []Variable{{"k8s.io/client-go/pkg/version.gitVersion", "{version}"}},
		Unset:     map[string]string{"gitCommit": commit, "buildDate": "a build has no date, so that it can be repeated"},
	},
	{
		Name: "registry", Module: "github.com/distribution/distribution/v3", Licence: "Apache-2.0",
		Source: "https://github.com/distribution/distribution", Place: Image, Later: true,
		Variables: []Variable{{"github.com/distribution/distribution/v3/version.version", "{version}"}},
		Unset: map[string]string{
			"revision": commit,
			"mainpkg":  "its value is right in the source",
		},
	},
	{
		Name: "traefik", Module: "github.com/traefik/traefik/v3", Licence: "MIT",
		Source: "https://github.com/traefik/traefik", Place: Image, Later: true,
		Variables: []Variable{{"github.com/traefik/traefik/v3/pkg/version.Version", "{number}"}},
		Unset: map[string]string{
			"Codename":  "a name for the release's announcement",
			"BuildDate": "a build has no date, so that it can be repeated",
		},
		Vendored: []Vendored{
			// Without its DNS providers, which makes Traefik half as big and as long to build.
			{
				Module: "github.com/go-acme/lego/v5", Version: "v5.4.1", Sum: "h1:Jt6xAP9xQrJ3SLLGgxejfDDd3pzdrmuLCWe4oTqHHQc=",
				Dir: "lego", Files: map[string]string{"nodns.go.txt": "providers/dns/zz_gen_dns_providers.go"},
			},
			// A body may take as long as it flows: readTimeout is a limit of the time without any of it (ADR 49).
			{
				Module: "github.com/traefik/traefik/v3", Version: "v3.7.13", Sum: "h1:T8wy9KuaFzCkmXCqAzDy7t73pBDR1DHrJe3pqXpNXTw=",
				Dir: "traefik", Files: map[string]string{"flowing.go.txt": "pkg/server/flowing.go"},
				Edits: []Edit{
					{"pkg/server/server_entrypoint_tcp.go", "\t\tHandler:        handler,\n", "\t\tHandler:        flowing(handler, time.Duration(configuration.Transport.RespondingTimeouts.ReadTimeout)),\n"},
					{"pkg/server/server_entrypoint_tcp.go", "\t\tReadTimeout:    time.Duration(", "\t\tReadHeaderTimeout: time.Duration("},
				},
			},
		},
	},
	{
		Name: "metallb", Module: "go.universe.tf/metallb", Licence: "Apache-2.0",
		Source: "https://github.com/metallb/metallb", Place: Pack,
		// Its source embeds the version.
		Unset: map[string]string{"gitCommit": commit, "gitBranch": commit},
	},
	{
		Name: "cert-manager", Module: "github.com/cert-manager/cert-manager", Inside: true, Licence: "Apache-2.0",
		Source: "https://github.com/cert-manager/cert-manager", Place: Pack,
		Variables: []Variable{{"github.com/cert-manager/cert-manager/pkg/util.AppVersion", "{version}"}},
		Unset:     map[string]string{"AppGitCommit": commit, "AppGitState": commit},
	},
	{
		Name: "helm", Module: "helm.sh/helm/v3", Licence: "Apache-2.0",
		Source: "https://github.com/helm/helm", Place: Snap, Dir: "bin", Later: true,
		// Where it has no cluster, helm acts as the Kubernetes of these four, and of 1.20 without them.
		Variables: []Variable{
			{"helm.sh/helm/v3/internal/version.version", "{version}"},
			{"helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor", "{major}"},
			{"helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor", "{minor}"},
			{"helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor", "{major}"},
			{"helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor", "{minor}"},
		},
		Unset: map[string]string{
			"gitCommit":    commit,
			"gitTreeState": commit,
			"metadata":     "empty in a release",
		},
	},
	{
		Name: "network-policy-api", Module: "sigs.k8s.io/network-policy-api", Licence: "Apache-2.0",
		Source: "https://github.com/kubernetes-sigs/network-policy-api", Place: Snap, Dir: "manifests",
		Objects: map[string]string{"cluster-network-policies.yaml": "config/crd/standard/policy.networking.k8s.io_clusternetworkpolicies.yaml"},
		Annotations: map[string]string{
			"microk8s.io/feature": "builtin-network",
			"microk8s.io/keep":    "the policies of the whole cluster that people made",
		},
	},
	{
		Name: "etcd", Module: "go.etcd.io/etcd/server/v3", Licence: "Apache-2.0",
		Source: "https://github.com/etcd-io/etcd", Place: Peer, Cgo: true,
	},
	{
		Name: "kine", Module: "github.com/k3s-io/kine", Licence: "Apache-2.0",
		Source: "https://github.com/k3s-io/kine", Place: Peer, Cgo: true,
		Unset: map[string]string{"Version": "never shown", "GitCommit": commit},
	},
	{
		Name: "gobgp", Module: "github.com/osrg/gobgp/v4", Licence: "Apache-2.0",
		Source: "https://github.com/osrg/gobgp", Place: Peer,
	},
	{
		Name: "versitygw", Module: "github.com/versity/versitygw", Licence: "Apache-2.0",
		Source: "https://github.com/versity/versitygw", Place: Peer,
		Unset: map[string]string{"Version": "never shown", "Build": commit, "BuildTime": "a build has no date, so that it can be repeated"},
	},
	{
		Name: "pebble", Module: "github.com/letsencrypt/pebble/v2", Licence: "MPL-2.0",
		Source: "https://github.com/letsencrypt/pebble", Place: Peer,
		Unset: map[string]string{"version": "never shown"},
	},
}

// Part is a module or source package whose code is in programs of our own, and which
// `microk8s version` names.
type Part struct{ Row, Module, Licence string }

// Parts are those modules; their versions are in the go.mod of the product.
var Parts = []Part{
	{"kubernetes", "k8s.io/kubernetes", "Apache-2.0"},
	{"flannel", "github.com/flannel-io/flannel", "Apache-2.0"},
	{"traefik-balancer", "github.com/traefik/traefik/v2", "MIT"}, // in apiserver-proxy
	{"go-dqlite", "github.com/canonical/go-dqlite/v3", "Apache-2.0"},
}

// Programs are our own programs in the snap, by the names of their folders in cmd/.
var Programs = []string{"microk8s", "kubelite", "k8s-dqlite", "cluster-agent", "apiserver-proxy", "supervisor"}

// Library is C code that is linked into programs or travels beside them.
type Library struct {
	// Key names it here and in [Component.Libraries].
	Key string
	// Name and Licence as the bill of materials has them; Licence is an SPDX licence expression.
	Name, Licence string
	// Package is the Debian package that the build takes it from, whose version counts. Without
	// one the version is in the file Version below the root of the repository.
	Package, Version string
}

// Libraries are the C libraries that are linked into programs. What travels with nft is found
// from its files.
var Libraries = []Library{
	{Key: "dqlite", Name: "libdqlite", Licence: "LGPL-3.0-only WITH LGPL-3.0-linking-exception", Version: "build/dqlite/version"},
	{Key: "uv", Name: "libuv", Licence: "MIT", Package: "libuv1-dev"},
	{Key: "lz4", Name: "liblz4", Licence: "BSD-2-Clause", Package: "liblz4-dev"},
	{Key: "sqlite", Name: "sqlite3", Licence: "blessing", Package: "libsqlite3-dev"},
	{Key: "seccomp", Name: "libseccomp", Licence: "LGPL-2.1-only", Package: "libseccomp-dev"},
	{Key: "libc", Name: "glibc", Licence: "LGPL-2.1-or-later", Package: "libc6-dev"},
}

// Linked says which C libraries are in programs that are not of a component.
var Linked = map[string][]string{
	"k8s-dqlite": {"dqlite", "uv", "lz4", "sqlite", "libc"},
	"pause":      {"libc"},
}

// Find returns the component of that name, or an error that lists those that exist.
func Find(name string) (Component, error) {
	var names []string
	for _, c := range Components {
		if c.Name == name {
			return c, nil
		}
		names = append(names, c.Name)
	}
	return Component{}, fmt.Errorf("there is no component %q; there are %s", name, strings.Join(names, ", "))
}

// At returns the components of a place.
func At(place Place) []Component {
	return slices.DeleteFunc(slices.Clone(Components), func(c Component) bool { return c.Place != place })
}

// Title is the component's name in `microk8s version`.
func (c Component) Title() string {
	if c.Row != "" {
		return c.Row
	}
	return c.Name
}

// Subfolder is where the component's programs are, below build/components/bin: the CNI
// plugins have one of their own.
func (c Component) Subfolder() string {
	if c.Dir == "opt/cni/bin" {
		return "cni"
	}
	return ""
}

// Version returns the version of the component's module, as its go.mod below root says it.
func (c Component) Version(root string) (string, error) {
	return Required(filepath.Join(root, Folder, c.Name, "go.mod"), c.Module)
}

// Mains returns the main packages: those of the tool lines, or the folder itself. A component
// with objects and no such lines has none.
func (c Component) Mains(root string) ([]string, error) {
	mod, err := parse(filepath.Join(root, Folder, c.Name, "go.mod"))
	if err != nil {
		return nil, err
	}
	var mains []string
	for _, t := range mod.Tool {
		mains = append(mains, t.Path)
	}
	if len(mains) == 0 && len(c.Objects) == 0 {
		mains = []string{"."}
	}
	return mains, nil
}

// Binaries returns the names of the programs that the component is built into.
func (c Component) Binaries(root string) ([]string, error) {
	mains, err := c.Mains(root)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range mains {
		if m == "." {
			m = c.Name
		}
		names = append(names, path.Base(m))
	}
	return names, nil
}

// Linker returns the -ldflags of the component.
func (c Component) Linker(root string) (string, error) {
	version, err := c.Version(root)
	if err != nil {
		return "", err
	}
	kubernetes, err := Required(filepath.Join(root, "go.mod"), "k8s.io/kubernetes")
	if err != nil {
		return "", err
	}
	numbers := strings.SplitN(strings.TrimPrefix(kubernetes, "v"), ".", 3)
	if len(numbers) < 3 {
		return "", fmt.Errorf("the version of Kubernetes is %q", kubernetes)
	}
	fill := strings.NewReplacer("{version}", version, "{number}", strings.TrimPrefix(version, "v"),
		"{kubernetes}", kubernetes, "{major}", numbers[0], "{minor}", numbers[1])
	flags := "-s -w"
	if c.Cgo && c.Place != Peer {
		flags += " -linkmode external -extldflags -static"
	}
	for _, v := range c.Variables {
		flags += " -X " + v.Name + "=" + fill.Replace(v.Value)
	}
	return flags, nil
}

// Required returns the version of a module that a go.mod requires.
func Required(gomod, module string) (string, error) {
	mod, err := parse(gomod)
	if err != nil {
		return "", err
	}
	for _, r := range mod.Require {
		if r.Mod.Path == module {
			return r.Mod.Version, nil
		}
	}
	return "", fmt.Errorf("%s requires no %s", gomod, module)
}

func parse(gomod string) (*modfile.File, error) {
	data, err := os.ReadFile(gomod)
	if err != nil {
		return nil, err
	}
	return modfile.Parse(gomod, data, nil)
}

// ModulePrefix begins the names of the components' modules: each is that and its name, but those Inside of another.
const ModulePrefix = "microk8s/scripts/components/"

// Own is the name of the component's own module.
func (c Component) Own() string {
	if c.Inside {
		return c.Module + "/" + c.Name
	}
	return ModulePrefix + c.Name
}

// goLine is the go line of every component's module: the highest that one of them needs.
const goLine = "1.26.4"

// Check reports what is wrong with the components' folders below root: a module that is not
// named by the rule, another go line, a folder without an entry and an entry without a folder.
func Check(root string) []error {
	var errs []error
	mods, err := filepath.Glob(filepath.Join(root, Folder, "*", "go.mod"))
	if err != nil {
		return []error{err}
	}
	for _, file := range mods {
		name := filepath.Base(filepath.Dir(file))
		c, err := Find(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", file, err))
			continue
		}
		mod, err := parse(file)
		switch {
		case err != nil:
			errs = append(errs, err)
			continue
		case mod.Module.Mod.Path != c.Own():
			errs = append(errs, fmt.Errorf("%s: the module is called %s, not %s", file, mod.Module.Mod.Path, c.Own()))
		}
		if mod.Go == nil || mod.Go.Version != goLine {
			errs = append(errs, fmt.Errorf("%s: its go line is not go %s", file, goLine))
		}
	}
	for _, c := range Components {
		if _, err := c.Version(root); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}
