package inspect

import (
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"microk8s/internal/snapenv"
)

// removed stands where a secret was.
const removed = "[removed]"

// Redactor takes secrets out of text: those it has read from the node's own files, in plain,
// hexadecimal and base64 at any alignment (this file), the values of names that are those of
// secrets (text.go), and every field of an object that is not known to hold none (objects.go).
type Redactor struct {
	known *strings.Replacer
}

// minSecret is the length from which a word of a secret file is a secret: shorter ones are
// names and numbers, and replacing them would make the report unreadable.
const minSecret = 12

// NewRedactor reads the secrets of a node. Files that cannot be read are passed over: what
// cannot be read cannot get into a log by us either.
func NewRedactor(env snapenv.Env) *Redactor {
	values := map[string]bool{}
	backups, _ := filepath.Glob(filepath.Join(env.Data, "certs-backup*"))
	for _, dir := range append(backups, env.CredentialsDir(), env.CertsDir(), env.Backend(), env.BackendLive()) {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil
			}
			if dir != env.CredentialsDir() && filepath.Ext(path) != ".key" && filepath.Base(filepath.Dir(path)) != "credentials" {
				return nil // certificates and the datastore's own data
			}
			if data, err := os.ReadFile(path); err == nil {
				for _, s := range secretsIn(string(data)) {
					values[s] = true
				}
			}
			return nil
		})
	}
	return newRedactor(values)
}

func newRedactor(values map[string]bool) *Redactor {
	var pairs []string
	for _, v := range sortedByLength(values) {
		for _, form := range forms(v) {
			pairs = append(pairs, form, removed)
		}
	}
	return &Redactor{known: strings.NewReplacer(pairs...)}
}

// sortedByLength returns the longest first: a replacer tries its pairs in order, and a part must
// not be replaced before the whole.
func sortedByLength(values map[string]bool) []string {
	var out []string
	for v := range values {
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b string) int {
		if d := len(b) - len(a); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	return out
}

// notSecret are words of kubeconfigs that stand beside the secrets.
var notSecret = regexp.MustCompile(`^(https?://\S*|certificate-authority(-data)?|client-(key|certificate)(-data)?|current-context|microk8s-cluster|system:[\w:.-]+|kind|clusters?|contexts?|apiVersion|preferences|-+(BEGIN|END)?-*)[:,]?$`)

// secretsIn lists the words of a secret file, decoded too where they are base64.
func secretsIn(text string) []string {
	var out []string
	for _, w := range strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(" \t\r\n\"',|;", r) }) {
		if len(w) < minSecret || notSecret.MatchString(w) {
			continue
		}
		out = append(out, w)
		// A token may have its use appended, or be one of several: certs-request-tokens.txt.
		for _, part := range strings.FieldsFunc(w, func(r rune) bool { return strings.ContainsRune("-:/", r) }) {
			if len(part) >= minSecret && part != w && !notSecret.MatchString(part) {
				out = append(out, part)
			}
		}
		if plain, err := base64.StdEncoding.DecodeString(w); err == nil && strings.HasPrefix(string(plain), "-----BEGIN") && strings.Contains(string(plain), "PRIVATE KEY") {
			out = append(out, secretsIn(string(plain))...)
		}
	}
	return out
}

// forms returns a value as it may appear in a text: plain, hexadecimal, and inside a longer
// base64 text, where its first byte may be at any of three places.
func forms(v string) []string {
	out := []string{v, hex.EncodeToString([]byte(v))}
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for shift := range 3 {
			coded := enc.EncodeToString(append(make([]byte, shift), v...))
			// Characters that also hold bits of a neighbour differ from place to place.
			first := (shift*8 + 5) / 6
			last := (shift + len(v)) * 8 / 6
			if form := coded[first:last]; len(form) >= minSecret && !slices.Contains(out, form) {
				out = append(out, form)
			}
		}
	}
	return out
}
