// Package tokenstore keeps the join tokens of a cluster: what may be done with each, and which
// node is using it just now. Of a token it keeps the id and the key that internal/token
// derives, never the token.
//
// The rules are in [State], which is pure; a [Backend] makes changes to it atomic. There are
// two: a Secret in kube-system that all control-plane nodes share, and a file for what is
// written down before a node ever ran (docs/adr/0004).
package tokenstore

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"microk8s/internal/token"
)

// Reservation is how long a token stays with the node name that presented it.
const Reservation = 10 * time.Minute

// Unlimited is the number of uses of a token that is never used up.
const Unlimited = -1

// Limits of what is kept.
const (
	remember  = 24 * time.Hour // of tokens that are over, so that their users are told why
	maxTokens = 1000
	maxHolds  = 100 // reservations of one token at the same time
	// maxNames bounds how many nodes may, one after the other, begin a join with one use of a
	// token and give it up before a certificate is signed.
	maxNames = 8
)

// Reasons why a token is not taken. All but ErrUnknown are only given to who showed the token.
var (
	ErrUnknown = errors.New("invalid token")
	ErrUsed    = errors.New("the token was used up")
	ErrExpired = errors.New("the token has expired")
	ErrRevoked = errors.New("the token was revoked")
	ErrHeld    = errors.New("another node is joining with this token; it is free again after ten minutes at most")
	ErrRole    = errors.New("the token only joins workers; use --worker, or a token made without it")
	ErrName    = errors.New("the token is for a node of another name")
	ErrFull    = fmt.Errorf("there are %d tokens already; revoke some", maxTokens)
	ErrBound   = errors.New("a certificate for a node of another name was given out with this token, so only that node may go on with it; join under that name, or make another token")
	ErrSigned  = errors.New("the certificate of this kind was given out already; start the join again")
)

// Record is one token.
type Record struct {
	ID        token.ID  `json:"-"`
	Key       token.Key `json:"key"`
	Generated bool      `json:"generated"`      // or chosen and not to be guessed: only then the server proves that it knows it
	Worker    bool      `json:"worker"`         // joins workers only
	Name      string    `json:"name,omitempty"` // the node it is bound to
	Uses      int       `json:"uses"`           // what is left, or Unlimited
	Created   time.Time `json:"created"`
	Expires   time.Time `json:"expires,omitzero"`
	Revoked   time.Time `json:"revoked,omitzero"`
	Holds     []Hold    `json:"holds,omitempty"`
	Names     []string  `json:"names,omitempty"`  // that began a join with the use that is next
	Signed    []string  `json:"signed,omitempty"` // those of them that have a certificate
	SpentBy   []string  `json:"spentBy,omitempty"`
	SpentAt   time.Time `json:"spentAt,omitzero"`
}

// Hold is a reservation of one use.
type Hold struct {
	Joiner
	Until   time.Time `json:"until"`
	Began   time.Time `json:"began,omitzero"`    // the first join request of the node that was not given up
	Kubelet bool      `json:"kubelet,omitempty"` // the certificate was signed since the last join request
	Proxy   bool      `json:"proxy,omitempty"`
}

// Joiner is who presents a token.
type Joiner struct {
	Name    string `json:"name"`
	Worker  bool   `json:"worker"`
	Ours    bool   `json:"ours"`              // it confirms its join
	Address string `json:"address,omitempty"` // that it has for other nodes
	Join    string `json:"join,omitempty"`    // the nonce of its last join request
}

// Over says why the token cannot be used any more, or nil.
func (r *Record) Over(now time.Time) error {
	switch {
	case !r.Revoked.IsZero():
		return ErrRevoked
	case r.Uses == 0:
		return ErrUsed
	case !r.Expires.IsZero() && !now.Before(r.Expires):
		return ErrExpired
	}
	return nil
}

func (r *Record) hold(name string) *Hold {
	for i := range r.Holds {
		if r.Holds[i].Name == name {
			return &r.Holds[i]
		}
	}
	return nil
}

// Knows reports whether this node began a join with this token before and has not ended it, so that
// what is in the cluster under its name may be its own.
func (r *Record) Knows(name string) bool {
	return r.hold(name) != nil || slices.Contains(r.Names, name)
}

// State is all tokens of a store. Its methods use the time that they are given.
type State struct {
	Records map[token.ID]*Record
}

