package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/google/licensecheck"
	"golang.org/x/mod/module"
)

// licences finds the licences of modules in the cache of modules, from which they were built.
type licences struct {
	cache string
	known map[string]string
}

var licenceFile = regexp.MustCompile(`(?i)^(un)?(licen[cs]e|copying)([.-].*)?$`)

// enough is the share of a file, in percent, that must be the text of known licences.
const enough = 75

// of returns the licence of a module as an SPDX expression: that of the licence files at its
// top, all of them where there are several.
func (l *licences) of(name, version string) (string, error) {
	key := name + "@" + version
	if known, ok := l.known[key]; ok {
		return known, nil
	}
	if l.cache == "" {
		out, err := exec.Command("go", "env", "GOMODCACHE").Output()
		if err != nil {
			return "", fmt.Errorf("cannot find the cache of modules: %w", err)
		}
		l.cache, l.known = strings.TrimSpace(string(out)), map[string]string{}
	}
	escaped, err := module.EscapePath(name)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(l.cache, escaped+"@"+version)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("the source of %s is not in the cache of modules, which has its licence: build it first", key)
	}
	if err != nil {
		return "", err
	}
	var ids []string
	for _, e := range entries {
		if !e.Type().IsRegular() || !licenceFile.MatchString(e.Name()) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return "", err
		}
		found := licensecheck.Scan(text)
		if found.Percent < enough {
			continue
		}
		for _, m := range found.Match {
			if !m.IsURL {
				ids = append(ids, m.ID)
			}
		}
	}
	slices.Sort(ids)
	licence := strings.Join(slices.Compact(ids), " AND ")
	if licence == "" {
		licence = noAssertion
	}
	l.known[key] = licence
	return licence, nil
}
