package main

import (
	"context"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	apiext "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	logsapi "k8s.io/component-base/logs/api/v1"
	apireg "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	_ "github.com/cert-manager/cert-manager/internal/cainjector/feature" // its gates
	cmscheme "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned/scheme"
	"github.com/cert-manager/cert-manager/pkg/controller/cainjector"
	logf "github.com/cert-manager/cert-manager/pkg/logs"
	"github.com/cert-manager/cert-manager/pkg/util"
)

// cainjectorPart writes CAs into webhooks, API services and kinds that ask for them.
func cainjectorPart(flags *pflag.FlagSet) func(context.Context) error {
	logging := logsapi.NewLoggingConfiguration()
	logf.AddFlags(logging, flags)
	namespace := flags.String("leader-election-namespace", "kube-system", "namespace of the lease")
	metrics := flags.String("metrics-listen-address", "0.0.0.0:9402", "address for metrics; 0 for none")
	return func(ctx context.Context) error {
		if err := logf.ValidateAndApply(logging); err != nil {
			return err
		}
		scheme := runtime.NewScheme()
		for _, add := range []func(*runtime.Scheme) error{kscheme.AddToScheme, cmscheme.AddToScheme, apiext.AddToScheme, apireg.AddToScheme} {
			if err := add(scheme); err != nil {
				return err
			}
		}
		config, err := rest.InClusterConfig()
		if err != nil {
			return err
		}
		lease, renew, retry := leaseDuration, renewDeadline, retryPeriod
		manager, err := ctrl.NewManager(util.RestConfigWithUserAgent(config, "cainjector"), ctrl.Options{
			Scheme: scheme,
			Cache:  cache.Options{ReaderFailOnMissingInformer: true},
			// Secrets are read one by one: otherwise all of the cluster are kept in memory.
			Client:                        client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}}}},
			Metrics:                       server.Options{BindAddress: *metrics},
			LeaderElection:                true,
			LeaderElectionNamespace:       *namespace,
			LeaderElectionID:              "cert-manager-cainjector-leader-election",
			LeaderElectionResourceLock:    resourcelock.LeasesResourceLock,
			LeaderElectionReleaseOnCancel: true,
			LeaseDuration:                 &lease,
			RenewDeadline:                 &renew,
			RetryPeriod:                   &retry,
		})
		if err != nil {
			return err
		}
		err = cainjector.RegisterAllInjectors(ctx, manager, cainjector.SetupOptions{
			EnableCertificatesDataSource: true,
			EnabledReconcilersFor: map[string]bool{
				cainjector.MutatingWebhookConfigurationName:   true,
				cainjector.ValidatingWebhookConfigurationName: true,
				cainjector.APIServiceName:                     true,
				cainjector.CustomResourceDefinitionName:       true,
			},
		})
		if err != nil {
			return err
		}
		return manager.Start(ctx)
	}
}
