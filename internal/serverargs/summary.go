package serverargs

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

// Summary is what a node says of its arguments to the other control-plane nodes: for each argument
// that is set a digest of its value, or of the content of its files, in a form in which it does not
// matter how they are written and where the files are. The digests are keyed with the CA's key, which control-plane nodes
// have and nobody else: who reads a summary cannot try values.
type Summary struct {
	// Key names the key, and the rules by which the digests are made; summaries with different
	// ones cannot be compared.
	Key string `json:"key"`
	// Digests are 16 hex digits each, or [Unreadable], by the argument's name without dashes.
	Digests map[string]string `json:"digests"`
}

// Unreadable stands for the digest of an argument with a file that cannot be read.
const Unreadable = "unreadable"

// rules is changed with the rules by which digests are made.
const rules = "microk8s server arguments 1"

// inOrder are lists in which the order counts; the first issuer signs, the first authorizer decides.
var inOrder = []string{"service-account-issuer", "authorization-mode"}

// lists are flags that may be set several times, each time with several elements.
var lists = []string{
	"service-account-issuer", "api-audiences", "oidc-required-claim", "oidc-signing-algs", "oidc-username-prefix", "feature-gates", "runtime-config", "emulated-version",
	"enable-admission-plugins", "disable-admission-plugins", "admission-control", "authorization-mode",
	"requestheader-allowed-names", "requestheader-extra-headers-prefix", "requestheader-group-headers", "requestheader-username-headers", "requestheader-uid-headers",
}

// Summarize reads the arguments of this node, and returns with the summary the files on which it
// depends. It needs the CA's key, so root. The error is that of the argument file, or of the key.
func Summarize(env snapenv.Env) (*Summary, []string, error) {
	used := []string{env.Args(service), env.Cert("ca.key")}
	key, err := os.ReadFile(env.Cert("ca.key"))
	if err != nil {
		return nil, used, fmt.Errorf("cannot make digests of the API server's arguments: %w", err)
	}
	f, err := args.Load(env.Args(service), args.GrammarFor(service))
	if err != nil {
		return nil, used, err
	}
	digest := func(parts ...string) string {
		mac := hmac.New(sha256.New, key)
		fmt.Fprintf(mac, "%s\n%q", rules, parts)
		return hex.EncodeToString(mac.Sum(nil)[:8])
	}
	s := &Summary{Key: digest(), Digests: map[string]string{}}
	for _, flag := range values {
		if v := raw(f, flag); len(v) > 0 {
			s.Digests[flag] = digest(append([]string{flag}, elements(flag, v)...)...)
		}
	}
	for _, flag := range files {
		paths := f.Values(flag, env.Lookup)
		if flag != "service-account-key-file" && len(paths) > 1 {
			paths = paths[len(paths)-1:]
		}
		var texts []string
		readable := true
		for _, path := range paths {
			if path = strings.Trim(path, "\"'"); path == "" {
				continue
			}
			text, more, err := content(flag, path)
			used = append(append(used, path), more...)
			readable = readable && err == nil
			texts = append(texts, text)
		}
		switch {
		case !readable:
			s.Digests[flag] = Unreadable
		case len(texts) > 0:
			slices.Sort(texts)
			s.Digests[flag] = digest(append([]string{flag}, texts...)...)
		}
	}
	slices.Sort(used)
	return s, slices.Compact(used), nil
}

// elements are the values of a flag as the API server understands them.
func elements(flag string, written []string) []string {
	if !slices.Contains(lists, flag) { // the last one counts
		return []string{cmp.Or(written[len(written)-1], "true")}
	}
	var out []string
	for _, w := range written {
		for _, e := range strings.Split(w, ",") {
			if e = strings.TrimSpace(e); e != "" {
				out = append(out, e)
			}
		}
	}
	if !slices.Contains(inOrder, flag) {
		slices.Sort(out)
		out = slices.Compact(out)
	}
	return out
}

// inside are, for each argument with such a file, the keys whose values name files that must be
// the same too. What a server proves itself with (client certificates) may be its own.
var inside = map[string][]string{
	"admission-control-config-file":            {"path", "kubeConfigFile", "certificate-authority"},
	"authorization-config":                     {"kubeConfigFile", "certificate-authority"},
	"audit-webhook-config-file":                {"certificate-authority"},
	"authentication-token-webhook-config-file": {"certificate-authority"},
	"authorization-webhook-config-file":        {"certificate-authority"},
	"egress-selector-config-file":              {"caBundle"},
}

