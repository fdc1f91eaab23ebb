package cis

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/podsecurity"
	"microk8s/internal/snapenv"
)

const (
	apiServer  = "kube-apiserver"
	manager    = "kube-controller-manager"
	scheduler  = "kube-scheduler"
	kubelet    = "kubelet"
	proxy      = "kube-proxy"
	loopback   = "127.0.0.1"
	modeOf     = "mode and owner of the file"
	argument   = "argument file"
	forPersons = "depends on what runs in the cluster and who uses it"
)

// strong are the cipher suites that the benchmark lists. Those of TLS 1.3 cannot be chosen and
// are always on.
var strong = []string{
	"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256",
	"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
	"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
}

// argsFile names an argument file.
func argsFile(name string) func(snapenv.Env) []string {
	return func(e snapenv.Env) []string { return []string{e.Args(name)} }
}

// credential names a kubeconfig.
func credential(name string) func(snapenv.Env) []string {
	return func(e snapenv.Env) []string { return []string{e.Credential(name)} }
}

// cert names files in the folder of certificates.
func cert(pattern string) func(snapenv.Env) []string {
	return func(e snapenv.Env) []string { return []string{e.Cert(pattern)} }
}

// pair is the two controls, of mode and of owner, that the benchmark has for one file. Both are
// looked at together.
func pair(first, second, what string, limit string, files func(snapenv.Env) []string) []Control {
	var bits os.FileMode
	if _, err := fmt.Sscanf(limit, "%o", &bits); err != nil {
		panic(err) // the table is wrong
	}
	return []Control{
		{ID: first, Title: what + ": mode", How: modeOf, Wanted: limit + " or less", check: mode(bits, files)},
		{ID: second, Title: what + ": owner", How: modeOf, Wanted: "root:root", check: mode(bits, files)},
	}
}

// person is a control that only a person can check.
func person(id, title, reason string) Control {
	return Control{ID: id, Title: title, How: "by a person", Wanted: "-", Reason: cmp.Or(reason, forPersons), fixed: Manual}
}

// without is a control about something that this product does not have.
func without(id, title, reason string) Control {
	return Control{ID: id, Title: title, How: "-", Wanted: "-", Reason: reason, fixed: None}
}

