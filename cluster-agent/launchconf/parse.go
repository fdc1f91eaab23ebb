// Package launchconf applies launch configurations (cluster-agent.md 6): YAML documents that
// say, before or after the first start, which arguments, addons, names and tokens a node has
// and which cluster it joins.
//
// A configuration is looked at as a whole before anything is done, and all that is wrong is
// said at once. Its steps are then done one after the other, each once: what was done is
// written down, so that a run after a failure goes on where the last one ended, and the same
// configuration is not applied again.
package launchconf

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"microk8s/cluster-agent/client"
	"microk8s/cluster-agent/node"
	"microk8s/internal/registryhosts"
	"microk8s/internal/token"
)

// MaxSize bounds a configuration, in bytes.
const MaxSize = 1 << 20

// Text is a scalar taken as it is written: 1.10 is "1.10" and true is "true".
type Text string

// UnmarshalYAML implements yaml.Unmarshaler.
func (t *Text) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Kind != yaml.ScalarNode {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: a string is required here", n.Line)}} // collected with others
	}
	*t = Text(n.Value)
	if n.Tag == "!!null" {
		*t = ""
	}
	return nil
}

// Arguments are options of an argument file, or variables of an -env file; nil removes one.
type Arguments map[string]*Text

// Document is one document of a configuration.
type Document struct {
	Version                 Text              `yaml:"version"`
	AddonRepositories       []AddonRepository `yaml:"addonRepositories"`
	Addons                  []Addon           `yaml:"addons"`
	PersistentClusterToken  Text              `yaml:"persistentClusterToken"`
	ExtraConfigFiles        map[string]Text   `yaml:"extraConfigFiles"`
	APIServerArgs           Arguments         `yaml:"extraKubeAPIServerArgs"`
	KubeletArgs             Arguments         `yaml:"extraKubeletArgs"`
	KubeProxyArgs           Arguments         `yaml:"extraKubeProxyArgs"`
	ControllerManagerArgs   Arguments         `yaml:"extraKubeControllerManagerArgs"`
	SchedulerArgs           Arguments         `yaml:"extraKubeSchedulerArgs"`
	KubeliteEnv             Arguments         `yaml:"extraKubeliteEnv"`
	ContainerdArgs          Arguments         `yaml:"extraContainerdArgs"`
	ContainerdEnv           Arguments         `yaml:"extraContainerdEnv"`
	DqliteArgs              Arguments         `yaml:"extraDqliteArgs"`
	DqliteEnv               Arguments         `yaml:"extraDqliteEnv"`
	ClusterAgentArgs        Arguments         `yaml:"extraMicroK8sClusterAgentArgs"`
	ClusterAgentEnv         Arguments         `yaml:"extraMicroK8sClusterAgentEnv"`
	ProxyArgs               Arguments         `yaml:"extraMicroK8sAPIServerProxyArgs"`
	ProxyEnv                Arguments         `yaml:"extraMicroK8sAPIServerProxyEnv"`
	EtcdArgs                Arguments         `yaml:"extraEtcdArgs"`
	EtcdEnv                 Arguments         `yaml:"extraEtcdEnv"`
	FlanneldArgs            Arguments         `yaml:"extraFlanneldArgs"`
	FlanneldEnv             Arguments         `yaml:"extraFlanneldEnv"`
	CNIEnv                  Arguments         `yaml:"extraCNIEnv"`
	FIPSEnv                 Arguments         `yaml:"extraFIPSEnv"`
	ExtraSANs               *[]Text           `yaml:"extraSANs"` // absent and empty differ
	ContainerdRegistryFiles map[string]Text   `yaml:"containerdRegistryConfigs"`
	Join                    *Join             `yaml:"join"`
}

// AddonRepository is a place with addons.
type AddonRepository struct {
	Name      Text `yaml:"name"`
	URL       Text `yaml:"url"`
	Reference Text `yaml:"reference"`
}

