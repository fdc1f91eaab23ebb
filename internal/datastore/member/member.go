// Package member runs this node's dqlite: it reads the storage directory, starts the node of
// the C library, keeps its TLS port, and watches who leads. It leaves what is stored to
// package log and everything above.
package member

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"microk8s/internal/connlimit"
	dslog "microk8s/internal/datastore/log"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"

	dqlite "github.com/canonical/go-dqlite/v3"
	"github.com/canonical/go-dqlite/v3/client"
	"golang.org/x/sys/unix"
)

// PeerProtocol is the ALPN name under which datastore daemons talk to each other on the port
// that they share with dqlite. Connections without it are dqlite's. Without TLS, what speaks
// HTTP/2 is theirs.
const PeerProtocol = storedir.Protocol

const (
	handshakeTimeout = 10 * time.Second
)

// limits are those of the port, which everybody reaches who reaches the machine. A member has some
// ten connections to another one. Connections whose caller has shown the members' key pair keep their
// place; until then one may send what a handshake with a certificate takes.
var limits = connlimit.Limits{
	Total: 512, PerSource: 128,
	NewPerSecond: 50, NewBurst: 200,
	CallsPerSecond: 1, CallsBurst: 1, // there are no calls here
	Early: 64 << 10,
}

// Options of a Member.
type Options struct {
	Dir    string
	Logger *slog.Logger

	MinTLSVersion   uint16 // tls.VersionTLS12 if 0
	TLSSessionCache int    // entries; 0 means none
	DisableTLS      bool   // between members; only for tests of clusters on a trusted wire

	// FromOwn makes connections to other members come from the local address, so that tests on
	// one machine can cut members off from each other.
	FromOwn bool

	// SnapInstance, where it is set, is part of the name of the C node's socket, because AppArmor
	// allows nothing else inside a snap.
	SnapInstance string

	// Marker is a file outside of Dir that says how far Dir has come, so that an old copy of it
	// does not start; "" for none. SnapRevision is noted in it.
	Marker, SnapRevision string
}

// Member is a running dqlite node. Its methods may be called from any goroutine.
type Member struct {
	opt    Options
	node   storedir.Member
	dir    directory
	dqlite *dqlite.Node
	listen net.Listener
	socket string // the C node's, abstract; it answers this process only (src/server.c, listenCb)

	changed chan struct{} // has a value after the leader changed
	peers   *peerListener
	dialTLS *tls.Config // nil without TLS
	domain  uint64

	dialLimit time.Duration // for the C node's connections to other members

	listing ownClient
	known   memberList
	events  *os.File // of the view

	marks markers

	stop context.CancelFunc
	wg   sync.WaitGroup
}

