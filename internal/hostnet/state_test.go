package hostnet

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"microk8s/internal/hostwatch/hosttest"
	"microk8s/internal/snapenv"
)

// connected writes down a pod as the CNI library does.
func connected(t *testing.T, env snapenv.Env, sandbox, portMappings string) {
	t.Helper()
	config, err := conflist(env, []netip.Prefix{podNet}, 1450)
	if err != nil {
		t.Fatal(err)
	}
	data := fmt.Sprintf(`{"kind":"cniCacheV1","containerId":%q,"config":%q,"ifName":"eth0","networkName":"microk8s","netns":"/run/netns/none",
		"capabilityArgs":{"portMappings":%s},
		"result":{"cniVersion":"1.0.0","interfaces":[{"mac":"02:00:00:00:00:01","name":"cni0"},{"mac":"02:00:00:00:00:02","name":"vethxy"},{"mac":"02:00:00:00:00:03","name":"eth0","sandbox":"/run/netns/none"}],
		"ips":[{"address":"10.1.5.2/24","gateway":"10.1.5.1","interface":2}]}}`, sandbox, base64.StdEncoding.EncodeToString(config), portMappings)
	file := filepath.Join(resultsDir(env), NetworkName+"-"+sandbox+"-eth0")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPods(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	connected(t, env, "abc", "null")
	if err := os.WriteFile(filepath.Join(resultsDir(env), NetworkName+"-torn-eth0"), []byte(`{"networkName":"micr`), 0o600); err != nil {
		t.Fatal(err)
	}
	pods := Pods(env)
	if len(pods) != 1 {
		t.Fatalf("%d pods, want the one whose file is whole", len(pods))
	}
	p := pods[0]
	if p.Sandbox != "abc" || p.hostEnd != "vethxy" || p.bridgeMAC != "02:00:00:00:00:01" || p.ifName != "eth0" {
		t.Errorf("read %+v", p)
	}
	if p.Outside([]netip.Prefix{podNet}) || !p.Outside([]netip.Prefix{netip.MustParsePrefix("10.1.6.0/24")}) {
		t.Error("the pod's subnet is not recognised")
	}
}

// TestHostPortsComeBack has a fake of the portmap plugin, which writes the rules of the real one; the real one runs in
// TestHeal of tests/node.
func TestHostPortsComeBack(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	env := snapenv.Under(t.TempDir())
	connected(t, env, "abc", `[{"hostPort":80,"containerPort":8080,"protocol":"tcp"}]`)
	connected(t, env, "without", "null")
	plugin := filepath.Join(env.CNIBin(), "portmap")
	if err := os.MkdirAll(filepath.Dir(plugin), 0o755); err != nil {
		t.Fatal(err)
	}
	stdin := filepath.Join(t.TempDir(), "stdin")
	script := `#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >>` + stdin + `.log
[ "$CNI_COMMAND" = ADD ] || exit 0
cat >` + stdin + `
nft -f - <<END
table ip cni_hostport {
 chain prerouting { type nat hook prerouting priority dstnat; fib daddr type local jump hostports_all; }
 chain output { type nat hook output priority -100; fib daddr type local jump hostports_all; }
 chain hostports_all { jump hostports; }
 chain hostports { tcp dport 80 dnat to 10.1.5.2:8080 comment "$CNI_CONTAINERID"; }
}
END
`
	if err := os.WriteFile(plugin, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	keeper := NewKeeper(env, func() State { return State{Cluster: []netip.Prefix{cluster}, Node: []netip.Prefix{podNet}, MTU: 1450} })
	watch(t, keeper.Owner())
	present := func() bool { return strings.Contains(ruleset(t), "dnat to 10.1.5.2:8080") }
	await(t, "host port at the start", present)
	for _, fault := range []string{"flush ruleset", "delete table ip cni_hostport", "flush chain ip cni_hostport hostports"} {
		run(t, fault, "nft", "-f", "-")
		await(t, "host port after: "+fault, present)
	}
	data, err := os.ReadFile(stdin)
	var got struct {
		CNIVersion, Name, Type string
		RuntimeConfig          struct{ PortMappings []struct{ HostPort int } }
		PrevResult             struct{ IPs []struct{ Address string } }
		Capabilities           map[string]bool
	}
	if err == nil {
		err = json.Unmarshal(data, &got)
	}
	if err != nil || got.CNIVersion != "1.0.0" || got.Name != NetworkName || got.Type != "portmap" || len(got.RuntimeConfig.PortMappings) != 1 ||
		got.RuntimeConfig.PortMappings[0].HostPort != 80 || len(got.PrevResult.IPs) != 1 || got.Capabilities != nil {
		t.Errorf("the plugin got %s (%v)", data, err)
	}
	log, _ := os.ReadFile(stdin + ".log")
	if strings.Contains(string(log), "without") || !strings.HasPrefix(string(log), "DEL abc eth0\nADD abc eth0\n") {
		t.Errorf("the plugin was called so:\n%s", log)
	}
}

// TestServicesComeBack has a fake of kube-proxy, which writes all its rules when it is told to, with an nft that is called
// as that of the package is.
func TestServicesComeBack(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), proxyProgram)
	if err := os.Symlink(nft, own); err != nil {
		t.Fatal(err)
	}
	const service = "service-ABC-default/kubernetes/tcp/https"
	rules := `table ip kube-proxy {
		map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
		chain nat-prerouting { type nat hook prerouting priority dstnat; }
		chain services { }
		chain ` + service + ` { }
	}
	flush chain ip kube-proxy nat-prerouting
	flush chain ip kube-proxy services
	flush chain ip kube-proxy ` + service + `
	flush map ip kube-proxy service-ips
	table ip kube-proxy {
		chain nat-prerouting { jump services; }
		chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
		chain ` + service + ` { counter; }
	}
	add element ip kube-proxy service-ips { 10.152.183.1 . tcp . 443 : goto ` + service + ` }`
	var calls atomic.Int32
	write := func() error {
		calls.Add(1)
		run(t, rules, own, "-f", "-")
		return nil
	}
	watch(t, ProxyOwner(write))
	list := func() string { return run(t, "", "nft", "-s", "list", "ruleset") }
	settle := func() { run(t, "", "sleep", "0.5") } // for what must not happen
	run(t, rules, "nft", "-f", "-")
	settle()
	if calls.Load() != 0 {
		t.Error("kube-proxy was told to write before it had")
	}
	for probe := int32(0); probe == calls.Load(); settle() { // until the subscription stands
		run(t, rules, own, "-f", "-")
		run(t, "add chain ip kube-proxy mine", "nft", "-f", "-")
	}
	run(t, "flush ruleset", "nft", "-f", "-")
	await(t, "Services after a flush", func() bool { return strings.Contains(list(), "10.152.183.1") })
	settle()
	want := list()
	for _, fault := range []string{
		"flush ruleset", "delete table ip kube-proxy", "flush table ip kube-proxy", "flush chain ip kube-proxy nat-prerouting", "flush map ip kube-proxy service-ips",
		"flush chain ip kube-proxy " + service,
		"insert rule ip kube-proxy " + service + " drop",
		"delete element ip kube-proxy service-ips { 10.152.183.1 . tcp . 443 }",
		"delete element ip kube-proxy service-ips { 10.152.183.1 . tcp . 443 }; add element ip kube-proxy service-ips { 10.152.183.1 . tcp . 443 : drop }",
	} {
		before := calls.Load()
		run(t, fault, "nft", "-f", "-")
		await(t, "Services after: "+fault, func() bool { return list() == want && calls.Load() > before })
	}
	settle()
	// What kube-proxy itself does all the time is none of it, and neither is what others do elsewhere.
	before := calls.Load()
	run(t, "flush chain ip kube-proxy "+service, own, "-f", "-")
	run(t, "add table ip other; add chain ip other kube-proxy; delete table ip other", "nft", "-f", "-")
	settle()
	if calls.Load() != before {
		t.Error("kube-proxy was told to write after it did")
	}
}