// Addon is switched on, or off.
type Addon struct {
	Name    Text   `yaml:"name"`
	Disable bool   `yaml:"disable"`
	Args    []Text `yaml:"args"`
}

// Join is the cluster to join.
type Join struct {
	URL    Text `yaml:"url"`
	Worker bool `yaml:"worker"`
}

// file is an argument file with what a document wants of it.
type file struct {
	name     string
	env      bool // lines are KEY=value
	restarts []string
	changes  Arguments
}

// files lists a document's argument files in their order (cluster-agent.md 6.3).
func (d *Document) files() []file {
	k := []string{"kubelite"}
	return []file{
		{"kube-apiserver", false, k, d.APIServerArgs}, {"kubelet", false, k, d.KubeletArgs}, {"kube-proxy", false, k, d.KubeProxyArgs},
		{"kube-controller-manager", false, k, d.ControllerManagerArgs}, {"kube-scheduler", false, k, d.SchedulerArgs}, {"kubelite-env", true, k, d.KubeliteEnv},
		{"containerd", false, []string{"containerd"}, d.ContainerdArgs}, {"containerd-env", true, []string{"containerd"}, d.ContainerdEnv},
		{"k8s-dqlite", false, []string{"k8s-dqlite"}, d.DqliteArgs}, {"k8s-dqlite-env", true, []string{"k8s-dqlite"}, d.DqliteEnv},
		{"cluster-agent", false, []string{"cluster-agent"}, d.ClusterAgentArgs}, {"cluster-agent-env", true, []string{"cluster-agent"}, d.ClusterAgentEnv},
		{"apiserver-proxy", false, []string{"apiserver-proxy"}, d.ProxyArgs}, {"apiserver-proxy-env", true, []string{"apiserver-proxy"}, d.ProxyEnv},
		// Of daemons that this product does not have: kept for who reads them, restarting nothing.
		{"etcd", false, nil, d.EtcdArgs}, {"etcd-env", true, nil, d.EtcdEnv}, {"flanneld", false, nil, d.FlanneldArgs}, {"flanneld-env", true, nil, d.FlanneldEnv},
		{"cni-env", true, k, d.CNIEnv}, {"fips-env", true, []string{"kubelite", "k8s-dqlite", "cluster-agent"}, d.FIPSEnv},
	}
}

// Parse reads all documents, YAML or JSON. Warnings are about fields that nobody knows; the error says
// everything that is wrong.
func Parse(data []byte) (docs []Document, warnings []string, err error) {
	if len(data) > MaxSize {
		return nil, nil, fmt.Errorf("could not parse configuration: it has more than %d bytes", MaxSize)
	}
	strict := yaml.NewDecoder(bytes.NewReader(plainJSON(data)))
	var errs []error
	for number := 1; ; number++ {
		var raw yaml.Node
		err := strict.Decode(&raw)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("could not parse configuration: %w", err))
			break // where the next document begins cannot be known
		}
		if empty(&raw) {
			continue
		}
		var d Document
		if err := raw.Decode(&d); err != nil {
			errs = append(errs, fmt.Errorf("document %d: could not parse configuration: %w", number, plain(err)))
			if mismatch := new(yaml.TypeError); !errors.As(err, &mismatch) {
				continue
			} // the rest of it was read, and may have mistakes too
		}
		for _, unknown := range unknownFields(&raw) {
			warnings = append(warnings, fmt.Sprintf("document %d: the field %s is not known and has no effect", number, unknown))
		}
		for _, err := range d.check() {
			errs = append(errs, fmt.Errorf("document %d: %w", number, err))
		}
		docs = append(docs, d)
	}
	if len(errs) > 0 {
		return nil, warnings, errors.Join(append(errs, errors.New("what a launch configuration may say is in docs/launch.md"))...)
	}
	return docs, warnings, nil
}

// unmarshalled is what the parser says of a value of the wrong kind.
var unmarshalled = regexp.MustCompile("cannot unmarshal !!\\w+(?: `[^`]*`)? into (\\S+)")

