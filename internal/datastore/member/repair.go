package member

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/diskspace"

	dqlite "github.com/canonical/go-dqlite/v3"
	"github.com/canonical/go-dqlite/v3/client"
)

// ErrAlone says that a member has no others to get data from.
var ErrAlone = errors.New("this is the only member: there are no others to get the data from; restore a backup instead")

// Reseed makes the directory of a stopped member of a cluster that of a node that joins the
// same cluster again, so that it gets all data from the others. The old files are kept in a
// hidden folder of the directory, whose path is returned. The others need a leader: the old
// member is removed first. Interrupted at any point, it may be run again, and the next start finishes it
// where the member is removed.
func Reseed(ctx context.Context, dir string) (kept string, err error) {
	if err := notRunning(dir); err != nil {
		return "", err
	}
	d := at(dir)
	if kept, found, err := d.finishReseed(); found {
		return kept, err
	}
	ini, begun, err := read(d, storedir.InitFile, storedir.ParseInit)
	if err != nil {
		return "", err
	}
	if begun && len(ini.Cluster) == 0 {
		return "", fmt.Errorf("%s makes a new cluster, not a member of one; there is nothing to get from others", d.File(storedir.InitFile))
	}
	if !begun {
		info, ok, err := read(d, storedir.InfoFile, storedir.ParseSelf)
		if err == nil && !ok {
			err = fmt.Errorf("%s is missing, so nothing says which member this is", d.File(storedir.InfoFile))
		}
		if err != nil {
			return "", fmt.Errorf("%w; remove the member on another node (microk8s remove-node --force) and join again with microk8s join", err)
		}
		members, ok, err := read(d, storedir.ClusterFile, storedir.ParseMembers)
		if err == nil && !ok {
			err = fmt.Errorf("%s is missing, so nothing says who the others are", d.File(storedir.ClusterFile))
		}
		if err != nil {
			return "", fmt.Errorf("%w; copy the file from another member", err)
		}
		ini.Address = info.Address
		for _, n := range members {
			if n.Address != info.Address {
				ini.Cluster = append(ini.Cluster, n.Address)
			}
		}
		if len(ini.Cluster) == 0 {
			return "", ErrAlone
		}
		const unchanged = "the others go on with the old member, and nothing was changed: %w"
		local, err := net.InterfaceAddrs()
		if err != nil {
			return "", err
		}
		known, err := peers.Known(ctx, dir)
		if err != nil {
			return "", fmt.Errorf(unchanged, err)
		}
		if err := mayReseed(info, known, local); err != nil {
			return "", fmt.Errorf(unchanged, errors.Join(ErrNotOurs, err))
		}
		if err := peers.RemoveMember(ctx, dir, info.ID, info.Address); err != nil && !errors.Is(err, peers.ErrNotMember) {
			return "", fmt.Errorf(unchanged, err)
		}
	}
	data, err := ini.Encode()
	if err != nil {
		return "", err
	}
	// From here on the directory is not one that starts with its old files.
	if err := d.write(storedir.ReseedFile, string(data)); err != nil {
		return "", err
	}
	kept, _, err = d.finishReseed()
	return kept, err
}

// finishReseed moves the old files of a member away that was removed to be seeded again, and asks for the
// new one. found is false where that was not begun.
func (d directory) finishReseed() (kept string, found bool, err error) {
	ini, found, err := read(d, storedir.ReseedFile, storedir.ParseInit)
	if err != nil || !found {
		return "", found, err
	}
	names := []string{storedir.SeenFile} // what was seen may be of before a recovery
	entries, err := os.ReadDir(string(d.Dir))
	if err != nil {
		return "", true, err
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case name == storedir.InitFile, name == storedir.CertFile, name == storedir.KeyFile, name == storedir.FailureDomainFile, name == storedir.TuningFile, name == storedir.EncryptionFile,
			strings.HasPrefix(name, "."), e.Type()&fs.ModeSocket != 0:
		default:
			names = append(names, name)
		}
	}
	if kept, err = d.quarantine(names); err != nil {
		return "", true, fmt.Errorf("cannot move the old files away: %w; run the command again", err)
	}
	if err := d.Begin(ini, func(_ string, data []byte) error { return d.write(storedir.InitFile, string(data)) }); err != nil {
		return "", true, err
	}
	return kept, true, os.Remove(d.File(storedir.ReseedFile))
}

const (
	quarantined = ".damaged-"
	keepDamaged = 2 // newest folders of damaged files
)

