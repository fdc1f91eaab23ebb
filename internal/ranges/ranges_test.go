package ranges

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"microk8s/internal/hostnet"
	"microk8s/internal/hostwatch/hosttest"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       string // ranges, masks and nodes, or pieces of the error behind "error: "
	}{
		{"what upstream ships", "IPv4_SUPPORT=true\nIPv4_CLUSTER_CIDR=10.1.0.0/16\nIPv4_SERVICE_CIDR=10.152.183.0/24\nIPv6_SUPPORT=false\n", "[10.1.0.0/16] [10.152.183.0/24] [24] 256"},
		{"nothing", "", "[10.1.0.0/16] [10.152.183.0/24] [24] 256"},
		{"both families, as upstream documents it", "IPv4_SUPPORT=true\nIPv4_CLUSTER_CIDR=10.3.0.0/16\nIPv4_SERVICE_CIDR=10.153.183.0/24\nIPv6_SUPPORT=true\nIPv6_CLUSTER_CIDR=fd02::/64\nIPv6_SERVICE_CIDR=fd99::/108\n",
			"[10.3.0.0/16 fd02::/64] [10.153.183.0/24 fd99::/108] [24 80] 256"},
		{"IPv6 only", "IPv4_SUPPORT=false\nIPv6_SUPPORT=true\n", "[fd01::/64] [fd98::/108] [80] 65536"},
		{"quotes, export and a comment", "export IPv4_CLUSTER_CIDR=\"10.2.0.0/15\" # mine\n#IPv6_SUPPORT=true\n", "[10.2.0.0/15] [10.152.183.0/24] [24] 512"},
		{"IPv6 with shares of /64", "IPv6_SUPPORT=true\nIPv6_CLUSTER_CIDR=fd02:0:0:100::/56\n", "[10.1.0.0/16 fd02:0:0:100::/56] [10.152.183.0/24 fd98::/108] [24 64] 256"},
		{"a /60 of IPv6 is shared out further", "IPv4_SUPPORT=false\nIPv6_SUPPORT=true\nIPv6_CLUSTER_CIDR=fd02::/60\n", "[fd02::/60] [fd98::/108] [76] 65536"},
		{"a large range of IPv6", "IPv4_SUPPORT=false\nIPv6_SUPPORT=true\nIPv6_CLUSTER_CIDR=fd00::/40\n", "[fd00::/40] [fd98::/108] [56] 65536"},
		{"smaller shares", "IPv4_NODE_CIDR_MASK_SIZE=26\n", "[10.1.0.0/16] [10.152.183.0/24] [26] 1024"},

		{"no family", "IPv4_SUPPORT=false\n", "error: both false"},
		{"a word for a switch", "IPv6_SUPPORT=on\n", "error: IPv6_SUPPORT=on: it is true or false"},
		{"the other family", "IPv4_CLUSTER_CIDR=fd01::/64\n", "error: IPv4_CLUSTER_CIDR=fd01::/64: not a range of IPv4; this one belongs in IPv6_CLUSTER_CIDR"},
		{"both in one", "IPv4_CLUSTER_CIDR=10.1.0.0/16,fd01::/64\n", "error: one range; that of the other family is IPv6_CLUSTER_CIDR"},
		{"no range", "IPv4_SERVICE_CIDR=10.1.0.0\n", "error: IPv4_SERVICE_CIDR=10.1.0.0: not a range"},
		{"bits behind the prefix", "IPv4_CLUSTER_CIDR=10.1.2.0/16\n", "error: the range begins at 10.1.0.0"},
		{"each other", "IPv4_CLUSTER_CIDR=10.152.0.0/16\n", "error: IPv4_SERVICE_CIDR=: overlaps the range of pods, IPv4_CLUSTER_CIDR=10.152.0.0/16"},
		{"pods too small", "IPv4_CLUSTER_CIDR=10.1.0.0/25\n", "error: IPv4_CLUSTER_CIDR=10.1.0.0/25: too small: a node's share is a /24"},
		{"Services too small", "IPv4_SERVICE_CIDR=10.9.0.0/29\n", "error: too small: Services need a /28"},
		{"Services too large", "IPv6_SUPPORT=true\nIPv6_SERVICE_CIDR=fd98::/64\n", "error: too large: the API server takes a /108"},
		{"a share larger than all", "IPv4_NODE_CIDR_MASK_SIZE=15\n", "error: larger than the range of all pods"},
		{"a share too small", "IPv4_NODE_CIDR_MASK_SIZE=30\n", "error: a node needs a /28"},
		{"too many shares", "IPv6_SUPPORT=true\nIPv6_NODE_CIDR_MASK_SIZE=112\n", "error: the controller manager takes up to 80"},
		{"link-local", "IPv6_SUPPORT=true\nIPv6_CLUSTER_CIDR=fe80::/64\n", "error: loopback, link-local"},
		{"another spelling", "IPV6_SUPPORT=true\n", "error: the key is written IPv6_SUPPORT"},
		{"two mistakes", "IPv4_CLUSTER_CIDR=x\nIPv4_SERVICE_CIDR=y\n", "error: IPv4_SERVICE_CIDR=y"},
		{"a key of somebody else", "CALICO_VETH_MTU=1400\nCNI=calico\n", "[10.1.0.0/16] [10.152.183.0/24] [24] 256"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := Parse(Read([]byte(tc.text)))
			got := fmt.Sprint(r.Pods, r.Services, r.Masks, r.Nodes())
			if err != nil {
				got = "error: " + err.Error()
			}
			if piece, fails := strings.CutPrefix(tc.want, "error: "); fails && (err == nil || !strings.Contains(got, piece)) || !fails && got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
			if err != nil {
				return
			}
			again, err := Parse(Read(Edit([]byte(tc.text), r.Values())))
			if err != nil || !same(again, r) {
				t.Errorf("written and read again it is %v (%v), want %v", again, err, r)
			}
		})
	}
}

