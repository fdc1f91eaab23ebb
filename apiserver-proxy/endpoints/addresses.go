package endpoints

import (
	"net"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"microk8s/apiserver-proxy/config"
)

// portName is the API server's port in the endpoints of the Service "kubernetes".
const portName = "https"

// FromSlices returns the addresses of EndpointSlices, host:port, each once and sorted. Endpoints
// that are not ready are left out unless all are; names instead of IP addresses always are.
func FromSlices(list []discoveryv1.EndpointSlice) []string {
	var ready, all []string
	for _, slice := range list {
		if slice.AddressType != discoveryv1.AddressTypeIPv4 && slice.AddressType != discoveryv1.AddressTypeIPv6 {
			continue
		}
		port := config.DefaultPort
		for _, p := range slice.Ports {
			if p.Name != nil && *p.Name == portName && p.Port != nil {
				port = int(*p.Port)
			}
		}
		for _, e := range slice.Endpoints {
			for _, address := range e.Addresses {
				a := net.JoinHostPort(address, strconv.Itoa(port))
				all = append(all, a)
				if e.Conditions.Ready == nil || *e.Conditions.Ready {
					ready = append(ready, a)
				}
			}
		}
	}
	if len(ready) == 0 {
		ready = all
	}
	slices.Sort(ready)
	return slices.Compact(ready)
}

// FromEndpoints is [FromSlices] for the older kind of object.
func FromEndpoints(e *corev1.Endpoints) []string { //nolint:staticcheck // clusters before 1.34 allow nodes nothing newer
	if e == nil {
		return nil
	}
	var out []string
	for _, subset := range e.Subsets {
		port := config.DefaultPort
		for _, p := range subset.Ports {
			if p.Name == portName {
				port = int(p.Port)
			}
		}
		for _, a := range subset.Addresses {
			out = append(out, net.JoinHostPort(a.IP, strconv.Itoa(port)))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
