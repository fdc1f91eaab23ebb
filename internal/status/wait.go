package status

import (
	"context"
	"encoding/json"
	"net/url"
	"time"
)

// retry is how often a node that is not up yet is asked again; once its API server answers,
// a watch takes over.
const retry = 250 * time.Millisecond

// patience is the budget of a question while waiting: an answer that is late counts here.
const patience = 2 * time.Second

// WaitReady probes until the node is ready or ctx ends, and gives the last report. Changes of
// nodes are watched, not polled; asking again at intervals is left for the time before the API
// server listens, which announces itself to nobody.
func (p *Prober) WaitReady(ctx context.Context) Report {
	return p.WaitReadyUnless(ctx, func(Report) bool { return false })
}

// WaitReadyUnless is [Prober.WaitReady] that also ends when a report shows that waiting is of
// no use.
func (p *Prober) WaitReadyUnless(ctx context.Context, hopeless func(Report) bool) Report {
	for {
		r := p.probe(ctx, patience)
		if r.Ready || ctx.Err() != nil || hopeless(r) {
			return r
		}
		p.awaitChange(ctx)
	}
}

// seen keeps the version from which awaitChange watches: only where what is missing is a
// change of a node.
func (p *Prober) seen(s apiState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.version = ""
	if s.err == nil && s.service == nil && s.nodeErr == nil && !s.ready() {
		p.version = s.version
	}
}

// watchLimit bounds one watch, so that causes other than the nodes' are seen too.
const watchLimit = 5 * time.Second

// awaitChange returns when something may have changed: an event of a node, or after retry
// where nodes cannot be watched.
func (p *Prober) awaitChange(ctx context.Context) {
	pause := time.After(retry)
	p.mu.Lock()
	c, version := p.api, p.version
	p.mu.Unlock()
	if c != nil && version != "" {
		watch, cancel := context.WithTimeout(ctx, watchLimit)
		defer cancel()
		body, err := c.get(watch, "/api/v1/nodes?watch=1&resourceVersion="+url.QueryEscape(version), "application/json")
		if err == nil {
			defer body.Close()
			var event json.RawMessage
			if json.NewDecoder(body).Decode(&event) == nil {
				return
			}
		}
	}
	select {
	case <-ctx.Done():
	case <-pause:
	}
}
