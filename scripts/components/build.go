package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"microk8s/internal/atomicfile"
	"microk8s/scripts/catalog"
)

// build is one component on its way to programs.
type build struct {
	catalog.Component
	root   string // of the repository, absolute
	folder string // with the component's go.mod
	mains  []string
	linker string // -ldflags
	out    string // folder of the programs
	stamp  string // file
}

// newBuild returns the build of a component in the repository at root.
func newBuild(root string, c catalog.Component) (*build, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	b := &build{Component: c, root: root, folder: filepath.Join(root, catalog.Folder, c.Name)}
	if b.mains, err = c.Mains(root); err != nil {
		return nil, err
	}
	if b.linker, err = c.Linker(root); err != nil {
		return nil, err
	}
	base := filepath.Join(root, "build/components")
	b.out = filepath.Join(base, "bin", c.Subfolder())
	if c.Place == catalog.Peer {
		base = filepath.Join(root, "build/peers")
		b.out = base
	}
	b.stamp = filepath.Join(base, c.Name+".stamp")
	return b, nil
}

// bring builds the component unless its stamp says that it is built.
func (b *build) bring() error {
	want, err := b.fingerprint()
	if err != nil {
		return err
	}
	programs, err := b.Binaries(b.root)
	if err != nil {
		return err
	}
	if have, err := os.ReadFile(b.stamp); err == nil && string(have) == want && b.have(b.out, programs) && b.have(b.manifests(), slices.Collect(maps.Keys(b.Objects))) {
		return nil
	}
	fmt.Printf("building %s: %s\n", b.Name, strings.Join(append(programs, slices.Sorted(maps.Keys(b.Objects))...), " "))
	for _, v := range b.Vendored {
		if err := b.vendor(v); err != nil {
			return err
		}
	}
	if err := b.checkVariables(); err != nil {
		return err
	}
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	if err := b.objects(); err != nil {
		return err
	}
	argv := append([]string{"build", "-trimpath", "-buildvcs=false"}, b.tags()...)
	argv = append(argv, "-ldflags", b.linker, "-o", b.out+"/")
	if len(b.mains) > 0 {
		if _, err := b.golang(append(argv, b.mains...)...); err != nil {
			return err
		}
	}
	return atomicfile.Write(b.stamp, []byte(want), 0o644, nil)
}

func (b *build) have(folder string, files []string) bool {
	return !slices.ContainsFunc(files, func(name string) bool {
		fi, err := os.Stat(filepath.Join(folder, name))
		return err != nil || !fi.Mode().IsRegular()
	})
}

// manifests is the folder of the objects.
func (b *build) manifests() string { return filepath.Join(b.root, "build/components/manifests") }

// objects takes the component's objects out of its module.
func (b *build) objects() error {
	if len(b.Objects) == 0 {
		return nil
	}
	version, err := b.Version(b.root)
	if err != nil {
		return err
	}
	out, err := b.golang("mod", "download", "-json", b.Module+"@"+version)
	if err != nil {
		return err
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return err
	}
	if err := os.MkdirAll(b.manifests(), 0o755); err != nil {
		return err
	}
	for name, file := range b.Objects {
		data, err := os.ReadFile(filepath.Join(module.Dir, filepath.FromSlash(file)))
		if err != nil {
			return err
		}
		var object unstructured.Unstructured
		if err := yaml.Unmarshal(data, &object.Object); err != nil {
			return fmt.Errorf("%s of %s %s: %w", file, b.Module, version, err)
		}
		annotations := object.GetAnnotations()
		if annotations == nil {
			annotations = map[string]string{}
		}
		maps.Copy(annotations, b.Annotations)
		object.SetAnnotations(annotations)
		delete(object.Object, "status")
		if data, err = yaml.Marshal(object.Object); err != nil {
			return err
		}
		if err := atomicfile.Write(filepath.Join(b.manifests(), name), data, 0o644, nil); err != nil {
			return err
		}
	}
	return nil
}

func (b *build) tags() []string {
	if len(b.Tags) == 0 {
		return nil
	}
	return []string{"-tags", strings.Join(b.Tags, " ")}
}

// golang runs the go command in the component's folder and returns what it prints.
func (b *build) golang(argv ...string) ([]byte, error) {
	cgo := "0"
	if b.Cgo {
		cgo = "1"
	}
	cmd := exec.Command("go", argv...)
	cmd.Dir = b.folder
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOWORK=off")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("go %s: %w", argv[0], err)
	}
	return out.Bytes(), nil
}

