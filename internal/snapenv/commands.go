package snapenv

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// CommandEnviron returns base (in the form of os.Environ) as the programs see it that a person
// runs through us: kubectl, helm, ctr, plugins and the hooks of addons (cli.md 0.5). Besides
// the variables of [Env.Environ]
//
//   - the package's own folders are in front of PATH,
//   - XDG_RUNTIME_DIR is [Env.RunDir],
//   - a locale that is not UTF-8 is replaced by one that is, where the host has one,
//   - REAL_PATH, REAL_LD_LIBRARY_PATH and REAL_PYTHONPATH are what the caller had.
//
// Doing it again to the result changes nothing.
func (e Env) CommandEnviron(base []string) []string {
	value := func(name string) (string, bool) {
		for _, kv := range slices.Backward(base) { // the last one counts
			if v, ok := strings.CutPrefix(kv, name+"="); ok {
				return v, true
			}
		}
		return "", false
	}
	vars := []string{"XDG_RUNTIME_DIR=" + e.RunDir()}
	for _, name := range []string{"PATH", "LD_LIBRARY_PATH", "PYTHONPATH"} {
		if _, done := value("REAL_" + name); !done {
			v, _ := value(name)
			vars = append(vars, "REAL_"+name+"="+v)
		}
	}
	path, _ := value("PATH")
	vars = append(vars, "PATH="+e.searchPath(path))
	if triplet := triplets[runtime.GOARCH]; triplet != "" {
		vars = append(vars, "SNAPCRAFT_ARCH_TRIPLET="+triplet)
	}
	locale := "" // the first of these that is not empty counts (locale(7))
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v, _ := value(name); locale == "" {
			locale = v
		}
	}
	if utf8 := e.utf8Locale(); utf8 != "" && !isUTF8(locale) {
		vars = append(vars, "LANG="+utf8, "LC_ALL="+utf8)
	}
	out := slices.DeleteFunc(e.Environ(base), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return slices.ContainsFunc(vars, func(v string) bool { return strings.HasPrefix(v, name+"=") })
	})
	return append(out, vars...)
}

// triplets name the architecture as snapcraft does.
var triplets = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// searchPath puts the package's folders that exist in front of path, once.
func (e Env) searchPath(path string) string {
	var dirs []string
	for _, d := range []string{"usr/bin", "bin", "usr/sbin", "sbin"} {
		if fi, err := os.Stat(filepath.Join(e.Snap, d)); err == nil && fi.IsDir() {
			dirs = append(dirs, filepath.Join(e.Snap, d))
		}
	}
	for _, d := range filepath.SplitList(path) {
		if !slices.Contains(dirs, d) {
			dirs = append(dirs, d)
		}
	}
	return strings.Join(dirs, string(filepath.ListSeparator))
}

// utf8Locale returns the first of the usual UTF-8 locales that the host has, "" if it has none.
func (e Env) utf8Locale() string {
	for _, l := range []struct{ name, dir string }{
		{"C.UTF-8", "C.utf8"}, {"C.UTF-8", "C.UTF-8"}, {"en_US.UTF-8", "en_US.utf8"}, {"en_US.UTF-8", "en_US.UTF-8"},
	} {
		if _, err := os.Stat(filepath.Join(e.Host, "usr/lib/locale", l.dir)); err == nil {
			return l.name
		}
	}
	return ""
}

func isUTF8(locale string) bool {
	_, charset, _ := strings.Cut(locale, ".")
	charset, _, _ = strings.Cut(strings.ToLower(charset), "@")
	return charset == "utf-8" || charset == "utf8"
}