// content returns what the file of an argument says, with the content of the files that it names in
// place of their names, and those files' paths.
func content(flag, path string) (text string, used []string, err error) {
	data, err := readFile(path)
	if err != nil || slices.Contains([]string{"oidc-ca-file", "service-account-key-file", "service-account-signing-key-file", "token-auth-file"}, flag) {
		return data, nil, err
	}
	in := inliner{keys: inside[flag]}
	doc, err := in.document(data, filepath.Dir(path), 0)
	if err != nil {
		return "", in.used, err
	}
	canonical, err := json.Marshal(doc)
	return string(canonical), in.used, err
}

// inliner replaces the names of files in documents by what is in them.
type inliner struct {
	keys []string
	used []string // paths
}

// nesting is how deep files name files: an admission configuration, a plugin's, its kubeconfig, a CA.
const nesting = 3

// document returns YAML or JSON as a value, and other text as it is.
func (in *inliner) document(data, dir string, depth int) (any, error) {
	var doc any
	if strings.Contains(data, "\n---\n") || yaml.Unmarshal([]byte(data), &doc) != nil {
		return data, nil // the API server refuses it, or reads the first part only
	}
	return in.value(doc, dir, depth)
}

func (in *inliner) value(v any, dir string, depth int) (any, error) {
	var err error
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			name, isText := value.(string)
			if isText && name != "" && slices.Contains(in.keys, key) && !strings.Contains(name, "\n") && depth < nesting {
				v[key], err = in.file(name, dir, depth)
			} else {
				v[key], err = in.value(value, dir, depth)
			}
			if err != nil {
				return nil, err
			}
		}
	case []any:
		for i := range v {
			if v[i], err = in.value(v[i], dir, depth); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

func (in *inliner) file(name, dir string, depth int) (any, error) {
	if !filepath.IsAbs(name) {
		name = filepath.Join(dir, name)
	}
	in.used = append(in.used, name)
	data, err := readFile(name)
	if err != nil {
		return nil, err
	}
	return in.document(data, filepath.Dir(name), depth+1)
}

// String is the summary as it is kept in the node's record.
func (s *Summary) String() string {
	data, _ := json.Marshal(s) // maps of strings always can
	return string(data)
}

// maxSummary bounds a summary from the cluster, in bytes.
const maxSummary = 16 << 10

// ParseSummary reads what [Summary.String] wrote.
func ParseSummary(text string) (*Summary, error) {
	var s Summary
	if len(text) > maxSummary {
		return nil, fmt.Errorf("a summary of %d bytes is none", len(text))
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return nil, err
	}
	return &s, nil
}

// Difference is an argument in which control-plane nodes do not agree.
type Difference struct {
	Argument string // without dashes
	// Groups are nodes with the same value, sorted by name, the largest group first.
	Groups []Group
}

// Group is nodes that have the same value of an argument.
type Group struct {
	Nodes []string
	// Set is false where the argument is not set. Unreadable: its file cannot be read.
	Set, Unreadable bool
}

// Compare returns the arguments in which nodes differ, by the nodes' names. Nodes whose summary cannot
// be compared with the majority's are left out.
func Compare(nodes map[string]*Summary) []Difference {
	byKey := map[string][]string{}
	for name, s := range nodes {
		byKey[s.Key] = append(byKey[s.Key], name)
	}
	var members []string
	for _, list := range byKey {
		if slices.Sort(list); len(list) > len(members) || len(list) == len(members) && list[0] < members[0] {
			members = list
		}
	}
	var out []Difference
	for _, flag := range slices.Sorted(slices.Values(slices.Concat(values, files))) {
		groups := map[string][]string{}
		for _, name := range members {
			d := nodes[name].Digests[flag]
			groups[d] = append(groups[d], name)
		}
		if len(groups) < 2 && groups[Unreadable] == nil {
			continue
		}
		diff := Difference{Argument: flag}
		for d, names := range groups {
			diff.Groups = append(diff.Groups, Group{Nodes: names, Set: d != "", Unreadable: d == Unreadable})
		}
		slices.SortFunc(diff.Groups, func(a, b Group) int {
			return cmp.Or(len(b.Nodes)-len(a.Nodes), strings.Compare(a.Nodes[0], b.Nodes[0]))
		})
		out = append(out, diff)
	}
	return out
}
