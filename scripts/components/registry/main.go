// Command registry is the registry of the Distribution project with what a registry inside a
// cluster needs: images in a directory, and users in a file. The drivers for the storage of
// clouds, which would treble its size, are left out.
//
// As `registry forward PORT ADDRESS` it hands connections to PORT of the loopback on to ADDRESS,
// so that the registry is at localhost on every node.
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/registry"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

const (
	dialTimeout    = 10 * time.Second
	maxConnections = 512
)

func main() {
	var err error
	if len(os.Args) == 4 && os.Args[1] == "forward" {
		err = forward(os.Args[2], os.Args[3])
		fmt.Fprintln(os.Stderr, "registry forward:", err)
	} else {
		err = registry.RootCmd.Execute()
	}
	if err != nil {
		os.Exit(1)
	}
}

// forward listens on the loopback of both families, as far as the host has them, until one
// listener fails.
func forward(port, to string) error {
	var listeners []net.Listener
	var errs []error
	for _, address := range []string{"127.0.0.1", "::1"} {
		l, err := net.Listen("tcp", net.JoinHostPort(address, port))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		listeners = append(listeners, l)
	}
	if len(listeners) == 0 {
		return errors.Join(errs...)
	}
	slots := make(chan struct{}, maxConnections)
	ended := make(chan error)
	for _, l := range listeners {
		go func() { ended <- serve(l, to, slots) }()
	}
	return <-ended
}

func serve(l net.Listener, to string, slots chan struct{}) error {
	for {
		slots <- struct{}{}
		client, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer func() { <-slots }()
			defer client.Close()
			server, err := net.DialTimeout("tcp", to, dialTimeout)
			if err != nil {
				fmt.Fprintln(os.Stderr, "registry forward:", err)
				return
			}
			defer server.Close()
			var both sync.WaitGroup
			both.Go(func() { pipe(server, client) })
			both.Go(func() { pipe(client, server) })
			both.Wait()
		}()
	}
}

// pipe copies one way and then passes the end on.
func pipe(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if half, ok := to.(*net.TCPConn); ok && err == nil {
		_ = half.CloseWrite()
		return
	}
	to.Close()
	from.Close()
}
