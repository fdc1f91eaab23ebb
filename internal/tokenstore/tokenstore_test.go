package tokenstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

var start = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// backends are those under test.
func backends(t *testing.T) map[string]Backend {
	return map[string]Backend{
		"file":   File{Path: filepath.Join(t.TempDir(), "tokens.json")},
		"secret": Secret{Core: kubetest.New(t).Core},
	}
}

func mustParse(t *testing.T, text string) token.Token {
	t.Helper()
	tok, err := token.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// TestLife takes tokens through what can happen to them, in both backends.
func TestLife(t *testing.T) {
	for name, b := range backends(t) {
		t.Run(name, func(t *testing.T) {
			now := start
			s := &Store{Backends: []Backend{b}, Now: func() time.Time { return now }}
			ctx := t.Context()
			add := func(o Options) token.Token {
				t.Helper()
				tok := token.New()
				if _, err := s.Add(ctx, tok, o); err != nil {
					t.Fatal(err)
				}
				return tok
			}
			want := func(what string, err, wanted error) {
				t.Helper()
				if !errors.Is(err, wanted) && (err != nil || wanted != nil) {
					t.Errorf("%s: %v, want %v", what, err, wanted)
				}
			}
			reserve := func(tok token.Token, name string, worker bool) error {
				_, err := s.Reserve(ctx, tok, Joiner{Name: name, Worker: worker, Ours: true})
				return err
			}
			confirm := func(tok token.Token, name string) error {
				_, err := s.Confirm(ctx, tok, name)
				return err
			}

			one := add(Options{Uses: 1})
			want("an unknown one", reserve(token.New(), "n2", false), ErrUnknown)
			want("the first", reserve(one, "n2", false), nil)
			want("the same node", reserve(one, "n2", false), nil)
			want("another node", reserve(one, "n3", false), ErrHeld)
			want("a confirmation of another", confirm(one, "n3"), ErrHeld)
			want("given back", s.Release(ctx, one, "n2"), nil)
			want("given back again", s.Release(ctx, one, "n2"), nil)
			want("another node then", reserve(one, "n3", false), nil)
			want("the confirmation", confirm(one, "n3"), nil)
			want("the confirmation again", confirm(one, "n3"), nil)
			want("used", reserve(one, "n3", false), ErrUsed)
			want("used, another's confirmation", confirm(one, "n4"), ErrUsed)

			late := add(Options{Uses: 1})
			want("a slow join", reserve(late, "n2", false), nil)
			now = now.Add(Reservation)
			want("confirmed after the reservation", confirm(late, "n2"), nil)

			three := add(Options{Uses: 3})
			for i := range 3 {
				want("one of three", reserve(three, fmt.Sprint("n", i), true), nil)
			}
			want("a fourth", reserve(three, "n9", true), ErrHeld)
			for i := range 3 {
				want("one of three", confirm(three, fmt.Sprint("n", i)), nil)
			}
			want("a fourth later", reserve(three, "n9", true), ErrUsed)

			many := add(Options{Uses: Unlimited, TTL: 300 * time.Second})
			for i := range 20 {
				want("within its time", reserve(many, fmt.Sprint("n", i), true), nil)
				want("within its time", confirm(many, fmt.Sprint("n", i)), nil)
			}
			now = now.Add(300 * time.Second)
			want("after its time", reserve(many, "n2", true), ErrExpired)

			forever := add(Options{Persist: true})
			now = now.Add(10 * 365 * 24 * time.Hour)
			want("after ten years", reserve(forever, "n2", false), nil)
			list, err := s.List(ctx)
			if err != nil || len(list) != 1+4-0 {
				// What is over is forgotten when the next one is made.
				t.Errorf("%d tokens, %v", len(list), err)
			}
			add(Options{Uses: 1})
			if list, err = s.List(ctx); err != nil || len(list) != 2 {
				t.Errorf("%d tokens after pruning, %v", len(list), err)
			}

			id, _ := forever.Derive()
			if _, err := s.Revoke(ctx, "zz"); err == nil {
				t.Error("something was revoked")
			}
			if _, err := s.Revoke(ctx, strings.ToUpper(id.String()[:10])); err != nil {
				t.Error(err)
			}
			want("revoked", reserve(forever, "n2", false), ErrRevoked)
		})
	}
}

// TestUpstreamFormsOfTokens has the inputs that cluster-agent.md 2.2 requires.
func TestUpstreamFormsOfTokens(t *testing.T) {
	s := &Store{Backends: []Backend{File{Path: filepath.Join(t.TempDir(), "t")}}}
	long := mustParse(t, "0123456789abcdef0123456789abcdef-and-more")
	prefix := mustParse(t, "0123456789abcdef0123456789abcdef")
	if _, err := s.Add(t.Context(), long, Options{Uses: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reserve(t.Context(), prefix, Joiner{Name: "n"}); !errors.Is(err, ErrUnknown) {
		t.Errorf("a prefix: %v", err)
	}
	if _, err := s.Key(t.Context(), idOf(long)); !errors.Is(err, ErrUnknown) {
		t.Errorf("a proof of a chosen token: %v", err)
	}
	random := mustParse(t, "7c1f0e5b93a84d26b0e9f3127ad5c846")
	if _, err := s.Add(t.Context(), random, Options{Uses: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Key(t.Context(), idOf(random)); err != nil {
		t.Errorf("no proof of a random token: %v", err)
	}
	if _, err := s.Reserve(t.Context(), mustParse(t, "  0123456789abcdef0123456789abcdef-and-more\n"), Joiner{Name: "n"}); err != nil {
		t.Error(err)
	}
}

func idOf(tok token.Token) token.ID {
	id, _ := tok.Derive()
	return id
}

// TestNobodyWinsTwice lets many nodes ask with one token at the same time, in two processes'
// worth of stores: exactly one of them joins.
func TestNobodyWinsTwice(t *testing.T) {
	for name, b := range backends(t) {
		t.Run(name, func(t *testing.T) {
			tok := token.New()
			stores := []*Store{{Backends: []Backend{b}}, {Backends: []Backend{b}}}
			if _, err := stores[0].Add(t.Context(), tok, Options{Uses: 3}); err != nil {
				t.Fatal(err)
			}
			var mu sync.Mutex
			won := 0
			var group sync.WaitGroup
			for i := range 12 {
				group.Go(func() {
					node, s := fmt.Sprint("n", i), stores[i%2]
					if _, err := s.Reserve(t.Context(), tok, Joiner{Name: node}); err != nil {
						if !errors.Is(err, ErrHeld) && !errors.Is(err, ErrUsed) {
							t.Error(err)
						}
						return
					}
					if _, err := s.Confirm(t.Context(), tok, node); err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					defer mu.Unlock()
					won++
				})
			}
			group.Wait()
			if won != 3 {
				t.Errorf("%d nodes joined with a token for three", won)
			}
		})
	}
}

// TestUsesAreNeverExceeded does random things and compares with a simple count.
func TestUsesAreNeverExceeded(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("MICROK8S_TEST_SEED"); text != "" {
		if _, err := fmt.Sscan(text, &seed); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 200 {
		uses := 1 + r.IntN(3)
		st, now, tok := &State{}, start, token.New()
		if _, err := st.Add(tok, Record{Uses: uses}, now); err != nil {
			t.Fatal(err)
		}
		confirmed := 0
		for range 60 {
			name := fmt.Sprint("n", r.IntN(5))
			switch r.IntN(5) {
			case 0, 1:
				_, _ = st.Reserve(tok, Joiner{Name: name, Worker: true, Ours: true}, now)
			case 2:
				held := st.Records[idOf(tok)].hold(name) != nil
				_, err := st.Confirm(tok, name, now)
				if held && err != nil {
					t.Fatalf("seed %d: a reservation that cannot be confirmed: %v", seed, err)
				}
				if held {
					confirmed++
				}
			case 3:
				_ = st.Release(tok, name)
			case 4:
				now = now.Add(time.Duration(r.IntN(8)) * time.Minute)
			}
			if rec := st.Records[idOf(tok)]; rec.Uses+confirmed != uses || rec.Uses < 0 {
				t.Fatalf("seed %d: %d uses left after %d of %d joins", seed, rec.Uses, confirmed, uses)
			}
		}
	}
}

func TestSign(t *testing.T) {
	st, tok := &State{}, token.New()
	if _, err := st.Add(tok, Record{Uses: 2}, start); err != nil {
		t.Fatal(err)
	}
	ok := func(Hold) error { return nil }
	refuse := errors.New("refused")
	if _, err := st.Sign(tok, true, "n2", start, ok); !errors.Is(err, ErrUnknown) {
		t.Errorf("without a reservation: %v", err)
	}
	for _, j := range []Joiner{{Name: "cp"}, {Name: "n2", Worker: true}} {
		if _, err := st.Reserve(tok, j, start); err != nil {
			t.Fatal(err)
		}
	}
	if h, err := st.Sign(tok, false, "", start, ok); err != nil || h.Name != "n2" {
		t.Errorf("the proxy's: %v, %v", h, err)
	}
	if _, err := st.Sign(tok, true, "n2", start, func(Hold) error { return refuse }); !errors.Is(err, refuse) {
		t.Errorf("refused: %v", err)
	}
	if h, err := st.Sign(tok, true, "n2", start, ok); err != nil || h.Name != "n2" {
		t.Errorf("the kubelet's, after a refusal: %v, %v", h, err)
	}
	// n2 is not one that confirms, so this was its use.
	if r := st.Records[idOf(tok)]; r.Uses != 1 || r.hold("n2") != nil {
		t.Errorf("%d uses are left, %v", r.Uses, r.Holds)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	s := &Store{Backends: []Backend{File{Path: path}}}
	tok := token.New()
	if _, err := s.Add(t.Context(), tok, Options{Uses: 1, Name: "n2", Worker: true}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(data), tok.Reveal()) {
		t.Errorf("%v; the token is in the file: %v", err, strings.Contains(string(data), tok.Reveal()))
	}
	for _, p := range []string{path, path + ".lock"} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", p, st.Mode(), err)
		}
	}
	for _, damage := range []string{"x", "[]", `{"zz":{}}`, `{"0011223344556677":{"uses":-7}}`, `{"0011223344556677":{}}`, `{"0011223344556677":{"key":"AA=="}}`, `{"0011223344556677":3}`} {
		if err := os.WriteFile(path, []byte(damage), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.List(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot read the join tokens") {
			t.Errorf("%s: %v", damage, err)
		}
	}
}

func TestSecretUnavailable(t *testing.T) {
	api := kubetest.New(t)
	s := &Store{Backends: []Backend{Secret{Core: api.Core}, File{Path: filepath.Join(t.TempDir(), "t")}}}
	api.Down(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := s.Add(ctx, token.New(), Options{Uses: 1}); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	if _, err := s.Reserve(ctx, token.New(), Joiner{Name: "n"}); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	if _, err := s.Revoke(ctx, "12345678"); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
}

func TestAdopt(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.CredentialsDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	cluster := Secret{Core: kubetest.New(t).Core}
	if err := Adopt(t.Context(), env, cluster, start); err != nil { // nothing to do
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(env.CredentialsDir()); err != nil || len(entries) > 0 {
		t.Errorf("it left %v, %v", entries, err)
	}
	own := &Store{Backends: []Backend{File{Path: env.Credential(PersistentFile)}}}
	mine, theirs := token.New(), mustParse(t, "an-appliance-has-written-this-one")
	if _, err := own.Add(t.Context(), mine, Options{Persist: true}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(env.Credential(upstreamFile), []byte("\n  "+theirs.Reveal()+"\nshort\nlimited-"+theirs.Reveal()+"|5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Adopt(t.Context(), env, cluster, start); err != nil {
			t.Fatal(err)
		}
	}
	shared := &Store{Backends: []Backend{cluster}}
	for _, tok := range []token.Token{mine, theirs} {
		if _, err := shared.Check(t.Context(), tok, Joiner{Name: "n"}); err != nil {
			t.Error(err)
		}
	}
	if list, err := shared.List(t.Context()); err != nil || len(list) != 2 {
		t.Errorf("%d tokens, %v", len(list), err)
	}
	if list, err := own.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%d tokens are left, %v", len(list), err)
	}
	if _, err := os.Stat(env.Credential(upstreamFile)); err == nil {
		t.Error("a file with tokens is left")
	}
}

func FuzzDecode(f *testing.F) {
	st := &State{}
	if _, err := st.Add(token.New(), Record{Uses: 1, Name: "n"}, start); err != nil {
		f.Fatal(err)
	}
	data, err := Encode(st)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"0011223344556677":{"holds":[{}],"uses":-1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		st, err := Decode(data)
		if err != nil {
			return
		}
		tok := token.New()
		if _, err := st.Check(tok, Joiner{Name: "n"}, start); !errors.Is(err, ErrUnknown) {
			t.Errorf("a token that nobody made: %v", err)
		}
		again, err := Encode(st)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(again); err != nil {
			t.Errorf("what it wrote cannot be read: %v", err)
		}
		st.prune(start)
		st.List()
	})
}

// TestNames: which names a token is for follows from what was begun with it.
func TestNames(t *testing.T) {
	now := start
	join := func(name, nonce string) Joiner { return Joiner{Name: name, Worker: true, Ours: true, Join: nonce} }
	add := func(uses int) (*State, token.Token) {
		st, tok := &State{}, token.New()
		if _, err := st.Add(tok, Record{Uses: uses}, now); err != nil {
			t.Fatal(err)
		}
		return st, tok
	}
	allow := func(Hold) error { return nil }

	// A certificate binds the use to its node, whatever becomes of the reservation.
	st, tok := add(1)
	if _, err := st.Reserve(tok, join("a", "1"), now); err != nil {
		t.Fatal(err)
	}
	if err := st.Release(tok, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Reserve(tok, join("b", "2"), now); err != nil {
		t.Fatalf("another name before there is a certificate: %v", err)
	}
	if _, err := st.Sign(tok, true, "b", now, allow); err != nil {
		t.Fatal(err)
	}
	if err := st.Release(tok, "b"); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Reserve(tok, join("a", "3"), now.Add(time.Hour)); !errors.Is(err, ErrBound) {
		t.Errorf("another name afterwards: %v", err)
	}
	if _, err := st.Reserve(tok, join("b", "4"), now.Add(time.Hour)); err != nil {
		t.Errorf("the same name: %v", err)
	}

	// The first request of a join that goes on is remembered, and the nonce of the last.
	st, tok = add(Unlimited)
	for i, nonce := range []string{"1", "2"} {
		if _, err := st.Reserve(tok, join("a", nonce), now.Add(time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	h, ok, err := st.Hold(tok, "a")
	if err != nil || !ok || h.Join != "2" || !h.Began.Equal(now) {
		t.Errorf("%+v, %v, %v", h, ok, err)
	}
	// A token without a limit knows who began, until the join is confirmed; and not without end.
	r, err := st.Check(tok, join("a", ""), now)
	if err != nil || !r.Knows("a") {
		t.Errorf("%v", err)
	}
	st.Settle("2", now)
	if _, ok, _ := st.Hold(tok, "a"); ok || r.Knows("a") {
		t.Error("a node that is in counts as joining")
	}
	for i := range 2 * maxHolds {
		if _, err := st.Reserve(tok, join(fmt.Sprintf("n%d", i), "x"), now); err != nil && !errors.Is(err, ErrHeld) {
			t.Fatal(err)
		}
		if err := st.Release(tok, fmt.Sprintf("n%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(r.Names) > maxHolds || !r.Knows(fmt.Sprintf("n%d", 2*maxHolds-1)) {
		t.Errorf("%d names", len(r.Names))
	}
}