// find checks a presented token against what is kept, in constant time for each token.
func (s *State) find(t token.Token) (*Record, error) {
	id, key := t.Derive()
	r, ok := s.Records[id]
	if !ok {
		r = &Record{} // compared all the same
	}
	if !ok || !r.Key.Equal(key) {
		return nil, ErrUnknown
	}
	return r, nil
}

// Add writes down a token; one that is there already is replaced.
func (s *State) Add(t token.Token, r Record, now time.Time) (*Record, error) {
	s.prune(now)
	r.ID, r.Key = t.Derive()
	r.Generated = t.Guessable() == nil
	r.Created = now
	if _, there := s.Records[r.ID]; !there && len(s.Records) >= maxTokens {
		return nil, ErrFull
	}
	if s.Records == nil {
		s.Records = map[token.ID]*Record{}
	}
	s.Records[r.ID] = &r
	return &r, nil
}

// Key returns the key with which the server proves itself. Tokens that could be guessed have no
// proof: it would tell whoever asks whether a guess was right.
func (s *State) Key(id token.ID, now time.Time) (token.Key, error) {
	r, ok := s.Records[id]
	if !ok || !r.Generated || r.Over(now) != nil && len(r.Holds) == 0 && !s.lately(r, now) {
		return token.Key{}, ErrUnknown
	}
	return r.Key, nil
}

// lately says that a token ended not long ago: its server still proves itself, so that the
// client can be told why it is not taken.
func (s *State) lately(r *Record, now time.Time) bool {
	return now.Sub(r.end(now)) < remember
}

// end is when the token was over; now if it is not.
func (r *Record) end(now time.Time) time.Time {
	err := r.Over(now)
	switch {
	case errors.Is(err, ErrRevoked):
		return r.Revoked
	case errors.Is(err, ErrUsed):
		return r.SpentAt
	case errors.Is(err, ErrExpired):
		return r.Expires
	}
	return now
}

// Check reports whether this joiner would get a reservation, and changes nothing.
func (s *State) Check(t token.Token, j Joiner, now time.Time) (*Record, error) {
	r, err := s.find(t)
	if err != nil {
		return nil, err
	}
	return r, r.admits(j, now)
}

func (r *Record) admits(j Joiner, now time.Time) error {
	if err := r.Over(now); err != nil {
		return err
	}
	if r.Worker && !j.Worker {
		return ErrRole
	}
	if r.Name != "" && r.Name != j.Name {
		return ErrName
	}
	held := 0
	for _, h := range r.Holds {
		if h.Name != j.Name && now.Before(h.Until) {
			held++
		}
	}
	if r.Uses != Unlimited && held >= r.Uses || held >= maxHolds {
		return ErrHeld
	}
	if r.Uses != Unlimited && len(r.Names) >= maxNames*r.Uses && !slices.Contains(r.Names, j.Name) {
		return ErrUsed
	}
	if r.Uses != Unlimited && len(r.Signed) >= r.Uses && !slices.Contains(r.Signed, j.Name) {
		return ErrBound
	}
	return nil
}

// Reserve keeps one use of the token for this node. The same node may repeat it, and gets its
// certificates signed again.
func (s *State) Reserve(t token.Token, j Joiner, now time.Time) (*Record, error) {
	r, err := s.Check(t, j, now)
	if err != nil {
		return r, err
	}
	began := now
	if h := r.hold(j.Name); h != nil && !h.Began.IsZero() {
		began = h.Began
	}
	r.Holds = slices.DeleteFunc(r.Holds, func(h Hold) bool { return h.Name == j.Name || !now.Before(h.Until) })
	r.Holds = append(r.Holds, Hold{Joiner: j, Until: now.Add(Reservation), Began: began})
	if !slices.Contains(r.Names, j.Name) {
		r.Names = append(r.Names, j.Name)
	}
	if over := len(r.Names) - maxHolds; over > 0 && r.Uses == Unlimited {
		r.Names = slices.Delete(r.Names, 0, over)
	}
	return r, nil
}

