package addon

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

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

type ingressValues struct{ Certificate string }

// readIngress reads `enable ingress [--default-ssl-certificate NAMESPACE/NAME]`.
func readIngress(words []string) (ingressValues, error) {
	v, full := ingressValues{}, ""
	err := parseFlags("ingress", words, func(f *pflag.FlagSet) { f.StringVar(&full, "default-ssl-certificate", "", "") })
	if err != nil || full == "" {
		return v, err
	}
	namespace, name, ok := strings.Cut(full, "/")
	if !ok || !objectName.MatchString(name) {
		return v, &ArgumentError{fmt.Sprintf("--default-ssl-certificate is a Secret as NAMESPACE/NAME, and not %q", full)}
	}
	if namespace != ingressNamespace {
		return v, &ArgumentError{fmt.Sprintf("the Secret of --default-ssl-certificate must be in the namespace %s, and not in %q", ingressNamespace, namespace)}
	}
	v.Certificate = name
	return v, nil
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
