package labcli

import (
	"bytes"
	"io"
	"sync"
)

// lineWriter lets several hosts write whole lines to one stream.
type lineWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lineWriter) line(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = io.WriteString(l.w, s+"\n")
}

func (l *lineWriter) prefixed(prefix string) *prefixWriter {
	return &prefixWriter{out: l, prefix: prefix}
}

// prefixWriter puts a prefix before each line. One goroutine at a time may use it.
type prefixWriter struct {
	out    *lineWriter
	prefix string
	rest   []byte
}

func (p *prefixWriter) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 {
			return len(b), nil
		}
		p.out.line(p.prefix + string(p.rest[:i]))
		p.rest = p.rest[i+1:]
	}
}

func (p *prefixWriter) flush() {
	if len(p.rest) > 0 {
		p.out.line(p.prefix + string(p.rest))
		p.rest = nil
	}
}