// Controls returns the table, ordered by number.
func Controls() []Control {
	var t []Control
	add := func(c ...Control) { t = append(t, c...) }

	// 1.1 Files of the control plane.
	add(pair("1.1.1", "1.1.2", "Arguments of the API server", "600", argsFile(apiServer))...)
	add(pair("1.1.3", "1.1.4", "Arguments of the controller manager", "600", argsFile(manager))...)
	add(pair("1.1.5", "1.1.6", "Arguments of the scheduler", "600", argsFile(scheduler))...)
	add(pair("1.1.7", "1.1.8", "Arguments of the datastore", "600", argsFile("k8s-dqlite"))...)
	add(pair("1.1.9", "1.1.10", "CNI configuration", "600", func(e snapenv.Env) []string { return []string{e.CNIConf() + "/*"} })...)
	add(Control{ID: "1.1.11", Title: "Folder of the datastore: mode", How: modeOf, Wanted: "700 or less",
		check: mode(0o700, func(e snapenv.Env) []string { return []string{e.BackendLive()} })},
		without("1.1.12", "Folder of the datastore: a user of its own", "the datastore runs as root, as every service of the product; there is no account that could be given less"))
	add(pair("1.1.13", "1.1.14", "Administrator's kubeconfig", "600", credential("client.config"))...)
	add(pair("1.1.15", "1.1.16", "Scheduler's kubeconfig", "600", credential("scheduler.config"))...)
	add(pair("1.1.17", "1.1.18", "Controller manager's kubeconfig", "600", credential("controller.config"))...)
	add(Control{ID: "1.1.19", Title: "Folder of the certificates: owner", How: modeOf, Wanted: "root:root", check: mode(0o755, func(e snapenv.Env) []string { return []string{e.CertsDir()} })},
		Control{ID: "1.1.20", Title: "Certificates: mode", How: modeOf, Wanted: "644 or less", check: mode(0o644, cert("*.crt"))},
		Control{ID: "1.1.21", Title: "Private keys: mode", How: modeOf, Wanted: "600", check: mode(0o600, cert("*.key"))})

	// 1.2 API server.
	add(Control{ID: "1.2.1", Title: "Requests without credentials reach health checks only", How: "authentication configuration", Wanted: "health paths, or none", check: anonymous},
		Control{ID: "1.2.2", Title: "No static tokens", How: argument, Wanted: "not set", check: flagUnset(apiServer, "token-auth-file")},
		Control{ID: "1.2.3", Title: "Services cannot claim external addresses", How: argument + ", shipped policies", Wanted: "refused", check: externalIPs},
		Control{ID: "1.2.4", Title: "Client certificate towards kubelets", How: argument, Wanted: "set", check: flagsSet(apiServer, "kubelet-client-certificate", "kubelet-client-key")},
		Control{ID: "1.2.5", Title: "Certificates of kubelets are verified", How: argument, Wanted: "set", check: flagsSet(apiServer, "kubelet-certificate-authority")},
		Control{ID: "1.2.6", Title: "Not everything is allowed", How: argument, Wanted: "no AlwaysAllow", check: listHas(apiServer, "authorization-mode", "AlwaysAllow", false)},
		Control{ID: "1.2.7", Title: "Node authorization", How: argument, Wanted: "Node", check: listHas(apiServer, "authorization-mode", "Node", true)},
		Control{ID: "1.2.8", Title: "RBAC", How: argument, Wanted: "RBAC", check: listHas(apiServer, "authorization-mode", "RBAC", true)},
		Control{ID: "1.2.9", Title: "Events are limited", How: argument, Wanted: "EventRateLimit", check: listHas(apiServer, "enable-admission-plugins", "EventRateLimit", true)},
		Control{ID: "1.2.10", Title: "No admission of everything", How: argument, Wanted: "no AlwaysAdmit", check: listHas(apiServer, "enable-admission-plugins", "AlwaysAdmit", false)},
		Control{ID: "1.2.11", Title: "Images are pulled at each start of a pod", How: argument, Wanted: "AlwaysPullImages", Reason: pullReason,
			check: func(n *Node) finding {
				f := listHas(apiServer, "enable-admission-plugins", "AlwaysPullImages", true)(n)
				f.accept = pullReason
				return f
			}},
		Control{ID: "1.2.12", Title: "Admission of service accounts", How: argument, Wanted: "not disabled", check: listHas(apiServer, "disable-admission-plugins", "ServiceAccount", false)},
		Control{ID: "1.2.13", Title: "Admission of the namespaces' life cycle", How: argument, Wanted: "not disabled", check: listHas(apiServer, "disable-admission-plugins", "NamespaceLifecycle", false)},
		Control{ID: "1.2.14", Title: "Kubelets write their own objects only", How: argument, Wanted: "NodeRestriction", check: listHas(apiServer, "enable-admission-plugins", "NodeRestriction", true)},
		Control{ID: "1.2.15", Title: "API server: no profiling", How: argument, Wanted: "false", check: flagIs(apiServer, "profiling", "false", "true")},
		Control{ID: "1.2.16", Title: "Audit log", How: argument, Wanted: "set", check: func(n *Node) finding {
			v, _ := n.flag(apiServer, "audit-log-path")
			return finding{found: cmp.Or(v, "not set"), ok: v != "", do: setFlag(apiServer, "audit-log-path", "${SNAP_COMMON}/var/log/audit/kube-apiserver.log") + " (and --audit-policy-file=${SNAP_DATA}/args/audit-policy.yaml)"}
		}},
		Control{ID: "1.2.17", Title: "Audit log: days kept", How: argument, Wanted: "30 or more", check: atLeast(apiServer, "audit-log-maxage", 30, 30)},
		Control{ID: "1.2.18", Title: "Audit log: files kept", How: argument, Wanted: "10 or more", check: atLeast(apiServer, "audit-log-maxbackup", 10, 10)},
		Control{ID: "1.2.19", Title: "Audit log: MB per file", How: argument, Wanted: "100 or more", check: atLeast(apiServer, "audit-log-maxsize", 100, 100)},
		Control{ID: "1.2.20", Title: "Requests end in time", How: argument, Wanted: "not 0", check: func(n *Node) finding {
			v, set := n.flag(apiServer, "request-timeout")
			if !set {
				v = "1m0s (default)"
			}
			return finding{found: v, ok: v != "0" && v != "0s", do: setFlag(apiServer, "request-timeout", "1m")}
		}},
		Control{ID: "1.2.21", Title: "Tokens of deleted service accounts end", How: argument, Wanted: "true", check: flagIs(apiServer, "service-account-lookup", "true", "true")},
		Control{ID: "1.2.22", Title: "Key for tokens of service accounts", How: argument, Wanted: "set", check: flagsSet(apiServer, "service-account-key-file")},
		Control{ID: "1.2.23", Title: "Client certificate towards the datastore", How: argument + ", mode of the socket", Wanted: "TLS, or a socket of root", check: datastoreClient},
		Control{ID: "1.2.24", Title: "API server: serving certificate", How: argument, Wanted: "set", check: flagsSet(apiServer, "tls-cert-file", "tls-private-key-file")},
		Control{ID: "1.2.25", Title: "API server: CA of clients", How: argument, Wanted: "set", check: flagsSet(apiServer, "client-ca-file")},
		Control{ID: "1.2.26", Title: "CA of the datastore", How: argument + ", mode of the socket", Wanted: "TLS, or a socket of root", check: datastoreClient},
		Control{ID: "1.2.27", Title: "Encryption at rest", How: argument, Wanted: "set", check: func(n *Node) finding {
			v, _ := n.flag(apiServer, "encryption-provider-config")
			if v == "" {
				return finding{found: "not set", do: encryptionDo}
			}
			return flagsSet(apiServer, "encryption-provider-config")(n)
		}},
		Control{ID: "1.2.28", Title: "Encryption at rest: Secrets, with a strong provider", How: "encryption configuration", Wanted: "secretbox, kms or aescbc first", check: encryption},
		Control{ID: "1.2.29", Title: "API server: strong ciphers", How: argument, Wanted: "the benchmark's list", check: onlyFrom(apiServer, "tls-cipher-suites", strong)},
		Control{ID: "1.2.30", Title: "Tokens of pods are not extended to a year", How: argument, Wanted: "false", check: flagIs(apiServer, "service-account-extend-token-expiration", "false", "true")})

	// 1.3, 1.4 Controller manager and scheduler.
	add(Control{ID: "1.3.1", Title: "Ended pods are collected", How: argument, Wanted: "set", check: func(n *Node) finding {
		v, _ := n.flag(manager, "terminated-pod-gc-threshold")
		return finding{found: cmp.Or(v, "12500 (default)"), ok: v != "" && v != "0", do: setFlag(manager, "terminated-pod-gc-threshold", "1000")}
	}},
		Control{ID: "1.3.2", Title: "Controller manager: no profiling", How: argument, Wanted: "false", check: flagIs(manager, "profiling", "false", "true")},
		Control{ID: "1.3.3", Title: "Controllers with accounts of their own", How: argument, Wanted: "true", check: flagIs(manager, "use-service-account-credentials", "true", "false")},
		Control{ID: "1.3.4", Title: "Key that signs tokens of service accounts", How: argument, Wanted: "set", check: flagsSet(manager, "service-account-private-key-file")},
		Control{ID: "1.3.5", Title: "CA that pods get", How: argument, Wanted: "set", check: flagsSet(manager, "root-ca-file")},
		Control{ID: "1.3.6", Title: "Kubelets' serving certificates rotate: not switched off", How: argument, Wanted: "not false", check: gateNotFalse(manager)},
		Control{ID: "1.3.7", Title: "Controller manager on the loopback", How: argument, Wanted: loopback, check: flagIs(manager, "bind-address", loopback, "0.0.0.0")},
		Control{ID: "1.4.1", Title: "Scheduler: no profiling", How: argument, Wanted: "false", check: flagIs(scheduler, "profiling", "false", "true")},
		Control{ID: "1.4.2", Title: "Scheduler on the loopback", How: argument, Wanted: loopback, check: flagIs(scheduler, "bind-address", loopback, "0.0.0.0")})

	// 2 Datastore.
	const noListener = "the datastore's etcd API is on a unix socket that only root may open; it has no network listener for clients"
	add(Control{ID: "2.1", Title: "Datastore: TLS for clients", How: "mode of the socket", Wanted: "TLS, or a socket of root", Reason: noListener, check: datastoreClient},
		Control{ID: "2.2", Title: "Datastore: clients are authenticated", How: "mode of the socket", Wanted: "TLS, or a socket of root", Reason: noListener, check: datastoreClient},
		without("2.3", "Datastore: no certificates made by itself for clients", noListener),
		Control{ID: "2.4", Title: "Datastore: TLS between members", How: "files of the datastore", Wanted: "a key pair, key 600", check: datastorePair},
		Control{ID: "2.5", Title: "Datastore: members are authenticated", How: "files of the datastore", Wanted: "the members' key pair", check: datastorePair},
		without("2.6", "Datastore: no certificates made by itself for members", "members have one key pair, which a join hands on; none is made otherwise"),
		Control{ID: "2.7", Title: "Datastore: a CA of its own", How: "files of the datastore", Wanted: "not the cluster's CA", check: datastoreCA})

	// 3 Authentication and audit.
	add(person("3.1.1", "People do not use client certificates", "the administrator's kubeconfig is a client certificate for the machine itself; for people: OIDC (--authentication-config), or kubeconfigs that end"),
		person("3.1.2", "People do not use tokens of service accounts", ""),
		without("3.1.3", "People do not use bootstrap tokens", "bootstrap tokens are off (--enable-bootstrap-token-auth is not set); join tokens of this product are not credentials of the API server"),
		Control{ID: "3.2.1", Title: "Audit policy", How: argument, Wanted: "set", check: flagsSet(apiServer, "audit-policy-file")},
		Control{ID: "3.2.2", Title: "Audit policy keeps what Secrets hold out of the log, and changes and exec in it", How: "audit policy", Wanted: "no body of Secrets; pods, exec", check: auditPolicy})

	// 4 Nodes.
	add(pair("4.1.1", "4.1.2", "Arguments of the kubelet", "600", argsFile(kubelet))...)
	add(pair("4.1.3", "4.1.4", "Kubeconfig of kube-proxy", "600", credential("proxy.config"))...)
	add(pair("4.1.5", "4.1.6", "Kubeconfig of the kubelet", "600", credential("kubelet.config"))...)
	add(pair("4.1.7", "4.1.8", "CA of the kubelet's clients", "644", cert("ca*.crt"))...)
	const noConfig = "the kubelet is configured by its argument file (4.1.1), there is no other"
	add(without("4.1.9", "Configuration file of the kubelet: mode", noConfig), without("4.1.10", "Configuration file of the kubelet: owner", noConfig),
		Control{ID: "4.2.1", Title: "Kubelet: no requests without credentials", How: argument, Wanted: "false", check: flagIs(kubelet, "anonymous-auth", "false", "true")},
		Control{ID: "4.2.2", Title: "Kubelet asks the API server who may", How: argument, Wanted: "Webhook", check: flagIs(kubelet, "authorization-mode", "Webhook", "AlwaysAllow")},
		Control{ID: "4.2.3", Title: "Kubelet: CA of clients", How: argument, Wanted: "set", check: flagsSet(kubelet, "client-ca-file")},
		Control{ID: "4.2.4", Title: "Kubelet: no port without authentication", How: argument, Wanted: "0", check: flagIs(kubelet, "read-only-port", "0", "10255")},
		Control{ID: "4.2.5", Title: "Idle streams end", How: argument, Wanted: "not 0", check: func(n *Node) finding {
			v, set := n.flag(kubelet, "streaming-connection-idle-timeout")
			if !set {
				v = "4h0m0s (default)"
			}
			return finding{found: v, ok: v != "0" && v != "0s", do: setFlag(kubelet, "streaming-connection-idle-timeout", "4h")}
		}},
		without("4.2.6", "Kubelet makes chains of iptables", "services are nftables tables of kube-proxy; nothing uses those chains"),
		Control{ID: "4.2.7", Title: "Kubelet: no other host name", How: argument, Wanted: "not set", check: func(n *Node) finding {
			f := flagUnset(kubelet, "hostname-override")(n)
			if !f.ok {
				f.status, f.accept = Manual, "somebody named this node; its certificate must carry that name"
			}
			return f
		}},
		Control{ID: "4.2.8", Title: "Kubelet: Events are written, but limited", How: argument, Wanted: "above 0", check: func(n *Node) finding {
			v, set := n.flag(kubelet, "event-qps")
			if !set {
				v = "50 (default)"
			}
			return finding{found: v, ok: v != "0", do: setFlag(kubelet, "event-qps", "50")}
		}},
		Control{ID: "4.2.9", Title: "Kubelet: serving certificate", How: argument, Wanted: "set", check: flagsSet(kubelet, "tls-cert-file", "tls-private-key-file")},
		Control{ID: "4.2.10", Title: "Kubelet: certificates rotate", How: argument, Wanted: "not false", Reason: "the cluster agent renews them",
			check: func(n *Node) finding {
				v, set := n.flag(kubelet, "rotate-certificates")
				if !set {
					v = "renewed by the cluster agent"
				}
				return finding{found: v, ok: v != "false", do: "remove --rotate-certificates from args/kubelet"}
			}},
		Control{ID: "4.2.11", Title: "Kubelet: serving certificates rotate", How: argument, Wanted: "not false", check: gateNotFalse(kubelet)},
		Control{ID: "4.2.12", Title: "Kubelet: strong ciphers", How: argument, Wanted: "the benchmark's list", check: onlyFrom(kubelet, "tls-cipher-suites", strong)},
		Control{ID: "4.2.13", Title: "Kubelet: limit of processes of a pod", How: argument, Wanted: "above 0", check: atLeast(kubelet, "pod-max-pids", 1, 4096)},
		Control{ID: "4.2.14", Title: "Kubelet: the runtime's seccomp profile for every pod", How: argument, Wanted: "true", check: flagIs(kubelet, "seccomp-default", "true", "false")},
		Control{ID: "4.3.1", Title: "Metrics of kube-proxy on the loopback", How: argument, Wanted: loopback, check: func(n *Node) finding {
			v, set := n.flag(proxy, "metrics-bind-address")
			if !set {
				v = "127.0.0.1:10249 (default)"
			}
			return finding{found: v, ok: strings.HasPrefix(v, loopback) || strings.HasPrefix(v, "[::1]"), do: "remove --metrics-bind-address from args/kube-proxy, then: microk8s stop && microk8s start"}
		}})

	// 5 Policies.
	add(Control{ID: "5.1.1", Title: "cluster-admin only where needed", How: "ClusterRoleBindings", Wanted: "none besides Kubernetes' own", check: clusterAdmins},
		few("5.1.2", "Few may read Secrets", right{"", []string{"secrets"}, []string{"get", "list", "watch"}}),
		Control{ID: "5.1.3", Title: "Few wildcards in roles", How: "roles", Wanted: "none besides Kubernetes' own", check: wildcards},
		few("5.1.4", "Few may create pods", right{"", []string{"pods"}, []string{"create"}}),
		Control{ID: "5.1.5", Title: "Default service accounts are not used", How: "bindings, pods", Wanted: "no right, no token", check: defaultAccounts},
		person("5.1.6", "Tokens are mounted only where needed", "the addons' pods that do not call the API have none"),
		person("5.1.7", "system:masters is not used", "one certificate of that group is made, for the administrator's kubeconfig of each control-plane node; requests with it are in the audit log"),
		few("5.1.8", "Few may bind, impersonate or escalate", right{rbacv1.GroupName, []string{"roles", "clusterroles"}, []string{"bind", "escalate"}}, right{"", []string{"users", "groups", "serviceaccounts"}, []string{"impersonate"}}),
		few("5.1.9", "Few may create PersistentVolumes", right{"", []string{"persistentvolumes"}, []string{"create"}}),
		few("5.1.10", "Few may use nodes/proxy", right{"", []string{"nodes/proxy"}, []string{"get", "create"}}),
		few("5.1.11", "Few may approve certificate requests", right{"certificates.k8s.io", []string{"certificatesigningrequests/approval"}, []string{"update", "patch"}}),
		few("5.1.12", "Few may change webhook configurations", right{"admissionregistration.k8s.io", []string{"validatingwebhookconfigurations", "mutatingwebhookconfigurations"}, []string{"create", "update", "patch", "delete"}}),
		few("5.1.13", "Few may make tokens of service accounts", right{"", []string{"serviceaccounts/token"}, []string{"create"}}),
		Control{ID: "5.2.1", Title: "A policy for pods is active", How: "admission configuration", Wanted: "PodSecurity, baseline as a warning at least", check: podSecurity})
	for _, p := range [][2]string{
		{"5.2.2", "privileged containers"}, {"5.2.3", "the host's processes"}, {"5.2.4", "the host's IPC"}, {"5.2.5", "the host's network"}, {"5.2.6", "privilege escalation"},
		{"5.2.7", "root in containers"}, {"5.2.8", "NET_RAW"}, {"5.2.9", "added capabilities"}, {"5.2.10", "Windows' host processes"}, {"5.2.11", "hostPath volumes"}, {"5.2.12", "host ports"},
	} {
		if p[0] == "5.2.10" {
			add(without(p[0], "Pods without "+p[1], "nodes run Linux"))
			continue
		}
		// What baseline refuses, restricted refuses too.
		level := []string{podsecurity.Baseline, podsecurity.Restricted}
		if slices.Contains([]string{"5.2.6", "5.2.7", "5.2.8"}, p[0]) {
			level = level[1:]
		}
		add(Control{ID: p[0], Title: "Pods without " + p[1], How: "labels of namespaces", Wanted: "refused: " + level[0], check: enforced(level...)})
	}
	add(Control{ID: "5.3.1", Title: "The network enforces NetworkPolicies", How: "what kubelite says", Wanted: "enforced", check: enforcer}, Control{ID: "5.3.2", Title: "Every namespace has NetworkPolicies", How: "NetworkPolicies, pods", Wanted: "one where pods run", check: policies},
		Control{ID: "5.4.1", Title: "Secrets as files rather than variables", How: "pods", Wanted: "none as variables", check: variables}, person("5.4.2", "Secrets outside of the cluster", ""),
		person("5.5.1", "Where images come from is checked", "no service that could check them is part of the product"),
		person("5.6.1", "Namespaces as borders", ""),
		Control{ID: "5.6.2", Title: "seccomp profile of pods", How: argument, Wanted: "RuntimeDefault for every pod (4.2.14)", check: flagIs(kubelet, "seccomp-default", "true", "false")},
		person("5.6.3", "Pods have a securityContext", ""), Control{ID: "5.6.4", Title: "The namespace default is not used", How: "pods", Wanted: "no pods", check: defaultNamespace})

	// What a new node of this product has beyond the benchmark.
	add(Control{ID: "M.1", Title: "Pods cannot take what the node itself needs", How: argument, Wanted: "memory and pid reserved", check: reserved},
		Control{ID: "M.2", Title: "containerd's metrics are not open to every local user", How: "containerd-template.toml", Wanted: "off", check: runtimeMetrics},
		Control{ID: "M.3", Title: "EventRateLimit limits", How: "its configuration", Wanted: "a limit per namespace", check: eventLimits})
	return t
}

