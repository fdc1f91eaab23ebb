package main

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/spf13/pflag"

	"github.com/cert-manager/cert-manager/pkg/issuer/acme/http/solver"
	logf "github.com/cert-manager/cert-manager/pkg/logs"
)

// ending is how long open connections have when a program ends.
const ending = 5 * time.Second

// acmesolverPart answers one challenge.
func acmesolverPart(flags *pflag.FlagSet) func(context.Context) error {
	s := &solver.HTTP01Solver{}
	flags.IntVar(&s.ListenPort, "listen-port", 8089, "port to listen on")
	flags.StringVar(&s.Domain, "domain", "", "domain that is asked for")
	flags.StringVar(&s.Token, "token", "", "token of the challenge")
	flags.StringVar(&s.Key, "key", "", "answer to it")
	return func(ctx context.Context) error {
		end := context.AfterFunc(ctx, func() { shutdown(&s.Server) })
		defer end()
		return closed(s.Listen(logf.FromContext(ctx)))
	}
}

// shutdown ends a server within a bound.
func shutdown(s *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), ending)
	defer cancel()
	if s.Shutdown(ctx) != nil {
		_ = s.Close()
	}
}

// closed takes the end of a server that was shut down for none.
func closed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
