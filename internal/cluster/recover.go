package cluster

import (
	"context"
	"encoding/json"
	"fmt"

	"microk8s/internal/journal"
	"microk8s/internal/snapenv"
)

type recoverParams struct {
	Self string `json:"self"`
	// Saved is where the datastore's directory as it was is kept.
	Saved string `json:"saved"`
	// Compare are directories of other members that the tool compares with once more.
	Compare []string `json:"compare,omitempty"`
	Stopped bool     `json:"stopped,omitempty"` // the node was, before
}

// ResumeRecover finishes a recovery that was interrupted; found is false where there is none.
func (n *Node) ResumeRecover(ctx context.Context, j *journal.Journal) (found bool, err error) {
	n.defaults()
	r, err := j.Pending()
	if err != nil || r == nil {
		return false, err
	}
	if r.Operation != opRecover {
		return false, fmt.Errorf("%w: %s; run it again to finish it", ErrOther, r.Operation)
	}
	var p recoverParams
	if err := json.Unmarshal(r.Params, &p); err != nil {
		return true, fmt.Errorf("cannot read the journal of the interrupted recovery: %w", err)
	}
	n.Say("A previous recovery was interrupted; resuming it")
	return true, j.Resume(ctx, n.recoverPlan(&p))
}

// Recover makes this node's member of the datastore the only one, with the data that it has. The caller has
// found out that it is the newest that is left (internal/datastore/survivors). The directory as it was is
// kept, and its path returned. Until it is rewritten, what fails is undone.
func (n *Node) Recover(ctx context.Context, j *journal.Journal, compare []string) (saved string, err error) {
	n.defaults()
	name, err := n.nodeName()
	if err != nil {
		return "", err
	}
	p := &recoverParams{
		Self: name, Saved: n.Env.BackendLive() + ".before-recover-" + n.Now().UTC().Format(keptLayout), Compare: compare, Stopped: n.state().Stopped,
	}
	return p.Saved, j.Run(ctx, n.recoverPlan(p), p)
}

func (n *Node) recoverPlan(p *recoverParams) journal.Plan {
	s := &recoverRun{Node: n, recoverParams: p}
	return journal.Plan{Operation: opRecover, Commit: StepStart, Steps: []journal.Step{
		step(StepStop, s.stop, s.startAgain),
		step(StepRewrite, s.rewrite, nil),
		step(StepStart, s.start, nil),
		step(StepWait, s.wait, nil),
	}}
}

type recoverRun struct {
	*Node
	*recoverParams
}

func (s *recoverRun) stop(ctx context.Context) error {
	if err := s.lock(snapenv.LockJoining); err != nil {
		return err
	}
	// Containers go on: what runs in them does not need the datastore.
	if err := s.Services.Stop(ctx); err != nil {
		return fmt.Errorf("cannot stop the services: %w", err)
	}
	return nil
}

func (s *recoverRun) startAgain(ctx context.Context) error {
	if err := s.unlock(snapenv.LockJoining); err != nil {
		return err
	}
	if s.Stopped {
		return nil
	}
	return s.Services.Start(ctx)
}

// rewrite is repeated after an interruption: what was saved by then stays, and the tool begins with the
// directory as it is.
func (s *recoverRun) rewrite(ctx context.Context) error {
	argv := []string{"recover", "--storage-dir", s.Env.BackendLive(), "--saved", s.Saved, "--others-are-gone"}
	for _, dir := range s.Compare {
		argv = append(argv, "--compare", dir)
	}
	if _, err := s.Datastore(ctx, argv...); err != nil {
		return fmt.Errorf("cannot rewrite the membership: %w", err)
	}
	return nil
}

func (s *recoverRun) start(ctx context.Context) error {
	if err := s.unlock(snapenv.LockJoining, snapenv.LockStopped); err != nil {
		return err
	}
	return s.Services.Start(ctx)
}

func (s *recoverRun) wait(ctx context.Context) error {
	return s.awaitReady(ctx, s.Self, "the datastore is recovered", "microk8s status")
}
