package addon

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/spf13/pflag"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// objectName is a name that Kubernetes takes for most objects.
var objectName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

// parseFlags reads the options of an addon, and refuses what is none.
func parseFlags(name string, words []string, define func(*pflag.FlagSet)) error {
	flags := pflag.NewFlagSet(name, pflag.ContinueOnError)
	flags.Usage = func() {}
	define(flags)
	if err := flags.Parse(words); err != nil {
		return &ArgumentError{err.Error()}
	}
	if flags.NArg() > 0 {
		return &ArgumentError{fmt.Sprintf("unexpected argument %q", flags.Arg(0))}
	}
	return nil
}

// registryNamespace holds the registry and its claim.
const registryNamespace = "container-registry"

// registrySize is what the registry asks for where nothing else is said, and at least (cli.md 5.7).
const registrySize = "20Gi"

type registryValues struct{ Size, StorageClass string }

// readRegistry reads `enable registry [--size 40Gi] [--storageclass X]`, or `size=40Gi`.
func readRegistry(words []string) (registryValues, error) {
	v := registryValues{}
	var rest []string
	for _, w := range words {
		if s, ok := strings.CutPrefix(w, "size="); ok {
			w = "--size=" + s
		}
		rest = append(rest, w)
	}
	err := parseFlags("registry", rest, func(f *pflag.FlagSet) {
		f.StringVar(&v.Size, "size", "", "")
		f.StringVar(&v.StorageClass, "storageclass", "", "")
	})
	if err != nil {
		return v, err
	}
	if v.Size != "" {
		size, err := resource.ParseQuantity(v.Size)
		if err != nil {
			return v, &ArgumentError{fmt.Sprintf("--size is a size such as 40Gi, and not %q", v.Size)}
		}
		if size.Cmp(resource.MustParse(registrySize)) < 0 {
			return v, &ArgumentError{fmt.Sprintf("--size is at least %s, and not %s", registrySize, v.Size)}
		}
	}
	if v.StorageClass != "" && !objectName.MatchString(v.StorageClass) {
		return v, &ArgumentError{fmt.Sprintf("%q is not the name of a storage class", v.StorageClass)}
	}
	return v, nil
}

// registryNeeds: the storage, unless it comes from a class of the person's.
func registryNeeds(words []string) []string {
	if v, err := readRegistry(words); err != nil || v.StorageClass != "" {
		return nil
	}
	return []string{"hostpath-storage"}
}

var claims = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}

// renderRegistry takes size and class from a claim that is there: neither can be changed.
func renderRegistry(ctx context.Context, s *Set, words []string) (any, error) {
	v, err := readRegistry(words)
	if err != nil {
		return nil, err
	}
	claim, err := s.client.Resource(claims).Namespace(registryNamespace).Get(ctx, "registry-claim", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("cannot get the registry's claim: %w", err)
	}
	if err == nil {
		size, _, _ := unstructured.NestedString(claim.Object, "spec", "resources", "requests", "storage")
		class, _, _ := unstructured.NestedString(claim.Object, "spec", "storageClassName")
		if v.Size != "" && v.Size != size || v.StorageClass != "" && v.StorageClass != class {
			return nil, &ArgumentError{fmt.Sprintf("its claim %s/registry-claim has %s of class %s, which cannot be changed; for another one delete it, and the images in it, first", registryNamespace, size, class)}
		}
		v.Size, v.StorageClass = size, class
	}
	if v.Size == "" {
		v.Size = registrySize
	}
	if v.StorageClass == "" {
		v.StorageClass = "microk8s-hostpath"
	}
	return v, nil
}

// ingressNamespace holds Traefik, and the certificate for hosts without one of their own.
const ingressNamespace = "ingress"

type ingressValues struct {
	Certificate string
	// Balancers are networks whose PROXY protocol and X-Forwarded-For are believed, with commas between.
	Balancers []string
	// Args are Traefik's own, as YAML.
	Args []string
	// Translated are the annotations of ingress-nginx with an effect, as a list of CEL.
	Translated string
}

