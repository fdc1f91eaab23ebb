package callback

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"microk8s/internal/kube/kubetest"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

func TestKeyIsMadeOnce(t *testing.T) {
	k := Keys{Core: kubetest.New(t).Core}
	var mu sync.Mutex
	seen := map[string]bool{}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			key, err := k.Get(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[string(key)] = true
		})
	}
	group.Wait()
	if len(seen) != 1 {
		t.Errorf("%d keys", len(seen))
	}
	old, err := k.Get(t.Context())
	if err != nil || len(old) != token.CallbackKeySize {
		t.Fatal(len(old), err)
	}
	if err := k.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now, err := k.Get(t.Context()); err != nil || bytes.Equal(now, old) {
		t.Errorf("the key is the same after Rotate: %v", err)
	}
}

// TestKeeper follows the key into the file, over a time without an API server.
func TestKeeper(t *testing.T) {
	api := kubetest.New(t)
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.CredentialsDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	connected := make(chan struct{}, 10)
	keys := Keys{Core: api.Core}
	k := &Keeper{Env: env, Keys: keys, Node: "n1", Log: slog.New(slog.DiscardHandler), Connected: func(context.Context) error {
		connected <- struct{}{}
		return nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.Run(ctx) }()
	<-connected
	if secret, err := Load(env); err != nil || secret != "" {
		t.Errorf("a secret without a key: %q, %v", secret, err)
	}
	for range 2 {
		if err := keys.Rotate(t.Context()); err != nil {
			t.Fatal(err)
		}
		key, err := keys.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := token.Callback(key, "n1")
		tick := time.NewTicker(5 * time.Millisecond)
		for limit := time.After(20 * time.Second); ; {
			got, err := Load(env)
			if err != nil {
				t.Fatal(err)
			}
			if got == want {
				break
			}
			select {
			case <-tick.C:
			case <-limit:
				t.Fatal("the file does not follow the key")
			}
		}
		tick.Stop()
	}
	if st, err := os.Stat(env.Credential(FileName)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestUnavailable(t *testing.T) {
	api := kubetest.New(t)
	api.Lock()
	api.Down = true
	api.Unlock()
	if _, err := (Keys{Core: api.Core}).Get(t.Context()); err == nil {
		t.Error("a key from nowhere")
	}
}