const (
	pullReason   = "nodes run without internet: a pod whose image was imported could not start; whoever may start pods can use any image on the node"
	encryptionDo = "docs/cis.md says how it is switched on for a cluster in use"
)

// The files of the API server that are looked at, as far as they are: linking the API server's
// own types would cost the command line its size.
type (
	authenticationConfig struct {
		Anonymous *struct {
			Enabled    bool `json:"enabled"`
			Conditions []struct {
				Path string `json:"path"`
			} `json:"conditions"`
		} `json:"anonymous"`
	}
	encryptionConfig struct {
		Resources []struct {
			Resources []string                    `json:"resources"`
			Providers []map[string]map[string]any `json:"providers"`
		} `json:"resources"`
	}
	auditPolicyFile struct {
		Rules []struct {
			Level           string   `json:"level"`
			Users           []string `json:"users"`
			UserGroups      []string `json:"userGroups"`
			Verbs           []string `json:"verbs"`
			NonResourceURLs []string `json:"nonResourceURLs"`
			Resources       []struct {
				Resources     []string `json:"resources"`
				ResourceNames []string `json:"resourceNames"`
			} `json:"resources"`
		} `json:"rules"`
	}
)

// few is a control about a right.
func few(id, title string, rights ...right) Control {
	return Control{ID: id, Title: title, How: "roles and bindings", Wanted: "none besides Kubernetes' and the product's own", check: holders(rights...)}
}

