package endpoints

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

func slice(kind discoveryv1.AddressType, port int32, addresses ...string) discoveryv1.EndpointSlice {
	s := discoveryv1.EndpointSlice{AddressType: kind}
	if port != 0 {
		s.Ports = []discoveryv1.EndpointPort{{Name: new("other"), Port: new(int32(1))}, {Name: new("https"), Port: &port}, {}}
	}
	for _, a := range addresses {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return s
}

func TestFromSlices(t *testing.T) {
	const v4, v6 = discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6
	ready := func(s discoveryv1.EndpointSlice, ready ...bool) discoveryv1.EndpointSlice {
		for i, r := range ready {
			s.Endpoints[i].Conditions.Ready = &r
		}
		return s
	}
	for _, tc := range []struct {
		name string
		list []discoveryv1.EndpointSlice
		want []string
	}{
		{"nil", nil, nil},
		{"one", []discoveryv1.EndpointSlice{slice(v4, 0, "10.0.0.1")}, []string{"10.0.0.1:16443"}},
		{"two, sorted", []discoveryv1.EndpointSlice{slice(v4, 0, "10.0.0.2", "10.0.0.1")}, []string{"10.0.0.1:16443", "10.0.0.2:16443"}},
		{"IPv6", []discoveryv1.EndpointSlice{slice(v6, 6443, "fd00::1")}, []string{"[fd00::1]:6443"}},
		{"a port for each", []discoveryv1.EndpointSlice{slice(v4, 6443, "10.0.0.2"), slice(v4, 443, "10.0.0.1"), slice(v6, 0, "fd00::1")},
			[]string{"10.0.0.1:443", "10.0.0.2:6443", "[fd00::1]:16443"}},
		{"names", []discoveryv1.EndpointSlice{slice(discoveryv1.AddressTypeFQDN, 0, "a.example.com"), slice("new", 0, "x")}, nil},
		{"the same twice", []discoveryv1.EndpointSlice{slice(v4, 0, "10.0.0.1"), slice(v4, 0, "10.0.0.1")}, []string{"10.0.0.1:16443"}},
		{"one is not ready", []discoveryv1.EndpointSlice{ready(slice(v4, 0, "10.0.0.1", "10.0.0.2"), false, true)}, []string{"10.0.0.2:16443"}},
		{"none is ready", []discoveryv1.EndpointSlice{ready(slice(v4, 0, "10.0.0.1"), false)}, []string{"10.0.0.1:16443"}},
	} {
		if got := FromSlices(tc.list); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestFromEndpoints(t *testing.T) {
	subset := func(port int32, addresses ...string) corev1.EndpointSubset { //nolint:staticcheck // as in FromEndpoints
		s := corev1.EndpointSubset{NotReadyAddresses: []corev1.EndpointAddress{{IP: "10.9.9.9"}}} //nolint:staticcheck // as in FromEndpoints
		if port != 0 {
			s.Ports = []corev1.EndpointPort{{Name: "other", Port: 1}, {Name: "https", Port: port}}
		}
		for _, a := range addresses {
			s.Addresses = append(s.Addresses, corev1.EndpointAddress{IP: a})
		}
		return s
	}
	for _, tc := range []struct {
		name string
		e    *corev1.Endpoints //nolint:staticcheck // as in FromEndpoints
		want []string
	}{
		{"nil", nil, nil},
		{"one", &corev1.Endpoints{Subsets: []corev1.EndpointSubset{subset(0, "10.0.0.1")}}, []string{"10.0.0.1:16443"}},                                       //nolint:staticcheck // as in FromEndpoints
		{"two, sorted", &corev1.Endpoints{Subsets: []corev1.EndpointSubset{subset(0, "10.0.0.2", "10.0.0.1")}}, []string{"10.0.0.1:16443", "10.0.0.2:16443"}}, //nolint:staticcheck // as in FromEndpoints
		{"several subsets", &corev1.Endpoints{Subsets: []corev1.EndpointSubset{subset(6443, "10.0.0.2", "fd00::1"), subset(443, "10.0.0.1")}}, //nolint:staticcheck // as in FromEndpoints
			[]string{"10.0.0.1:443", "10.0.0.2:6443", "[fd00::1]:6443"}},
	} {
		if got := FromEndpoints(tc.e); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}