// shapes say how a value is written, by the type that takes it.
var shapes = map[string]string{
	"launchconf.Document":          "a document is a list of fields, such as version: 0.2.0",
	"launchconf.Addon":             "an addon is written as {name: NAME}",
	"[]launchconf.Addon":           "addons are a list, each written as - name: NAME",
	"launchconf.AddonRepository":   "a repository is written as {name: NAME, url: URL}",
	"[]launchconf.AddonRepository": "repositories are a list, each written as - {name: NAME, url: URL}",
	"launchconf.Join":              "join is written as {url: \"HOST:PORT/TOKEN\"}",
	"launchconf.Arguments":         "options are written as --name: value, each on its own line",
	"map[string]launchconf.Text":   "files are written as NAME: TEXT",
	"[]launchconf.Text":            "a list is required here, each entry written as - TEXT",
	"bool":                         "true or false is required here",
}

// plain says what should have been written, instead of which type of the program did not take it.
func plain(err error) error {
	var mismatch *yaml.TypeError
	if !errors.As(err, &mismatch) {
		return err
	}
	lines := make([]string, len(mismatch.Errors))
	for i, line := range mismatch.Errors {
		lines[i] = unmarshalled.ReplaceAllStringFunc(line, func(s string) string {
			if shape := shapes[unmarshalled.FindStringSubmatch(s)[1]]; shape != "" {
				return shape
			}
			return s
		})
	}
	return errors.New(strings.Join(lines, "; "))
}

// plainJSON returns a JSON text as YAML reads it, and any other text as it is. JSON is YAML but
// for its pairs of escaped surrogates; numbers keep their digits.
func plainJSON(data []byte) []byte {
	if !json.Valid(data) {
		return data
	}
	var value any
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := dec.Decode(&value); err != nil {
		return data
	}
	out, err := json.Marshal(value)
	if err != nil {
		return data
	}
	return out
}

// empty says that a document holds nothing but comments.
func empty(n *yaml.Node) bool {
	return n.Kind == 0 || n.Kind == yaml.DocumentNode && (len(n.Content) == 0 || n.Content[0].Tag == "!!null")
}

// unknownFields lists the keys of the top level that no field has.
func unknownFields(n *yaml.Node) (out []string) {
	if n.Kind == yaml.DocumentNode && len(n.Content) > 0 {
		n = n.Content[0]
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if key := n.Content[i].Value; !slices.Contains(fieldNames, key) {
			out = append(out, key)
		}
	}
	return out
}

// versions that are understood (cluster-agent.md 6.2).
var (
	oldest, newest = [3]int{0, 1, 0}, [3]int{0, 2, 0}
	semantic       = regexp.MustCompile(`^v?(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})$`)
)

func (d *Document) checkVersion() error {
	m := semantic.FindStringSubmatch(string(d.Version))
	if m == nil {
		return fmt.Errorf("could not parse config file version %q: it must be of the form x.y.z, such as 0.2.0", d.Version)
	}
	var v [3]int
	for i := range v {
		if _, err := fmt.Sscan(m[i+1], &v[i]); err != nil {
			return fmt.Errorf("could not parse config file version %q: %w", d.Version, err)
		}
	}
	if slices.Compare(v[:], newest[:]) > 0 {
		return fmt.Errorf("config file version is %s but the maximum version supported is 0.2.0", d.Version)
	}
	if slices.Compare(v[:], oldest[:]) < 0 {
		return fmt.Errorf("config file version is %s but the minimum version required is 0.1.0", d.Version)
	}
	return nil
}