// health are the paths that may be reached without credentials.
var health = []string{"/livez", "/readyz", "/healthz"}

func anonymous(n *Node) finding {
	if v, set := n.flag(apiServer, "anonymous-auth"); set && v == "false" {
		return finding{found: "none", ok: true}
	}
	do := "write --authentication-config=${SNAP_DATA}/args/authentication-config.yaml into args/kube-apiserver, then: microk8s stop && microk8s start"
	text := n.text(apiServer, "authentication-config")
	if text == "" {
		return finding{found: "all paths (RBAC decides)", do: do}
	}
	var c authenticationConfig
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		return finding{found: "the configuration cannot be read", do: do}
	}
	switch {
	case c.Anonymous == nil || c.Anonymous.Enabled && len(c.Anonymous.Conditions) == 0:
		return finding{found: "all paths (RBAC decides)", do: do}
	case !c.Anonymous.Enabled:
		return finding{found: "none", ok: true}
	}
	var paths []string
	ok := true
	for _, cond := range c.Anonymous.Conditions {
		paths = append(paths, cond.Path)
		known := false
		for _, h := range health {
			known = known || cond.Path == h || strings.HasPrefix(cond.Path, h+"/")
		}
		ok = ok && known
	}
	return finding{found: strings.Join(paths, ","), ok: ok, do: do}
}

