package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

const (
	// silence is how long no agent of the cluster may answer before a join gives up.
	silence = 8 * time.Second
	// helloWait bounds one attempt to talk to an agent: a frozen machine still accepts connections.
	helloWait = 4 * time.Second
	// goneWait is what a cluster that does not answer gets for what only it can do.
	goneWait = 3 * time.Second
)

// errSilent is wrapped when the cluster went away while this node joined it.
var errSilent = errors.New("the cluster no longer answers")

// whileAnswering runs wait, and ends its context when no agent of the cluster has answered for a
// while: a join to machines that died is taken back at once, and not when the limits of its steps
// are over.
func (s *joinRun) whileAnswering(ctx context.Context, wait func(ctx context.Context) error) error {
	agents, err := s.agents()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		last := time.Now()
		for tick := time.NewTicker(s.silence / 8); ; {
			err := s.hello(ctx, agents)
			switch {
			case ctx.Err() != nil:
				tick.Stop()
				return
			case err == nil:
				last = time.Now()
			case time.Since(last) > s.silence:
				tick.Stop()
				cancel(fmt.Errorf("%w: %w", errSilent, err))
				return
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}()
	err = wait(ctx)
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errSilent) {
		return cause
	}
	return err
}

// patience is the time for asking the cluster to forget this node: the given one, or a short one
// where nobody answers.
func (s *joinRun) patience(ctx context.Context, usual time.Duration) time.Duration {
	if s.gone == nil {
		agents, err := s.agents()
		gone := err == nil && s.hello(ctx, agents) != nil
		s.gone = &gone
	}
	if *s.gone {
		return min(usual, goneWait)
	}
	return usual
}

// agents lists where agents of the cluster's control-plane nodes listen, as far as that is known.
func (s *joinRun) agents() ([]string, error) {
	c, err := s.connection()
	if err != nil {
		return nil, err
	}
	hosts := []string{c.Target().Host}
	if a, err := s.answer(); err == nil {
		for _, address := range slices.Concat(a.Voters, a.apiServers()) {
			hosts = append(hosts, host(address))
		}
	}
	slices.Sort(hosts)
	hosts = slices.Compact(hosts)
	for i, h := range hosts {
		hosts[i] = join(h, c.Target().Port)
	}
	return hosts, nil
}

// hello succeeds when one of the agents answers. Who it is does not matter here, nothing is told to
// it.
func (s *joinRun) hello(ctx context.Context, agents []string) error {
	ctx, cancel := context.WithTimeout(ctx, helloWait)
	defer cancel()
	answers := make(chan error, len(agents))
	for _, address := range agents {
		go func() {
			conn, err := s.Dial(ctx, "tcp", address)
			if err == nil {
				err = greet(ctx, conn)
			}
			answers <- err
		}()
	}
	var errs []error
	for range agents {
		err := <-answers
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func greet(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	return tls.Client(conn, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(ctx) //nolint:gosec // nothing is sent
}