// quarantine moves files into a hidden folder of the directory, and removes older such folders.
func (d directory) quarantine(names []string) (kept string, err error) {
	old, err := filepath.Glob(d.File(quarantined + "*"))
	if err != nil {
		return "", err
	}
	for _, o := range old[:max(0, len(old)-keepDamaged+1)] { // by their dates
		if err := os.RemoveAll(o); err != nil {
			return "", err
		}
	}
	kept = d.File(quarantined + time.Now().UTC().Format("2006-01-02-15-04-05.000"))
	if err := os.MkdirAll(kept, 0o700); err != nil {
		return "", err
	}
	for _, name := range names {
		if err := os.Rename(d.File(name), filepath.Join(kept, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return kept, nil
}

// SetAside moves damaged files of a stopped member away that it does not need, because what is in them is
// in other files of its as well. kept is "" where there is nothing that would make it whole.
func SetAside(dir string) (kept string, names []string, err error) {
	closed, err := readClosed(dir, os.ReadFile)
	if err != nil {
		return "", nil, err
	}
	names, ok := closed.superfluous()
	if !ok {
		return "", nil, nil
	}
	kept, err = at(dir).quarantine(names)
	return kept, names, err
}

// ErrNotOurs says that a directory is not, or not any more, the one of the member that it names.
var ErrNotOurs = errors.New("the directory is not this machine's member")

// mayReseed refuses a directory that is not the one of the member which it names: a copy on another
// machine, or one of a member that was replaced since. Who has no more than the address of a member
// must not take that member out of the cluster. known are the members as their leader knows them, local
// the addresses of this machine.
func mayReseed(self storedir.Member, known []storedir.Member, local []net.Addr) error {
	const next = "if this machine is to be in the cluster, let it leave (microk8s leave --force) and join again"
	ip := net.ParseIP(self.Host())
	if ip != nil && !ip.IsLoopback() && !slices.ContainsFunc(local, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(ip)
	}) {
		return fmt.Errorf("the directory is of the member at %s, which is no address of this machine: it is a copy of another machine's, or the address has changed; %s", self.Address, next)
	}
	for _, m := range known {
		switch {
		case m.ID == self.ID && m.Address != self.Address:
			return fmt.Errorf("member %x is at %s now, and the directory has it at %s: it is an old copy; %s", m.ID, m.Address, self.Address, next)
		case m.ID != self.ID && m.Address == self.Address:
			return fmt.Errorf("%w: %s is member %x now, and the directory is of member %x; %s", peers.ErrReplaced, m.Address, m.ID, self.ID, next)
		}
	}
	return nil
}

// notRunning refuses a directory on which a daemon runs.
func notRunning(dir string) error {
	info, ok, err := read(at(dir), storedir.InfoFile, storedir.ParseSelf)
	if err != nil || !ok {
		return nil //nolint:nilerr // it is judged where it is needed
	}
	conn, err := net.DialTimeout("tcp", info.Address, time.Second)
	if err != nil {
		return nil //nolint:nilerr // nobody listens
	}
	conn.Close()
	return fmt.Errorf("something listens on %s, so the datastore of %s may be running; stop it on this node first: microk8s stop", info.Address, dir)
}

// Copy is a storage directory and how far it has come.
type Copy struct {
	Dir         string
	Term, Index uint64 // of its last log entry
}

// Judge finds out how far storage directories of stopped members have come, the first one's
// result first. It reads copies, one after the other, beside the first directory, because dqlite
// renames files when it looks.
func Judge(dirs ...string) ([]Copy, error) {
	var out []Copy
	for _, dir := range dirs {
		if err := CheckFiles(dir); err != nil {
			return nil, err
		}
		c, err := judge(dir, filepath.Dir(dirs[0]))
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// judge reads a copy of dir, which it makes below work and removes again.
func judge(dir, work string) (Copy, error) {
	if err := roomFor(work, dir); err != nil {
		return Copy{}, err
	}
	tmp, err := os.MkdirTemp(work, ".judge-")
	if err != nil {
		return Copy{}, err
	}
	defer os.RemoveAll(tmp)
	if err := copyFiles(dir, tmp); err != nil {
		return Copy{}, fmt.Errorf("cannot copy %s: %w", dir, err)
	}
	last, err := dqlite.ReadLastEntryInfo(tmp)
	if err != nil {
		return Copy{}, fmt.Errorf("cannot read the log of %s: %w", dir, err)
	}
	return Copy{Dir: dir, Term: last.Term, Index: last.Index}, nil
}

// roomFor checks that a copy of dir has room below work. Copies that a killed command has left
// there are removed first.
func roomFor(work, dir string) error {
	left, err := filepath.Glob(filepath.Join(work, ".judge-*"))
	if err != nil {
		return err
	}
	for _, l := range left {
		if err := os.RemoveAll(l); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var need diskspace.Need
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && fi.Mode().IsRegular() {
			need.Add(fi.Size())
		}
	}
	if err := diskspace.Check(work, need); err != nil {
		return fmt.Errorf("cannot copy %s: %w", dir, err)
	}
	return nil
}

// ErrStaler says that another copy is newer than the one that was to be used.
var ErrStaler = errors.New("another copy is newer")

// ErrNoData says that a member has none of the cluster's data.
var ErrNoData = errors.New("this member has none of the cluster's data")

// Recover makes a stopped member whose cluster has lost its majority for good the only member
// of a new cluster with the same data. others are the directories of other members that are
// left; when one is newer than dir, it is refused with ErrStaler. A member without data is refused with
// ErrNoData. dir is saved to the directory saved before anything is changed; where that is there already,
// an earlier call that was interrupted has saved it.
func Recover(dir string, others []string, saved string) error {
	if err := notRunning(dir); err != nil {
		return err
	}
	d := at(dir)
	info, ok, err := read(d, storedir.InfoFile, storedir.ParseSelf)
	if err == nil && !ok {
		err = fmt.Errorf("%s is missing", d.File(storedir.InfoFile))
	}
	if err != nil {
		return err
	}
	copies, err := Judge(append([]string{dir}, others...)...)
	if err != nil {
		return err
	}
	if copies[0].Index == 0 {
		return fmt.Errorf("%w: a spare has none, which the second control-plane node is until there is a third, and neither has one after reseed that was not started since; "+
			"run the command on a voter, or make this node a cluster of its own and restore a backup there: microk8s leave --force; microk8s dbctl restore FILE", ErrNoData)
	}
	for _, c := range copies[1:] {
		if c.Term > copies[0].Term || c.Term == copies[0].Term && c.Index > copies[0].Index {
			return fmt.Errorf("%w: %s ends with entry %d of term %d, %s with entry %d of term %d; run the command on the member of the newer one",
				ErrStaler, c.Dir, c.Index, c.Term, dir, copies[0].Index, copies[0].Term)
		}
	}
	if err := save(dir, saved); err != nil {
		return fmt.Errorf("cannot save the directory: %w", err)
	}
	info.Role = storedir.Voter
	if err := d.leaveOut(info, time.Now()); err != nil {
		return err
	}
	if err := Reconfigure(dir, []client.NodeInfo{{ID: info.ID, Address: info.Address, Role: client.Voter}}); err != nil {
		return fmt.Errorf("cannot rewrite the membership: %w; the directory is saved in %s", err, saved)
	}
	if err := d.identify(info); err != nil {
		return err
	}
	if err := os.Remove(d.File(storedir.JoinFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// save copies a directory to another one, which appears whole.
func save(dir, saved string) error {
	if _, err := os.Stat(saved); err == nil {
		return nil
	}
	if err := roomFor(filepath.Dir(saved), dir); err != nil {
		return err
	}
	part := saved + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := os.Mkdir(part, 0o700); err != nil {
		return err
	}
	if err := copyFiles(dir, part); err != nil {
		return err
	}
	return os.Rename(part, saved)
}

// copyFiles copies the regular files of a directory, and syncs them.
func copyFiles(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if err := copyFile(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}

// CopyAlone copies the directory of a member to another one, which it makes, and makes the copy the only
// member of a datastore at an address of this machine. The original may run, and is not changed.
func CopyAlone(dir, to, address string) error {
	info, err := storedir.Dir(dir).Self()
	if err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	if err := copyFiles(dir, to); err != nil {
		return fmt.Errorf("cannot copy %s: %w", dir, err)
	}
	for _, name := range []string{storedir.JoinFile, storedir.InitFile, storedir.UpdateFile} {
		if err := os.Remove(filepath.Join(to, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := Reconfigure(to, []client.NodeInfo{{ID: info.ID, Address: address, Role: client.Voter}}); err != nil {
		return fmt.Errorf("cannot read the log: %w", err)
	}
	return at(to).identify(storedir.Member{ID: info.ID, Address: address})
}

// AtLeast returns an entry that the log of a directory certainly had, by the names of its files, for one
// whose contents cannot be read; 0 where nothing says it.
func AtLeast(dir string) uint64 {
	_, last, err := lastIndex(dir)
	if err != nil {
		return 0
	}
	return last
}