func externalIPs(n *Node) finding {
	f := listHas(apiServer, "enable-admission-plugins", "DenyServiceExternalIPs", true)(n)
	if f.ok {
		f.found = "DenyServiceExternalIPs"
		return f
	}
	for _, name := range []string{"service-external-ips.yaml", "external-ips.yaml"} {
		if exists(n.Env.Manifests() + "/" + name) {
			return finding{found: "a policy of the product", ok: true}
		}
	}
	f.found = "allowed"
	return f
}

// datastoreClient looks at how the API server reaches its datastore.
func datastoreClient(n *Node) finding {
	if d := nodeconfig.Load(n.Env).Datastore; d.Owner == nodeconfig.ExternalEtcd {
		f := flagsSet(apiServer, "etcd-cafile", "etcd-certfile", "etcd-keyfile")(n)
		for s := range strings.SplitSeq(d.Servers, ",") {
			f.ok = f.ok && strings.HasPrefix(s, "https://")
		}
		return f
	}
	if !exists(n.Env.DatastoreSocket()) {
		return finding{found: "the datastore does not run", status: Manual, accept: "start the node and look again"}
	}
	f := n.owned(n.Env.DatastoreSocket(), 0o600)
	f.found = "unix socket, " + f.found
	return f
}

func datastorePair(n *Node) finding {
	if nodeconfig.Load(n.Env).Datastore.Owner == nodeconfig.ExternalEtcd {
		return finding{found: "an etcd of its own", status: Manual, accept: "look at the etcd's own arguments"}
	}
	for _, name := range []string{storedir.CertFile, storedir.KeyFile} {
		if !exists(n.Env.BackendLive() + "/" + name) {
			return finding{found: name + " is missing", do: "restore " + n.Env.BackendLive() + "/" + name + " from another member"}
		}
	}
	f := n.owned(n.Env.BackendLive()+"/"+storedir.KeyFile, 0o600)
	f.found = "cluster.key " + f.found
	return f
}

