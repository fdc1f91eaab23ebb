package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/santhosh-tekuri/jsonschema/v6"
	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
	"github.com/spdx/tools-golang/spdxlib"
)

// tree makes a tree of a snap with one real Go program, this test, under the name of one that
// links C libraries too, and with a file that is no program.
func tree(t *testing.T) (root, dir string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	root, err = filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for name, data := range map[string][]byte{
		"meta/snap.yaml": []byte("name: microk8s\nversion: v1.37.1\narchitectures: [" + runtime.GOARCH + "]\n"),
		"bin/runc":       program,
		"bin/microk8s":   program,
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root, dir
}

// documents runs the program and returns what it wrote, by the names' endings.
func documents(t *testing.T, root, dir string) map[string][]byte {
	t.Helper()
	out := t.TempDir()
	if err := run(root, dir, out); err != nil {
		t.Fatal(err)
	}
	docs := map[string][]byte{}
	for _, ending := range []string{"spdx.json", "cdx.json"} {
		data, err := os.ReadFile(filepath.Join(out, "microk8s_v1.37.1_"+runtime.GOARCH+"."+ending))
		if err != nil {
			t.Fatal(err)
		}
		docs[ending] = data
	}
	return docs
}

func TestSPDXIsValid(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	root, dir := tree(t)
	data := documents(t, root, dir)["spdx.json"]
	doc, err := spdxjson.Read(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := spdxlib.ValidateDocument(doc); err != nil {
		t.Error(err)
	}
	if doc.SPDXVersion != "SPDX-2.3" || doc.CreationInfo.Created != "2001-09-09T01:46:40Z" {
		t.Errorf("version %s, created %s", doc.SPDXVersion, doc.CreationInfo.Created)
	}
	seen := map[string]*v2_3.Package{}
	ids := map[string]bool{}
	for _, p := range doc.Packages {
		seen[p.PackageName] = p
		if id := string(p.PackageSPDXIdentifier); ids[id] || !regexp.MustCompile(`^[A-Za-z0-9.-]+$`).MatchString(id) {
			t.Errorf("%s: the identifier is used twice, or has letters that SPDX does not know", id)
		} else {
			ids[id] = true
		}
	}
	for name, licence := range map[string]string{
		"bin/runc": "Apache-2.0", "stdlib": "BSD-3-Clause", "libseccomp": "LGPL-2.1-only",
		"github.com/google/licensecheck": "BSD-3-Clause", "github.com/CycloneDX/cyclonedx-go": "Apache-2.0",
	} {
		if p := seen[name]; p == nil || p.PackageLicenseDeclared != licence {
			t.Errorf("%s: %+v, want the licence %s", name, p, licence)
		}
	}
	if p := seen["libseccomp"]; p != nil && p.PackageVersion == "" {
		t.Error("a C library without its version")
	}
}

func TestCycloneDXIsValid(t *testing.T) {
	root, dir := tree(t)
	data := documents(t, root, dir)["cdx.json"]
	bom := new(cdx.BOM)
	if err := cdx.NewBOMDecoder(bytes.NewReader(data), cdx.BOMFileFormatJSON).Decode(bom); err != nil {
		t.Fatal(err)
	}
	if bom.SpecVersion != cdx.SpecVersion1_6 || !strings.HasPrefix(bom.SerialNumber, "urn:uuid:") {
		t.Errorf("version %s, serial number %s", bom.SpecVersion, bom.SerialNumber)
	}
	// The schema that the library validates its own output with.
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(strings.TrimSpace(string(out)), "schema")
	compiler := jsonschema.NewCompiler()
	for _, name := range []string{"bom-1.6.schema.json", "spdx.schema.json", "jsf-0.82.schema.json", "jsf-0.82.schemax.json"} {
		text, err := os.ReadFile(filepath.Join(folder, name))
		if err != nil {
			continue // the module has it under one of two names
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := compiler.AddResource("http://cyclonedx.org/schema/"+strings.Replace(name, "schemax", "schema", 1), doc); err != nil {
			t.Fatal(err)
		}
	}
	schema, err := compiler.Compile("http://cyclonedx.org/schema/bom-1.6.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(doc); err != nil {
		t.Error(err)
	}
	// The validator finds what is wrong.
	doc.(map[string]any)["specVersion"] = 1.6
	if schema.Validate(doc) == nil {
		t.Error("a document with a number as its version is valid")
	}
	// Licences are those of SPDX' list.
	text, err := os.ReadFile(filepath.Join(folder, "spdx.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var list struct{ Enum []string }
	if err := json.Unmarshal(text, &list); err != nil {
		t.Fatal(err)
	}
	for _, c := range *bom.Components {
		if c.Licenses == nil {
			t.Errorf("%s has no licence", c.Name)
			continue
		}
		for _, word := range strings.Fields((*c.Licenses)[0].Expression) {
			if word != "AND" && word != "OR" && word != "WITH" && !slices.Contains(list.Enum, word) {
				t.Errorf("%s: %s is no licence of SPDX' list", c.Name, word)
			}
		}
	}
}

func TestSameTreeSameDocuments(t *testing.T) {
	root, dir := tree(t)
	a, b := documents(t, root, dir), documents(t, root, dir)
	for ending := range a {
		if !bytes.Equal(a[ending], b[ending]) {
			t.Errorf("two runs wrote two %s", ending)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/microk8s"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := documents(t, root, dir)
	for ending := range a {
		if bytes.Equal(a[ending], c[ending]) {
			t.Errorf("%s is the same without a program", ending)
		}
	}
}

// TestUnknownProgram: the bill is complete, or there is none.
func TestUnknownProgram(t *testing.T) {
	root, dir := tree(t)
	if err := os.WriteFile(filepath.Join(dir, "bin/other"), []byte("\x7fELF, of nobody knows what"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := Collect("microk8s", root, dir, "v1", runtime.GOARCH)
	if err == nil || !strings.Contains(err.Error(), "bin/other is a program, and nothing says what is in it") {
		t.Errorf("error is %v", err)
	}
}

// TestPacks: the packs have documents of their own, beside them.
func TestPacks(t *testing.T) {
	root, dir := tree(t)
	if err := runPacks(root, dir); err == nil || !strings.Contains(err.Error(), "run: make addons") {
		t.Errorf("without images: %v", err)
	}
	inv, err := Collect("microk8s-addons", root, dir, "v1", "amd64")
	if err != nil {
		t.Fatal(err)
	}
	if err := write(inv, dir); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "microk8s-addons_v1_amd64.spdx.json"))
	if err != nil || !bytes.Contains(text, []byte(`"pkg:generic/microk8s-addons@v1"`)) {
		t.Errorf("%v: %.200s", err, text)
	}
}

func TestEpoch(t *testing.T) {
	for in, want := range map[string]time.Time{"": time.Unix(0, 0), "1": time.Unix(1, 0)} {
		if got, err := epoch(in); err != nil || !got.Equal(want) {
			t.Errorf("epoch(%q) is %v, %v", in, got, err)
		}
	}
	if _, err := epoch("yesterday"); err == nil {
		t.Error("a time that is no number was accepted")
	}
}
