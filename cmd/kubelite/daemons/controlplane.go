package daemons

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/pflag"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/util/compatibility"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/component-base/cli/globalflag"
	"k8s.io/component-base/logs"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/component-base/version"
	"k8s.io/klog/v2"
	apiserverapp "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	controllerapp "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	controlleroptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	schedulerapp "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"

	"microk8s/internal/netpolicy/feed"
)

// componentGlobals is the registry that the three daemons' options all use by default.
var componentGlobals = compatibility.DefaultComponentGlobalsRegistry

// shutdownWatches is the time over which a stopping API server spreads the end of its watches.
const shutdownWatches = time.Second

// parseFlags reads words into the daemon's named flag sets as its cobra command would.
func parseFlags(name string, sets *cliflag.NamedFlagSets, words []string) error {
	globalflag.AddGlobalFlags(sets.FlagSet("global"), name, logs.SkipLoggingConfigurationFlags())
	fs := pflag.NewFlagSet(name, pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	fs.Usage = func() {}
	for _, f := range sets.FlagSets {
		fs.AddFlagSet(f)
	}
	if err := fs.Parse(words); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("takes no arguments besides flags, got %q", fs.Args())
	}
	return nil
}

func newAPIServer(words []string) (func(context.Context) error, error) {
	opts := apiserveroptions.NewServerRunOptions()
	// By default the server waits up to a minute for its clients to hang up, and most of them
	// run in this process and never do. So it ends its watches itself, over shutdownWatches,
	// and then gives connections the two seconds that go with ShutdownSendRetryAfter; requests
	// that are being served are finished in either case. Flags of the same names override.
	opts.GenericServerRunOptions.ShutdownSendRetryAfter = true
	opts.GenericServerRunOptions.ShutdownWatchTerminationGracePeriod = shutdownWatches
	sets := opts.Flags()
	if err := parseFlags(APIServer, &sets, words); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		// The API server talks to itself with types it has deprecated; its own warnings
		// about that are for other clients.
		rest.SetDefaultWarningHandler(rest.NoWarnings{})
		if err := logsapi.ValidateAndApply(opts.Logs, utilfeature.DefaultFeatureGate); err != nil {
			return err
		}
		completed, err := opts.Complete(ctx)
		if err != nil {
			return err
		}
		if errs := completed.Validate(); len(errs) > 0 {
			return utilerrors.NewAggregate(errs)
		}
		utilfeature.DefaultMutableFeatureGate.AddMetrics()
		componentGlobals.AddMetrics()
		return serveAPI(ctx, completed)
	}, nil
}

// putInFront is guard; a test leaves it out, to see what it is for.
var putInFront = guard

// serveAPI does what apiserverapp.Run does, with the same functions, puts the gate of the nodes'
// records in front (docs/adr/0016), and serves nodes what network policies are made of (docs/adr/0037).
func serveAPI(ctx context.Context, options apiserveroptions.CompletedOptions) error {
	klog.InfoS("Starting", "daemon", APIServer, "version", version.Get())
	if options.InformerName == nil {
		name, err := cache.NewInformerName(APIServer)
		if err != nil {
			return err
		}
		options.InformerName = name
	}
	config, err := apiserverapp.NewConfig(options)
	if err != nil {
		return err
	}
	if err := putInFront(config); err != nil {
		return err
	}
	client, err := dynamic.NewForConfig(config.KubeAPIs.ControlPlane.Generic.LoopbackClientConfig)
	if err != nil {
		return err
	}
	clusterPolicies := dynamicinformer.NewDynamicSharedInformerFactory(client, 0)
	policies, err := feed.NewServer(config.KubeAPIs.ControlPlane.VersionedInformers, clusterPolicies)
	if err != nil {
		return err
	}
	policies.Caller = func(r *http.Request) string {
		if u, ok := request.UserFrom(r.Context()); ok {
			return u.GetName()
		}
		return ""
	}
	outer := &config.Aggregator.GenericConfig.Config
	endless := outer.LongRunningFunc
	outer.LongRunningFunc = func(r *http.Request, info *request.RequestInfo) bool {
		return info.Path == feed.Path || endless(r, info)
	}
	completed, err := config.Complete()
	if err != nil {
		return err
	}
	server, err := apiserverapp.CreateServerChain(completed)
	if err != nil {
		return err
	}
	server.GenericAPIServer.Handler.NonGoRestfulMux.Handle(feed.Path, policies)
	err = server.GenericAPIServer.AddPostStartHook("network-policy-feed", func(hook genericapiserver.PostStartHookContext) error {
		clusterPolicies.Start(hook.Done())
		return nil
	})
	if err != nil {
		return err
	}
	err = server.GenericAPIServer.AddPreShutdownHook("network-policy-feed", func() error {
		policies.Close()
		return nil
	})
	if err != nil {
		return err
	}
	prepared, err := server.PrepareRun()
	if err != nil {
		return err
	}
	return prepared.Run(ctx)
}

func newControllerManager(words []string) (func(context.Context) error, error) {
	opts, err := controlleroptions.NewKubeControllerManagerOptions()
	if err != nil {
		return nil, err
	}
	known, disabled, aliases := controllerapp.KnownControllers(), controllerapp.ControllersDisabledByDefault(), controllerapp.ControllerAliases()
	sets := opts.Flags(known, disabled, aliases)
	opts.ParsedFlags = &sets
	if err := parseFlags(ControllerManager, &sets, words); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		if err := logsapi.ValidateAndApply(opts.Logs, utilfeature.DefaultFeatureGate); err != nil {
			return err
		}
		c, err := opts.Config(ctx, known, disabled, aliases)
		if err != nil {
			return err
		}
		return controllerapp.Run(ctx, c.Complete())
	}, nil
}

func newScheduler(words []string) (func(context.Context) error, error) {
	opts := scheduleroptions.NewOptions()
	if err := parseFlags(Scheduler, opts.Flags, words); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		if err := logsapi.ValidateAndApply(opts.Logs, utilfeature.DefaultFeatureGate); err != nil {
			return err
		}
		name, err := cache.NewInformerName(Scheduler)
		if err != nil {
			return err
		}
		defer name.Release() // for the next run
		opts.InformerName = name
		completed, sched, err := schedulerapp.Setup(ctx, opts)
		if err != nil {
			return err
		}
		return schedulerapp.Run(ctx, completed, sched)
	}, nil
}