func datastoreCA(n *Node) finding {
	own, err := os.ReadFile(n.Env.BackendLive() + "/cluster.crt")
	if err != nil {
		return finding{found: "no certificate of the datastore", status: Manual, accept: "look at the etcd's own arguments"}
	}
	ca, err := os.ReadFile(n.Env.Cert("ca.crt"))
	return finding{found: "the members' own certificate", ok: err == nil && string(own) != string(ca), do: "docs/datastore.md says how the key pair is replaced"}
}

func encryption(n *Node) finding {
	text := n.text(apiServer, "encryption-provider-config")
	if text == "" {
		return finding{found: "no encryption", do: encryptionDo}
	}
	var c encryptionConfig
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		return finding{found: "the configuration cannot be read", do: "restore the file"}
	}
	for _, r := range c.Resources {
		for _, kind := range r.Resources {
			if kind != "secrets" && kind != "*." && kind != "*.*" || len(r.Providers) == 0 {
				continue
			}
			for _, name := range []string{"secretbox", "kms", "aescbc"} {
				if _, first := r.Providers[0][name]; first {
					return finding{found: name, ok: true}
				}
			}
			for name := range r.Providers[0] {
				return finding{found: name + " is the first provider", do: "microk8s encryption rotate"}
			}
		}
	}
	return finding{found: "Secrets are not in it", do: encryptionDo}
}

