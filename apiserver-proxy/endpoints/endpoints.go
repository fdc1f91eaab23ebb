// Package endpoints learns from the cluster which API servers there are: the endpoints of the
// Service default/kubernetes, which the API servers themselves keep. It watches EndpointSlices
// and lists them again after each interval, so that a lost watch is late by that at most. Where
// nodes may not read EndpointSlices (clusters before 1.34), it asks for the Endpoints object
// instead, once in each interval.
//
// What is done with the list, and how the API is reached, is left to the caller.
package endpoints

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"microk8s/internal/backoff"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	namespace = metav1.NamespaceDefault
	service   = "kubernetes"

	requestTimeout = 10 * time.Second // of one request that is no watch
	userAgent      = "microk8s-apiserver-proxy"
)

// Source is the loop. Its first three fields are needed.
type Source struct {
	// Kubeconfig is the file of the credentials; it is read again for each list, so that
	// renewed certificates are used.
	Kubeconfig string
	// Interval is the longest time between two lists, and between a change and its arrival.
	Interval time.Duration
	Log      *slog.Logger

	// Pause is the shortest time between two tries, 1 s by default. After failures it is
	// doubled, up to Interval.
	Pause time.Duration
}

// Run calls apply with every list of addresses (host:port, sorted) that it learns of, changed or
// not, until ctx ends. Empty lists are not passed on: a cluster always has an API server. apply
// is never called concurrently.
func (s *Source) Run(ctx context.Context, apply func([]string)) {
	pause := s.Pause
	if pause <= 0 {
		pause = time.Second
	}
	waits, fallback := backoff.New(pause, s.Interval), false
	for {
		began := time.Now()
		err := s.follow(ctx, apply)
		if refused(err) {
			if !fallback {
				s.Log.Info("Failed to get EndpointSlices, falling back to Endpoints api", "err", err)
			}
			fallback = true
			if err = s.endpoints(ctx, apply); err == nil {
				err = sleep(ctx, s.Interval)
			}
		} else if err == nil {
			fallback = false
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			wait := min(waits.Step(), s.Interval)
			s.Log.Warn("failed to retrieve kubernetes endpoints", "err", err, "retry_in", wait)
			_ = sleep(ctx, wait)
			continue
		}
		waits = backoff.New(pause, s.Interval)
		_ = sleep(ctx, pause-time.Since(began)) // a watch that ends at once is not asked for in a hurry
	}
}

// refused says that these credentials may not read the objects, or that there are none.
func refused(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsNotFound(err) }

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// follow lists the slices and passes on what a watch then says, for one interval.
func (s *Source) follow(ctx context.Context, apply func([]string)) error {
	client, err := s.client(discoveryv1.SchemeGroupVersion)
	if err != nil {
		return err
	}
	options := metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service}
	var list discoveryv1.EndpointSliceList
	listCtx, cancel := context.WithTimeout(ctx, requestTimeout)
	err = client.Get().Namespace(namespace).Resource("endpointslices").
		VersionedParams(&options, parameters).Do(listCtx).Into(&list)
	cancel()
	if err != nil {
		return err
	}
	known := map[string]discoveryv1.EndpointSlice{}
	for _, slice := range list.Items {
		known[slice.Name] = slice
	}
	s.pass(FromSlices(list.Items), apply)

	seconds := max(1, int64(s.Interval/time.Second))
	options.ResourceVersion, options.Watch, options.TimeoutSeconds = list.ResourceVersion, true, &seconds
	watchCtx, cancel := context.WithTimeout(ctx, s.Interval)
	defer cancel()
	w, err := client.Get().Namespace(namespace).Resource("endpointslices").
		VersionedParams(&options, parameters).Timeout(s.Interval).Watch(watchCtx)
	if refused(err) { // the list is allowed, the watch is not: list again later
		s.Log.Debug("cannot watch EndpointSlices", "err", err)
		return sleep(ctx, s.Interval)
	}
	if err != nil {
		return ended(watchCtx, ctx, err)
	}
	defer w.Stop()
	for {
		select {
		case <-watchCtx.Done():
			return ended(watchCtx, ctx, nil)
		case event, ok := <-w.ResultChan():
			if !ok {
				return nil
			}
			slice, isSlice := event.Object.(*discoveryv1.EndpointSlice)
			switch {
			case event.Type == watch.Error:
				return apierrors.FromObject(event.Object)
			case !isSlice:
				return fmt.Errorf("the API server sent a %T", event.Object)
			case event.Type == watch.Deleted:
				delete(known, slice.Name)
			default:
				known[slice.Name] = *slice
			}
			now := make([]discoveryv1.EndpointSlice, 0, len(known))
			for _, slice := range known {
				now = append(now, slice)
			}
			s.pass(FromSlices(now), apply)
		}
	}
}

// ended is nil when a watch ended only because its time was up.
func ended(watchCtx, ctx context.Context, err error) error {
	if ctx.Err() == nil && errors.Is(watchCtx.Err(), context.DeadlineExceeded) {
		return nil
	}
	return errors.Join(err, ctx.Err())
}

func (s *Source) endpoints(ctx context.Context, apply func([]string)) error {
	client, err := s.client(corev1.SchemeGroupVersion)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var e corev1.Endpoints //nolint:staticcheck // clusters before 1.34 allow nodes nothing newer
	if err := client.Get().Namespace(namespace).Resource("endpoints").Name(service).Do(ctx).Into(&e); err != nil {
		return err
	}
	s.pass(FromEndpoints(&e), apply)
	return nil
}

func (s *Source) pass(addresses []string, apply func([]string)) {
	if len(addresses) == 0 {
		s.Log.Warn("warning: empty list of endpoints, skipping update")
		return
	}
	apply(addresses)
}

// The kinds that are read here and no others, which spares the memory of the full scheme.
var (
	scheme     = runtime.NewScheme()
	codecs     = serializer.NewCodecFactory(scheme)
	parameters = runtime.NewParameterCodec(scheme)
)

func init() {
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
}

func (s *Source) client(gv schema.GroupVersion) (*rest.RESTClient, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", s.Kubeconfig, err)
	}
	cfg.GroupVersion, cfg.APIPath, cfg.UserAgent = &gv, "/apis", userAgent
	if gv.Group == "" {
		cfg.APIPath = "/api"
	}
	cfg.NegotiatedSerializer = codecs.WithoutConversion()
	cfg.QPS = -1 // the loop above is slow by itself
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", s.Kubeconfig, err)
	}
	return client, nil
}