// Start prepares the directory, starts the node and begins to listen on its address. It does
// not wait until the node leads; OpenLog does.
func Start(opt Options) (_ *Member, err error) {
	if opt.MinTLSVersion == 0 {
		opt.MinTLSVersion = tls.VersionTLS12
	}
	d := at(opt.Dir)
	if fi, err := os.Stat(opt.Dir); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("the storage directory %s is missing; run: microk8s start, or give the right --storage-dir", opt.Dir)
	}
	if kept, found, err := d.finishReseed(); err != nil {
		return nil, err
	} else if found {
		opt.Logger.Warn("damaged files were moved away; this member joins the others again and gets its data from them", "kept", kept)
	}
	if err := d.restoreIdentity(opt.Logger); err != nil {
		return nil, err
	}
	tuning, warnings, err := d.tuning()
	if err != nil {
		return nil, err
	}
	for _, w := range warnings {
		opt.Logger.Warn(w, "file", d.File(storedir.TuningFile))
	}
	domain, _, err := read(d, storedir.FailureDomainFile, parseFailureDomain)
	if err != nil {
		return nil, err
	}
	// Before anything is changed: without the pair nothing can start.
	listenTLS, dialTLS, err := peers.KeyPair(opt.Dir, opt.MinTLSVersion, opt.TLSSessionCache)
	if err != nil && !opt.DisableTLS {
		return nil, err
	}
	marks := markers{file: opt.Marker, dir: opt.Dir, revision: opt.SnapRevision, log: opt.Logger}
	if d.Has(storedir.InitFile) {
		if err := marks.forget(); err != nil {
			return nil, err
		}
	}
	node, err := d.prepare(func(n storedir.Member) error {
		if err := errors.Join(forgetTerm(opt.Dir), marks.forget()); err != nil {
			return err
		}
		return dqlite.ReconfigureMembershipExt(opt.Dir, []dqlite.NodeInfo{{ID: n.ID, Address: n.Address, Role: client.Voter}})
	})
	if err != nil {
		return nil, err
	}
	if err := d.beginAgain(node); err != nil {
		return nil, err
	}
	if err := finishCut(opt.Dir); err != nil {
		return nil, err
	}
	if err := CheckFiles(opt.Dir); err != nil {
		return nil, err
	}
	if err := checkTerm(opt.Dir); err != nil {
		return nil, err
	}
	marks.id = node.ID
	if err := marks.check(); err != nil {
		return nil, err
	}
	marks.note(false)
	if err := d.rememberPair(); err != nil {
		opt.Logger.Warn("cannot keep a copy of the members' key pair", "err", err)
	}

	m := &Member{marks: marks, opt: opt, node: node, dir: d, domain: domain, dialLimit: max(time.Second, 10*tuning.NetworkLatency), changed: make(chan struct{}, 1), peers: newPeerListener(node.Address)}
	m.listing.m = m
	// With a part that nobody can guess, so that nobody can take the name before.
	m.socket = fmt.Sprintf("@dqlite-%d-%s", node.ID, rand.Text())
	if opt.SnapInstance != "" {
		m.socket = fmt.Sprintf("@snap.%s.%s", opt.SnapInstance, m.socket[1:])
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.stop = cancel
	defer func() {
		if err != nil {
			cancel()
		}
	}()

	// The port first: dqlite would start writing, only to be stopped again.
	m.listen, err = net.Listen("tcp", node.Address)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on this member's address %s (from %s): %w; is another datastore running?", node.Address, d.File(storedir.InfoFile), err)
	}
	defer func() {
		if err != nil {
			m.listen.Close()
		}
	}()
	if m.opt.DisableTLS {
		listenTLS, dialTLS = nil, nil
	} else {
		m.listen = connlimit.Wrap(m.listen, limits)
		listenTLS.NextProtos = []string{PeerProtocol}
		m.dialTLS = dialTLS.Clone()
		m.dialTLS.NextProtos = []string{PeerProtocol}
	}
	strategy := dqlite.TrailingStrategyStatic
	if tuning.Dynamic {
		strategy = dqlite.TrailingStrategyDynamic
	}
	m.dqlite, err = dqlite.New(node.ID, node.Address, opt.Dir,
		dqlite.WithBindAddress(m.socket),
		dqlite.WithDialFunc(m.dialPeer(ctx, dialTLS)),
		dqlite.WithFailureDomain(domain),
		dqlite.WithNetworkLatency(tuning.NetworkLatency),
		dqlite.WithSnapshotParams(dqlite.SnapshotParams{Threshold: tuning.Threshold, Trailing: tuning.Trailing, Strategy: strategy}),
		dqlite.WithAutoRecovery(false), // it makes damage good by dropping what was acknowledged
	)
	if err != nil {
		return nil, unreadable(fmt.Errorf("cannot create the dqlite node in %s: %w", opt.Dir, err))
	}
	if err = m.dqlite.Start(); err != nil {
		return nil, unreadable(fmt.Errorf("cannot start dqlite in %s: %w; if the files are damaged, restore the directory from a backup", opt.Dir, err))
	}
	if m.events, err = m.viewEvents(); err != nil {
		return nil, errors.Join(err, m.dqlite.Close())
	}
	m.wg.Add(2)
	go m.accept(ctx, listenTLS)
	go m.watchView(m.events)
	return m, nil
}

