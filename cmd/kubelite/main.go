// Command kubelite is all of Kubernetes that runs on a node, in one process: on a control
// plane node kube-apiserver, kube-controller-manager and kube-scheduler; on every node the
// kubelet, kube-proxy and the pod network. Called as kubectl (or with that as its first
// argument) it is kubectl.
package main

import (
	"os"
	"path/filepath"
)

func main() {
	if filepath.Base(os.Args[0]) == "kubectl" {
		kubectl(os.Args)
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "kubectl" {
		kubectl(os.Args[1:])
		return
	}
	os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}