// fingerprint is a digest of everything that the programs are made of: the table's entry, the
// component's folder, the compilers and the C libraries.
func (b *build) fingerprint() (string, error) {
	sum := sha256.New()
	entry, err := json.Marshal(b.Component)
	if err != nil {
		return "", err
	}
	fmt.Fprintf(sum, "%s\n%s\n%s\n%s\n", entry, b.linker, runtime.Version(), os.Getenv("GOARCH"))
	err = filepath.WalkDir(b.folder, func(file string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasSuffix(file, "_test.go") {
			return err
		}
		data, err := os.ReadFile(file)
		fmt.Fprintf(sum, "%s %x\n", strings.TrimPrefix(file, b.folder), sha256.Sum256(data))
		return err
	})
	if err != nil {
		return "", err
	}
	for _, key := range b.Libraries {
		l, err := catalog.LibraryOf(key)
		if err != nil {
			return "", err
		}
		version, err := l.Installed(b.root)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(sum, key, version)
	}
	return fmt.Sprintf("%x\n", sum.Sum(nil)), nil
}

// vendor makes the changed copy of a module. Its content is checked against its sum here, since
// go.sum does not have a module that is replaced by a folder.
func (b *build) vendor(v catalog.Vendored) error {
	cmd := exec.Command("go", "mod", "download", "-json", v.Module+"@"+v.Version)
	cmd.Dir, cmd.Stderr = os.TempDir(), os.Stderr // outside of any module
	out, err := cmd.Output()
	var got struct{ Dir, Sum, Error string }
	if jsonErr := json.Unmarshal(out, &got); err != nil || jsonErr != nil {
		return fmt.Errorf("cannot get %s %s: %w %s", v.Module, v.Version, err, got.Error)
	}
	if got.Sum != v.Sum {
		return fmt.Errorf("%s %s has the sum %s, not %s", v.Module, v.Version, got.Sum, v.Sum)
	}
	dest := filepath.Join(b.root, "build/components/src", v.Dir)
	if err := os.RemoveAll(dest); err != nil {
		return err
	}
	if err := copyTree(dest, got.Dir); err != nil {
		return err
	}
	for from, to := range v.Files {
		data, err := os.ReadFile(filepath.Join(b.folder, from))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dest, to), data, 0o644); err != nil {
			return err
		}
	}
	for _, e := range v.Edits {
		file := filepath.Join(dest, e.File)
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if n := strings.Count(string(data), e.Old); n != 1 {
			return fmt.Errorf("%s %s: %s has the text to be replaced %d times, not once: %q", v.Module, v.Version, e.File, n, e.Old)
		}
		if err := os.WriteFile(file, []byte(strings.Replace(string(data), e.Old, e.New, 1)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies the files below src, writable: those of the module cache are not.
func copyTree(dst, src string) error {
	return filepath.WalkDir(src, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, file)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		if d.IsDir() {
			return os.MkdirAll(to, 0o755)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		return os.WriteFile(to, data, 0o644)
	})
}

// checkVariables wants every variable that the linker sets to exist: it says nothing of one
// that does not.
func (b *build) checkVariables() error {
	packages := map[string][]string{}
	for _, v := range b.Variables {
		dot := strings.LastIndexByte(v.Name, '.')
		packages[v.Name[:dot]] = append(packages[v.Name[:dot]], v.Name[dot+1:])
	}
	for pkg, names := range packages {
		out, err := b.golang("list", "-f", "{{.Dir}}\n{{join .GoFiles \"\\n\"}}", pkg)
		if err != nil {
			return err
		}
		lines := strings.Fields(string(out))
		declared := map[string]bool{}
		for _, name := range lines[1:] {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(lines[0], name), nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			addVariables(file, declared)
		}
		for _, name := range names {
			if !declared[name] {
				return fmt.Errorf("the linker is to set %s.%s, which %s does not have", path.Base(pkg), name, b.Module)
			}
		}
	}
	return nil
}

// addVariables notes the variables that a file declares at its top.
func addVariables(file *ast.File, declared map[string]bool) {
	for _, d := range file.Decls {
		decl, ok := d.(*ast.GenDecl)
		if !ok || decl.Tok != token.VAR {
			continue
		}
		for _, spec := range decl.Specs {
			if values, ok := spec.(*ast.ValueSpec); ok {
				for _, name := range values.Names {
					declared[name.Name] = true
				}
			}
		}
	}
}
