package console

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

// facts looks at the node while somebody watches it, once for all who do.
type facts struct {
	node  Node
	every time.Duration

	mu       sync.Mutex
	watchers map[chan []byte]bool
	last     []byte
	stop     context.CancelFunc
}

// watch returns a channel with the node's state, now and whenever it changed. A reader that is slow misses
// states, never the last one. end must be called.
func (f *facts) watch(ctx context.Context) (states <-chan []byte, end func()) {
	ch := make(chan []byte, 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.watchers) == 0 {
		f.watchers, f.last = map[chan []byte]bool{}, nil
		look, stop := context.WithCancel(context.WithoutCancel(ctx))
		f.stop = stop
		go f.look(look)
	}
	f.watchers[ch] = true
	if f.last != nil {
		ch <- f.last
	}
	return ch, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.watchers, ch)
		if len(f.watchers) == 0 {
			f.stop()
		}
	}
}

// look ends with ctx, when nobody watches any more.
func (f *facts) look(ctx context.Context) {
	ticker := time.NewTicker(f.every)
	defer ticker.Stop()
	for {
		data, err := json.Marshal(f.node.Facts(ctx))
		if err == nil {
			f.tell(ctx, data)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (f *facts) tell(ctx context.Context, data []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ctx.Err() != nil || bytes.Equal(data, f.last) {
		return
	}
	f.last = data
	for ch := range f.watchers {
		select {
		case <-ch: // what was not read is old
		default:
		}
		ch <- data
	}
}

// heartbeat keeps the stream known to be alive, for the page and for what is between.
const heartbeat = 10 * time.Second

// watchNode streams the node's state, one JSON document on a line for each change, and an empty line now
// and then. It is for people who may list nodes.
func (s *Server) watchNode(w http.ResponseWriter, r *http.Request, p *person) {
	if s.facts == nil {
		fail(w, http.StatusNotFound, "", "this console does not run on a node")
		return
	}
	mayStill := func() bool { return p.may(r.Context(), right{verb: "list", resource: "nodes"}, s.opts.Now()) }
	if !mayStill() {
		fail(w, http.StatusForbidden, "Forbidden", "you may not see the state of the node: that needs the right to list nodes")
		return
	}
	states, end := s.facts.watch(r.Context())
	defer end()
	w.Header().Set("Content-Type", "application/x-ndjson")
	control := http.NewResponseController(w)
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for {
		var line []byte
		select {
		case <-r.Context().Done():
			return
		case <-beat.C:
		case line = <-states:
		}
		if s.sessions.of(r) == nil || !mayStill() { // logged out elsewhere, or no longer allowed to
			return
		}
		if _, err := w.Write(append(line[:len(line):len(line)], '\n')); err != nil {
			return
		}
		if control.Flush() != nil {
			return
		}
	}
}