// node is a node that was set up with the shipped arguments.
func node(t *testing.T) snapenv.Env {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	for _, dir := range []string{env.ArgsDir(), env.DefaultArgs(), env.LocksDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{FileName, "kube-apiserver", "kube-controller-manager", "kube-proxy", "kubelet"} {
		data, err := os.ReadFile(filepath.Join("../../snap/local/default-args", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{env.Args(name), filepath.Join(env.DefaultArgs(), name)} {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return env
}

func both() ([]net.IP, error) {
	return []net.IP{net.ParseIP("192.0.2.1"), net.ParseIP("2001:db8::1")}, nil
}

// TestHostOfIPv6 has a host without IPv4, whose next start goes on after the line of the error was typed; a start that was tried and failed
// has not chosen anything.
func TestHostOfIPv6(t *testing.T) {
	env := node(t)
	only6 := func() ([]net.IP, error) { return []net.IP{net.ParseIP("2001:db8::1")}, nil }
	_, err := prepare(env, only6)
	if err == nil || !strings.Contains(err.Error(), "no IPv4 address") {
		t.Fatalf("got %v", err)
	}
	if err := Begin(env); err != nil {
		t.Fatal(err)
	}
	if err := nodeconfig.KeepName(env, "n1"); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("sh", "-c", strings.Split(err.Error(), "\n")[1]).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if _, err := prepare(env, only6); err != nil || !strings.HasPrefix(flags(t, env), "fd98::/108 fd98::/108 fd01::/64") {
		t.Errorf("%v, flags %s", err, flags(t, env))
	}
	if _, err := prepare(env, func() ([]net.IP, error) { return nil, nil }); err == nil {
		t.Error("IPv6 was chosen, and there is none")
	}
	if _, err := prepare(node(t), func() ([]net.IP, error) { return nil, nil }); err != nil {
		t.Errorf("a host that has no address yet: %v", err)
	}
}

func only4() ([]net.IP, error) { return []net.IP{net.ParseIP("192.0.2.1")}, nil }

// flags are the arguments about ranges that the daemons have.
func flags(t *testing.T, env snapenv.Env) string {
	t.Helper()
	var out []string
	for _, x := range []string{"kube-apiserver service-cluster-ip-range", "kube-controller-manager service-cluster-ip-range", "kube-controller-manager cluster-cidr", "kube-proxy cluster-cidr", "kubelet cluster-dns",
		"kube-controller-manager node-cidr-mask-size-ipv4", "kube-controller-manager node-cidr-mask-size-ipv6", "kubelet max-pods"} {
		file, flag, _ := strings.Cut(x, " ")
		f, err := nodeconfig.File(env, file)
		if err != nil {
			t.Fatal(err)
		}
		v, _ := f.Get(flag)
		out = append(out, v)
	}
	return strings.Join(out, " ")
}

func set(t *testing.T, env snapenv.Env, lines string) {
	t.Helper()
	text, err := os.ReadFile(env.Args(FileName))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(env.Args(FileName), Edit(text, Read([]byte(lines))), 0o600); err != nil {
		t.Fatal(err)
	}
}

const usual = "10.152.183.0/24 10.152.183.0/24 10.1.0.0/16 10.1.0.0/16 10.152.183.10   "

const dual = "IPv4_CLUSTER_CIDR=10.3.0.0/16\nIPv4_SERVICE_CIDR=10.153.183.0/24\nIPv6_SUPPORT=true\nIPv6_CLUSTER_CIDR=fd02::/64\nIPv6_SERVICE_CIDR=fd99::/108\n"

const dualFlags = "10.153.183.0/24,fd99::/108 10.153.183.0/24,fd99::/108 10.3.0.0/16,fd02::/64 10.3.0.0/16,fd02::/64 10.153.183.10  80 "

// TestPrepare goes through the life of a node: the file counts until the first start, and from then on may only give more.
func TestPrepare(t *testing.T) {
	env := node(t)
	want := func(what string, changed bool, all string) {
		t.Helper()
		got, err := prepare(env, both)
		if err != nil || got != changed || flags(t, env) != all {
			t.Errorf("%s: changed %v, flags %q, %v; want %v, %q", what, got, flags(t, env), err, changed, all)
		}
	}
	want("as shipped", false, usual)
	set(t, env, dual)
	want("both families", true, dualFlags)
	want("again", false, dualFlags)
	set(t, env, "IPv6_SUPPORT=false\nIPv4_CLUSTER_CIDR=10.1.0.0/16\nIPv4_SERVICE_CIDR=10.152.183.0/24\n")
	want("back, before the first start", true, usual)
	set(t, env, "IPv4_SUPPORT=false\nIPv6_SUPPORT=true\n")
	want("IPv6 only", true, "fd99::/108 fd99::/108 fd02::/64 fd02::/64 fd99::a  80 ")
	set(t, env, dual+"IPv4_SUPPORT=true\nIPv4_NODE_CIDR_MASK_SIZE=26\n")
	want("small shares", true, strings.Replace(dualFlags, "  80 ", " 26 80 61", 1))
	set(t, env, "IPv4_NODE_CIDR_MASK_SIZE=25\n")
	want("larger shares", false, strings.Replace(dualFlags, "  80 ", " 25 80 ", 1))

	if err := MarkStarted(env); err != nil {
		t.Fatal(err)
	}
	running := strings.Replace(dualFlags, "  80 ", " 25 80 ", 1)
	for name, lines := range map[string]string{"other pods": "IPv4_CLUSTER_CIDR=10.9.0.0/16\n", "other Services": "IPv6_SERVICE_CIDR=fdaa::/108\n", "one family less": "IPv6_SUPPORT=false\n", "nonsense": "IPv4_CLUSTER_CIDR=x\n"} {
		before, err := os.ReadFile(env.Args(FileName))
		if err != nil {
			t.Fatal(err)
		}
		if err := Differs(env); err != nil {
			t.Errorf("before %s: %v", name, err)
		}
		changes := map[string]*string{}
		for k, v := range Read([]byte(lines)) {
			changes[k] = &v
		}
		if err := Try(env, changes); err == nil {
			t.Errorf("%s: a launch configuration may ask for it", name)
		}
		set(t, env, lines)
		want(name+" after the start", false, running)
		if err := Differs(env); err == nil || !strings.Contains(err.Error(), "10.") {
			t.Errorf("%s: nobody is told that it has no effect: %v", name, err)
		}
		if err := os.WriteFile(env.Args(FileName), before, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set(t, env, "IPv4_CLUSTER_CIDR=10.2.0.0/15\n")
	want("twice as many nodes", false, strings.ReplaceAll(running, "10.3.0.0/16", "10.2.0.0/15"))
	set(t, env, "IPv4_NODE_CIDR_MASK_SIZE=26\n")
	want("another share for new nodes", false, strings.ReplaceAll(strings.ReplaceAll(running, "10.3.0.0/16", "10.2.0.0/15"), " 25 ", " 26 "))
	if err := Differs(env); err != nil {
		t.Error(err)
	}
}

// TestEarlierRelease has a node whose file was edited when no code read it: the cluster keeps what it has.
func TestEarlierRelease(t *testing.T) {
	env := node(t)
	if err := os.MkdirAll(env.CNIConf(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(hostnet.Conflist(env), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	set(t, env, dual)
	if changed, err := prepare(env, both); changed || err != nil || flags(t, env) != usual {
		t.Errorf("changed %v, %v, flags %s", changed, err, flags(t, env))
	}
	if Differs(env) == nil {
		t.Error("nobody is told that the file has no effect")
	}
}

// TestRefused holds that what cannot work is said, and changes nothing.
func TestRefused(t *testing.T) {
	for _, tc := range []struct{ name, lines, hand, says string }{
		{"nonsense", "IPv4_CLUSTER_CIDR=10.1.0.0/33\n", "", "IPv4_CLUSTER_CIDR=10.1.0.0/33: not a range"},
		{"no address of the family", dual, "", "IPv6_SUPPORT=true: this host has no address of IPv6"},
		{"an argument says something else", "IPv4_CLUSTER_CIDR=10.3.0.0/16\n", "10.4.0.0/16", `--cluster-cidr in `},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := node(t)
			if tc.hand != "" {
				if _, err := nodeconfig.SetFlags(env, nodeconfig.KubeProxy, map[string]string{"cluster-cidr": tc.hand}); err != nil {
					t.Fatal(err)
				}
			}
			before := flags(t, env)
			set(t, env, tc.lines)
			if _, err := prepare(env, only4); err == nil || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q in one line", err, tc.says)
			}
			if after := flags(t, env); after != before {
				t.Errorf("it changed %q to %q", before, after)
			}
		})
	}
}

// TestArgumentsByHand: who has set the daemons' own arguments, and nothing in the file, keeps them.
func TestArgumentsByHand(t *testing.T) {
	env := node(t)
	for _, file := range []string{nodeconfig.KubeProxy, "kube-controller-manager"} {
		if _, err := nodeconfig.SetFlags(env, file, map[string]string{"cluster-cidr": "10.4.0.0/16"}); err != nil {
			t.Fatal(err)
		}
	}
	before := flags(t, env)
	if _, err := prepare(env, only4); err != nil || flags(t, env) != before {
		t.Errorf("%v, flags %s, want %s", err, flags(t, env), before)
	}
	if err := MarkStarted(env); err != nil {
		t.Fatal(err)
	}
	if err := Differs(env); err != nil {
		t.Errorf("and is bothered: %v", err)
	}
}

// TestOverlapWithTheHost wants the lines of the error to be right: typed, they make the next start go on.
func TestOverlapWithTheHost(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	env := node(t)
	run := func(script string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", script, err, out)
		}
	}
	set(t, env, "IPv6_SUPPORT=true\n")
	if _, err := prepare(env, both); err != nil {
		t.Fatalf("without any network: %v", err)
	}
	run("ip link add lan0 type bridge; ip link set lan0 up; ip addr add 10.1.0.5/21 dev lan0; ip addr add 10.152.183.9/24 dev lan0; ip addr add fd01::5/64 dev lan0 nodad")
	_, err := prepare(env, both)
	if err == nil || !strings.Contains(err.Error(), "overlaps the pods' 10.1.0.0/16") || !strings.Contains(err.Error(), "overlaps the Services' 10.152.183.0/24") || !strings.Contains(err.Error(), "overlaps the pods' fd01::/64") {
		t.Fatalf("got %v", err)
	}
	lines := strings.Split(err.Error(), "\n")
	run(strings.Join(lines[1:len(lines)-1], "\n"))
	if _, err := prepare(env, both); err != nil {
		t.Errorf("after the lines were typed: %v", err)
	}
	if got := flags(t, env); !strings.Contains(got, "10.153.183.10") || !strings.Contains(got, "10.200.0.0/16,fd11::/64") {
		t.Errorf("the daemons have %s", got)
	}
}
