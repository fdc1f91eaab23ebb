package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// Copies of a datastore that a node had before are kept beside the one it has: backend.backup is
// that of the last join, and backend.backup-DATE those of earlier ones; backend.left-DATE is the
// copy of a cluster's data with which a node left that could reach no other member.
const (
	kindBackup = "backup"
	kindLeft   = "left"
	keptCopies = 5 // of each kind
	keptLayout = "2006-01-02-15-04-05"
)

// leftNode is the folder, in a copy that a node left with, of the certificates, credentials and
// arguments that belong to it.
const leftNode = ".node"

// keepBackendAsBackup ends what setBackendAside began. The backup of an earlier join stays, under
// the date of its last change.
func (n *Node) keepBackendAsBackup() error {
	if _, err := os.Lstat(n.backendAside()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if st, err := os.Lstat(n.backendBackup()); err == nil {
		if _, err := n.keepDated(n.backendBackup(), kindBackup, st.ModTime()); err != nil {
			return err
		}
	}
	if err := os.Rename(n.backendAside(), n.backendBackup()); err != nil {
		return err
	}
	return syncDir(filepath.Dir(n.backendBackup()))
}

// keepDated renames a directory to one of the kind with a date, and removes the oldest ones of the
// kind beyond keptCopies. It returns the new path.
func (n *Node) keepDated(from, kind string, date time.Time) (string, error) {
	prefix := n.Env.BackendLive() + "." + kind + "-"
	to := prefix + date.UTC().Format(keptLayout)
	for i := 2; ; i++ {
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			break
		}
		to = prefix + date.UTC().Format(keptLayout) + "." + strconv.Itoa(i)
	}
	if err := os.Rename(from, to); err != nil {
		return "", fmt.Errorf("cannot keep the datastore's copy: %w", err)
	}
	if err := syncDir(filepath.Dir(to)); err != nil {
		return "", err
	}
	all, err := filepath.Glob(prefix + "*") // in the order of their dates
	if err != nil {
		return "", err
	}
	all = slices.DeleteFunc(all, func(path string) bool { return path == to })
	for len(all) >= keptCopies {
		if err := os.RemoveAll(all[0]); err != nil {
			return "", fmt.Errorf("cannot remove an old copy of the datastore: %w", err)
		}
		all = all[1:]
	}
	return to, nil
}

// departedFile is there when the other members have let this node go: its copy of the data is not
// needed then.
const departedFile = "departed"

func (n *Node) noteDeparted() error {
	return atomicfile.Write(n.file(departedFile), nil, 0o600, nil)
}

// keepLeft keeps the copy of the cluster's data of a node that leaves without the others, with what
// else belongs to it.
func (s *leaveRun) keepLeft() error {
	live := s.Env.BackendLive()
	if _, err := os.Lstat(live); errors.Is(err, fs.ErrNotExist) {
		return nil // done, or a worker
	}
	if _, err := os.Lstat(filepath.Join(live, leftNode)); errors.Is(err, fs.ErrNotExist) && s.Member != "" {
		temporary := filepath.Join(live, leftNode+".new")
		if err := os.RemoveAll(temporary); err != nil {
			return err
		}
		for name, from := range savedTrees(s.Env) {
			if name == "lock" {
				continue
			}
			if err := copyTree(from, filepath.Join(temporary, name)); err != nil {
				return fmt.Errorf("cannot keep a copy of %s: %w", from, err)
			}
		}
		if err := os.Rename(temporary, filepath.Join(live, leftNode)); err != nil {
			return err
		}
		if err := os.Chmod(live, 0o700); err != nil {
			return err
		}
	}
	far := s.howFar()
	kept, err := s.keepDated(live, kindLeft, s.Now())
	if err != nil {
		return err
	}
	s.Say("The datastore of this node is kept in %s%s; docs/cluster.md says how to use it, and when it is not needed remove it", kept, far)
	return nil
}

var (
	closedSegment = regexp.MustCompile(`^\d{16}-(\d{16})$`)
	snapshotFile  = regexp.MustCompile(`^snapshot-\d+-(\d+)-\d+$`)
)

// howFar says how far this node's copy of the data has come, as " (entry 7 or later, last written
// DATE)"; "" where that is not known. k8s-dqlite recover says it exactly.
func (n *Node) howFar() string {
	live := n.Env.BackendLive()
	entries, err := os.ReadDir(live)
	if err != nil {
		return ""
	}
	var last uint64
	var written time.Time
	for _, e := range entries {
		name := e.Name()
		for _, form := range []*regexp.Regexp{closedSegment, snapshotFile} {
			if m := form.FindStringSubmatch(name); m != nil {
				if i, err := strconv.ParseUint(m[1], 10, 64); err == nil {
					last = max(last, i)
				}
			}
		}
		if st, err := e.Info(); err == nil && e.Type().IsRegular() && st.ModTime().After(written) {
			written = st.ModTime()
		}
	}
	var marker struct{ ID, Index uint64 }
	if data, err := os.ReadFile(n.Env.BackendMarker()); err == nil && json.Unmarshal(data, &marker) == nil && marker.ID == ownMember(live).ID {
		last = max(last, marker.Index)
	}
	if written.IsZero() {
		return ""
	}
	return fmt.Sprintf(" (entry %d or later, last written %s)", last, written.UTC().Format(time.RFC3339))
}

// HowFar says how far this node's copy of the datastore has come, as " (entry 7 or later, last
// written DATE)"; "" where there is none.
func HowFar(env snapenv.Env) string { return (&Node{Env: env}).howFar() }

// Elsewhere returns the address by which the cluster knows this node where this host does not have
// it: the host's address has changed, or its disk is a copy of another machine's. It is "" otherwise.
func Elsewhere(env snapenv.Env) string {
	n := &Node{Env: env}
	n.defaults()
	if c := nodeconfig.Load(env); c.Worker {
		if len(c.NodeIPs) > 0 && !n.isOwn(c.NodeIPs[0].String()) {
			return c.NodeIPs[0].String()
		}
		return ""
	}
	if own := ownMember(env.BackendLive()); IsMember(env) && n.elsewhere(own) {
		return host(own.Address)
	}
	return ""
}

// others finds out which other voters of the datastore there are, and whether one answers. Where this
// node's member is at an address that the host does not have, whoever answers there is another one.
func (n *Node) others(ctx context.Context, own storedir.Member) (voters []string, answers bool) {
	live := n.Env.BackendLive()
	stored, _ := storedir.Dir(live).Members()
	for _, m := range stored {
		if m.Role == storedir.Voter && (m.Address != own.Address || n.elsewhere(own)) {
			voters = append(voters, m.Address)
		}
	}
	if list, err := peers.Members(ctx, live); err == nil && len(list) > 0 {
		voters = nil
		for _, m := range list {
			if m.Role == storedir.Voter && !m.Self && m.Address != own.Address {
				voters = append(voters, m.Address)
			}
		}
	}
	dial, err := n.memberDial(live)
	if err != nil {
		return voters, false
	}
	found := make(chan bool, len(voters))
	for _, address := range voters {
		go func() { found <- peers.Answers(ctx, address, dial) }()
	}
	for range voters {
		answers = <-found || answers
	}
	return voters, answers
}

// elsewhere reports whether this node's member of the datastore has an address that this host does
// not have: the host's address has changed, or its disk is a copy of another machine's, which then
// is that member.
func (n *Node) elsewhere(own storedir.Member) bool {
	ip := net.ParseIP(host(own.Address))
	return ip != nil && !ip.IsLoopback() && !n.isOwn(ip.String())
}