// readIngress reads `enable ingress [--default-ssl-certificate NAMESPACE/NAME] [--keep-client-address[=NETWORKS]]
// [--traefik-arg ARGUMENT]...`.
func readIngress(words []string) (ingressValues, error) {
	v, full, balancers := ingressValues{Translated: "'" + strings.Join(nginxAnnotations, "', '") + "'"}, "", ""
	var args []string
	err := parseFlags("ingress", words, func(f *pflag.FlagSet) {
		f.StringVar(&full, "default-ssl-certificate", "", "")
		f.StringVar(&balancers, "keep-client-address", "", "")
		f.Lookup("keep-client-address").NoOptDefVal = directClients
		f.StringArrayVar(&args, "traefik-arg", nil, "")
	})
	if err != nil {
		return v, err
	}
	if full != "" {
		namespace, name, ok := strings.Cut(full, "/")
		if !ok || !objectName.MatchString(name) {
			return v, &ArgumentError{fmt.Sprintf("--default-ssl-certificate is a Secret as NAMESPACE/NAME, and not %q", full)}
		}
		if namespace != ingressNamespace {
			return v, &ArgumentError{fmt.Sprintf("the Secret of --default-ssl-certificate must be in the namespace %s, and not in %q", ingressNamespace, namespace)}
		}
		v.Certificate = name
	}
	if balancers != "" && balancers != directClients {
		for text := range strings.SplitSeq(balancers, ",") {
			network, err := netip.ParsePrefix(text)
			if addr, addrErr := netip.ParseAddr(text); addrErr == nil && addr.Zone() == "" {
				network, err = netip.PrefixFrom(addr, addr.BitLen()), nil
			}
			if err != nil {
				return v, &ArgumentError{fmt.Sprintf("--keep-client-address takes addresses or networks of load balancers with commas between, and %q is neither", text)}
			}
			if network.Bits() == 0 {
				return v, &ArgumentError{fmt.Sprintf("--keep-client-address=%s would believe everybody who names another address as his own; name the load balancers", text)}
			}
			v.Balancers = append(v.Balancers, network.String())
		}
		v.Balancers = []string{strings.Join(v.Balancers, ",")}
	}
	for _, arg := range args {
		name, _, _ := strings.Cut(arg, "=")
		key := strings.ToLower(strings.TrimLeft(name, "-"))
		switch {
		case !strings.HasPrefix(arg, "--") || key == "" || strings.ContainsFunc(arg, unicode.IsControl):
			return v, &ArgumentError{fmt.Sprintf("--traefik-arg is an argument of Traefik's such as --traefik-arg=--accesslog=true, and not %q", arg)}
		case slices.Contains(fixedArgs, key) || strings.HasPrefix(key, "configfile"):
			return v, &ArgumentError{fmt.Sprintf("--traefik-arg cannot set %s, on which the addon depends", name)}
		}
		quoted, err := json.Marshal(arg) // JSON is YAML
		if err != nil {
			return v, err
		}
		v.Args = append(v.Args, string(quoted))
	}
	return v, nil
}

// directClients stands for --keep-client-address without load balancers.
const directClients = "direct"

// fixedArgs are arguments of Traefik without which the addon's own parts do not find each other.
var fixedArgs = []string{
	"entrypoints.web.address", "entrypoints.websecure.address", "entrypoints.traefik.address", "ping", "ping.entrypoint", "ping.manualrouting",
	"providers.kubernetesingress", "providers.kubernetesingress.endpoint", "providers.kubernetesingress.token", "providers.kubernetesingress.ingressclass",
	"providers.kubernetesingressnginx", "providers.kubernetesingressnginx.endpoint", "providers.kubernetesingressnginx.token", "providers.kubernetesingressnginx.controllerclass",
	"providers.kubernetescrd", "providers.kubernetescrd.endpoint", "providers.kubernetescrd.token",
	"providers.file", "providers.file.filename", "providers.file.directory",
}

