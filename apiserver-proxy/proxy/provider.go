package proxy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/traefik/traefik/v2/pkg/config/dynamic"
	"github.com/traefik/traefik/v2/pkg/provider/file"

	"microk8s/apiserver-proxy/config"
	"microk8s/internal/filewatch"
)

// loadProvider reads the list of servers from a file in the format of traefik's file provider.
// bad are entries that cannot be used; a list without any that can is an error.
func loadProvider(path string) (good []string, bad []error, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("cannot use %s: its decoder gave up: %v", path, p)
		}
	}()
	if _, err := config.Read(path); err != nil { // there, and not too large
		return nil, nil, err
	}
	// Traefik's own watching is not used: it ends when the file is missing at its start, and
	// errors are in its log only.
	c, err := (&file.Provider{Filename: path}).BuildConfiguration()
	if err != nil {
		return nil, nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	good, bad, err = servers(c)
	if err != nil {
		return nil, bad, fmt.Errorf("cannot use %s: %w", path, err)
	}
	return good, bad, nil
}

// servers takes the API servers out of a configuration.
func servers(c *dynamic.Configuration) (good []string, bad []error, err error) {
	var balancer *dynamic.TCPServersLoadBalancer
	if c.TCP != nil && c.TCP.Services[config.Service] != nil {
		balancer = c.TCP.Services[config.Service].LoadBalancer
	}
	if balancer == nil {
		return nil, nil, fmt.Errorf("it has no tcp.services.%s.loadBalancer", config.Service)
	}
	var list []string
	for _, s := range balancer.Servers {
		list = append(list, s.Address)
	}
	good, bad = config.Addresses(list)
	if len(good) == 0 {
		return nil, bad, errors.Join(append([]error{errors.New("it lists no server that can be used")}, bad...)...)
	}
	return good, bad, nil
}

// settle is how long a file must be left alone before it is read: who writes it by hand does so
// in several steps.
const settle = 50 * time.Millisecond

// watchFile calls changed after each change of a file, until ctx ends. It watches the directory,
// so that the file may be missing, replaced and removed.
func watchFile(ctx context.Context, path string, changed func()) error {
	match, folders := filewatch.Files(path)
	files, err := filewatch.Watch(ctx, filewatch.Options{Settle: settle, Match: match}, folders...)
	if err != nil {
		return err
	}
	changed() // what happened before the watch
	for range files {
		changed()
	}
	if ctx.Err() == nil {
		return fmt.Errorf("watching %s has ended", path)
	}
	return nil
}