// Sign notes that a certificate is given to a worker with a reservation. name is the node's;
// for the proxy's certificate, which does not say it, "" finds any that still may have one. A
// worker that will not confirm spends the token with its kubelet's certificate. allow may
// refuse the request; then nothing is noted, and its error is returned.
func (s *State) Sign(t token.Token, kubelet bool, name string, now time.Time, allow func(Hold) error) (Hold, error) {
	r, err := s.find(t)
	if err != nil {
		return Hold{}, err
	}
	if !r.Revoked.IsZero() {
		return Hold{}, ErrRevoked
	}
	open := func(h *Hold) bool { return kubelet && !h.Kubelet || !kubelet && !h.Proxy }
	var found *Hold // the one of that name, else one that has no such certificate yet, else any
	for i := range r.Holds {
		h := &r.Holds[i]
		if !h.Worker || !now.Before(h.Until) {
			continue
		}
		if h.Name == name {
			found = h
			break
		}
		if found == nil || !open(found) && open(h) {
			found = h
		}
	}
	switch {
	case found == nil:
		return Hold{}, ErrUnknown
	case !open(found):
		return Hold{}, ErrSigned
	}
	if err := allow(*found); err != nil {
		return *found, err
	}
	if kubelet {
		found.Kubelet = true
		if !slices.Contains(r.Signed, found.Name) && r.Uses != Unlimited {
			r.Signed = append(r.Signed, found.Name)
		}
	} else {
		found.Proxy = true
	}
	out := *found
	if kubelet && !out.Ours {
		r.spend(out.Name, now)
	}
	return out, nil
}

func (r *Record) spend(name string, now time.Time) {
	same := func(n string) bool { return n == name }
	r.Holds = slices.DeleteFunc(r.Holds, func(h Hold) bool { return h.Name == name })
	r.Names = slices.DeleteFunc(r.Names, same)
	r.Signed = slices.DeleteFunc(r.Signed, same)
	if r.Uses > 0 {
		r.Uses--
		r.SpentAt = now
		r.SpentBy = append(r.SpentBy, name)
	}
}

// Confirm spends the use that this node has reserved. A node that confirmed before is told so
// again. It also counts when the reservation is over and nobody else took the use.
func (s *State) Confirm(t token.Token, name string, now time.Time) (Hold, error) {
	r, err := s.find(t)
	if err != nil {
		return Hold{}, err
	}
	h := r.hold(name)
	if h == nil {
		if slices.Contains(r.SpentBy, name) || r.Uses == Unlimited && r.Revoked.IsZero() {
			return Hold{Joiner: Joiner{Name: name}}, nil
		}
		if r.Over(now) == nil {
			return Hold{}, ErrHeld
		}
		return Hold{}, r.Over(now)
	}
	out := *h
	r.spend(name, now)
	return out, nil
}

// Hold returns the reservation of a node, whether its time is over or not; ok is false where it has none.
func (s *State) Hold(t token.Token, name string) (h Hold, ok bool, err error) {
	r, err := s.find(t)
	if err != nil {
		return Hold{}, false, err
	}
	if found := r.hold(name); found != nil {
		return *found, true, nil
	}
	return Hold{}, false, nil
}

// Settle spends what was reserved for a join, of a node that is in and could not confirm it.
func (s *State) Settle(join string, now time.Time) {
	for _, r := range s.Records {
		for _, h := range r.Holds {
			if h.Join == join && join != "" {
				r.spend(h.Name, now)
				return
			}
		}
	}
}

// Release gives the use back. Without a reservation it does nothing.
func (s *State) Release(t token.Token, name string) error {
	r, err := s.find(t)
	if err != nil {
		return err
	}
	r.Holds = slices.DeleteFunc(r.Holds, func(h Hold) bool { return h.Name == name })
	return nil
}

// Revoke revokes the token whose id begins with the given digits.
func (s *State) Revoke(prefix string, now time.Time) (*Record, error) {
	var found *Record
	for id, r := range s.Records {
		if strings.HasPrefix(id.String(), strings.ToLower(prefix)) {
			if found != nil {
				return nil, fmt.Errorf("more than one token has an id that begins with %s", prefix)
			}
			found = r
		}
	}
	if found == nil || len(prefix) < 4 {
		return nil, fmt.Errorf("no token has the id %q; microk8s add-node --list shows them", prefix)
	}
	if found.Revoked.IsZero() {
		found.Revoked = now
	}
	found.Holds = nil
	return found, nil
}

// prune forgets tokens that were over long ago.
func (s *State) prune(now time.Time) {
	for id, r := range s.Records {
		if r.Over(now) != nil && now.Sub(r.end(now)) > remember {
			delete(s.Records, id)
		}
	}
}

// List returns the tokens, oldest first.
func (s *State) List() []Record {
	out := make([]Record, 0, len(s.Records))
	for _, r := range s.Records {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b Record) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.ID.String(), b.ID.String())
	})
	return out
}
