// Package watch tells watchers which changes concern them. It keeps no queue: a change only
// marks the watchers that it matches, and each takes what it missed from the history when it
// can. So a slow watcher costs nothing, delays nobody, and loses nothing until compaction
// passes it by; and one that has no mark is known to have seen everything.
package watch

import (
	"bytes"
	"maps"
	"slices"
	"sync"

	"microk8s/internal/datastore/state"
)

// Source returns the committed changes from a revision on, or state.ErrCompacted.
type Source interface {
	History(rev int64) ([]state.Change, error)
}

// Hub knows all watchers of a daemon. Its methods may be called from any goroutine.
type Hub struct {
	mu     sync.Mutex
	src    Source
	rev    int64 // everything up to here has been marked
	exact  map[string]map[*Watcher]struct{}
	ranges map[*Watcher]struct{}
}

// NewHub begins at a revision.
func NewHub(src Source, rev int64) *Hub {
	return &Hub{src: src, rev: rev, exact: map[string]map[*Watcher]struct{}{}, ranges: map[*Watcher]struct{}{}}
}

// Filter is what a watcher wants to see.
type Filter struct {
	Key, End          []byte // as in etcd: no end is one key, "\x00" all from key on
	NoPuts, NoDeletes bool
}

func (f *Filter) matches(c *state.Change) bool {
	k := c.Cur.KV.Key
	switch {
	case len(f.End) == 0:
		if !bytes.Equal(k, f.Key) {
			return false
		}
	case bytes.Compare(k, f.Key) < 0:
		return false
	case len(f.End) == 1 && f.End[0] == 0:
	case bytes.Compare(k, f.End) >= 0:
		return false
	}
	if c.Cur.Deleted() {
		return !f.NoDeletes
	}
	return !f.NoPuts
}

// Watcher is one watch. Collect is for one goroutine.
type Watcher struct {
	hub    *Hub
	filter Filter
	wake   func()
	next   int64 // changes below are of no interest
	mark   int64 // first revision that may hold a change to deliver, 0 if there is none
}

// Add begins a watch with the changes of revision start; 0 means those after now. It returns
// the revision of now. wake is called, without any blocking allowed, whenever Collect may
// have something to give after it gave nothing.
func (h *Hub) Add(f Filter, start int64, wake func()) (*Watcher, int64) {
	w := &Watcher{hub: h, filter: f, wake: wake, next: start}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case start <= 0:
		w.next = h.rev + 1
	case start <= h.rev:
		w.mark = start
	}
	if len(f.End) == 0 {
		m := h.exact[string(f.Key)]
		if m == nil {
			m = map[*Watcher]struct{}{}
			h.exact[string(f.Key)] = m
		}
		m[w] = struct{}{}
	} else {
		h.ranges[w] = struct{}{}
	}
	return w, h.rev
}

// Remove ends a watch.
func (h *Hub) Remove(w *Watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.ranges, w)
	k := string(w.filter.Key)
	if m := h.exact[k]; m != nil {
		delete(m, w)
		if len(m) == 0 {
			delete(h.exact, k)
		}
	}
}

// Len is the number of watches.
func (h *Hub) Len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := len(h.ranges)
	for _, m := range h.exact {
		n += len(m)
	}
	return n
}

// Publish takes newly committed changes, in order, and the revision they lead to. The source
// must hold them already.
func (h *Hub) Publish(changes []state.Change, rev int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range changes {
		c := &changes[i]
		for w := range h.exact[string(c.Cur.KV.Key)] {
			w.note(c)
		}
		for w := range h.ranges {
			w.note(c)
		}
	}
	h.rev = rev
}

func (w *Watcher) note(c *state.Change) {
	if w.mark == 0 && c.Rev() >= w.next && w.filter.matches(c) {
		w.mark = c.Rev()
		w.wake()
	}
}

// Rewind tells the watchers to read the history up to a revision by themselves, because the
// changes between are not known one by one. The source must hold them already, or know that
// they have been compacted.
func (h *Hub) Rewind(rev int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	from := h.rev + 1
	h.rev = rev
	if from > rev {
		return
	}
	for _, m := range append(slices.Collect(maps.Values(h.exact)), h.ranges) {
		for w := range m {
			if w.mark == 0 && w.next <= rev {
				w.mark = max(from, w.next)
				w.wake()
			}
		}
	}
}

// Rev is the revision up to which watchers have been marked.
func (h *Hub) Rev() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.rev
}

// Collect returns the next changes for the watcher: whole revisions, in order, until about
// maxBytes. rev is the revision up to which the watcher has now been given everything, if
// more is false. The error is state.ErrCompacted.
func (w *Watcher) Collect(maxBytes int) (changes []state.Change, rev int64, more bool, err error) {
	h := w.hub
	h.mu.Lock()
	from := w.mark
	w.mark = 0
	rev = h.rev
	h.mu.Unlock()
	if from == 0 {
		return nil, rev, false, nil
	}
	history, err := h.src.History(from)
	if err != nil {
		return nil, rev, false, err
	}
	size := 0
	for i := range history {
		c := &history[i]
		if c.Rev() > rev {
			break
		}
		if size >= maxBytes && changes[len(changes)-1].Rev() != c.Rev() {
			more = true
			h.mu.Lock()
			w.mark = c.Rev() // not above a mark that Publish made meanwhile: that is newer than rev
			h.mu.Unlock()
			break
		}
		if !w.filter.matches(c) {
			continue
		}
		changes = append(changes, *c)
		size += len(c.Cur.KV.Key) + len(c.Cur.KV.Value) + 64
		if c.Prev != nil {
			size += len(c.Prev.KV.Value)
		}
	}
	return changes, rev, more, nil
}
