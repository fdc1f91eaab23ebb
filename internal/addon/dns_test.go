package addon

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

func TestDNSServers(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want []string
		err  string
	}{
		{args: nil},
		{args: []string{"192.0.2.1"}, want: []string{"192.0.2.1"}},
		{args: []string{"192.0.2.1,2001:db8::1"}, want: []string{"192.0.2.1", "2001:db8::1"}},
		{args: []string{"192.0.2.1:5353,[2001:db8::1]:53"}, want: []string{"192.0.2.1:5353", "[2001:db8::1]:53"}},
		{args: []string{"router"}, err: `"router" is not the address`},
		{args: []string{""}},
		{args: []string{"192.0.2.1,"}, err: `"" is not the address`},
		{args: []string{"192.0.2.1 {\n}"}, err: "is not the address"},
		{args: []string{"127.0.0.53"}, err: "cannot reach"},
		{args: []string{"[::1]:53"}, err: "cannot reach"},
		{args: []string{"0.0.0.0"}, err: "cannot reach"},
		{args: []string{"192.0.2.1", "192.0.2.2,192.0.2.3"}, err: "is not an address for the DNS service"},
		{args: []string{"192.0.2.1", "10.152.183.20", "not_a_domain"}, err: "is not a domain name"},
		{args: []string{"192.0.2.1", "10.152.183.20", "a.test", "x"}, err: "unexpected argument"},
		{args: []string{"192.0.2.1", "10.152.183.20", "a.test"}, want: []string{"192.0.2.1"}},
	} {
		v, err := readDNS(tc.args)
		got := v.servers
		if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
			t.Errorf("%q: error %v, want %q", tc.args, err, tc.err)
		}
		if err == nil && !slices.Equal(got, tc.want) {
			t.Errorf("%q: got %q, want %q", tc.args, got, tc.want)
		}
	}
}

func TestDNSAddress(t *testing.T) {
	for text, want := range map[string]string{
		"":                           "10.152.183.10",
		"10.50.0.0/16":               "10.50.0.10",
		"10.152.183.0/24,fd98::/108": "[10.152.183.10 fd98::a]",
		"fd98::/108":                 "fd98::a",
		"10.152.183.0/30":            "no room",
		"ten":                        "cannot use",
	} {
		env := snapenv.Under(t.TempDir())
		if text != "" {
			if err := os.MkdirAll(env.ArgsDir(), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(env.Args("kube-apiserver"), []byte("--service-cluster-ip-range="+text+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		addr, err := dnsAddresses(env)
		got := fmt.Sprint(addr)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) {
			t.Errorf("%q: got %s, want %s", text, got, want)
		}
	}
}

func TestValidDomain(t *testing.T) {
	for domain, want := range map[string]bool{
		"cluster.local": true, "cluster.local.": true, "x": true, "Home-1.example": true,
		"": false, ".": false, "a..b": false, "a b": false, "a{": false, "a\nforward": false, strings.Repeat("a", 64): false,
	} {
		if got := validDomain(domain); got != want {
			t.Errorf("%q: got %v, want %v", domain, got, want)
		}
	}
}

// What is written to the Corefile follows from whether servers were given.
func TestDNSManifest(t *testing.T) {
	env := snapenv.Env{Snap: "../.."}
	usual, err := dnsAddresses(snapenv.Under(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		upstreams   []string
		want, never string
	}{
		{nil, "    import upstream-{$MICROK8S_UPSTREAM}.conf\n", "forward . "},
		{[]string{"192.0.2.1", "2001:db8::1"}, "    forward . 192.0.2.1 2001:db8::1 {\n      failfast_all_unhealthy_upstreams\n", "import upstream"},
	} {
		objects, err := render(filepath.Join(env.CoreAddons(), "addons/dns"), dnsValues{ClusterIP: usual[0], Second: netip.MustParseAddr("fd98::a"), Domain: "example.test", Upstreams: tc.upstreams})
		if err != nil {
			t.Fatal(err)
		}
		byKind := map[string]map[string]any{}
		for _, o := range objects {
			byKind[o.GetKind()] = o.Object
		}
		corefile := byKind["ConfigMap"]["data"].(map[string]any)["Corefile"].(string)
		if !strings.Contains(corefile, tc.want) || strings.Contains(corefile, tc.never) || !strings.Contains(corefile, "kubernetes example.test ") {
			t.Errorf("upstreams %q: the Corefile is\n%s", tc.upstreams, corefile)
		}
		if ip := byKind["Service"]["spec"].(map[string]any)["clusterIP"]; ip != "10.152.183.10" {
			t.Errorf("the Service has the address %v", ip)
		}
		if all := fmt.Sprint(byKind["Service"]["spec"].(map[string]any)["clusterIPs"]); all != "[10.152.183.10 fd98::a]" {
			t.Errorf("the Service has the addresses %s", all)
		}
	}
}
