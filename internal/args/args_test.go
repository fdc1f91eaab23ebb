package args

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func lookup(name string) (string, bool) {
	v, ok := map[string]string{"SNAP_DATA": "/data dir", "SNAP": "/snap", "EMPTY": ""}[name]
	return v, ok
}

func mustParse(t *testing.T, text string, g Grammar) *File {
	t.Helper()
	f, err := Parse([]byte(text), g)
	if err != nil {
		t.Fatalf("Parse(%q): %v", text, err)
	}
	return f
}

func TestWords(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		grammar    Grammar
		want       []string
	}{
		{"empty", "", GrammarA, nil},
		{"blank lines and comments", "\n  # --a=1\n--b=2\n\n", GrammarA, []string{"--b=2"}},
		{"quotes go", `--x="a,b"` + "\n--y='c'\n", GrammarA, []string{"--x=a,b", "--y=c"}},
		{"two on a line, tabs, CR", "--a=1\t --b 2\r\n", GrammarA, []string{"--a=1", "--b", "2"}},
		{"a variable with blanks stays one word", "--k=${SNAP_DATA}/x $SNAP\n", GrammarA, nil},
		{"variables", "--k=${SNAP_DATA}/x\n--l $SNAP/y\n--m=$NONE.\n", GrammarA, []string{"--k=/data dir/x", "--l", "/snap/y", "--m=."}},
		{"hash inside a word", "--a=b#c\n", GrammarA, []string{"--a=b#c"}},

		{"empty", "", GrammarB, nil},
		{"only comment", "# nothing\n", GrammarB, nil},
		{"comment at the end of a line", "--a 1 # --b 2\n\n\n--c\n", GrammarB, []string{"--a", "1", "--c"}},
		{"quotes group", `--a "b c" --d='e  f' --g=h\ i`, GrammarB, []string{"--a", "b c", "--d=e  f", "--g=h i"}},
		{"quoted variable", `--a "${SNAP_DATA}/x"`, GrammarB, []string{"--a", "/data dir/x"}},
		{"unquoted variable splits", "--a ${SNAP}/x --b=$SNAP_DATA", GrammarB, []string{"--a", "/snap/x", "--b=/data", "dir"}},
		{"default", "--a=${NONE:-d}", GrammarB, []string{"--a=d"}},
		{"single quotes keep variables", "--a='$SNAP'", GrammarB, []string{"--a=$SNAP"}},
		{"no globbing", "--a=/*", GrammarB, []string{"--a=/*"}},
		{"empty value", `--a "" --b='' --c`, GrammarB, []string{"--a", "", "--b=", "--c"}},
		{"continued line", "--a=1 \\\n  --b=2\n", GrammarB, []string{"--a=1", "--b=2"}},
		{"braces, as in bash", "--a={1,2}", GrammarB, []string{"--a=1", "--a=2"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, err := Parse([]byte(tc.text), tc.grammar)
			if tc.name == "a variable with blanks stays one word" {
				if err == nil {
					t.Fatal("a word that no flag claims was accepted")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := f.Words(lookup); !slices.Equal(got, tc.want) {
				t.Errorf("Words() = %q, want %q", got, tc.want)
			}
			if string(f.Bytes()) != tc.text {
				t.Errorf("Bytes() = %q, want the text itself", f.Bytes())
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		grammar    Grammar
		line       int
		says       string
	}{
		{"NUL", "--a=1\n--b=\x00\n", GrammarA, 2, "0x00"},
		{"binary", "\x7fELF\x02", GrammarB, 1, "0x7f"},
		{"not UTF-8", "--a=1\n\n\xff", GrammarB, 3, "0xff"},
		{"value with blanks", `--labels="a=b, c=d"`, GrammarA, 1, "without blanks"},
		{"word alone", "hello\n", GrammarA, 1, "not a flag"},
		{"three dashes", "---x\n", GrammarB, 1, "not a flag"},
		{"nameless", "--=x\n", GrammarB, 1, "not a flag"},
		{"double dash", "--a=1\n--\n", GrammarB, 2, "not a flag"},
		{"command", "--a=1\n--b=$(id)\n", GrammarA, 2, "command"},
		{"backquotes", "--b=`id`\n", GrammarA, 1, "command"},
		{"command", "--a=1\n--b=$(id)\n", GrammarB, 2, "command"},
		{"command in quotes", "--b=\"x`id`\"\n", GrammarB, 1, "command"},
		{"arithmetic", "--b=$((1+1))\n", GrammarB, 1, "not supported"},
		{"pipe", "--b=1\n--c | sh\n", GrammarB, 2, "quotes"},
		{"semicolon", "--b=1; id\n", GrammarB, 1, "quotes"},
		{"nothing alone", "--a=1 ''\n", GrammarB, 1, "not a flag"},
		{"open quote", "--a=1\n--b=\"x\n", GrammarB, 2, "quote"},
		{"failing expansion", "--b=${X:?boom}\n", GrammarB, 1, "not supported"},
		{"length", "--b=${#X}\n", GrammarB, 1, "not supported"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse([]byte(tc.text), tc.grammar)
			var bad *SyntaxError
			if !errors.As(err, &bad) {
				t.Fatalf("Parse(%q) = %v, want a SyntaxError", tc.text, err)
			}
			if bad.Line != tc.line || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %q (line %d), want line %d and %q", err, bad.Line, tc.line, tc.says)
			}
		})
	}
}

func TestGet(t *testing.T) {
	text := "--etcd-servers-overrides=o\n--etcd-servers=\"unix://${SNAP}/s\"\n--flag v\n--bare\n-v=4\n--twice=1\n--twice=2\n--neg -1\n"
	for _, g := range []Grammar{GrammarA, GrammarB} {
		f := mustParse(t, text, g)
		for flag, want := range map[string]string{
			"etcd-servers": "unix://${SNAP}/s", "etcd-servers-overrides": "o", "flag": "v", "bare": "true", "v": "4", "twice": "2", "neg": "-1",
		} {
			if got, ok := f.Get(flag); !ok || got != want {
				t.Errorf("grammar %d: Get(%q) = %q, %v; want %q", g, flag, got, ok, want)
			}
		}
		for _, flag := range []string{"etcd", "etcd-server", "fla", "ba", "-flag", ""} {
			if got, ok := f.Get(flag); ok {
				t.Errorf("grammar %d: Get(%q) = %q, want nothing", g, flag, got)
			}
		}
		if got, _ := f.Value("etcd-servers", lookup); got != "unix:///snap/s" {
			t.Errorf("Value = %q", got)
		}
		if got, _ := f.Value("bare", lookup); got != "true" {
			t.Errorf("Value(bare) = %q", got)
		}
	}
	if _, ok := mustParse(t, "--a_b=1", GrammarA).Get("a-b"); !ok {
		t.Error("underscores count as dashes in grammar A")
	}
}

func TestSetAndUnset(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		grammar    Grammar
		edit       func(*File) error
		want       string
	}{
		{"into an empty file", "", GrammarA, set("a", "1"), "--a=1\n"},
		{"after a line without end", "--b=2", GrammarA, set("a", "1"), "--b=2\n--a=1\n"},
		{"in place", "# c\n--a=1\n\n--b=2\n", GrammarA, set("a", "x=y"), "# c\n--a=x=y\n\n--b=2\n"},
		{"space form", "--a 1\n--b\n", GrammarA, set("a", "2"), "--a=2\n--b\n"},
		{"bare form", "--a\n--b\n", GrammarB, set("a", "false"), "--a=false\n--b\n"},
		{"not by prefix", "--etcd-servers-overrides=o\n", GrammarA, set("etcd-servers", "s"), "--etcd-servers-overrides=o\n--etcd-servers=s\n"},
		{"duplicates collapse", "--a=1\n--b=2\n--a 3\n", GrammarA, set("a", "4"), "--a=4\n--b=2\n"},
		{"value over two lines", "--a\n  1\n--b\n", GrammarB, set("a", "2"), "--a=2\n--b\n"},
		{"comments that name the flag stay", "# --a=0\n--a=1 # why\n", GrammarB, set("a", "2"), "# --a=0\n--a=2 # why\n"},
		{"quoted where needed", "", GrammarB, set("a", `x "y" $SNAP $(z)`), `--a="x \"y\" $SNAP \$(z)"` + "\n"},
		{"variable", "", GrammarB, set("a", "${SNAP}/x"), `--a="${SNAP}/x"` + "\n"},
		{"variable", "", GrammarA, set("a", "${SNAP}/x"), "--a=${SNAP}/x\n"},
		{"empty value", "--a=1\n", GrammarA, set("a", ""), "--a=\n"},
		{"one letter", "-v 2\n", GrammarA, set("v", "4"), "--v=4\n"},

		{"remove line", "# c\n--a=1\n--b=2\n", GrammarA, unset("a"), "# c\n--b=2\n"},
		{"remove all occurrences", "--a=1\n--b=2\n--a 3\n", GrammarA, unset("a"), "--b=2\n"},
		{"remove from a shared line", "--a=1 --b=2 --c=3\n", GrammarA, unset("b"), "--a=1 --c=3\n"},
		{"remove the first of a line", "--a=1 --b=2\n", GrammarB, unset("a"), "--b=2\n"},
		{"remove the last of a line", "--a=1 --b=2\n", GrammarB, unset("b"), "--a=1\n"},
		{"remove space form", "--a 1\n--b\n", GrammarB, unset("a"), "--b\n"},
		{"remove what is not there", "--ab=1\n", GrammarA, unset("a"), "--ab=1\n"},
		{"remove a continued line", "--a=1 \\\n--b=2 \\\n--c=3\n", GrammarB, unset("b"), "--a=1 \\\n--c=3\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := mustParse(t, tc.text, tc.grammar)
			if err := tc.edit(f); err != nil {
				t.Fatal(err)
			}
			if got := string(f.Bytes()); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func set(flag, value string) func(*File) error {
	return func(f *File) error { return f.Set(flag, value) }
}

func unset(flag string) func(*File) error {
	return func(f *File) error { f.Unset(flag); return nil }
}

func TestSetRefusesWhatCannotBeWritten(t *testing.T) {
	f := mustParse(t, "--b=1\n", GrammarA)
	for _, tc := range []struct{ flag, value string }{
		{"a", "x y"}, {"a", `"x"`}, {"a", "x\ny"}, {"a", "$(id)"}, {"", "x"}, {"--a", "x"}, {"a b", "x"}, {"a=b", "x"}, {"a", "\x00"},
	} {
		if err := f.Set(tc.flag, tc.value); err == nil {
			t.Errorf("Set(%q, %q) succeeded", tc.flag, tc.value)
		}
	}
	if got := string(f.Bytes()); got != "--b=1\n" {
		t.Errorf("a refused Set changed the text to %q", got)
	}
}

func TestSaveKeepsModeAndBackup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kubelet")
	if err := os.WriteFile(path, []byte("--a=1\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	f, err := Load(path, GrammarA)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Save(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path + ".backup"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("an unchanged file got a backup: %v", err)
	}
	if err := f.Set("a", "2"); err != nil {
		t.Fatal(err)
	}
	if err := f.Save(path); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{path: "--a=2\n", path + ".backup": "--a=1\n"} {
		data, err := os.ReadFile(name)
		st, statErr := os.Stat(name)
		if err != nil || statErr != nil || string(data) != want || st.Mode().Perm() != 0o640 {
			t.Errorf("%s: %q %v %v %v, want %q with mode 0640", name, data, err, st.Mode(), statErr, want)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none"), GrammarA); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "default-args/none") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load(dir, GrammarA); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("directory: %v", err)
	}
	path := filepath.Join(dir, "bad")
	if err := os.WriteFile(path, []byte("--a=1\n\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, GrammarB); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("damaged file: %v", err)
	}
}

func TestParseEnv(t *testing.T) {
	text := `# comment
HTTP_PROXY=http://p:3128
export PATH="$SNAP/bin:${HTTP_PROXY}"
A=1 B='two words'
A=3
export A
ulimit -n 65536 || true
ulimit -l 16384
`
	env, err := ParseEnv([]byte(text), lookup)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"HTTP_PROXY=http://p:3128", "PATH=/snap/bin:http://p:3128", "B=two words", "A=3"}
	if !slices.Equal(env.Vars, want) || env.NoFile != 65536 || env.MemLock != 16384*1024 {
		t.Errorf("got %q, %d, %d", env.Vars, env.NoFile, env.MemLock)
	}
	for _, bad := range []string{"rm -rf /\n", "A=$(id)\n", "A=1 id\n", "if true; then A=1; fi\n", "ulimit -n x\n", "ulimit -c 5\n", "A=(1 2)\n", "A=1 >/x\n", "A=\x01", "A+=1", "A=1 &\n", "A=1 || id\n"} {
		if env, err := ParseEnv([]byte(bad), lookup); err == nil {
			t.Errorf("ParseEnv(%q) = %+v, want an error", bad, env)
		}
	}
	if env, err := LoadEnv(filepath.Join(t.TempDir(), "none"), lookup); err != nil || len(env.Vars) != 0 {
		t.Errorf("missing file: %v %v", env, err)
	}
}

// FuzzEdit checks, for any text that parses, that setting a flag is seen and touches no other.
func FuzzEdit(f *testing.F) {
	f.Add("--a=1\n--b 2\n# c\n--c\n", "a", "x", true)
	f.Add("--a 'x y' --b=\"$Z\" \\\n --c # d\n", "b", "p q", false)
	f.Add("", "new", "${SNAP}/x", false)
	f.Add("-v 2 --v=3", "v", "$(x)", true)
	f.Fuzz(func(t *testing.T, text, flag, value string, a bool) {
		g := GrammarB
		if a {
			g = GrammarA
		}
		file, err := Parse([]byte(text), g)
		if err != nil {
			return
		}
		others := map[string]string{}
		for _, name := range file.Flags() {
			if !file.sameName(name, flag) {
				others[name], _ = file.Get(name)
			}
		}
		if err := file.Set(flag, value); err != nil {
			if string(file.Bytes()) != text {
				t.Fatalf("a refused Set changed %q to %q", text, file.Bytes())
			}
			return
		}
		if got, ok := file.Get(flag); !ok || got != value {
			t.Fatalf("%q: Set(%q, %q), then Get = %q, %v in %q", text, flag, value, got, ok, file.Bytes())
		}
		check := func() {
			for name, want := range others {
				if got, ok := file.Get(name); !ok || got != want {
					t.Fatalf("%q: editing %q changed --%s from %q to %q, %v in %q", text, flag, name, want, got, ok, file.Bytes())
				}
			}
		}
		check()
		if !file.Unset(flag) {
			t.Fatalf("cannot unset %q in %q", flag, file.Bytes())
		}
		if _, ok := file.Get(flag); ok {
			t.Fatalf("%q is still in %q", flag, file.Bytes())
		}
		check()
	})
}
