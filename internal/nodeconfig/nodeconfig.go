// Package nodeconfig is the typed view of what the argument files and the locks of an
// installation say about its node: name, role, ports, ranges of addresses, and whose datastore
// it uses. [Load] reads, [Edit] changes; nothing else reads a flag of another program out of
// args/, or looks for a lock.
//
// Handing a file's words on to the program that it is for is internal/daemon's and kubelite's
// business, and so is refusing files that this program could not use. The syntax of the files is
// internal/args', the datastore's own folder internal/datastore/storedir's.
package nodeconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"microk8s/internal/args"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/hostinfo"
	"microk8s/internal/snapenv"
)

// What holds where the argument files say nothing (cli.md 6.3, 6.8).
const (
	DefaultAPIServerPort = 16443
	DefaultAgentPort     = 25000

	defaultServiceCIDR = "10.152.183.0/24"
	defaultAgentHost   = "0.0.0.0"
	defaultDomain      = "cluster.local"
)

// DefaultAgentBind is where the cluster agent listens, host:port.
var DefaultAgentBind = net.JoinHostPort(defaultAgentHost, strconv.Itoa(DefaultAgentPort))

// Names of argument files whose flags others than their program look at.
const (
	Kubelet   = "kubelet"
	KubeProxy = "kube-proxy"
	APIServer = "kube-apiserver"
	agentFile = "cluster-agent"
)

// OwnEtcdServers is the value of --etcd-servers for the product's own datastore.
const OwnEtcdServers = "unix://${SNAP_DATA}/" + ownSocket

// ownSocket is part of --etcd-servers where the datastore is the product's own; other programs
// look for it, too.
const ownSocket = "var/kubernetes/backend/kine.sock:12379"

// Config is what is configured on one node, read at one moment. All fields are usable: one
// that is not set, or not set to something that can be used, has its default, see [Config.Err].
type Config struct {
	State // what the locks say

	NodeName string // see [NodeName]; "" where there is none by the rule

	Datastore Datastore
	APIServer APIServerConfig

	ClusterCIDRs []netip.Prefix // addresses of pods, --cluster-cidr of kube-proxy; nil where it is not set
	NodeIPs      []netip.Addr   // --node-ip of the kubelet: one, or one of each family; nil where it is not set
	// ClusterDomain is that of the names of Services, as the kubelet tells pods.
	ClusterDomain string
	AgentPort     int    // of the cluster agent; all nodes of a cluster have the same
	AgentHost     string // an address of this host at which its cluster agent listens

	errs map[Part]error
}

// Owner is whose datastore the API server of a node uses.
type Owner int

// The owners.
const (
	NoDatastore Owner = iota // none on this node: it is a worker, or was told so by its lock
	OwnDatastore
	ExternalEtcd
)

// Datastore is where this node's API server keeps its objects.
type Datastore struct {
	Owner Owner

	// Port is where this node's own member listens, or will from its first start on.
	Port int

	// Of an external etcd. Servers is --etcd-servers as a whole, Endpoints its parts as
	// host:port; the files are paths, "" where they are not set.
	Servers                   string
	Endpoints                 []string
	CAFile, CertFile, KeyFile string
}

// Own reports whether it is the product's own datastore, on this node.
func (d Datastore) Own() bool { return d.Owner == OwnDatastore }

// APIServerConfig is what counts of the arguments of the node's API server. A worker has them
// from the time before it joined; there they mean nothing.
type APIServerConfig struct {
	Port              int
	ServiceCIDRs      []netip.Prefix // at least one
	AuthorizationMode string         // "" where it is not set
	EncryptionConfig  string         // path of the configuration of encryption at rest, "" where it is not set
	// PreferredAddressTypes are those of kubelets, the first first; nil where they are not set.
	PreferredAddressTypes []string
}

// JoinPrefixes writes ranges as flags and the wire have them: separated by commas.
func JoinPrefixes(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ",")
}

// Part is one of the things that can be configured wrongly, for [Config.Err].
type Part string

// The parts.
const (
	PartName         Part = "node name"
	PartRenamed      Part = "renamed node" // the name is not the one under which the node registered
	PartAPIPort      Part = "API server port"
	PartServiceCIDRs Part = "range of Services"
	PartClusterCIDRs Part = "range of pods"
	PartNodeIP       Part = "node IP"
	PartAgent        Part = "cluster agent"
	partFiles        Part = "argument files"
)

// Err returns what is wrong with the named parts, as an error for each that names file, flag and
// value, joined; nil where nothing is. Without names it is about everything, files that cannot
// be read included. For the single parts such a file counts as one without flags: the service
// that it is for refuses it, with the line.
func (c Config) Err(parts ...Part) error {
	if len(parts) == 0 {
		parts = slices.Sorted(maps.Keys(c.errs))
	}
	var errs []error
	for _, p := range parts {
		errs = append(errs, c.errs[p])
	}
	return errors.Join(errs...)
}

// Load reads the configuration of this node.
func Load(env snapenv.Env) Config { return load(env, hostinfo.Hostname) }

