package tokenstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/atomicfile"
	"microk8s/internal/coalesce"
	"microk8s/internal/kube"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// Backend keeps a State. Update calls change with the present state and keeps what it became;
// when change returns an error nothing is kept and the error is returned. change may be called
// more than once and must do nothing else.
type Backend interface {
	Update(ctx context.Context, change func(*State) error) error
}

// Store is the tokens of one or more backends: new ones go to the first, and a presented one
// is looked for in each in turn.
type Store struct {
	Backends []Backend
	Now      func() time.Time // nil means time.Now
}

// PersistentFile holds, in credentials/, the tokens that a launch configuration has written
// before the node ever ran; its agent hands them over to the cluster (see Adopt).
const PersistentFile = "persistent-join-tokens.json"

// readEvery is the least time between two reads of the cluster's tokens by one agent.
const readEvery = 20 * time.Millisecond

// Open returns the tokens as a control-plane node sees them: the cluster's, then its own file's.
func Open(env snapenv.Env, core func() (*kube.Core, error)) *Store {
	reads := &coalesce.Reads[*corev1.Secret]{Every: readEvery}
	return &Store{Backends: []Backend{Secret{Core: core, Reads: reads}, File{Path: env.Credential(PersistentFile)}}}
}

// upstreamFile, in credentials/, is where upstream's launch configurations leave persistent
// tokens, one on a line. Appliances write it themselves.
const upstreamFile = "persistent-cluster-tokens.txt"