func gateNotFalse(service string) func(*Node) finding {
	return func(n *Node) finding {
		v, _ := n.flag(service, "feature-gates")
		bad := strings.Contains(v, "RotateKubeletServerCertificate=false")
		return finding{found: cmp.Or(v, "default (true)"), ok: !bad, do: "remove RotateKubeletServerCertificate=false from --feature-gates in args/" + service}
	}
}

// auditPolicy looks for the mistakes that put secrets into the log, and for what must be in it.
func auditPolicy(n *Node) finding {
	text := n.text(apiServer, "audit-policy-file")
	if text == "" {
		return finding{found: "no policy", do: "write --audit-policy-file=${SNAP_DATA}/args/audit-policy.yaml into args/kube-apiserver"}
	}
	var p auditPolicyFile
	if err := yaml.Unmarshal([]byte(text), &p); err != nil {
		return finding{found: "the policy cannot be read", do: "restore the file"}
	}
	const do = "copy $SNAP/default-args/audit-policy.yaml to args/audit-policy.yaml"
	for _, want := range []struct{ resource, verb string }{{"secrets", "get"}, {"configmaps", "update"}, {"pods", "create"}, {"pods/exec", "create"}, {"deployments", "update"}} {
		level := levelFor(p, want.resource, want.verb)
		secret := want.resource == "secrets" || want.resource == "configmaps"
		if level == "None" || level == "" {
			return finding{found: want.verb + " of " + want.resource + " is not logged", do: do}
		}
		if secret && level != "Metadata" {
			return finding{found: want.resource + " are logged with their content", do: do}
		}
	}
	return finding{found: fmt.Sprintf("%d rules", len(p.Rules)), ok: true}
}

