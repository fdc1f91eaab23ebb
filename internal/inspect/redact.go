package inspect

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
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
// hexadecimal and base64 at any alignment, and everything that looks like one.
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
	for _, dir := range []string{env.CredentialsDir(), env.CertsDir(), env.Backend(), env.BackendLive(), filepath.Join(env.Data, "certs-backup")} {
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

// sortedByLength gives the longest first: a replacer tries its pairs in order, and a part must
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

// forms gives a value as it may appear in a text: plain, hexadecimal, and inside a longer
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

var (
	privateKey = regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)`)
	pemBase64  = regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/=_-]{8,}`)
	jwt        = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*`)
	authHeader = regexp.MustCompile(`(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{6,}`)
	userInfo   = regexp.MustCompile(`://[^\s/@"']+@`)
	joinToken  = regexp.MustCompile(`\b[0-9a-f]{32}\b(/[0-9a-f]{12,64})?`)
	keyValue   = regexp.MustCompile(`(?i)((?:[\w.-]*(?:token|passw(?:or)?d|passphrase|secret|api[-_]?key|access[-_]?key|private[-_]?key|key-data|credentials?)[\w.-]*|\b_?auth(?:orization)?)["']?)(\s*[:=]\s*["'\[]*|\s+)([^\s"',}\]]+)`)
	harmless   = regexp.MustCompile(`^(true|false|null|none|-?[0-9]+|[0-9.]+(?:ms|[smh])[0-9smh.]*|[\$/].*|--.*|` + regexp.QuoteMeta(removed) + `.*)$`)
)

// Redact gives text without secrets.
func (r *Redactor) Redact(text string) string {
	text = privateKey.ReplaceAllString(text, "-----PRIVATE KEY "+removed+"-----")
	text = r.known.Replace(text)
	text = pemBase64.ReplaceAllString(text, removed)
	text = jwt.ReplaceAllString(text, removed)
	text = authHeader.ReplaceAllString(text, "$1$2"+removed)
	text = userInfo.ReplaceAllString(text, "://"+removed+"@")
	text = joinToken.ReplaceAllString(text, removed)
	return keyValue.ReplaceAllStringFunc(text, func(m string) string {
		part := keyValue.FindStringSubmatch(m)
		// With a space between, only a flag has a value: "token expired" is a sentence.
		if strings.TrimSpace(part[2]) == "" && !strings.HasPrefix(part[1], "-") || harmless.MatchString(part[3]) {
			return m
		}
		return part[1] + part[2] + removed
	})
}

// RedactJSON redacts the output of kubectl: besides what Redact does the values of environment
// variables and the copies of objects in annotations are taken out, whatever they look like.
func (r *Redactor) RedactJSON(data []byte) string {
	var v any
	if json.Unmarshal(data, &v) != nil {
		return r.Redact(string(data))
	}
	out, err := json.MarshalIndent(strip(v), "", "  ")
	if err != nil {
		return ""
	}
	return r.Redact(string(out))
}

func strip(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = strip(v[i])
		}
	case map[string]any:
		if _, named := v["name"]; named {
			if _, ok := v["value"].(string); ok {
				v["value"] = removed
			}
		}
		delete(v, "kubectl.kubernetes.io/last-applied-configuration")
		for k := range v {
			v[k] = strip(v[k])
		}
	}
	return v
}
