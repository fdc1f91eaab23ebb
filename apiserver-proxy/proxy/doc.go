// Package proxy is the API server proxy of a worker: kubelet and kube-proxy connect to it on
// this machine, and it connects them to one of the cluster's API servers. TLS goes through it
// untouched.
//
// Traefik's parts are its weighted balancer, which takes turns among the servers, its handler
// switcher, which puts a new balancer in the place of an old one between two connections, its
// configuration types and its file provider, which reads provider.yaml. Ours are what its own
// TCP proxy does not do: see [Balancer] for dialling with further tries within one client
// connection, health checks and the end of connections to dead servers, and [Program] for the
// files and the lists that come from the cluster.
//
// The package is the only one that imports traefik.
package proxy
