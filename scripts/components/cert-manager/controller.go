package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	logsapi "k8s.io/component-base/logs/api/v1"

	_ "github.com/cert-manager/cert-manager/internal/controller/feature" // its gates
	"github.com/cert-manager/cert-manager/pkg/controller"
	"github.com/cert-manager/cert-manager/pkg/healthz"
	dnsutil "github.com/cert-manager/cert-manager/pkg/issuer/acme/dns/util"
	logf "github.com/cert-manager/cert-manager/pkg/logs"

	// Controllers and issuers register themselves: all that cert-manager has by default, without Venafi.
	_ "github.com/cert-manager/cert-manager/pkg/controller/acmechallenges"
	_ "github.com/cert-manager/cert-manager/pkg/controller/acmeorders"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificate-shim/ingresses"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/acme"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/approver"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/ca"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/selfsigned"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/vault"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/issuing"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/keymanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/metrics"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/readiness"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/requestmanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/revisionmanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/trigger"
	_ "github.com/cert-manager/cert-manager/pkg/controller/clusterissuers"
	_ "github.com/cert-manager/cert-manager/pkg/controller/issuers"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/acme"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/ca"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/selfsigned"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/vault"
)

// The lease by which one of several works, as cert-manager has it by default.
const (
	leaseDuration = 60 * time.Second
	renewDeadline = 40 * time.Second
	retryPeriod   = 15 * time.Second
)

// controllerPart issues certificates and renews them. Its flags have the names, and what has none the values, that
// cert-manager's own controller has.
func controllerPart(flags *pflag.FlagSet) func(context.Context) error {
	logging := logsapi.NewLoggingConfiguration()
	logf.AddFlags(logging, flags)
	namespace := flags.String("cluster-resource-namespace", "kube-system", "namespace of what ClusterIssuers need")
	leases := flags.String("leader-election-namespace", "kube-system", "namespace of the lease")
	solver := flags.String("acme-http01-solver-image", "", "image of the pods that answer HTTP-01 challenges")
	nameservers := flags.StringSlice("dns01-recursive-nameservers", nil, "servers that are asked whether a DNS-01 challenge is there (default: those of /etc/resolv.conf)")
	only := flags.Bool("dns01-recursive-nameservers-only", false, "ask these only, and not those that have the zone")
	return func(ctx context.Context) error {
		if err := logf.ValidateAndApply(logging); err != nil {
			return err
		}
		if *solver == "" {
			return errors.New("--acme-http01-solver-image is needed")
		}
		if len(*nameservers) == 0 {
			*nameservers = dnsutil.RecursiveNameservers
		}
		factory, err := controller.NewContextFactory(ctx, controller.ContextOptions{
			KubernetesAPIQPS:   20,
			KubernetesAPIBurst: 50,
			IssuerOptions:      controller.IssuerOptions{ClusterResourceNamespace: *namespace, ClusterIssuerAmbientCredentials: true},
			ACMEOptions: controller.ACMEOptions{
				HTTP01SolverImage:                 *solver,
				HTTP01SolverResourceRequestCPU:    resource.MustParse("10m"),
				HTTP01SolverResourceRequestMemory: resource.MustParse("64Mi"),
				HTTP01SolverResourceLimitsCPU:     resource.MustParse("100m"),
				HTTP01SolverResourceLimitsMemory:  resource.MustParse("64Mi"),
				ACMEHTTP01SolverRunAsNonRoot:      true,
				DNS01CheckAuthoritative:           !*only,
				DNS01Nameservers:                  *nameservers,
				DNS01CheckRetryPeriod:             10 * time.Second,
			},
			IngressShimOptions: controller.IngressShimOptions{
				DefaultIssuerKind:                 "Issuer",
				DefaultIssuerGroup:                "cert-manager.io",
				DefaultAutoCertificateAnnotations: []string{"kubernetes.io/tls-acme"},
			},
			CertificateOptions: controller.CertificateOptions{
				CopiedAnnotationPrefixes:                 []string{"*", "-kubectl.kubernetes.io/", "-fluxcd.io/", "-argocd.argoproj.io/"},
				CertificateRequestMinimumBackoffDuration: time.Hour,
				CertificateRequestMaximumBackoffDuration: 32 * time.Hour,
			},
			SchedulerOptions: controller.SchedulerOptions{MaxConcurrentChallenges: 60},
		})
		if err != nil {
			return err
		}
		return serve(ctx, factory, *leases)
	}
}

// serve serves metrics and health, and runs the controllers once this one has the lease.
func serve(ctx context.Context, factory *controller.ContextFactory, leases string) error {
	shared, err := factory.Build()
	if err != nil {
		return err
	}
	cm := shared.SharedInformerFactory.Certmanager().V1()
	shared.Metrics.SetupCertificateCollector(cm.Certificates().Lister())
	shared.Metrics.SetupIssuerCollector(cm.Issuers().Lister())
	shared.Metrics.SetupClusterIssuerCollector(cm.ClusterIssuers().Lister())
	shared.Metrics.SetupACMECollector(shared.SharedInformerFactory.Acme().V1().Challenges().Lister())
	metrics, err := net.Listen("tcp", ":9402")
	if err != nil {
		return err
	}
	health, err := net.Listen("tcp", ":9403")
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	server, livez := shared.Metrics.NewServer(metrics), healthz.NewServer(20*time.Second)
	group.Go(func() error { return closed(server.Serve(metrics)) })
	group.Go(func() error {
		<-ctx.Done()
		shutdown(server)
		return nil
	})
	group.Go(func() error { return livez.Start(ctx, health) })
	leading := make(chan struct{})
	group.Go(func() error { return lead(ctx, factory, leases, livez, leading) })
	select {
	case <-ctx.Done():
		return group.Wait()
	case <-leading:
	}
	for name, construct := range controller.Known() {
		c, err := construct(factory)
		if err != nil {
			return fmt.Errorf("cannot make the controller %s: %w", name, err)
		}
		group.Go(func() error {
			if err := c.Run(5, ctx); err != nil {
				return fmt.Errorf("controller %s: %w", name, err)
			}
			return nil
		})
	}
	shared.SharedInformerFactory.Start(ctx.Done())
	shared.KubeSharedInformerFactory.Start(ctx.Done())
	shared.HTTP01ResourceMetadataInformersFactory.Start(ctx.Done())
	return group.Wait()
}

// lead holds the lease until ctx ends, and closes leading when it has it. A lease that is lost is an error.
func lead(ctx context.Context, factory *controller.ContextFactory, namespace string, health *healthz.Server, leading chan<- struct{}) error {
	own, err := factory.Build("leader-election")
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: namespace, Name: "cert-manager-controller"},
			Client:     own.Client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: host + "_" + string(uuid.NewUUID()), EventRecorder: own.Recorder},
		},
		LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod,
		ReleaseOnCancel: true,
		WatchDog:        health.LeaderHealthzAdaptor,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { close(leading) },
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return err
	}
	elector.Run(ctx)
	if ctx.Err() == nil {
		return errors.New("the lease was lost")
	}
	return nil
}