var (
	addonName   = regexp.MustCompile(`^([a-z0-9][a-z0-9-]*/)?[a-z0-9][a-z0-9.-]*$`)
	repository  = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
	variable    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	hostName    = regexp.MustCompile(`^(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$`)
	gitRevision = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]*$`)
)

// check lists everything that is wrong in a document.
func (d *Document) check() (errs []error) {
	add := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	add(d.checkVersion())
	for _, r := range d.AddonRepositories {
		u, err := url.Parse(string(r.URL))
		switch {
		case !repository.MatchString(string(r.Name)):
			add(fmt.Errorf("addonRepositories: %q is not the name of a repository", r.Name))
		case err != nil || r.URL == "" || strings.HasPrefix(string(r.URL), "-") || u.Scheme == "" && !filepath.IsAbs(string(r.URL)):
			add(fmt.Errorf("addonRepositories: %s: %q is neither a URL nor a path", r.Name, r.URL))
		case r.Reference != "" && !gitRevision.MatchString(string(r.Reference)):
			add(fmt.Errorf("addonRepositories: %s: %q is not a git reference", r.Name, r.Reference))
		}
	}
	for _, a := range d.Addons {
		if !addonName.MatchString(string(a.Name)) {
			add(fmt.Errorf("addons: %q is not the name of an addon", a.Name))
		}
		for _, arg := range a.Args {
			if strings.ContainsAny(string(arg), "\n\x00") {
				add(fmt.Errorf("addons: %s: the argument %q is not one line", a.Name, arg))
			}
		}
	}
	if d.PersistentClusterToken != "" {
		tok, err := token.Parse(string(d.PersistentClusterToken))
		if err == nil {
			err = tok.Guessable()
		}
		if err != nil {
			add(fmt.Errorf("persistentClusterToken: %w; a random one comes from: openssl rand -hex 16", err))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(d.ExtraConfigFiles)) {
		if !plainName(strings.TrimPrefix(name, manifestsFolder)) {
			add(fmt.Errorf("extraConfigFiles: %q is not the name of a file in args, or in args/%s", name, manifestsFolder))
		}
	}
	for _, f := range d.files() {
		for _, key := range slices.Sorted(maps.Keys(f.changes)) {
			value := ""
			if v := f.changes[key]; v != nil {
				value = string(*v)
			}
			switch {
			case !f.env:
				if err := node.CheckArgument(key, value); err != nil {
					add(fmt.Errorf("arguments of %s: %w", f.name, err))
				}
			case !variable.MatchString(key):
				add(fmt.Errorf("%s: %q is not the name of a variable", f.name, key))
			case strings.ContainsAny(value, "\n\r\x00`") || strings.Contains(value, "$("):
				add(fmt.Errorf("%s: the value of %s is not one line, or holds a command for a shell", f.name, key))
			}
		}
	}
	if d.ExtraSANs != nil {
		for _, name := range *d.ExtraSANs {
			if net.ParseIP(string(name)) == nil && (!hostName.MatchString(string(name)) || len(name) > 253) {
				add(fmt.Errorf("extraSANs: %q is neither an IP address nor a host name", name))
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(d.ContainerdRegistryFiles)) {
		if !plainName(name) {
			add(fmt.Errorf("containerdRegistryConfigs: %q is not the name of a registry", name))
			continue
		}
		if err := registryhosts.Check(name+"/hosts.toml", []byte(d.ContainerdRegistryFiles[name])); err != nil {
			add(fmt.Errorf("containerdRegistryConfigs: %w", err))
		}
	}
	if d.Join != nil {
		if _, err := client.Parse(string(d.Join.URL)); err != nil {
			add(fmt.Errorf("join: Invalid connection: %w", err))
		}
		if d.Join.Worker && len(d.Addons) > 0 {
			add(errors.New("join: a worker has no addons of its own; switch them on in the cluster"))
		}
	}
	return errs
}

// plainName reports whether a name is that of a file in the folder itself.
// manifestsFolder begins the names of files whose objects are kept in the cluster (internal/manifests).
const manifestsFolder = "manifests/"

func plainName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) < 200 && !strings.HasPrefix(name, ".") &&
		!strings.ContainsAny(name, "/\\\x00\n")
}
