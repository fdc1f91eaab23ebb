package encryption

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"microk8s/internal/journal"
)

// Rotation replaces the keys of a cluster by a new one. It is a journal of steps: interrupted
// anywhere, by kill -9 too, it goes on when it is run again. At every moment every API server can
// read what any of them writes.
type Rotation struct {
	// Keys returns those of this node, as its API server uses them.
	Keys func() (Keys, error)
	// Spread has all control-plane nodes, this one among them, use exactly these keys.
	Spread func(ctx context.Context, keys Keys) error
	// Rewrite writes every Secret and ConfigMap again, and returns how many there were.
	Rewrite func(ctx context.Context) (int, error)
	// Begun is a rotation that an earlier release has begun: the name of its new key. "" is none.
	Begun string
}

// RotationOperation is the journal's name of a rotation.
const RotationOperation = "encryption-rotate"

// Steps of a rotation. Journals hold them, so none may change.
const (
	stepAddKey  = "add-key"
	stepEncrypt = "encrypt"
	stepRewrite = "rewrite"
	stepDrop    = "drop-keys"
)

// rotationParams is what the journal keeps: no key.
type rotationParams struct {
	Key string `json:"key"` // the new key's name
}

// Rotated is what a rotation has done.
type Rotated struct {
	Key     string // name of the key that is left
	Objects int    // written again
}

// Run begins a rotation, or goes on with the one in the journal. An error leaves it in the
// journal, and nothing that cannot be read.
func (r *Rotation) Run(ctx context.Context, j *journal.Journal) (Rotated, error) {
	record, err := j.Pending()
	if err != nil {
		return Rotated{}, err
	}
	params := rotationParams{Key: r.Begun}
	if record != nil {
		if err := json.Unmarshal(record.Params, &params); err != nil || params.Key == "" {
			return Rotated{}, fmt.Errorf("the journal of the rotation is damaged: %w", err)
		}
	} else if params.Key == "" {
		params.Key = NewKey().Name
	}
	done := Rotated{Key: params.Key}
	plan := r.plan(params.Key, &done)
	if record != nil {
		return done, j.Resume(ctx, plan)
	}
	return done, j.Run(ctx, plan, params)
}

// RotationSteps returns the IDs of the steps, for tests that interrupt each.
func RotationSteps() []string { return (&Rotation{}).plan("", &Rotated{}).IDs() }

func (r *Rotation) plan(name string, done *Rotated) journal.Plan {
	add := func(ctx context.Context) error {
		keys, err := r.Keys()
		if err != nil {
			return err
		}
		if keys[0].Name == name {
			return nil // a rotation of an earlier release came as far as that
		}
		if !slices.Contains(keys.Names(), name) {
			// Nothing is encrypted with it yet, so a key of that name that some nodes have from
			// before an interruption may be another one.
			key := NewKey()
			key.Name = name
			if keys, err = keys.Merge(Keys{key}); err != nil {
				return err
			}
		}
		return r.Spread(ctx, keys)
	}
	return journal.Plan{Operation: RotationOperation, Commit: stepAddKey, Steps: []journal.Step{
		{ID: stepAddKey, Title: "Add the new key " + name + " on all control plane nodes", Do: add},
		{ID: stepEncrypt, Title: "Encrypt with it", Do: func(ctx context.Context) error {
			keys, err := r.Keys()
			if err != nil {
				return err
			}
			if keys, err = keys.First(name); err != nil {
				return err
			}
			return r.Spread(ctx, keys)
		}},
		{ID: stepRewrite, Title: "Encrypt what is there", Do: func(ctx context.Context) (err error) {
			done.Objects, err = r.Rewrite(ctx)
			return err
		}},
		{ID: stepDrop, Title: "Drop the other keys", Do: func(ctx context.Context) error {
			keys, err := r.Keys()
			if err != nil {
				return err
			}
			if keys, err = keys.First(name); err != nil {
				return err
			}
			return r.Spread(ctx, keys[:1])
		}},
	}}
}
