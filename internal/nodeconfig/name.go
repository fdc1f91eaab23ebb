package nodeconfig

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"microk8s/internal/args"
	"microk8s/internal/snapenv"
)

// NodeName returns the name under which the cluster knows this node: --hostname-override in
// args/kubelet, else what hostname returns, without blanks around it and in lower case, as the
// kubelet takes it. Everything that needs the name uses this one: kubelet, kube-proxy, pod
// network, certificates, joins and status.
//
// It is an error when the name is none that a node can have, and when args/kube-proxy has another
// --hostname-override than args/kubelet: kube-proxy looks for the Node object of that name and
// would not find it. A file that cannot be read counts as one without flags.
func NodeName(env snapenv.Env, hostname func() (string, error)) (string, error) {
	return (&reader{env: env, files: map[string]*args.File{}}).nodeName(hostname)
}

const overrideFlag = "hostname-override"

func (r *reader) nodeName(hostname func() (string, error)) (string, error) {
	override, _ := r.value(Kubelet, overrideFlag)
	name, from := override, fmt.Sprintf("--%s in %s", overrideFlag, r.env.Args(Kubelet))
	if name == "" {
		var err error
		if name, err = hostname(); err != nil {
			return "", err
		}
		from = "the host's name"
	}
	name = normalized(name)
	if err := CheckNodeName(name); err != nil {
		next := "correct it and run: microk8s start"
		if override == "" {
			next = fmt.Sprintf("change it with: hostnamectl set-hostname NAME; or leave it and add --%s=NAME to %s; then run: microk8s start", overrideFlag, r.env.Args(Kubelet))
		}
		return "", fmt.Errorf("%s: %w; %s", from, err, next)
	}
	if proxy, _ := r.value(KubeProxy, overrideFlag); proxy != "" && normalized(proxy) != name {
		return "", fmt.Errorf("--%s=%s in %s is not the name of this node, %s; remove it there (kube-proxy follows %s) and run: microk8s start",
			overrideFlag, proxy, r.env.Args(KubeProxy), name, r.env.Args(Kubelet))
	}
	return name, nil
}

// normalized is what Kubernetes' daemons make of a host's name
// (k8s.io/kubernetes/pkg/util/node, GetHostname).
func normalized(name string) string { return strings.ToLower(strings.TrimSpace(name)) }

// CheckNodeName reports why a name cannot be a node's: it must be a DNS-1123 subdomain, and fit
// into the label kubernetes.io/hostname, which the API server checks.
func CheckNodeName(name string) error {
	problems := append(validation.IsDNS1123Subdomain(name), validation.IsValidLabelValue(name)...)
	if len(problems) == 0 {
		return nil
	}
	if r := []rune(name); len(r) > 64 {
		name = string(r[:64]) + "…"
	}
	return fmt.Errorf("%q cannot be the name of a node: %s", name, problems[0])
}
