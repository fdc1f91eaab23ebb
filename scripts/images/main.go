// Command images builds the container images of the product, and the one the tests use, into
// OCI archives, and packs of the addons whose images are not in the snap. There is no registry behind any of them: each holds one static program that
// this build made from source.
//
//	go run ./scripts/images --out build/snap/images --test-out build/test-images
//	go run ./scripts/images --packs build/packs
//
// With --built those are left out whose program scripts/components has not built yet.
//
// The result depends on the sources and the compiler only: times in the archives are zero,
// and an archive whose content would not change is not touched, so that what depends on it
// is not built again.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"microk8s/internal/atomicfile"
)

// image is one image to build.
type image struct {
	archive string   // file name of the archive, without ".tar"
	refs    []string // full references under which containerd knows it
	program string   // path of the program inside the image; also its entry point
	user    string   // uid:gid it runs as
	title   string   // org.opencontainers.image.title
	note    string   // org.opencontainers.image.description
	licence string   // org.opencontainers.image.licenses; "" is that of the component, or the product's
	test    bool     // for the tests only: goes to --test-out
	packed  bool     // for packs of addons: which ones, addons.yaml says
	more    []string // paths of further programs of the component
	links   []string // paths that are links to the program, which does what the name says by which it is called
	// component is the program of scripts/components that the image holds; where there is none,
	// build makes the program.
	component string
	build     func(b builder, out string) error
}

// images lists everything that is built, in the order in which it is reported.
var images = []image{
	{
		archive: "pause",
		// The name that the CRI plugin of containerd and the documentation use (cli.md 6.1).
		refs:    []string{"registry.k8s.io/pause:3.10"},
		program: "/pause",
		user:    "65535:65535",
		title:   "pause",
		note:    "Pod sandbox program of MicroK8s, built from its own source; not the image of that name published by the Kubernetes project.",
		licence: "Apache-2.0 AND LGPL-2.1-or-later", // with the C library
		build:   func(b builder, out string) error { return b.c("pause/pause.c", out) },
	},
	{
		archive: "coredns",
		// The number after the version changes with our main package, so that pods are renewed.
		refs:      []string{"microk8s.io/coredns:1.15.0-2"},
		program:   "/coredns",
		user:      "65532:65532",
		title:     "coredns",
		note:      "CoreDNS with the plugins that the dns addon of MicroK8s uses, built from its module.",
		component: "coredns",
	},
	{
		archive: "hostpath-provisioner",
		// The number changes with the program, so that pods are renewed.
		refs:    []string{"microk8s.io/hostpath-provisioner:3"},
		program: "/hostpath-provisioner",
		user:    "0:0", // the volumes of all users
		title:   "hostpath-provisioner",
		note:    "Makes the volumes of the addon hostpath-storage of MicroK8s.",
		build:   func(b builder, out string) error { return b.golang("microk8s/cmd/hostpath-provisioner", out) },
	},
	{
		archive: "host-access",
		refs:    []string{"microk8s.io/host-access:1"},
		program: "/host-access",
		user:    "0:0", // for the address
		title:   "host-access",
		note:    "Keeps the address of the addon host-access of MicroK8s on the loopback.",
		build:   func(b builder, out string) error { return b.golang("microk8s/cmd/host-access", out) },
	},
	{
		archive: "ingress-secrets",
		refs:    []string{"microk8s.io/ingress-secrets:2"},
		program: "/ingress-secrets",
		user:    "65532:65532",
		title:   "ingress-secrets",
		note:    "Serves the ingress controller of MicroK8s the Secrets and ConfigMaps that it may read.",
		build:   func(b builder, out string) error { return b.golang("microk8s/cmd/ingress-secrets", out) },
	},
	{
		archive: "console",
		// The number changes with the program and its page, so that pods are renewed.
		refs:    []string{"microk8s.io/console:1"},
		program: "/console",
		user:    "65532:65532",
		title:   "console",
		note:    "The console of MicroK8s, of the addon dashboard.",
		build:   func(b builder, out string) error { return b.golang("microk8s/cmd/console", out) },
	},
	{
		archive:   "metrics-server",
		refs:      []string{"microk8s.io/metrics-server:0.9.0"},
		program:   "/metrics-server",
		user:      "65532:65532",
		title:     "metrics-server",
		note:      "The metrics server of the Kubernetes project, built from its module.",
		component: "metrics-server",
	},
	{
		archive:   "registry",
		refs:      []string{"microk8s.io/registry:3.1.2-1"},
		program:   "/registry",
		user:      "65532:65532",
		title:     "registry",
		note:      "The registry of the Distribution project with its driver for directories, built from its module.",
		component: "registry",
	},
	{
		archive:   "traefik",
		refs:      []string{"microk8s.io/traefik:3.7.13-1"},
		program:   "/traefik",
		user:      "65532:65532",
		title:     "traefik",
		note:      "Traefik without the DNS providers for ACME and the lookup of machines at AWS, built from its module.",
		component: "traefik",
	},
	{
		archive:   "metallb",
		refs:      []string{"microk8s.io/metallb:0.15.2"},
		program:   "/controller",
		more:      []string{"/speaker"},
		user:      "65534:65534",
		title:     "metallb",
		note:      "MetalLB's controller and speaker, with layer 2 and native BGP, built from its module.",
		component: "metallb",
		packed:    true,
	},
	{
		archive: "cert-manager",
		refs:    []string{"microk8s.io/cert-manager:1.21.2"},
		// The paths are those of cert-manager's own images; the controller starts the solver without a command.
		program:   "/app/cmd/acmesolver/acmesolver",
		links:     []string{"/app/cmd/controller/controller", "/app/cmd/webhook/webhook", "/app/cmd/cainjector/cainjector"},
		user:      "65532:65532",
		title:     "cert-manager",
		note:      "cert-manager's controller, webhook, CA injector and ACME solver in one program, without the issuer for Venafi, built from its module.",
		component: "cert-manager",
		packed:    true,
	},
	{
		archive: "web",
		refs:    []string{"microk8s.test/web:1"},
		program: "/web",
		user:    "0:0", // tests write to volumes that belong to root
		title:   "web",
		note:    "Server and tools for the tests of MicroK8s.",
		test:    true,
		build:   func(b builder, out string) error { return b.golang("microk8s/tests/images/web", out) },
	},
}

