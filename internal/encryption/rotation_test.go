package encryption

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"microk8s/internal/journal"
)

// nodes stands in for three control-plane nodes: their keys, and with which key each object is
// encrypted. This node is the first.
type nodes struct {
	t       *testing.T
	keys    [3]Keys
	objects map[string]Key
	// after ends the command in the middle of a step: that many nodes have got keys then.
	after int
}

var errKilled = errors.New("killed")

// readable wants every node to read every object, and what any node would write now.
func (n *nodes) readable(when string) {
	n.t.Helper()
	for i, keys := range n.keys {
		for name, k := range n.objects {
			if !slices.Contains(keys, k) {
				n.t.Errorf("%s: node %d cannot read %s, which is encrypted with %s", when, i, name, k.Name)
			}
		}
		for j, other := range n.keys {
			if !slices.Contains(keys, other[0]) {
				n.t.Errorf("%s: node %d cannot read what node %d writes", when, i, j)
			}
		}
	}
}

func (n *nodes) rotation() *Rotation {
	return &Rotation{
		Keys: func() (Keys, error) { return slices.Clone(n.keys[0]), nil },
		Spread: func(_ context.Context, keys Keys) error {
			for _, i := range []int{2, 1, 0} { // this one last, which is the worst
				if n.after == 0 {
					return errKilled
				}
				n.after--
				n.keys[i] = slices.Clone(keys)
				n.readable("spread")
				n.objects["written by node "+string(rune('0'+i))] = keys[0]
			}
			return nil
		},
		Rewrite: func(context.Context) (int, error) {
			for name := range n.objects {
				n.objects[name] = n.keys[1][0]
			}
			return len(n.objects), nil
		},
	}
}

// TestRotationIsInterrupted ends the command like kill -9 at each point of its journal, and in the
// middle of each step that changes nodes, and runs it again.
func TestRotationIsInterrupted(t *testing.T) {
	old := NewKey()
	start := func(t *testing.T) *nodes {
		n := &nodes{t: t, after: -1, objects: map[string]Key{"a": old}}
		for i := range n.keys {
			n.keys[i] = Keys{old}
		}
		return n
	}
	run := func(t *testing.T, n *nodes, path string, die journal.Point) (got Rotated, err error) {
		j, err := journal.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		j.At = func(p journal.Point) {
			if p == die {
				panic(errKilled)
			}
		}
		defer func() {
			if v := recover(); v != nil {
				err = errKilled
			}
		}()
		return n.rotation().Run(t.Context(), j)
	}
	check := func(t *testing.T, n *nodes, path string) {
		t.Helper()
		n.readable("interrupted")
		n.after = -1
		got, err := run(t, n, path, journal.Point{})
		if err != nil {
			t.Fatal(err)
		}
		n.readable("done")
		for i, keys := range n.keys {
			if len(keys) != 1 || keys[0].Name != got.Key || keys[0] == old || keys[0] != n.keys[0][0] {
				t.Errorf("node %d has the keys %v, and the new one is %s", i, keys.Names(), got.Key)
			}
		}
		for name, k := range n.objects {
			if k != n.keys[0][0] {
				t.Errorf("%s is encrypted with %s", name, k.Name)
			}
		}
		if r, err := journal.Read(path); r != nil || err != nil {
			t.Errorf("the journal has %v, %v", r, err)
		}
	}
	for _, step := range RotationSteps() {
		for _, end := range []bool{false, true} {
			p := journal.Point{Operation: RotationOperation, Step: step, End: end}
			t.Run(p.String(), func(t *testing.T) {
				n, path := start(t), filepath.Join(t.TempDir(), "journal")
				if _, err := run(t, n, path, p); !errors.Is(err, errKilled) {
					t.Fatalf("it went on: %v", err)
				}
				check(t, n, path)
			})
		}
	}
	for after := range 9 { // three steps, three nodes each
		n, path := start(t), filepath.Join(t.TempDir(), "journal")
		n.after = after
		if _, err := run(t, n, path, journal.Point{}); !errors.Is(err, errKilled) {
			t.Fatalf("after %d nodes it went on: %v", after, err)
		}
		check(t, n, path)
	}
	t.Run("of an earlier release", func(t *testing.T) {
		for _, first := range []bool{false, true} {
			n, path := start(t), filepath.Join(t.TempDir(), "journal")
			next := NewKey()
			for i := range n.keys {
				n.keys[i] = Keys{old, next}
				if first {
					n.keys[i] = Keys{next, old}
				}
			}
			j, err := journal.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			r := n.rotation()
			r.Begun = next.Name
			if got, err := r.Run(t.Context(), j); err != nil || got.Key != next.Name || len(n.keys[2]) != 1 || n.keys[2][0] != next {
				t.Errorf("%+v, %v, %v", got, err, n.keys[2].Names())
			}
			j.Close()
		}
	})
}
