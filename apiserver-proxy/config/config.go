// Package config knows the files that the API server proxy of a worker serves from, which have
// traefik's format because upstream's have:
//
//   - args/traefik/traefik.yaml, made from traefik-template.yaml at each start: where the proxy
//     listens, and which file lists the servers;
//   - args/traefik/provider.yaml, that list. It is replaced atomically, and never by an empty one;
//   - args/apiserver-proxy, the program's flags.
//
// [Install] writes them for a node that becomes a worker. The package is small so that the
// command line can import it: traefik's decoder, which understands more than is written here, is left
// to apiserver-proxy/proxy.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"microk8s/internal/atomicfile"
	"microk8s/internal/fileaccess"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// Names in the files (cluster-agent.md 5.3).
const (
	EntryPoint = "apiserver"      // in traefik.yaml
	Service    = "kube-apiserver" // in provider.yaml
)

// DefaultAddress is listened on where traefik.yaml names no address. Nothing but programs on
// the worker itself needs the proxy.
var DefaultAddress = net.JoinHostPort("127.0.0.1", strconv.Itoa(DefaultPort))

// DefaultPort is that of an API server whose port is not known.
const DefaultPort = nodeconfig.DefaultAPIServerPort

// Limits of what is read.
const (
	MaxSize    = 1 << 20 // bytes of a file
	MaxServers = 64      // servers in a list; a cluster has a handful
)

// Dir is the folder of traefik's files, $SNAP_DATA/args/traefik.
func Dir(env snapenv.Env) string { return env.Args("traefik") }

// StaticFile is $SNAP_DATA/args/traefik/traefik.yaml.
func StaticFile(env snapenv.Env) string { return filepath.Join(Dir(env), "traefik.yaml") }

// TemplateFile is the file from which [Render] makes StaticFile, and which people edit.
func TemplateFile(env snapenv.Env) string { return filepath.Join(Dir(env), "traefik-template.yaml") }

// DefaultProviderFile is where the list of servers is when traefik.yaml does not say: below the
// link `current` beside the revision's directory, so that it stays right after a refresh.
func DefaultProviderFile(data string) string {
	if data == "" {
		data = snapenv.DefaultData
	}
	return filepath.Join(filepath.Dir(filepath.Clean(data)), "current/args/traefik/provider.yaml")
}

// Static is what counts in traefik.yaml.
type Static struct {
	Address      string // to listen on, host:port
	ProviderFile string // "" when not said
	Watch        bool   // apply changes of ProviderFile while running; true unless said otherwise
	// Ignored says which parts of the file have no effect; nil when there are none.
	Ignored error
}

type staticFile struct {
	EntryPoints struct {
		APIServer struct {
			Address string `json:"address"`
		} `json:"apiserver"`
	} `json:"entryPoints"`
	Providers struct {
		File struct {
			Filename string `json:"filename"`
			Watch    *bool  `json:"watch"`
		} `json:"file"`
	} `json:"providers"`
}

// LoadStatic reads traefik.yaml. Parts of traefik's format that mean nothing here are no error.
func LoadStatic(path string) (Static, error) {
	data, err := Read(path)
	if err != nil {
		return Static{}, err
	}
	s, err := ParseStatic(data)
	if err != nil {
		return Static{}, fmt.Errorf("cannot use %s: %w", path, err)
	}
	return s, nil
}

// ParseStatic is [LoadStatic] for a text.
func ParseStatic(data []byte) (Static, error) {
	var f staticFile
	if err := yaml.Unmarshal(data, &f); err != nil {
		return Static{}, fmt.Errorf("it is not YAML of the right form: %w", err)
	}
	s := Static{
		Address:      f.EntryPoints.APIServer.Address,
		ProviderFile: f.Providers.File.Filename,
		Watch:        f.Providers.File.Watch == nil || *f.Providers.File.Watch,
	}
	s.Ignored = yaml.UnmarshalStrict(data, new(staticFile))
	if s.Address == "" {
		s.Address = DefaultAddress
	}
	_, port, err := net.SplitHostPort(s.Address)
	if err == nil {
		_, err = portNumber(port)
	}
	if err != nil {
		return Static{}, fmt.Errorf("the address %q of entryPoints.%s is not host:port: %w", s.Address, EntryPoint, err)
	}
	return s, nil
}

// Read reads a file of limited size.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	if len(data) > MaxSize {
		return nil, fmt.Errorf("cannot read %s: it has more than %d bytes, which is no configuration", path, MaxSize)
	}
	return data, nil
}

