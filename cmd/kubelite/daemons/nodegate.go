package daemons

import (
	"fmt"
	"net/http"

	"k8s.io/apiserver/pkg/authorization/union"
	genericapiserver "k8s.io/apiserver/pkg/server"
	apiserverapp "k8s.io/kubernetes/cmd/kube-apiserver/app"

	"microk8s/internal/nodegate"
)

// guard puts the gate of nodes without a record (ADR 16) in front of an API server that is not running yet.
func guard(config *apiserverapp.Config) error {
	g, err := nodegate.New(config.KubeAPIs.ControlPlane.VersionedInformers)
	if err != nil {
		return fmt.Errorf("cannot follow the records of the nodes: %w", err)
	}
	for _, c := range []*genericapiserver.Config{
		config.KubeAPIs.ControlPlane.Generic, &config.ApiExtensions.GenericConfig.Config, &config.Aggregator.GenericConfig.Config,
	} {
		c.Authorization.Authorizer, err = union.New(
			union.NamedAuthorizer{AuthorizerName: "node-records", Authorizer: g},
			union.NamedAuthorizer{AuthorizerName: "configured", Authorizer: c.Authorization.Authorizer},
		)
		if err != nil {
			return err
		}
	}
	// Every request comes in through the aggregator.
	outer := &config.Aggregator.GenericConfig.Config
	build := outer.BuildHandlerChainFunc
	outer.BuildHandlerChainFunc = func(h http.Handler, c *genericapiserver.Config) http.Handler { return build(g.Handler(h), c) }
	return nil
}