// Adopt hands the tokens that were written down on this node over to the cluster, so that every
// control-plane node knows them, and no file holds them any more.
func Adopt(ctx context.Context, env snapenv.Env, cluster Backend, now time.Time) error {
	file := File{Path: env.Credential(PersistentFile)}
	path := env.Credential(upstreamFile)
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot read the persistent tokens: %w", err)
	}
	if _, err := os.Stat(file.Path); errors.Is(err, fs.ErrNotExist) && len(data) == 0 {
		return nil
	}
	var own State
	err = file.Update(ctx, func(st *State) error {
		for line := range strings.Lines(string(data)) {
			text, _, limited := strings.Cut(strings.TrimSpace(line), "|")
			if tok, err := token.Parse(text); err == nil && !limited {
				if _, err := st.Add(tok, Record{Uses: Unlimited}, now); err != nil {
					return err
				}
			}
		}
		own = *st
		return nil
	})
	if err != nil {
		return err
	}
	if len(data) > 0 {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("cannot remove tokens that are kept elsewhere now: %w", err)
		}
	}
	if len(own.Records) == 0 {
		return nil
	}
	err = cluster.Update(ctx, func(st *State) error {
		if st.Records == nil {
			st.Records = map[token.ID]*Record{}
		}
		for id, r := range own.Records {
			if _, there := st.Records[id]; !there {
				st.Records[id] = r
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return file.Update(ctx, func(st *State) error {
		for id := range own.Records {
			delete(st.Records, id)
		}
		return nil
	})
}

func (s *Store) now() time.Time {
	if s.Now != nil {
		return s.Now().UTC()
	}
	return time.Now().UTC()
}

// each does something in the first backend that knows the token.
func (s *Store) each(ctx context.Context, do func(*State) error) error {
	err := ErrUnknown
	for _, b := range s.Backends {
		if err = b.Update(ctx, do); !errors.Is(err, ErrUnknown) {
			return err
		}
	}
	return err
}

// Options of a token that is added.
type Options struct {
	Worker  bool
	Name    string        // node it is bound to; "" for any
	Uses    int           // Unlimited, or at least 1
	TTL     time.Duration // 0 for ever
	Persist bool          // never expires nor is used up
}

// Add writes down a token.
func (s *Store) Add(ctx context.Context, t token.Token, o Options) (r Record, err error) {
	now := s.now()
	r = Record{Worker: o.Worker, Name: o.Name, Uses: o.Uses}
	if o.TTL != 0 {
		r.Expires = now.Add(o.TTL)
	}
	if o.Persist {
		r.Uses = Unlimited
	}
	err = s.Backends[0].Update(ctx, func(st *State) error {
		added, err := st.Add(t, r, now)
		if err == nil {
			r = *added
		}
		return err
	})
	return r, err
}

// Key returns the key for a proof.
func (s *Store) Key(ctx context.Context, id token.ID) (k token.Key, err error) {
	err = s.each(ctx, func(st *State) (err error) {
		k, err = st.Key(id, s.now())
		return err
	})
	return k, err
}

// Check reports whether a reservation would be given.
func (s *Store) Check(ctx context.Context, t token.Token, j Joiner) (out Record, err error) {
	err = s.each(ctx, func(st *State) error {
		r, err := st.Check(t, j, s.now())
		if r != nil {
			out = *r
		}
		return err
	})
	return out, err
}

// Reserve keeps one use of the token for this node.
func (s *Store) Reserve(ctx context.Context, t token.Token, j Joiner) (out Record, err error) {
	err = s.each(ctx, func(st *State) error {
		r, err := st.Reserve(t, j, s.now())
		if r != nil {
			out = *r
		}
		return err
	})
	return out, err
}

// Sign notes that a certificate is given; see [State.Sign].
func (s *Store) Sign(ctx context.Context, t token.Token, kubelet bool, name string, allow func(Hold) error) (out Hold, err error) {
	err = s.each(ctx, func(st *State) (err error) {
		out, err = st.Sign(t, kubelet, name, s.now(), allow)
		return err
	})
	return out, err
}

// Confirm spends what the node has reserved.
func (s *Store) Confirm(ctx context.Context, t token.Token, name string) (out Hold, err error) {
	err = s.each(ctx, func(st *State) (err error) {
		out, err = st.Confirm(t, name, s.now())
		return err
	})
	return out, err
}

// Hold returns the reservation of a node; see [State.Hold].
func (s *Store) Hold(ctx context.Context, t token.Token, name string) (out Hold, ok bool, err error) {
	err = s.each(ctx, func(st *State) (err error) {
		out, ok, err = st.Hold(t, name)
		return err
	})
	return out, ok, err
}

// Settle spends what was reserved for a join; see [State.Settle].
func (s *Store) Settle(ctx context.Context, join string) error {
	for _, b := range s.Backends {
		if err := b.Update(ctx, func(st *State) error { st.Settle(join, s.now()); return nil }); err != nil {
			return err
		}
	}
	return nil
}

// Release gives a reservation back.
func (s *Store) Release(ctx context.Context, t token.Token, name string) error {
	return s.each(ctx, func(st *State) error { return st.Release(t, name) })
}

// Revoke revokes the token whose id begins with the given digits.
func (s *Store) Revoke(ctx context.Context, prefix string) (out Record, err error) {
	for _, b := range s.Backends {
		err = b.Update(ctx, func(st *State) error {
			r, err := st.Revoke(prefix, s.now())
			if err == nil {
				out = *r
			}
			return err
		})
		if err == nil || errors.Is(err, ErrUnavailable) {
			return out, err
		}
	}
	return out, err
}

// List returns all tokens, also those that ended lately.
func (s *Store) List(ctx context.Context) (out []Record, err error) {
	for _, b := range s.Backends {
		err := b.Update(ctx, func(st *State) error {
			out = append(out, st.List()...)
			return errRead
		})
		if err != nil && !errors.Is(err, errRead) {
			return nil, err
		}
	}
	return out, nil
}

// errRead ends an Update that only read.
var errRead = errors.New("nothing to keep")

// File is a Backend in one file, guarded by a lock on a second one that is never replaced.
// Both have mode 0600.
type File struct{ Path string }

// Update implements Backend.
func (f File) Update(ctx context.Context, change func(*State) error) error {
	lock, err := os.OpenFile(f.Path+".lock", os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot lock the join tokens: %w", err)
	}
	defer lock.Close()
	for { // others hold it for milliseconds
		if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("cannot lock the join tokens: %w", err)
	}
	data, err := os.ReadFile(f.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot read the join tokens: %w", err)
	}
	st := &State{}
	if len(data) > 0 {
		if st, err = Decode(data); err != nil {
			return fmt.Errorf("cannot read the join tokens in %s: %w; remove the file, and make new tokens", f.Path, err)
		}
	}
	if err := change(st); err != nil {
		return err
	}
	out, err := Encode(st)
	if err != nil {
		return err
	}
	if string(out) == string(data) {
		return nil
	}
	return atomicfile.Write(f.Path, out, 0o600, nil)
}

// Encode returns the text of a State.
func Encode(st *State) ([]byte, error) {
	all := map[string]*Record{}
	for id, r := range st.Records {
		all[id.String()] = r
	}
	return json.MarshalIndent(all, "", " ")
}

// Decode reads what Encode wrote.
func Decode(data []byte) (*State, error) {
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	st := &State{Records: map[token.ID]*Record{}}
	for text, raw := range all {
		r, err := decodeRecord(text, raw)
		if err != nil {
			return nil, err
		}
		st.Records[r.ID] = r
	}
	return st, nil
}

func decodeRecord(text string, raw []byte) (*Record, error) {
	id, err := token.ParseID(text)
	if err != nil {
		return nil, err
	}
	r := &Record{}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("token %s: %w", text, err)
	}
	if r.Uses < Unlimited {
		return nil, fmt.Errorf("token %s: it cannot have %d uses left", text, r.Uses)
	}
	if r.Key == (token.Key{}) {
		return nil, fmt.Errorf("token %s: its key is missing", text)
	}
	r.ID = id
	return r, nil
}