func load(env snapenv.Env, hostname func() (string, error)) Config {
	r := &reader{env: env, files: map[string]*args.File{}}
	c := Config{State: ReadState(env), errs: map[Part]error{}}
	note := func(part Part, err error) {
		if err != nil {
			c.errs[part] = errors.Join(c.errs[part], err)
		}
	}
	var err error
	c.NodeName, err = r.nodeName(hostname)
	note(PartName, err)
	note(PartRenamed, CheckRegistered(env, c.NodeName))

	c.APIServer.Port, err = number(r, APIServer, "secure-port", DefaultAPIServerPort)
	note(PartAPIPort, err)
	c.APIServer.ServiceCIDRs, err = list(r, APIServer, "service-cluster-ip-range", netip.ParsePrefix)
	note(PartServiceCIDRs, err)
	if len(c.APIServer.ServiceCIDRs) == 0 {
		c.APIServer.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix(defaultServiceCIDR)}
	}
	c.APIServer.AuthorizationMode, _ = r.value(APIServer, "authorization-mode")
	c.APIServer.EncryptionConfig, _ = r.value(APIServer, "encryption-provider-config")
	c.APIServer.PreferredAddressTypes, _ = list(r, APIServer, "kubelet-preferred-address-types", func(s string) (string, error) { return s, nil })

	c.ClusterCIDRs, err = list(r, KubeProxy, "cluster-cidr", netip.ParsePrefix)
	note(PartClusterCIDRs, err)
	c.NodeIPs, err = list(r, Kubelet, "node-ip", netip.ParseAddr)
	note(PartNodeIP, err)
	c.ClusterDomain = defaultDomain
	if v, ok := r.value(Kubelet, "cluster-domain"); ok {
		c.ClusterDomain = v
	}

	c.AgentHost, c.AgentPort, err = r.agentAddress()
	note(PartAgent, err)
	c.Datastore = r.datastore(c.State)
	for _, err := range r.errs {
		note(partFiles, err)
	}
	return c
}

// reader has the argument files that were read, each once.
type reader struct {
	env   snapenv.Env
	files map[string]*args.File // nil for one that cannot be read
	errs  []error
}

// value returns a flag's value with variables expanded; ok is false where it is not set.
func (r *reader) value(file, flag string) (v string, ok bool) {
	f, known := r.files[file]
	if !known {
		var err error
		if f, err = File(r.env, file); err != nil {
			r.errs = append(r.errs, err)
		}
		r.files[file] = f
	}
	if f == nil {
		return "", false
	}
	return f.Value(flag, r.env.Lookup)
}

// wrong is the error about a flag's value.
func (r *reader) wrong(file, flag, value string, err error) error {
	return fmt.Errorf("cannot use --%s=%s in %s: %w", flag, value, r.env.Args(file), err)
}

// list reads a value of parts that are separated by commas. One bad part spoils all: the
// program that the flag is for refuses it.
func list[T any](r *reader, file, flag string, parse func(string) (T, error)) ([]T, error) {
	text, _ := r.value(file, flag)
	if text == "" {
		return nil, nil
	}
	var out []T
	for part := range strings.SplitSeq(text, ",") {
		v, err := parse(strings.TrimSpace(part))
		if err != nil {
			return nil, r.wrong(file, flag, text, err)
		}
		out = append(out, v)
	}
	return out, nil
}

func number(r *reader, file, flag string, def int) (int, error) {
	text, ok := r.value(file, flag)
	if !ok {
		return def, nil
	}
	port, err := parsePort(text)
	if err != nil {
		return def, r.wrong(file, flag, text, err)
	}
	return port, nil
}

func parsePort(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return 0, errors.New("it is not a port, which is a number from 1 to 65535")
	}
	return int(n), nil
}

func (r *reader) agentAddress() (host string, port int, err error) {
	const loopback = "127.0.0.1"
	text, ok := r.value(agentFile, "bind")
	if !ok {
		return loopback, DefaultAgentPort, nil
	}
	host, portText, err := net.SplitHostPort(text)
	if err == nil {
		if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
			host = loopback
		}
		if port, err = parsePort(portText); err == nil {
			return host, port, nil
		}
	}
	return loopback, DefaultAgentPort, r.wrong(agentFile, "bind", text, err)
}

func (r *reader) datastore(s State) (d Datastore) {
	d.Port = storedir.Dir(r.env.Backend()).Port()
	servers, _ := r.value(APIServer, "etcd-servers")
	if !s.Worker && !strings.Contains(servers, ownSocket) {
		for ep := range strings.SplitSeq(servers, ",") {
			ep = strings.Trim(ep, `"' `)
			if _, after, ok := strings.Cut(ep, "://"); ok {
				ep = after
			}
			if ep = strings.TrimRight(ep, "/"); ep != "" {
				d.Endpoints = append(d.Endpoints, ep)
			}
		}
	}
	switch {
	case len(d.Endpoints) > 0:
		d.Owner, d.Servers = ExternalEtcd, servers
		d.CAFile, _ = r.value(APIServer, "etcd-cafile")
		d.CertFile, _ = r.value(APIServer, "etcd-certfile")
		d.KeyFile, _ = r.value(APIServer, "etcd-keyfile")
	case !s.Worker && !s.datastoreOff:
		d.Owner = OwnDatastore
	}
	return d
}

// File reads one argument file, $SNAP_DATA/args/<name>; one that does not exist is empty. It is
// for editors, and for programs' whole lists of arguments.
func File(env snapenv.Env, name string) (*args.File, error) {
	f, err := args.Load(env.Args(name), args.GrammarFor(name))
	if errors.Is(err, fs.ErrNotExist) {
		return args.Parse(nil, args.GrammarFor(name))
	}
	return f, err
}
