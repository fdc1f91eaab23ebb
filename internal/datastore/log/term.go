package log

import "errors"

// ErrDeposed says that the leadership has ended in which the log was opened.
var ErrDeposed = errors.New("the leadership in which the database was opened has ended")

// Leading returns the local node's term, as of now, and whether it leads in it. It must not
// wait for the node, and may be called from any goroutine.
type Leading func() (term uint64, leads bool)

// check is nil when the node leads in a term, which it has then done since it was elected.
func (leading Leading) check(term uint64) error {
	if now, leads := leading(); leads && now == term && term != 0 {
		return nil
	}
	return ErrDeposed
}
