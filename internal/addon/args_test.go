package addon

import (
	"strings"
	"testing"
)

func TestArguments(t *testing.T) {
	for _, tc := range []struct{ addon, args, err string }{
		{"registry", "", ""},
		{"registry", "--size 40Gi", ""},
		{"registry", "size=40Gi", ""},
		{"registry", "--storageclass fast --size=1Ti", ""},
		{"registry", "--size 10Gi", "at least 20Gi"},
		{"registry", "size=big", "a size such as 40Gi"},
		{"registry", "--storageclass Fast{{.}}", "not the name of a storage class"},
		{"registry", "40Gi", "unexpected argument"},
		{"ingress", "", ""},
		{"ingress", "--default-ssl-certificate ingress/mine", ""},
		{"ingress", "--default-ssl-certificate mine", "NAMESPACE/NAME"},
		{"ingress", "--default-ssl-certificate default/mine", "must be in the namespace ingress"},
		{"ingress", "--default-ssl-certificate=ingress/x}y", "NAMESPACE/NAME"},
		{"ingress", "-V 1.2", "unknown shorthand"},
		{"ingress", "--keep-client-address", ""},
		{"ingress", "--keep-client-address=192.0.2.0/24,2001:db8::1", ""},
		{"ingress", "--keep-client-address=lb.example.test", "is neither"},
		{"ingress", "--keep-client-address=0.0.0.0/0", "name the load balancers"},
		{"ingress", "--keep-client-address=fe80::1%eth0", "is neither"},
		{"ingress", "--keep-client-address 192.0.2.0/24", "unexpected argument"},
		{"ingress", "--traefik-arg=--accesslog=true --traefik-arg --log.level=DEBUG", ""},
		{"ingress", "--traefik-arg=accesslog", "is an argument of Traefik's such as"},
		{"ingress", "--traefik-arg=--", "is an argument of Traefik's such as"},
		{"ingress", "--traefik-arg=--entryPoints.web.address=:80", "cannot set --entryPoints.web.address"},
		{"ingress", "--traefik-arg=--providers.kubernetescrd.ENDPOINT=x", "on which the addon depends"},
		{"ingress", "--traefik-arg=--configFile=/x", "on which the addon depends"},
		{"host-access", "", ""},
		{"host-access", "ip=10.0.9.1", ""},
		{"host-access", "ip=fd00::1", ""},
		{"host-access", "ip=ten", "is not an address"},
		{"host-access", "ip=127.0.0.1", "cannot reach"},
		{"host-access", "10.0.9.1", "it takes ip=ADDRESS"},
		{"host-access", "ip=10.0.9.1 ip=10.0.9.2", "unexpected argument"},
		{"metrics-server", "", ""},
		{"metrics-server", "now", "takes no arguments"},
	} {
		err := Check(Addon{Repository: CoreRepository, Name: tc.addon}, strings.Fields(tc.args))
		if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
			t.Errorf("enable %s %s: %v, want %q", tc.addon, tc.args, err, tc.err)
		}
	}
}

func TestNeeds(t *testing.T) {
	registry := Addon{Repository: CoreRepository, Name: "registry"}
	if got := registry.Needs(nil); len(got) != 1 || got[0] != "hostpath-storage" {
		t.Errorf("registry needs %q", got)
	}
	if got := registry.Needs([]string{"--storageclass", "mine"}); len(got) != 0 {
		t.Errorf("registry with a class needs %q", got)
	}
}

// Every manifest can be filled with the values of default arguments, or of those that it needs, and asks for no more.
func TestManifests(t *testing.T) {
	s, f := open(t)
	for name := range parts {
		a, err := s.Find(name)
		if err != nil {
			t.Fatal(err)
		}
		var args []string
		if a.Question() != "" {
			args = []string{"203.0.113.10-203.0.113.19"}
		}
		values, err := parts[name].values(t.Context(), s, args)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		objects, err := render(a.dir, values)
		if err != nil || len(objects) == 0 {
			t.Errorf("%s: %d objects, %v", name, len(objects), err)
		}
	}
	if there := f.Paths(); len(there) != 0 {
		t.Errorf("rendering changed the cluster: %v", there)
	}
}
