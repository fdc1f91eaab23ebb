// Package args reads and edits the argument files in $SNAP_DATA/args: one reader for both
// grammars that exist, and one editor that knows flags by their exact names.
//
// A [File] is a value parsed once and edited in memory. Edits touch only the flag they name:
// comments, order, quoting and empty lines of the rest stay byte for byte. Files are never
// given to a shell, and command substitution in them is refused.
//
// `-env` files, which are assignments instead of flags, are read by [ParseEnv].
//
// What a flag means is left to the program that gets it.
package args

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"microk8s/internal/atomicfile"
	"microk8s/internal/fileaccess"
)

// Grammar is how the words of an argument file are written (cli.md 0.8).
type Grammar int

const (
	// GrammarA is that of the five Kubernetes daemons: quotes are deleted, words end at
	// blanks, lines that start with # are comments.
	GrammarA Grammar = iota
	// GrammarB is shell words: quotes group, # starts a comment anywhere.
	GrammarB
)

// GrammarFor returns the grammar of args/<name>.
func GrammarFor(name string) Grammar {
	switch name {
	case "kubelet", "kube-apiserver", "kube-proxy", "kube-scheduler", "kube-controller-manager":
		return GrammarA
	}
	return GrammarB
}

// SyntaxError is what is wrong in a file, and where.
type SyntaxError struct {
	Path string // "" when the text came from no file
	Line int    // from 1
	Msg  string // with what to do about it
}

func (e *SyntaxError) Error() string {
	path := e.Path
	if path == "" {
		path = "arguments"
	}
	return fmt.Sprintf("cannot read %s: line %d: %s", path, e.Line, e.Msg)
}

// A token is one word as written, with where it is in the text.
type token struct {
	start, end int    // byte offsets in File.data
	line       int    // from 1
	plain      string // quotes removed, variables as written
	expand     func(lookup func(string) (string, bool)) []string
}

// File is one argument file. Its methods may not be called concurrently with Set or Unset.
type File struct {
	grammar Grammar
	data    []byte
	tokens  []token
	path    string
}

// Parse reads text in the given grammar. Empty text is a file without flags.
func Parse(data []byte, g Grammar) (*File, error) {
	return parse(data, g, "")
}