// nginxAnnotations are those of ingress-nginx, without their prefix, that Traefik v3.7.13 reads
// (pkg/provider/kubernetes/ingress-nginx/annotations.go), less the snippets and ModSecurity, which this build does
// not take. Others are answered with a warning.
var nginxAnnotations = []string{
	"affinity", "affinity-canary-behavior", "allowlist-source-range", "app-root", "auth-method", "auth-realm",
	"auth-response-headers", "auth-secret", "auth-secret-type", "auth-signin", "auth-tls-pass-certificate-to-upstream",
	"auth-tls-secret", "auth-tls-verify-client", "auth-type", "auth-url", "backend-protocol", "canary",
	"canary-by-cookie", "canary-by-header", "canary-by-header-pattern", "canary-by-header-value", "canary-weight",
	"canary-weight-total", "client-body-buffer-size", "cors-allow-credentials", "cors-allow-headers", "cors-allow-methods",
	"cors-allow-origin", "cors-expose-headers", "cors-max-age", "custom-headers", "custom-http-errors", "default-backend",
	"enable-access-log", "enable-cors", "enable-global-auth", "force-ssl-redirect", "from-to-www-redirect",
	"limit-burst-multiplier", "limit-connections", "limit-rpm", "limit-rps", "permanent-redirect", "permanent-redirect-code",
	"proxy-body-size", "proxy-buffer-size", "proxy-buffering", "proxy-buffers-number", "proxy-connect-timeout",
	"proxy-http-version", "proxy-max-temp-file-size", "proxy-next-upstream", "proxy-next-upstream-timeout",
	"proxy-next-upstream-tries", "proxy-read-timeout", "proxy-request-buffering", "proxy-send-timeout", "proxy-ssl-name",
	"proxy-ssl-secret", "proxy-ssl-server-name", "proxy-ssl-verify", "rewrite-target", "server-alias", "service-upstream",
	"session-cookie-domain", "session-cookie-expires", "session-cookie-max-age", "session-cookie-name", "session-cookie-path",
	"session-cookie-samesite", "session-cookie-secure", "ssl-passthrough", "ssl-redirect", "temporal-redirect",
	"temporal-redirect-code", "upstream-hash-by", "upstream-vhost", "use-regex", "whitelist-source-range", "x-forwarded-prefix",
}

type dashboardValues struct{ Host string }

// readDashboard reads `enable dashboard [--host NAME]`.
func readDashboard(words []string) (dashboardValues, error) {
	v := dashboardValues{}
	err := parseFlags("dashboard", words, func(f *pflag.FlagSet) { f.StringVar(&v.Host, "host", "", "") })
	if err == nil && v.Host != "" && (!objectName.MatchString(v.Host) || net.ParseIP(v.Host) != nil) {
		err = &ArgumentError{fmt.Sprintf("--host is a host name that leads to a node, such as dashboard.example.com, and not %q", v.Host)}
	}
	return v, err
}

// dashboardNeeds returns the addon that serves the host name.
func dashboardNeeds(words []string) []string {
	if v, err := readDashboard(words); err == nil && v.Host != "" {
		return []string{"ingress"}
	}
	return nil
}

type hostAccessValues struct{ IP netip.Addr }

// readHostAccess reads `enable host-access [ip=10.0.1.1]`.
func readHostAccess(words []string) (hostAccessValues, error) {
	v := hostAccessValues{IP: netip.AddrFrom4([4]byte{10, 0, 1, 1})}
	for i, w := range words {
		text, ok := strings.CutPrefix(w, "ip=")
		if !ok || i > 0 {
			return v, &ArgumentError{fmt.Sprintf("unexpected argument %q: it takes ip=ADDRESS", w)}
		}
		ip, err := netip.ParseAddr(text)
		if err != nil || ip.Zone() != "" {
			return v, &ArgumentError{fmt.Sprintf("%q is not an address", text)}
		}
		if ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() {
			return v, &ArgumentError{fmt.Sprintf("pods cannot reach their node at %s", ip)}
		}
		v.IP = ip
	}
	return v, nil
}

// values makes the values of an addon from the function that reads its arguments alone.
func values[T any](read func([]string) (T, error)) func(context.Context, *Set, []string) (any, error) {
	return func(_ context.Context, _ *Set, words []string) (any, error) { return read(words) }
}
