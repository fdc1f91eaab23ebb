package ingressrights

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// use is what a Secret is named for. Whoever writes an Ingress or one of Traefik's kinds can name any
// Secret of the namespace: only one that can be of that use is read.
type use string

const (
	certificate use = "certificate"         // with its key
	authority   use = "certificate of a CA" // for what a backend or client shows
	users       use = "list of users"       // with hashes of passwords, or one user
	publicMap   use = "ConfigMap"           // a ConfigMap, and no Secret
	nginxPrefix     = "nginx.ingress.kubernetes.io/"
)

// reference is a Secret or ConfigMap that an object of its namespace names.
type reference struct {
	ns, name string
	use      use
}

// fits reports whether a Secret can be of a use.
func (u use) fits(s *corev1.Secret) bool {
	switch u {
	case certificate:
		return s.Type == corev1.SecretTypeTLS || s.Type == corev1.SecretTypeOpaque && len(s.Data[corev1.TLSCertKey]) > 0 && len(s.Data[corev1.TLSPrivateKeyKey]) > 0
	case authority: // the keys that Traefik takes it from
		return (s.Type == corev1.SecretTypeTLS || s.Type == corev1.SecretTypeOpaque) && (len(s.Data["ca.crt"]) > 0 || len(s.Data["tls.ca"]) > 0)
	case users:
		if s.Type == corev1.SecretTypeBasicAuth {
			return true
		}
		text, ok := s.Data["auth"]
		if !ok && len(s.Data) == 1 {
			for _, text = range s.Data {
			}
		}
		return s.Type == corev1.SecretTypeOpaque && isUsers(string(text))
	}
	return false
}

// isUsers reports whether a text has nothing but lines USER:HASH, as htpasswd writes them.
func isUsers(text string) bool {
	found := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if user, hash, ok := strings.Cut(line, ":"); !ok || user == "" || hash == "" {
			return false
		}
		found = true
	}
	return found
}

// Kinds are those of Traefik that name Secrets or ConfigMaps.
func Kinds() []schema.GroupVersionResource {
	var out []schema.GroupVersionResource
	for _, resource := range []string{"ingressroutes", "ingressroutetcps", "middlewares", "serverstransports", "serverstransporttcps", "tlsoptions", "tlsstores"} {
		out = append(out, schema.GroupVersionResource{Group: "traefik.io", Version: "v1alpha1", Resource: resource})
	}
	return out
}

// fields says in which fields of Traefik's kinds Secrets are named, by use; "[]" goes through a list.
// A name is of the object's own namespace.
var fields = []struct {
	path string
	use  use
}{
	{"tls.secretName", certificate}, // IngressRoute, IngressRouteTCP
	{"defaultCertificate.secretName", certificate},
	{"certificates[].secretName", certificate}, // TLSStore
	{"clientAuth.secretNames[]", authority},    // TLSOption
	{"basicAuth.secret", users},                // Middleware
	{"digestAuth.secret", users},
	{"forwardAuth.tls.caSecret", authority},
	{"forwardAuth.tls.certSecret", certificate},
	{"rootCAs[].secret", authority}, // ServersTransport
	{"rootCAs[].configMap", publicMap},
	{"rootCAsSecrets[]", authority},
	{"certificatesSecrets[]", certificate},
	{"tls.rootCAs[].secret", authority}, // ServersTransportTCP
	{"tls.rootCAs[].configMap", publicMap},
	{"tls.rootCAsSecrets[]", authority},
	{"tls.certificatesSecrets[]", certificate},
}

// namedByKind returns what an object of Traefik's kinds names.
func namedByKind(o *unstructured.Unstructured) []reference {
	if o.GetNamespace() == metav1.NamespaceSystem {
		return nil
	}
	var out []reference
	for _, f := range fields {
		for _, name := range valuesAt(o.Object["spec"], strings.Split(f.path, ".")) {
			out = append(out, reference{o.GetNamespace(), name, f.use})
		}
	}
	return out
}

// valuesAt returns the texts at a path.
func valuesAt(v any, path []string) []string {
	if len(path) == 0 {
		if text, ok := v.(string); ok && text != "" {
			return []string{text}
		}
		return nil
	}
	fields, ok := v.(map[string]any)
	if !ok {
		return nil
	}
	key, list := strings.CutSuffix(path[0], "[]")
	if !list {
		return valuesAt(fields[key], path[1:])
	}
	items, _ := fields[key].([]any)
	var out []string
	for _, item := range items {
		out = append(out, valuesAt(item, path[1:])...)
	}
	return out
}

// named returns what an Ingress names, unless it is of another controller or in kube-system.
func named(ing *networkingv1.Ingress, served func(class string) bool) []reference {
	if ing.Namespace == metav1.NamespaceSystem {
		return nil
	}
	if c := ing.Spec.IngressClassName; c != nil {
		if !served(*c) {
			return nil
		}
	} else if a := ing.Annotations[classAnnotation]; a != "" && a != annotated && !served(a) {
		return nil
	}
	var out []reference
	add := func(name string, u use) {
		// NAMESPACE/NAME is taken for the Ingress's own namespace only.
		if ns, short, ok := strings.Cut(name, "/"); ok && ns == ing.Namespace {
			name = short
		}
		if name != "" && !strings.Contains(name, "/") {
			out = append(out, reference{ing.Namespace, name, u})
		}
	}
	for _, t := range ing.Spec.TLS {
		add(t.SecretName, certificate)
	}
	add(ing.Annotations[nginxPrefix+"auth-secret"], users)
	add(ing.Annotations[nginxPrefix+"auth-tls-secret"], authority)
	add(ing.Annotations[nginxPrefix+"proxy-ssl-secret"], authority)
	add(ing.Annotations[nginxPrefix+"custom-headers"], publicMap)
	return out
}