// levelFor returns the level of the first rule that matches a request of a person, as the API
// server takes it; rules for named users, verbs, namespaces or paths of others do not match.
func levelFor(p auditPolicyFile, resource, verb string) string {
	for _, r := range p.Rules {
		if len(r.Users) > 0 || len(r.UserGroups) > 0 || len(r.NonResourceURLs) > 0 && len(r.Resources) == 0 {
			continue
		}
		if len(r.Verbs) > 0 && !contains(r.Verbs, verb) {
			continue
		}
		if len(r.Resources) == 0 {
			return r.Level
		}
		for _, g := range r.Resources {
			if len(g.ResourceNames) == 0 && (len(g.Resources) == 0 || contains(g.Resources, resource)) {
				return r.Level
			}
		}
	}
	return ""
}

func contains(list []string, word string) bool {
	for _, w := range list {
		if w == word || w == "*" {
			return true
		}
	}
	return false
}

// admission returns the configuration of an admission plugin, inline or in the file that is
// named; "" where there is none.
func (n *Node) admission(plugin string) string {
	var c struct {
		Plugins []struct {
			Name          string         `json:"name"`
			Path          string         `json:"path"`
			Configuration map[string]any `json:"configuration"`
		} `json:"plugins"`
	}
	if yaml.Unmarshal([]byte(n.text(apiServer, "admission-control-config-file")), &c) != nil {
		return ""
	}
	for _, p := range c.Plugins {
		if p.Name != plugin {
			continue
		}
		if p.Configuration != nil {
			data, err := yaml.Marshal(p.Configuration)
			if err != nil {
				return ""
			}
			return string(data)
		}
		path := p.Path
		if !strings.HasPrefix(path, "/") {
			file, _ := n.flag(apiServer, "admission-control-config-file")
			path = file[:strings.LastIndexByte(file, '/')+1] + path
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		return string(data)
	}
	return ""
}

func podSecurity(n *Node) finding {
	do := "copy $SNAP/default-args/admission-control-config-file.yaml to args, then: microk8s stop && microk8s start"
	var c struct {
		Defaults map[string]string `json:"defaults"`
	}
	if yaml.Unmarshal([]byte(n.admission("PodSecurity")), &c) != nil || len(c.Defaults) == 0 {
		return finding{found: "privileged everywhere", do: do}
	}
	strict := func(level string) bool { return level == "baseline" || level == "restricted" }
	found := fmt.Sprintf("enforce %s, warn %s, audit %s", cmp.Or(c.Defaults["enforce"], "privileged"), cmp.Or(c.Defaults["warn"], "privileged"), cmp.Or(c.Defaults["audit"], "privileged"))
	return finding{found: found, ok: strict(c.Defaults["enforce"]) || strict(c.Defaults["warn"]) && strict(c.Defaults["audit"]), do: do}
}

func reserved(n *Node) finding {
	v, _ := n.flag(kubelet, "kube-reserved")
	return finding{found: cmp.Or(v, "nothing"), ok: strings.Contains(v, "memory=") && strings.Contains(v, "pid="),
		do: setFlag(kubelet, "kube-reserved", "memory=256Mi,pid=1000")}
}

func runtimeMetrics(n *Node) finding {
	data, err := os.ReadFile(n.Env.Args("containerd-template.toml"))
	if err != nil {
		return finding{found: "no template", status: Manual, accept: "containerd is configured by other means"}
	}
	in := false
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			in = line == "[metrics]"
		}
		if v, ok := strings.CutPrefix(line, "address = "); in && ok && strings.Trim(v, `"`) != "" {
			return finding{found: strings.Trim(v, `"`), do: `write address = "" below [metrics] in args/containerd-template.toml, then: microk8s stop && microk8s start`}
		}
	}
	return finding{found: "off", ok: true}
}

func eventLimits(n *Node) finding {
	text := n.admission("EventRateLimit")
	return finding{found: fmt.Sprintf("%d limits", strings.Count(text, "type:")), ok: strings.Contains(text, "type: Namespace") || strings.Contains(text, "type: SourceAndObject"),
		do: "copy $SNAP/default-args/eventconfig.yaml to args, then: microk8s stop && microk8s start"}
}
