package addon

import (
	"net/netip"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	corev1 "k8s.io/api/core/v1"
)

func TestReadMetallb(t *testing.T) {
	for _, tc := range []struct{ args, want, err string }{
		{args: "10.64.140.43-10.64.140.49", want: "10.64.140.43-10.64.140.49"},
		{args: "10.64.140.43-10.64.140.49,192.168.0.105-192.168.0.111", want: "10.64.140.43-10.64.140.49 192.168.0.105-192.168.0.111"},
		{args: "10.64.140.0/28 fd00::10-fd00::20", want: "10.64.140.0-10.64.140.15 fd00::10-fd00::20"},
		{args: "10.64.140.9/30", want: "10.64.140.8-10.64.140.11"},
		{args: "fd00:1::/124", want: "fd00:1::-fd00:1::f"},
		{args: "10.64.140.43", want: "10.64.140.43-10.64.140.43"},
		{args: ",", want: ""},
		{args: "10.64.140.49-10.64.140.43", err: "ends before it begins"},
		{args: "10.64.140.43-fd00::1", err: "is not a range of addresses"},
		{args: "10.64.140.43-49", err: "is not a range of addresses"},
		{args: "10.64.140.0/33", err: "is not a range of addresses"},
		{args: "fe80::1%eth0", err: "is not a range of addresses"},
		{args: "router", err: `"router" is not a range of addresses`},
		{args: "--frr", err: "unknown option --frr"},
		{args: "127.0.0.1", err: "the loopback"},
		{args: "0.0.0.0/0", err: "which no Service can use"},
		{args: "::/0", err: "which no Service can use"},
		{args: "224.0.0.1", err: "multicast"},
		{args: "10.0.0.1-10.0.0.9,10.0.0.8/30", err: "overlap"},
	} {
		v, err := readMetallb(strings.Fields(tc.args))
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: error %v, want %q", tc.args, err, tc.err)
			}
			continue
		}
		if got := strings.Join(v.Addresses, " "); err != nil || got != tc.want || !v.Layer2 {
			t.Errorf("%q: %q, %v", tc.args, got, err)
		}
	}
	if v, err := readMetallb([]string{"10.0.0.1", "--bgp"}); err != nil || v.Layer2 {
		t.Errorf("--bgp: %+v, %v", v, err)
	}
}

func TestConflictNamesWhoseTheAddressIs(t *testing.T) {
	used := []taken{
		{addressRange{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("10.0.0.5")}, "the address of node n1"},
		{rangeOf(netip.MustParsePrefix("10.1.0.0/16")), "the range of pods"},
	}
	for args, want := range map[string]string{
		"10.0.0.6-10.0.0.9":  "",
		"10.0.0.1-10.0.0.9":  "the range 10.0.0.1-10.0.0.9 has 10.0.0.5, which is the address of node n1",
		"10.1.255.255":       "which is the range of pods",
		"10.0.255.0/24":      "",
		"9.0.0.0-11.0.0.0":   "the address of node n1",
		"fd00::a00:5/128":    "",
		"10.2.0.0-10.2.0.10": "",
	} {
		v, err := readMetallb([]string{args})
		if err != nil {
			t.Fatal(err)
		}
		if err := v.conflict(used); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}

// TestMetallb: addresses that the network uses change nothing; what is enabled is taken away again but for the
// kinds and the namespace, in which others' objects may be.
func TestMetallb(t *testing.T) {
	s, f := open(t)
	f.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "203.0.113.5"}}}})
	before := f.Paths()
	a, err := s.Find("metallb")
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Enable(t.Context(), a, []string{"203.0.113.1-203.0.113.9"})
	if err == nil || !strings.Contains(err.Error(), "203.0.113.5, which is the address of node n1") {
		t.Errorf("error is %v", err)
	}
	wantObjects(t, f, "after a refusal", before)
	values, err := renderMetallb(t.Context(), s, []string{"203.0.113.10-203.0.113.19"})
	if err != nil {
		t.Fatal(err)
	}
	objects, err := render(a.dir, values)
	if err != nil {
		t.Fatal(err)
	}
	images := map[string]string{}
	if err := pull(a, objects); err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if o.GetKind() == "IPAddressPool" {
			if text, _ := o.MarshalJSON(); !strings.Contains(string(text), `"addresses":["203.0.113.10-203.0.113.19"]`) {
				t.Errorf("the pool is %s", text)
			}
		}
		if _, ok := workloads[o.GetKind()]; ok {
			text, _ := o.MarshalJSON()
			images[o.GetName()] = string(text)
		}
	}
	for name, image := range a.Online {
		if !strings.Contains(images[name], `"image":"`+image+`","imagePullPolicy":"IfNotPresent"`) || strings.Contains(images[name], "microk8s.io/metallb") {
			t.Errorf("with --online %s is %s", name, images[name])
		}
	}
}