func parse(data []byte, g Grammar, path string) (*File, error) {
	f := &File{grammar: g, data: bytes.Clone(data), path: path}
	err := checkText(f.data)
	if err == nil {
		if g == GrammarA {
			f.tokens, err = tokensA(f.data)
		} else {
			f.tokens, err = tokensB(f.data)
		}
	}
	if err == nil {
		err = f.checkFlags()
	}
	var bad *SyntaxError
	if errors.As(err, &bad) {
		bad.Path = path
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Load reads the file at path. For a missing file the error wraps fs.ErrNotExist; one
// that cannot be understood a [*SyntaxError] with the line and the next step.
func Load(path string, g Grammar) (*File, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return parse(data, g, path)
}

// maxSize bounds an argument file; real ones have a few kilobytes.
const maxSize = 1 << 20

func readFile(path string) ([]byte, error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("cannot read %s: it does not exist, copy it from $SNAP/default-args/%s: %w",
			path, filepath.Base(path), fs.ErrNotExist)
	case err != nil:
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	case st.IsDir():
		return nil, fmt.Errorf("cannot read %s: it is a directory, remove it and copy the file from $SNAP/default-args/%s",
			path, filepath.Base(path))
	case st.Size() > maxSize:
		return nil, fmt.Errorf("cannot read %s: it has %d bytes, which is no argument file; restore it from %s.backup or $SNAP/default-args",
			path, st.Size(), path)
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("cannot read %s: try again with sudo: %w", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	return data, nil
}

const restore = "restore the file from its .backup or from $SNAP/default-args"

func checkText(data []byte) error {
	line := 1
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		switch {
		case r == '\n':
			line++
		case r == utf8.RuneError && size == 1:
			return &SyntaxError{Line: line, Msg: fmt.Sprintf("byte 0x%02x is no text, the file is damaged; %s", data[i], restore)}
		case r < ' ' && r != '\t' && r != '\r', r == 0x7f:
			return &SyntaxError{Line: line, Msg: fmt.Sprintf("control character 0x%02x, the file is damaged; %s", r, restore)}
		}
		i += size
	}
	return nil
}

// checkFlags refuses words that no flag claims: they are what a half-written line or a quoted
// value with blanks becomes, and every program would refuse them with less to go on.
func (f *File) checkFlags() error {
	for i := 0; i < len(f.tokens); i++ {
		t := f.tokens[i]
		name, _, hasValue := splitFlag(t.plain)
		switch {
		case name == "":
			msg := fmt.Sprintf("%q is not a flag; write --name=value", t.plain)
			if f.grammar == GrammarA && i > 0 && f.tokens[i-1].line == t.line {
				msg += ", without blanks in the value (quotes do not help there)"
			}
			return &SyntaxError{Line: t.line, Msg: msg}
		case !hasValue && f.valueFollows(i):
			i++
		}
	}
	return nil
}

// splitFlag takes "--name=value", "--name" and "-n" apart. name is "" for anything else.
func splitFlag(word string) (name, value string, hasValue bool) {
	long := strings.HasPrefix(word, "--")
	body := strings.TrimPrefix(strings.TrimPrefix(word, "-"), "-")
	if len(body) == len(word) || body == "" || strings.HasPrefix(body, "-") {
		return "", "", false
	}
	name, value, hasValue = strings.Cut(body, "=")
	if !long && (len(name) != 1 || !unicode.IsLetter(rune(name[0]))) {
		return "", "", false // -abc is no flag of any of these programs, and -1 is a number
	}
	return name, value, hasValue
}

// valueFollows reports whether the word after flag i is its value.
func (f *File) valueFollows(i int) bool {
	if i+1 >= len(f.tokens) {
		return false
	}
	next := f.tokens[i+1].plain
	negative := len(next) > 1 && next[0] == '-' && next[1] >= '0' && next[1] <= '9'
	return !strings.HasPrefix(next, "-") || negative
}

// sameName compares flag names; Kubernetes takes _ for - and so does grammar A.
func (f *File) sameName(a, b string) bool {
	if f.grammar == GrammarA {
		a, b = strings.ReplaceAll(a, "_", "-"), strings.ReplaceAll(b, "_", "-")
	}
	return a == b
}

// A place is one occurrence of a flag: tokens first to last (the same for --f=v and --f).
type place struct {
	first, last int
	value       string // "true" for a bare flag
	bare        bool
}

func (f *File) find(flag string) []place {
	var found []place
	for i := 0; i < len(f.tokens); i++ {
		name, value, hasValue := splitFlag(f.tokens[i].plain)
		p := place{first: i, last: i, value: value}
		if !hasValue {
			if f.valueFollows(i) {
				i++
				p.last, p.value = i, f.tokens[i].plain
			} else {
				p.value, p.bare = "true", true
			}
		}
		if f.sameName(name, flag) {
			found = append(found, p)
		}
	}
	return found
}

// Words returns the arguments for the program. lookup resolves variables; a name it does not
// know becomes empty, as in a shell. In grammar B an unquoted variable may become several
// words or none.
func (f *File) Words(lookup func(string) (string, bool)) []string {
	var words []string
	for _, t := range f.tokens {
		words = append(words, t.expand(lookup)...)
	}
	return words
}

// Get returns the value of a flag (named without dashes) as it is written, quotes removed and
// variables unexpanded; the last one counts, as it does for the programs. A bare flag has the
// value "true".
func (f *File) Get(flag string) (string, bool) {
	found := f.find(flag)
	if len(found) == 0 {
		return "", false
	}
	return found[len(found)-1].value, true
}

// Value is Get with variables expanded through lookup.
func (f *File) Value(flag string, lookup func(string) (string, bool)) (string, bool) {
	found := f.find(flag)
	if len(found) == 0 {
		return "", false
	}
	p := found[len(found)-1]
	if p.bare {
		return p.value, true
	}
	word := strings.Join(f.tokens[p.last].expand(lookup), " ")
	if p.first == p.last {
		_, word, _ = strings.Cut(word, "=")
	}
	return word, true
}

// Values is Value for a flag that may be given several times, as --service-account-issuer: every
// value, in the order of the file.
func (f *File) Values(flag string, lookup func(string) (string, bool)) []string {
	var out []string
	for _, p := range f.find(flag) {
		if p.bare {
			out = append(out, p.value)
			continue
		}
		word := strings.Join(f.tokens[p.last].expand(lookup), " ")
		if p.first == p.last {
			_, word, _ = strings.Cut(word, "=")
		}
		out = append(out, word)
	}
	return out
}

// SetAll sets several values of a flag (named without dashes), one --flag=value each, at the end of
// the file; none removes it. A value that the grammar cannot express is an error and changes
// nothing.
func (f *File) SetAll(flag string, values []string) error {
	next := f
	if found := f.find(flag); len(found) > 0 {
		parsed, err := parse(f.without(found), f.grammar, f.path)
		if err != nil {
			return err
		}
		next = parsed
	}
	data := next.Bytes()
	for _, v := range values {
		one := &File{grammar: f.grammar, path: f.path}
		if err := one.Set(flag, v); err != nil {
			return err
		}
		if len(data) > 0 && data[len(data)-1] != '\n' {
			data = append(data, '\n')
		}
		data = append(data, one.data...)
	}
	parsed, err := parse(data, f.grammar, f.path)
	if err != nil {
		return err
	}
	*f = *parsed
	return nil
}

// Flags lists the names of all flags in order of first appearance.
func (f *File) Flags() []string {
	var names []string
	seen := map[string]bool{}
	for i := 0; i < len(f.tokens); i++ {
		name, _, hasValue := splitFlag(f.tokens[i].plain)
		if !hasValue && f.valueFollows(i) {
			i++
		}
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	return names
}

// Empty reports whether the file has no flag at all.
func (f *File) Empty() bool { return len(f.tokens) == 0 }

// Set sets one value of a flag (named without dashes), written as --flag=value in the place of
// its first occurrence or at the end; further occurrences go. Variables in the value stay
// variables. A value that the grammar cannot express is an error and changes nothing.
func (f *File) Set(flag, value string) error {
	if flag == "" || strings.ContainsAny(flag, " \t\r\n=\"'$`\\#") || strings.HasPrefix(flag, "-") {
		return fmt.Errorf("cannot set flag %q: not a flag name", flag)
	}
	written, err := f.quote(value)
	if err != nil {
		return fmt.Errorf("cannot set --%s: %w", flag, err)
	}
	text := "--" + flag + "=" + written

	found := f.find(flag)
	var next []byte
	if len(found) == 0 {
		next = bytes.Clone(f.data)
		if len(next) > 0 && next[len(next)-1] != '\n' {
			next = append(next, '\n')
		}
		next = append(append(next, text...), '\n')
	} else {
		next = f.without(found[1:])
		at := f.tokens[found[0].first].start // lies before everything that was taken out
		end := f.tokens[found[0].last].end
		next = append(append(bytes.Clone(next[:at]), text...), next[end:]...)
	}
	parsed, err := parse(next, f.grammar, f.path)
	if err != nil {
		return fmt.Errorf("cannot set --%s: %w", flag, err)
	}
	if got, _ := parsed.Get(flag); got != value {
		return fmt.Errorf("cannot set --%s: the value %q cannot be written in this file", flag, value)
	}
	*f = *parsed
	return nil
}

// Unset removes a flag (named without dashes) and reports whether it was there.
func (f *File) Unset(flag string) bool {
	found := f.find(flag)
	if len(found) == 0 {
		return false
	}
	parsed, err := parse(f.without(found), f.grammar, f.path)
	if err != nil {
		return false // cannot be: taking whole flags out of a valid file leaves a valid file
	}
	*f = *parsed
	return true
}

// without returns the text with these places cut out, and the lines that become empty.
func (f *File) without(places []place) []byte {
	data := bytes.Clone(f.data)
	for i := len(places) - 1; i >= 0; i-- {
		for t := places[i].last; t >= places[i].first; t-- {
			data = cut(data, f.tokens[t].start, f.tokens[t].end)
		}
	}
	return data
}

func cut(data []byte, start, end int) []byte {
	lineStart := bytes.LastIndexByte(data[:start], '\n') + 1
	lineEnd := len(data)
	if i := bytes.IndexByte(data[end:], '\n'); i >= 0 {
		lineEnd = end + i + 1
	}
	before, after := bytes.TrimSpace(data[lineStart:start]), bytes.TrimSpace(data[end:lineEnd])
	switch {
	case len(before) == 0 && (len(after) == 0 || string(after) == `\`):
		start, end = lineStart, lineEnd
	case len(before) == 0:
		for end < lineEnd && (data[end] == ' ' || data[end] == '\t') {
			end++
		}
	default:
		for start > lineStart && (data[start-1] == ' ' || data[start-1] == '\t') {
			start--
		}
	}
	return append(bytes.Clone(data[:start]), data[end:]...)
}

// Bytes is the text as it would be saved.
func (f *File) Bytes() []byte { return bytes.Clone(f.data) }

// Save replaces the file at path, keeping its mode and owner (0660 and the owner of the
// directory when it is new), and leaves the previous text in path.backup. Nothing is
// written when the text is the same.
func (f *File) Save(path string) error {
	mode, owner := fs.FileMode(0o660), dirOwner(path)
	old, err := os.ReadFile(path)
	switch {
	case err == nil:
		if bytes.Equal(old, f.data) {
			return nil
		}
		st, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("cannot write %s: %w", path, err)
		}
		mode, owner = st.Mode().Perm(), fileaccess.OwnerOf(st)
		if err := atomicfile.Write(path+".backup", old, mode, owner); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return atomicfile.Write(path, f.data, mode, owner)
}

// dirOwner gives new files the group of the directory they are in; only root may do so.
func dirOwner(path string) *atomicfile.Owner {
	st, err := os.Stat(filepath.Dir(path))
	if err != nil || os.Geteuid() != 0 {
		return nil
	}
	return fileaccess.OwnerOf(st)
}
