package images

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"microk8s/internal/snapenv"
)

// TestSilentContainerd calls a listener that accepts and says nothing, as a frozen containerd does,
// and a server that answers for its health alone: that one may take its time.
func TestSilentContainerd(t *testing.T) {
	const limit = 100 * time.Millisecond
	dir, err := os.MkdirTemp("", "im") // short: a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	env := snapenv.Under(dir)
	if err := os.MkdirAll(filepath.Dir(env.ContainerdSocket()), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", env.ContainerdSocket())
	if err != nil {
		t.Fatal(err)
	}
	ctx, c, explain, done, err := attended(t.Context(), env, limit)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.ListImages(ctx)
	var silent *SilentError
	if err = explain(err); !errors.As(err, &silent) || silent.Wait != limit {
		t.Errorf("a frozen containerd: %v", err)
	}
	done()
	l.Close()

	if l, err = net.Listen("unix", env.ContainerdSocket()); err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		<-stream.Context().Done() // never answers, but its health does
		return stream.Context().Err()
	}))
	healthpb.RegisterHealthServer(s, health.NewServer())
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	ctx, c, explain, done, err = attended(t.Context(), env, 20*limit)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	answered := make(chan error, 1)
	go func() { _, err := c.ListImages(ctx); answered <- err }()
	select {
	case err := <-answered:
		t.Errorf("a slow containerd was taken for a frozen one: %v", explain(err))
	case <-time.After(5 * limit):
	}
}