// Address brings a server's address into the form host:port. A URL is reduced to its host part,
// and a host without port gets the default one, as upstream does.
func Address(text string) (string, error) {
	a := strings.TrimSpace(text)
	if strings.Contains(a, "://") {
		u, err := url.Parse(a)
		if err != nil {
			return "", fmt.Errorf("cannot use the server address %q: %w", text, err)
		}
		a = u.Host
	}
	bare, bracketed := strings.CutPrefix(a, "[")
	if bracketed {
		bare, bracketed = strings.CutSuffix(bare, "]")
	}
	if ip, err := netip.ParseAddr(bare); err == nil && (bracketed || bare == a) {
		a = net.JoinHostPort(ip.String(), strconv.Itoa(DefaultPort))
	} else if !strings.Contains(a, ":") && a != "" {
		a = net.JoinHostPort(a, strconv.Itoa(DefaultPort))
	}
	host, port, err := net.SplitHostPort(a)
	if err != nil {
		return "", fmt.Errorf("cannot use the server address %q: %w", text, err)
	}
	n, err := portNumber(port)
	if err != nil {
		return "", fmt.Errorf("cannot use the server address %q: %w", text, err)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "" && !isName(ip.Zone()) {
			return "", fmt.Errorf("cannot use the server address %q: it is no address of a machine", text)
		}
		host = ip.Unmap().String()
	} else if !isName(host) {
		return "", fmt.Errorf("cannot use the server address %q: %q is neither an address nor a name", text, host)
	}
	return net.JoinHostPort(host, strconv.Itoa(n)), nil
}

func portNumber(port string) (int, error) {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a port", port)
	}
	return int(n), nil
}

// isName reports whether a string can be a host's name.
func isName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return false
		}
	}
	return true
}

// Addresses brings a list into order: each in the form host:port, once, sorted, at most
// MaxServers of them. What cannot be used is left out and said in bad.
func Addresses(list []string) (good []string, bad []error) {
	for _, text := range list {
		a, err := Address(text)
		if err != nil {
			bad = append(bad, err)
			continue
		}
		good = append(good, a)
	}
	slices.Sort(good)
	good = slices.Compact(good)
	if len(good) > MaxServers {
		bad = append(bad, fmt.Errorf("cannot use more than %d servers: %d are left out", MaxServers, len(good)-MaxServers))
		good = good[:MaxServers]
	}
	return good, bad
}

// The part of traefik's dynamic configuration that provider.yaml has.
type providerFile struct {
	TCP struct {
		Routers  map[string]router  `json:"routers"`
		Services map[string]service `json:"services"`
	} `json:"tcp"`
}

type router struct {
	Rule    string `json:"rule"`
	Service string `json:"service"`
	TLS     struct {
		Passthrough bool `json:"passthrough"`
	} `json:"tls"`
}

type service struct {
	LoadBalancer struct {
		Servers []server `json:"servers"`
	} `json:"loadBalancer"`
}

type server struct {
	Address string `json:"address"`
}

// Encode returns the text of provider.yaml for servers; an empty list, or one without any address
// that can be used, is an error.
func Encode(addresses []string) ([]byte, error) {
	good, bad := Addresses(addresses)
	if len(good) == 0 {
		return nil, errors.Join(append([]error{errors.New("cannot write an empty list of API servers")}, bad...)...)
	}
	r := router{Rule: "HostSNI(`*`)", Service: Service}
	r.TLS.Passthrough = true
	var s service
	for _, a := range good {
		s.LoadBalancer.Servers = append(s.LoadBalancer.Servers, server{Address: a})
	}
	var f providerFile
	f.TCP.Routers = map[string]router{"Router-1": r}
	f.TCP.Services = map[string]service{Service: s}
	return yaml.Marshal(f)
}

// ReadProvider returns the servers of a list in the form that [WriteProvider] writes, each as
// host:port; a list without any that can be used is an error. It is for programs beside the
// proxy, which itself reads all that traefik does.
func ReadProvider(path string) ([]string, error) {
	data, err := Read(path)
	if err != nil {
		return nil, err
	}
	var f providerFile
	if err := yaml.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("cannot use %s: it is not YAML of the right form: %w", path, err)
	}
	var list []string
	for _, s := range f.TCP.Services[Service].LoadBalancer.Servers {
		list = append(list, s.Address)
	}
	good, bad := Addresses(list)
	if len(good) == 0 {
		return nil, errors.Join(append([]error{fmt.Errorf("cannot use %s: it names no API server", path)}, bad...)...)
	}
	return good, nil
}