// TestOverlaps has networks of a host in and around the pods' range.
func TestOverlaps(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	ranges := []netip.Prefix{cluster, netip.MustParsePrefix("10.152.183.0/24")}
	for _, tc := range []struct{ name, do, want string }{
		{"another LAN", "ip addr add 192.0.2.5/24 dev lan0", ""},
		{"a LAN inside", "ip addr add 10.1.0.5/21 dev lan0", "10.1.0.0/21 (lan0) overlaps 10.1.0.0/16"},
		{"a LAN that is the Services'", "ip addr add 10.152.183.20/24 dev lan0", "10.152.183.0/24 (lan0) overlaps 10.152.183.0/24"},
		{"a LAN that holds the pods', with an address elsewhere in it", "ip addr add 10.9.0.5/8 dev lan0", ""},
		{"a LAN that holds the pods', with an address inside", "ip addr add 10.1.9.5/8 dev lan0", "10.0.0.0/8 (lan0) overlaps 10.1.0.0/16"},
		{"a VPN to the range", "ip addr add 192.0.2.5/24 dev lan0; ip route add 10.1.0.0/16 dev vpn0", "10.1.0.0/16 (vpn0) overlaps 10.1.0.0/16"},
		{"a VPN to a part", "ip route add 10.1.64.0/24 dev vpn0", "10.1.64.0/24 (vpn0) overlaps 10.1.0.0/16"},
		{"a VPN to everything", "ip route add default dev vpn0; ip route add 10.0.0.0/8 dev vpn0", ""},
		{"our own bridge", "ip link add cni0 type bridge; ip addr add 10.1.5.1/24 dev cni0; ip link set cni0 up", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, "", "sh", "-ec", "for i in lan0 vpn0; do ip link add $i type bridge; ip link set $i up; done; "+tc.do)
			defer run(t, "", "sh", "-c", "for i in lan0 vpn0 cni0; do ip link del $i; done 2>/dev/null; true")
			got, err := Overlaps(ranges)
			if err != nil {
				t.Fatal(err)
			}
			text := fmt.Sprint(got)
			if tc.want == "" && len(got) > 0 || !strings.Contains(text, tc.want) {
				t.Errorf("got %s, want %q", text, tc.want)
			}
		})
	}
}
