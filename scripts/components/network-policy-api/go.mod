module microk8s/scripts/components/network-policy-api

go 1.26.4

require sigs.k8s.io/network-policy-api v0.3.0
