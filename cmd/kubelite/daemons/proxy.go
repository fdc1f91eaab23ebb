package daemons

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"unsafe"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/component-base/logs"
	proxyapp "k8s.io/kubernetes/cmd/kube-proxy/app"
)

// proxyOptions are those of this process' kube-proxy, which runs once.
var proxyOptions *proxyapp.Options

// newProxy does what kube-proxy's command does, with the same functions, on options that [ResyncProxy] can reach.
// Logging, which the command sets up as well, is the process': the kubelet's command does it, with the same flags.
func newProxy(words []string) (func(context.Context) error, error) {
	opts := proxyapp.NewOptions()
	fs := pflag.NewFlagSet(Proxy, pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	fs.Usage = func() {}
	opts.AddFlags(fs)
	if err := fs.Parse(words); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("takes no arguments besides flags, got %q", fs.Args())
	}
	proxyOptions = opts
	return func(ctx context.Context) error {
		if err := opts.Complete(fs); err != nil {
			return fmt.Errorf("failed complete: %w", err)
		}
		logs.InitLogs()
		cliflag.PrintFlags(fs)
		if err := opts.Validate(); err != nil {
			return fmt.Errorf("failed validate: %w", err)
		}
		utilfeature.DefaultMutableFeatureGate.AddMetrics()
		return opts.Run(ctx)
	}, nil
}

// errNoProxy is returned as long as kube-proxy has not come to its rules.
var errNoProxy = errors.New("kube-proxy is not running yet")

// ResyncProxy has kube-proxy write all its rules again, soon: by itself it only notices that they are gone when a
// Service changes, or once an hour. Call it after its table was there.
func ResyncProxy() error {
	server, err := proxyServer(proxyOptions)
	if err != nil {
		return err
	}
	if server.NodeManager == nil || server.Proxier == nil {
		return errNoProxy
	}
	node := server.NodeManager.Node()
	if node == nil {
		return errNoProxy
	}
	// Sync alone writes only what changed. A change of the node's topology is the one cause of a full one that can
	// be had from outside; the labels are those that kube-proxy itself passes (pkg/proxy/config, handleNodeEvent).
	labels := map[string]string{}
	if zone, ok := node.Labels[corev1.LabelTopologyZone]; ok {
		labels[corev1.LabelTopologyZone] = zone
	}
	server.Proxier.OnTopologyChange(labels)
	return nil
}

// proxyServer returns the server that options run. They keep it in a field that is not exported and never
// changes once it is set; a build with a Kubernetes that has it elsewhere fails TestProxyServer.
func proxyServer(opts *proxyapp.Options) (*proxyapp.ProxyServer, error) {
	if opts == nil {
		return nil, errNoProxy
	}
	field := reflect.ValueOf(opts).Elem().FieldByName("proxyServer")
	if !field.IsValid() || field.Kind() != reflect.Interface {
		return nil, errors.New("this version of kube-proxy keeps its server elsewhere")
	}
	field = reflect.NewAt(field.Type(), unsafe.Pointer(field.UnsafeAddr())).Elem()
	server, ok := field.Interface().(*proxyapp.ProxyServer)
	if !ok || server == nil {
		return nil, errNoProxy
	}
	return server, nil
}