// WriteProvider replaces the list of servers at path. Mode and owner of an existing file stay;
// a new one is readable for root and its directory's group. Nothing is written when the text
// is the same.
func WriteProvider(path string, addresses []string) error {
	data, err := Encode(addresses)
	if ext := filepath.Ext(path); err == nil && ext != ".yaml" && ext != ".yml" {
		err = errors.New("its name does not end in .yaml, and only YAML is written; keep the list by hand (--refresh-interval 0)")
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return replace(path, data)
}

// replace writes data to path, keeping mode and owner of what is there.
func replace(path string, data []byte) error {
	mode, like := fs.FileMode(0o660), filepath.Dir(path)
	st, err := os.Stat(path)
	if err == nil {
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
			return nil
		}
		mode = st.Mode().Perm()
	} else if st, err = os.Stat(like); err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return atomicfile.Write(path, data, mode, fileaccess.OwnerOf(st))
}

// Render makes traefik.yaml from its template, with the directories of this revision. Without a
// template traefik.yaml stays as it is.
func Render(env snapenv.Env) error {
	text, err := Read(TemplateFile(env))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	r := strings.NewReplacer("${SNAP_DATA}", env.Data, "${SNAP_COMMON}", env.Common, "${SNAP}", env.Snap)
	return replace(StaticFile(env), []byte(r.Replace(string(text))))
}

// Install writes what the proxy of a new worker needs, with the addresses of the API servers
// that are known so far (host:port; at a join that of the contacted node is enough). Argument
// files that people may have edited stay. It may be repeated. Starting the service is left to
// the caller.
func Install(env snapenv.Env, addresses []string) error {
	a := fileaccess.For(env)
	if err := a.SharedDir(Dir(env)); err != nil {
		return fmt.Errorf("cannot set up the API server proxy: %w", err)
	}
	for _, name := range []string{"apiserver-proxy", "traefik/traefik-template.yaml"} {
		if _, err := os.Stat(env.Args(name)); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(env.DefaultArgs(), name))
		if err != nil {
			return fmt.Errorf("cannot set up the API server proxy: the package is incomplete: %w", err)
		}
		if err := a.WriteShared(env.Args(name), data); err != nil {
			return fmt.Errorf("cannot set up the API server proxy: %w", err)
		}
	}
	if err := Render(env); err != nil {
		return fmt.Errorf("cannot set up the API server proxy: %w", err)
	}
	path, err := ProviderFile(env)
	if err != nil {
		return fmt.Errorf("cannot set up the API server proxy: %w", err)
	}
	if err := WriteProvider(path, addresses); err != nil {
		return fmt.Errorf("cannot set up the API server proxy: %w", err)
	}
	return nil
}

// Uninstall takes away what [Install] and the running proxy wrote about the cluster; templates
// and flags stay for the next join. It may be repeated. The service must be stopped before.
func Uninstall(env snapenv.Env) error {
	files := []string{StaticFile(env), DefaultProviderFile(env.Data), filepath.Join(Dir(env), "provider.yaml")}
	if path, err := ProviderFile(env); err == nil {
		files = append(files, path)
	}
	var errs []error
	for _, path := range files {
		for _, p := range []string{path, LastGood(path)} {
			if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("cannot remove the API server proxy's configuration: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// ProviderFile is the list of servers that the traefik.yaml of env names, or the default one.
func ProviderFile(env snapenv.Env) (string, error) {
	s, err := LoadStatic(StaticFile(env))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if s.ProviderFile != "" {
		return s.ProviderFile, nil
	}
	return DefaultProviderFile(env.Data), nil
}

// LastGood is the file beside a provider file in which the proxy keeps the last list that it
// could use, for a start at which the provider file is damaged.
func LastGood(provider string) string {
	base := filepath.Base(provider)
	return filepath.Join(filepath.Dir(provider), ".last-good-"+strings.TrimSuffix(base, filepath.Ext(base))+".yaml")
}

// ClientAddress is where the proxy of env is reached, for kubeconfigs: an unspecified host becomes
// 127.0.0.1.
func ClientAddress(env snapenv.Env) (string, error) {
	address := DefaultAddress
	s, err := LoadStatic(StaticFile(env))
	if err == nil {
		address = s.Address
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("cannot use the address %q of the API server proxy: %w", address, err)
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}
