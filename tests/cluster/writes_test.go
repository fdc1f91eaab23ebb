package cluster

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// writes are ConfigMaps that several clients create one after another, as fast as API servers
// acknowledge them.
type writes struct {
	cancel context.CancelFunc
	all    sync.WaitGroup

	mu    sync.Mutex
	acked []string
	by    map[string]int // client
	err   error          // the last
	last  time.Time
	gap   time.Duration // the longest time without any, since the fault
	begun bool          // the fault
}

const writesNamespace = "kube-public"

// write begins to write through some clients; what names the occasion.
func (c *cluster) write(t *testing.T, what string, through map[string]*kubernetes.Clientset) *writes {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	w := &writes{cancel: cancel, by: map[string]int{}}
	t.Cleanup(cancel)
	for who, k := range through {
		prefix := fmt.Sprintf("%s-%s-%d-", strings.ReplaceAll(what, " ", "-"), who, os.Getpid())
		w.all.Go(func() { w.run(ctx, who, prefix, k) })
	}
	return w
}

func (w *writes) run(ctx context.Context, who, prefix string, k *kubernetes.Clientset) {
	for i := 0; ctx.Err() == nil; i++ {
		name := prefix + fmt.Sprint(i)
		limit, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := k.CoreV1().ConfigMaps(writesNamespace).Create(limit, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"test": "writes"}}}, metav1.CreateOptions{})
		cancel()
		w.note(who, name, err)
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond): // the API server may not listen just now
			}
		}
	}
}

func (w *writes) note(who, name string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.err = err
		return
	}
	now := time.Now()
	if w.begun && now.Sub(w.last) > w.gap {
		w.gap = now.Sub(w.last)
	}
	w.acked, w.last = append(w.acked, name), now
	w.by[who]++
}

// goOn waits until n more are acknowledged, to one client or, with "", to all together.
func (w *writes) goOn(t *testing.T, n int, who string) {
	t.Helper()
	count := func() (int, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if who != "" {
			return w.by[who], w.err
		}
		return len(w.acked), w.err
	}
	from, _ := count()
	eventually(t, 2*time.Minute, func() error {
		if got, err := count(); got-from < n {
			return fmt.Errorf("%d writes of %d, the last error: %w", got-from, n, err)
		}
		return nil
	})
}

// fault says that something is done to the cluster from now on.
func (w *writes) fault() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begun = true
}

// end stops writing, and remembers what must never be lost.
func (c *cluster) end(t *testing.T, w *writes) {
	t.Helper()
	w.cancel()
	w.all.Wait()
	t.Logf("%d writes acknowledged, the longest gap was %s", len(w.acked), w.gap.Round(10*time.Millisecond))
	c.written = append(c.written, w.acked...)
}

// wantWrites checks that an API server knows all that was ever acknowledged.
func (c *cluster) wantWrites(t *testing.T, host string) {
	t.Helper()
	var list *corev1.ConfigMapList
	eventually(t, time.Minute, func() (err error) {
		list, err = c.client(t, host).CoreV1().ConfigMaps(writesNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "test=writes"})
		return err
	})
	have := map[string]bool{}
	for _, cm := range list.Items {
		have[cm.Name] = true
	}
	lost := 0
	for _, name := range c.written {
		if !have[name] {
			if lost++; lost < 5 {
				t.Errorf("%s was acknowledged, and %s does not know it", name, host)
			}
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d acknowledged writes are lost", lost, len(c.written))
	}
}
