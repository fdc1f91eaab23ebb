package images

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"microk8s/internal/snapenv"
)

// silence is how long containerd may leave a question about its health without an answer. One that
// is frozen still accepts connections, and a call into it may rightly take minutes: unpacking a
// large image, for instance.
const silence = 30 * time.Second

// SilentError is the error of a call that containerd did not answer.
type SilentError struct {
	Wait time.Duration
}

func (e *SilentError) Error() string {
	return fmt.Sprintf("containerd did not answer within %s; see: microk8s status, and microk8s logs containerd", e.Wait)
}

// attended connects to the node's containerd. The context that it returns is cancelled, with a
// *SilentError as its cause, when containerd stops to answer; done ends that and the connection.
// explain returns that error in the place of the one that a call returned because of it.
func attended(ctx context.Context, env snapenv.Env, limit time.Duration) (_ context.Context, c *client.Client, explain func(error) error, done func(), err error) {
	conn, err := (&net.Dialer{Timeout: limit}).DialContext(ctx, "unix", env.ContainerdSocket())
	if err != nil {
		return nil, nil, nil, nil, fmt.Errorf("containerd does not run (%w); see: microk8s status, and microk8s logs containerd", err)
	}
	conn.Close()
	// A frozen one does not get as far as a connection of gRPC's: calls wait for that.
	c, err = connect(env, grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return nil, nil, nil, nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	over := make(chan struct{})
	go func() {
		defer close(over)
		for {
			ask, end := context.WithTimeout(ctx, limit)
			_, err := c.HealthService().Check(ask, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
			end()
			if err != nil && ctx.Err() == nil {
				cancel(&SilentError{limit})
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(limit / 3):
			}
		}
	}()
	explain = func(err error) error {
		if silent, ok := context.Cause(ctx).(*SilentError); ok && err != nil { //nolint:errorlint // it is the cause itself
			return silent
		}
		return err
	}
	done = func() {
		cancel(nil)
		<-over
		c.Close()
	}
	return ctx, c, explain, done, nil
}

// Answers returns a [SilentError] when the node's containerd takes connections and does not answer
// within a limit; nil when it answers, or is not there.
func Answers(ctx context.Context, env snapenv.Env, limit time.Duration) error {
	conn, err := (&net.Dialer{Timeout: limit}).DialContext(ctx, "unix", env.ContainerdSocket())
	if err != nil {
		return nil // not there, which whoever calls it finds out
	}
	conn.Close()
	c, err := connect(env)
	if err != nil {
		return nil
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err = c.HealthService().Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil && ctx.Err() != nil {
		return &SilentError{limit}
	}
	return nil
}
