package nodecheck

import (
	"context"
	"errors"
	"net"
	"slices"
	"testing"
	"time"

	"microk8s/internal/leaktest"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// TestFrozenAgent looks at a node whose agent is frozen: the kernel takes its connections. The check has an end
// without one of its caller, and is none of those for `inspect` only.
func TestFrozenAgent(t *testing.T) {
	t.Parallel() // it waits
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n := &Node{
		Env: snapenv.Under(t.TempDir()), Now: time.Now, Services: []service.State{{Name: service.ClusterAgent, Phase: service.Running}},
		Config: nodeconfig.Config{AgentHost: "127.0.0.1", AgentPort: l.Addr().(*net.TCPAddr).Port},
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("it had no end of its own"))
	defer cancel()
	agent := func(r Result) bool { return r.Check.ID == "agent.answers" }
	results := Run(ctx, n, false)
	i := slices.IndexFunc(results, agent)
	if ctx.Err() != nil || i < 0 || len(results[i].Findings) != 1 {
		t.Errorf("%v: %+v", context.Cause(ctx), results)
	}
	if slices.ContainsFunc(RunSlow(ctx, n), agent) {
		t.Error("it is looked at twice")
	}
	// In the time of `status` the checks behind it are made as well.
	short, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	if results := Run(short, n, false); len(results[i].Findings) != 1 || short.Err() != nil {
		t.Errorf("with a second for all: %v, %+v", short.Err(), results)
	}
}
