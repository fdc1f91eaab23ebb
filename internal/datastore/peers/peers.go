// Package peers is what a program beside the datastore asks it: who the members are, which of
// them live, and that one be removed. It needs neither cgo nor the datastore's own code. What
// the daemons tell each other is in package replica.
package peers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/fileaccess"
)

// Member is a member of the cluster as one daemon sees it.
type Member struct {
	ID       uint64        `json:"id"`
	Address  string        `json:"address"` // host:port
	Role     storedir.Role `json:"role"`
	Online   bool          `json:"online"`             // it answered within the last 3 seconds
	Leader   bool          `json:"leader"`             // it leads
	Self     bool          `json:"self"`               // it is the daemon that was asked
	DiskFull bool          `json:"diskFull,omitempty"` // it has no space for more data, as it said last
	LastSeen time.Time     `json:"lastSeen"`           // when it answered last; zero: not since that daemon's start
	Space    *Space        `json:"space,omitempty"`    // of the datastore, as the daemon that was asked knows it
	Memory   *Memory       `json:"memory,omitempty"`   // of the daemon that was asked, if it is limited
}

// Space is how much of the datastore's quota is used.
type Space struct {
	Bytes   int64    `json:"bytes"`             // of all versions that can be read
	Quota   int64    `json:"quota,omitempty"`   // 0: none
	Refused bool     `json:"refused,omitempty"` // the alarm NOSPACE stands: what may grow the data is refused
	Largest []Prefix `json:"largest,omitempty"` // what takes most, if the quota is nearly used or the alarm stands
}

// Prefix is what the keys below a prefix take.
type Prefix struct {
	Prefix string `json:"prefix"`
	Keys   int    `json:"keys"`
	Bytes  int64  `json:"bytes"`
}

// Memory is how much of its limit a daemon uses.
type Memory struct {
	Used  int64 `json:"used"`  // bytes that cannot be given back without losing something
	Limit int64 `json:"limit"` // bytes at which the kernel kills it
	Low   bool  `json:"low,omitempty"`
}

// ErrNotRunning says that no daemon runs on the storage directory.
var ErrNotRunning = errors.New("the datastore does not run")

// answerTimeout is how long a daemon may take, which answers from what it keeps. A frozen one has
// its connections accepted by the kernel.
const answerTimeout = 10 * time.Second

// maxAnswer is more than any list of members needs.
const maxAnswer = 1 << 20

// Members asks the daemon that runs on a storage directory for the members and who of them
// lives. It answers from what it keeps, also when there is no leader. The error is
// ErrNotRunning when there is no daemon. The caller must be root or in the group of the socket.
func Members(ctx context.Context, dir string) ([]Member, error) {
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(dir, storedir.MembersSocket))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, ErrNotRunning
	case err != nil:
		return nil, fmt.Errorf("cannot ask the datastore for its members: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var members []Member
	if err := json.NewDecoder(io.LimitReader(conn, maxAnswer)).Decode(&members); err != nil {
		if ctx.Err() != nil && outer.Err() == nil {
			return nil, fmt.Errorf("the datastore did not answer within %s; see: microk8s logs k8s-dqlite", answerTimeout)
		}
		return nil, fmt.Errorf("cannot read the datastore's answer: %w", errors.Join(ctx.Err(), err))
	}
	return members, nil
}

// Serve answers Members on a storage directory until ctx ends: each connection gets one JSON
// document. The socket is for root and the group microk8s.
func Serve(ctx context.Context, dir string, log *slog.Logger, members func() []Member) (wait func(), err error) {
	path := filepath.Join(dir, storedir.MembersSocket)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot remove the stale socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	if err := fileaccess.Share(path, 0o660); err != nil {
		log.Warn("only root can ask for the members", "err", err)
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer stop()
		for {
			conn, err := l.Accept()
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-time.After(100 * time.Millisecond): // out of file descriptors, most likely
				}
				continue
			}
			// The answer fits into the socket's buffer: nobody can hold this up.
			_ = conn.SetDeadline(time.Now().Add(time.Second))
			_ = json.NewEncoder(conn).Encode(members()) // who has gone does not want to know
			conn.Close()
		}
	}()
	return func() { l.Close(); <-done }, nil
}
