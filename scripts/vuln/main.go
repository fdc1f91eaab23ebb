// Command vuln looks for known vulnerabilities in every program that is shipped, those of the
// snap and those in images, with govulncheck in its binary mode.
//
//	go run ./scripts/vuln                                # with the database of vuln.go.dev
//	go run ./scripts/vuln --db /media/vulndb             # a copy: a folder, or its .zip
//	go run ./scripts/vuln --db … PROGRAM…                # these programs
//
// A finding says that a vulnerable version of a module is linked, not that the vulnerable
// function is reached: release programs carry no symbol table. Exit code 0: nothing is known; 1: something is;
// 2: it could not be found out.
package main

import (
	"archive/zip"
	"bytes"
	"debug/buildinfo"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// public is the Go project's database.
const public = "https://vuln.go.dev"

func main() {
	db := flag.String("db", os.Getenv("GOVULNDB"), "database: an https address, a folder, or a zip file of one; default "+public)
	flag.Parse()
	found, err := run(".", *db, flag.Args(), os.Stdout)
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "vuln:", err)
		os.Exit(2)
	case found:
		os.Exit(1)
	}
}

// run checks programs, everything shipped if none is named, of the repository at root, and
// reports whether anything is known about one.
func run(root, db string, programs []string, out io.Writer) (found bool, err error) {
	tool, err := govulncheck(root)
	if err != nil {
		return false, err
	}
	address, done, err := database(db)
	if err != nil {
		return false, fmt.Errorf("cannot use the database %s: %w", db, err)
	}
	defer done()
	if len(programs) == 0 {
		if programs, err = shipped(root); err != nil {
			return false, err
		}
	}
	for _, program := range programs {
		// By default govulncheck looks for functions that are linked, and ends with 0 where it finds
		// a module only.
		text, err := exec.Command(tool, "-db", address, "-mode", "binary", "-scan", "module", program).CombinedOutput()
		var exit *exec.ExitError
		switch {
		case err == nil:
			fmt.Fprintf(out, "%s: nothing known\n", program)
		case errors.As(err, &exit) && exit.ExitCode() == 3: // as govulncheck's documentation has it
			found = true
			fmt.Fprintf(out, "%s:\n%s\n", program, text)
		default:
			hint := ""
			if strings.HasPrefix(address, "http") {
				hint = "\nwithout internet, name a copy of the database: make vuln DB=FOLDER (docs/supply-chain.md)"
			}
			return found, fmt.Errorf("nothing is known about %s: %w\n%s%s", program, err, bytes.TrimSpace(text), hint)
		}
	}
	fmt.Fprintf(out, "%d programs were checked\n", len(programs))
	return found, nil
}

// govulncheck builds the tool, at the version that scripts/tools pins.
func govulncheck(root string) (string, error) {
	path, err := filepath.Abs(filepath.Join(root, "build/tools/govulncheck"))
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", path, "golang.org/x/vuln/cmd/govulncheck")
	cmd.Dir = filepath.Join(root, "scripts/tools")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build govulncheck: %w\n%s", err, text)
	}
	return path, nil
}

// database returns the address of a database that govulncheck understands: a copy may be a
// folder or the zip file that vuln.go.dev offers.
func database(db string) (address string, done func(), err error) {
	done = func() {}
	if db == "" {
		return public, done, nil
	}
	if strings.Contains(db, "://") {
		return db, done, nil
	}
	fi, err := os.Stat(db)
	if err != nil {
		return "", done, err
	}
	folder := db
	if !fi.IsDir() {
		if folder, err = os.MkdirTemp("", "vulndb-"); err != nil {
			return "", done, err
		}
		done = func() { os.RemoveAll(folder) }
		z, err := zip.OpenReader(db)
		if err != nil {
			return "", done, err
		}
		defer z.Close()
		if err := os.CopyFS(folder, z); err != nil {
			return "", done, err
		}
	}
	if _, err := os.Stat(filepath.Join(folder, "index/modules.json")); err != nil {
		return "", done, fmt.Errorf("it is no database of Go vulnerabilities: %w", err)
	}
	folder, err = filepath.Abs(folder)
	return "file://" + folder, done, err
}

// shipped lists the Go programs of the tree of the snap and of the images.
func shipped(root string) ([]string, error) {
	var all []string
	for _, folder := range []string{"build/snap", "build/components/bin", "build/image-programs"} {
		err := filepath.WalkDir(filepath.Join(root, folder), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			info, err := d.Info()
			if err != nil || info.Mode()&0o111 == 0 && folder != "build/image-programs" {
				return err
			}
			if _, err := buildinfo.ReadFile(path); err == nil {
				all = append(all, path)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("there is nothing to check; run: make build: %w", err)
		}
	}
	// What is in the snap was built in build/components; images' programs are there only.
	inSnap := map[string]bool{}
	for _, path := range all {
		if strings.Contains(path, "build/snap/") {
			inSnap[filepath.Base(path)] = true
		}
	}
	all = slices.DeleteFunc(all, func(path string) bool {
		return strings.Contains(path, "build/components/") && inSnap[filepath.Base(path)]
	})
	return all, nil
}