// unreadable makes an error of dqlite's start a [*Damage] if it is about what the files hold. What this package has
// checked before leaves little: a segment that was never used, and is not empty.
func unreadable(err error) error {
	text := err.Error()
	for _, other := range []unix.Errno{unix.EACCES, unix.EMFILE, unix.ENFILE, unix.ENOSPC, unix.ENOMEM, unix.EROFS} {
		if strings.Contains(strings.ToLower(text), strings.ToLower(other.Error())) {
			return err
		}
	}
	_, what, found := strings.Cut(text, "raft_start(): io: ")
	if !found {
		_, what, found = strings.Cut(text, "raft_init(): io: ") // term and vote
	}
	if !found {
		return err
	}
	name := "metadata1" // or something that is about all of them
	for _, word := range strings.FieldsFunc(what, func(r rune) bool { return r == ' ' || r == ':' || r == ',' }) {
		if openName.MatchString(word) || closedName.MatchString(word) || strings.HasPrefix(word, "snapshot-") {
			name = word
			break
		}
	}
	what, _, _ = strings.Cut(what, "; if the files")
	return &Damage{name, what, err}
}

// Reconfigure rewrites the membership in the files of a member that does not run. Upstream's
// procedure for a lost majority uses it; the caller answers for the choice of the member.
func Reconfigure(dir string, members []client.NodeInfo) error {
	if err := CheckFiles(dir); err != nil {
		return err
	}
	if err := forgetTerm(dir); err != nil {
		return err
	}
	// What the others had come to was before this, too.
	if err := os.Remove(at(dir).File(storedir.SeenFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return dqlite.ReconfigureMembershipExt(dir, members)
}

func (d directory) tuning() (Tuning, []string, error) {
	var warnings []string
	t, ok, err := read(d, storedir.TuningFile, func(data []byte) (t Tuning, err error) {
		t, warnings, err = parseTuning(data)
		return t, err
	})
	if !ok {
		t = DefaultTuning()
	}
	return t, warnings, err
}

// Node returns this member's ID, address and role at its start.
func (m *Member) Node() storedir.Member { return m.node }

// DialOwn connects to the local node. Only this process can.
func (m *Member) DialOwn(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", m.socket)
}

// Client connects to the local node with dqlite's administrative protocol.
func (m *Member) Client(ctx context.Context) (*client.Client, error) {
	return client.New(ctx, m.node.Address, client.WithLogFunc(m.logf),
		client.WithDialFunc(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := m.DialOwn(ctx)
			if err != nil {
				return nil, err
			}
			return dslog.Together(conn), nil
		}))
}

// OpenLog opens the log on the local node. It waits until the node leads, and says every ten
// seconds what it waits for. An error other than ctx's will not go away by waiting.
func (m *Member) OpenLog(ctx context.Context) (dslog.Log, error) {
	const pause, report = 50 * time.Millisecond, 10 * time.Second
	reported := time.Now()
	for {
		l, err := dslog.OpenDqlite(ctx, m.node.Address, m.DialHere, m.leading, m.logf)
		switch {
		case err == nil:
			if mig := l.Migrated; mig != nil {
				m.opt.Logger.Info("the data of upstream's k8s-dqlite was migrated; its daemon can no longer use the directory",
					"keys", mig.Keys, "revision", mig.Revision, "compacted", mig.Compacted)
			}
			return l, nil
		case errors.Is(err, dslog.ErrKine):
			return nil, fmt.Errorf("%s: %w; start it with the program that made it, and move the data with its backup: microk8s dbctl", m.opt.Dir, err)
		case errors.Is(err, dslog.ErrForeign):
			return nil, fmt.Errorf("%s is left as it is: %w; save the directory, stop the other program for good, and go on with a backup of either: microk8s dbctl restore", m.opt.Dir, err)
		case ctx.Err() != nil:
			return nil, fmt.Errorf("the datastore did not become usable: %w", err)
		}
		if time.Since(reported) >= report {
			reported = time.Now()
			m.opt.Logger.Warn("this member does not lead yet, so the datastore is not usable", "address", m.node.Address, "id", m.node.ID, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// logf receives the messages of go-dqlite. Its warnings are about attempts that are repeated.
func (m *Member) logf(level client.LogLevel, format string, args ...any) {
	if level >= client.LogError {
		m.opt.Logger.Warn("dqlite: " + fmt.Sprintf(format, args...))
		return
	}
	m.opt.Logger.Debug("dqlite: " + fmt.Sprintf(format, args...))
}

func (m *Member) rememberTerm() {
	if err := rememberTerm(m.opt.Dir); err != nil {
		m.opt.Logger.Warn("cannot keep a copy of term and vote", "err", err)
	}
	m.marks.note(false)
}

// accept serves the member's address: dqlite's connections are copied to its socket.
func (m *Member) accept(ctx context.Context, config *tls.Config) {
	defer m.wg.Done()
	for {
		conn, err := m.listen.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			m.opt.Logger.Warn("cannot accept a connection", "address", m.node.Address, "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond): // out of file descriptors, most likely
			}
			continue
		}
		m.wg.Add(1)
		go func() {
			defer m.wg.Done()
			given := false
			defer func() {
				if !given {
					conn.Close()
				}
			}()
			var remote net.Conn
			if config != nil {
				t := tls.Server(conn, config)
				hs, cancel := context.WithTimeout(ctx, handshakeTimeout)
				err := t.HandshakeContext(hs)
				cancel()
				if err != nil {
					m.opt.Logger.Debug("refused a connection", "from", conn.RemoteAddr(), "err", err)
					return
				}
				if c := connlimit.Of(conn); c != nil {
					c.Started()
					c.Keep()
				}
				remote = t
				if t.ConnectionState().NegotiatedProtocol == PeerProtocol {
					given = m.peers.give(ctx, t)
					return
				}
			} else if p, http2 := peek(conn); http2 {
				given = m.peers.give(ctx, p)
				return
			} else {
				remote = p
			}
			local, err := m.DialOwn(ctx)
			if err != nil {
				m.opt.Logger.Warn("cannot reach the local dqlite node", "err", err)
				return
			}
			m.join(ctx, remote, local)
		}()
	}
}

// join copies between two connections until one ends, and closes both.
func (m *Member) join(ctx context.Context, a, b net.Conn) {
	stop := context.AfterFunc(ctx, func() { a.Close(); b.Close() })
	defer stop()
	var wg sync.WaitGroup
	for _, p := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, _ = io.Copy(p[0], p[1]) // either end closing is how connections end
			a.Close()
			b.Close()
		}()
	}
	wg.Wait()
}

// dialPeer is how the C node connects to others. It takes a file descriptor, so that TLS is
// spoken by a copying goroutine on the other end of a socket pair.
func (m *Member) dialPeer(ctx context.Context, config *tls.Config) client.DialFunc {
	return func(dial context.Context, address string) (net.Conn, error) {
		// The C library's four helper threads, which write to the disk as well, wait here for
		// each other: one member that does not answer must not hold them up for long.
		dial, cancel := context.WithTimeout(dial, m.dialLimit)
		defer cancel()
		d := m.dialer()
		conn, err := d.DialContext(dial, "tcp", address)
		if err != nil || config == nil {
			return conn, err
		}
		t := tls.Client(conn, config)
		if err := t.HandshakeContext(dial); err != nil {
			conn.Close()
			return nil, err
		}
		ours, theirs, err := socketPair()
		if err != nil {
			conn.Close()
			return nil, err
		}
		go m.join(ctx, t, ours)
		return theirs, nil
	}
}

// Close stops the node. The log must be closed before.
func (m *Member) Close() error {
	m.stop()
	m.listen.Close()
	m.peers.Close()
	m.events.Close()
	m.listing.close()
	err := m.dqlite.Close()
	m.wg.Wait()
	m.rememberTerm()
	if err != nil {
		return fmt.Errorf("cannot stop dqlite: %w", err)
	}
	m.marks.note(true)
	return nil
}

// Free returns the free space of the file system of the storage directory, in bytes.
func (m *Member) Free() (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(m.opt.Dir, &fs); err != nil {
		return 0, err
	}
	return fs.Bavail * uint64(fs.Bsize), nil
}

// Versions returns the versions of the C libraries, "sqlite", "dqlite" and "libuv", for display.
func Versions() []string { return strings.Fields(libraryVersions()) }