func main() {
	out := flag.String("out", "", "directory for the images of the product")
	testOut := flag.String("test-out", "", "directory for the images of the tests; empty builds none")
	packs := flag.String("packs", "", "directory for the packs of addons; empty builds none")
	built := flag.Bool("built", false, "leave out images whose program scripts/components has not built yet")
	arch := flag.String("arch", runtime.GOARCH, "architecture, in Go's spelling; a foreign one needs CC")
	flag.Parse()
	if err := run(*out, *testOut, *packs, *arch, *built); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(out, testOut, packs, arch string, built bool) error {
	if out == "" && testOut == "" && packs == "" {
		return errors.New("nothing to build: give --out DIR, --test-out DIR or --packs DIR")
	}
	tmp, err := os.MkdirTemp("", "images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	b := builder{arch: arch}
	for _, img := range images {
		dir := out
		switch {
		case img.test:
			dir = testOut
		case img.packed && packs != "":
			dir = filepath.Join(packs, "images")
		case img.packed:
			dir = ""
		}
		if dir == "" {
			continue
		}
		path := filepath.Join(dir, img.archive+".tar")
		programs, err := b.programs(img, tmp)
		if built && errors.Is(err, fs.ErrNotExist) {
			fmt.Printf("%s: later, its program is not built yet\n", path)
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot build the program of image %s: %w", img.archive, err)
		}
		if newer(path, programs...) {
			fmt.Printf("%s: up to date\n", path)
			continue
		}
		fmt.Printf("%s: compressing it\n", path)
		data, err := img.pack(arch, programs...)
		if err != nil {
			return fmt.Errorf("cannot make image %s: %w", img.archive, err)
		}
		changed, err := writeChanged(path, data)
		if err != nil {
			return err
		}
		now := time.Now() // see newer
		if err := os.Chtimes(path, now, now); err != nil {
			return err
		}
		state := "unchanged"
		if changed {
			state = "written"
		}
		fmt.Printf("%s: %s (%s, %d KiB)\n", path, state, strings.Join(img.refs, ", "), len(data)/1024)
	}
	if packs != "" {
		return makePacks(packs, arch)
	}
	return nil
}

// programs returns the programs of an image, built.
func (b builder) programs(img image, tmp string) ([]string, error) {
	if img.component == "" {
		program, err := b.own(img, tmp)
		return []string{program}, err
	}
	if len(img.more) == 0 {
		program, err := b.component(img.component)
		return []string{program}, err
	}
	var out []string
	for _, target := range append([]string{img.program}, img.more...) {
		program, err := b.component(filepath.Base(target))
		if err != nil {
			return nil, err
		}
		out = append(out, program)
	}
	return out, nil
}

// writeChanged replaces the file at path unless it already has this content.
func writeChanged(path string, data []byte) (changed bool, err error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	return true, atomicfile.Write(path, data, 0o644, nil)
}

// builder runs the compilers, from the root of the module.
type builder struct{ arch string }

// c makes a static program from a C file below this folder.
func (b builder) c(source, out string) error {
	cc := os.Getenv("CC")
	if cc == "" {
		if b.arch != runtime.GOARCH {
			return fmt.Errorf("%s for %s needs a cross compiler: set CC", source, b.arch)
		}
		cc = "cc"
	}
	return command(nil, cc, "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none",
		"-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-o", out, filepath.Join("scripts/images", source))
}

// golang makes a static program from a Go package.
func (b builder) golang(pkg, out string) error {
	return command([]string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + b.arch},
		"go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, pkg)
}

// component returns the path of a program that scripts/components has built.
func (b builder) component(name string) (string, error) {
	if b.arch != runtime.GOARCH {
		return "", fmt.Errorf("%s is built for %s only", name, runtime.GOARCH)
	}
	path := filepath.Join("build/components/bin", name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w; make components builds it", err)
	}
	return path, nil
}

// own builds a program of ours and keeps it, untouched when it is what it was.
func (b builder) own(img image, tmp string) (string, error) {
	made := filepath.Join(tmp, img.archive)
	if err := img.build(b, made); err != nil {
		return "", err
	}
	data, err := os.ReadFile(made)
	if err != nil {
		return "", err
	}
	kept := filepath.Join("build/image-programs", b.arch, img.archive)
	_, err = writeChanged(kept, data)
	return kept, err
}

// newer says that an archive was written after its programs and after the sources of this one:
// compressing a big program takes longer than building all the rest.
func newer(archive string, programs ...string) bool {
	made, err := os.Stat(archive)
	if err != nil {
		return false
	}
	sources, err := filepath.Glob("scripts/images/*.go")
	if err != nil || len(sources) == 0 {
		return false
	}
	sources = slices.DeleteFunc(sources, func(path string) bool { return strings.HasSuffix(path, "_test.go") })
	for _, path := range append(sources, programs...) {
		if fi, err := os.Stat(path); err != nil || !made.ModTime().After(fi.ModTime()) {
			return false
		}
	}
	return true
}

func command(env []string, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, output)
	}
	return nil
}
