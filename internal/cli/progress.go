package cli

import (
	"fmt"
	"io"
	"time"
)

// progress shows the steps of a command that takes time: on a terminal a list whose last line
// is the step under way, elsewhere one plain line per step.
type progress struct {
	w    io.Writer
	term bool
	now  func() time.Time
}

func (a *App) progress() *progress { return &progress{w: a.Err, term: a.Term, now: a.Now} }

// step runs one step and shows how it went.
func (p *progress) step(name string, do func() error) error {
	if !p.term {
		fmt.Fprintln(p.w, name)
		return do()
	}
	began := p.now()
	fmt.Fprintf(p.w, "… %s", name)
	err := do()
	mark := "✓"
	if err != nil {
		mark = "✗"
	}
	fmt.Fprintf(p.w, "\r%s %s (%s)\n", mark, name, p.now().Sub(began).Round(100*time.Millisecond))
	return err
}

// say shows a line that is no step.
func (p *progress) say(format string, a ...any) { fmt.Fprintf(p.w, format+"\n", a...) }
