package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/atomicfile"
)

// process names one process beyond the reuse of its number.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in clock ticks since boot, field 22 of /proc/PID/stat
	Boot  string `json:"boot"`  // boot id of the machine
}

// host is the record of one host, kept in host.json of its directory.
type host struct {
	Name         string  `json:"name"`
	Number       byte    `json:"number"`         // last octet of its address
	Snap         string  `json:"snap,omitempty"` // product tree it boots with
	DefaultRoute bool    `json:"defaultRoute,omitempty"`
	IPv6         IPv6    `json:"ipv6,omitempty"`
	Prepared     bool    `json:"prepared,omitempty"` // its root is complete
	Disk         int64   `json:"disk,omitempty"`
	Init         process `json:"init"`
	Booted       bool    `json:"booted"` // Init has set the host up; without it, Init may be about to end
}

// shared is what the hosts of a lab have in common, kept in lab.json.
type shared struct {
	Switch process     `json:"switch"`
	Ready  bool        `json:"ready"`          // the bridge is up
	Cuts   [][2]string `json:"cuts,omitempty"` // second "*": from everybody
}

func (l *Lab) dir() string                 { return filepath.Join(l.stateDir, l.instance) }
func (l *Lab) hostsDir() string            { return filepath.Join(l.dir(), "hosts") }
func (l *Lab) hostDir(name string) string  { return filepath.Join(l.hostsDir(), name) }
func (l *Lab) hostFile(name string) string { return filepath.Join(l.hostDir(name), "host.json") }
func (l *Lab) rootDir(name string) string  { return filepath.Join(l.hostDir(name), "root") }
func (l *Lab) imageFile(name string) string {
	return filepath.Join(l.hostDir(name), "var-snap.img")
}

// LogFile is the log of a host's init process, as the machine sees it.
func (l *Lab) LogFile(name string) string { return filepath.Join(l.hostDir(name), "init.log") }

// Root is a host's file system as the machine sees it, without what is mounted in it (/tmp,
// /run, and /var/snap of a host with a limited disk).
func (l *Lab) Root(name string) string { return l.rootDir(name) }

func (l *Lab) subnet() netip.Prefix {
	var octet byte
	if l.instance != DefaultInstance {
		octet = byte(crc32.ChecksumIEEE([]byte(l.instance))%254 + 1)
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, octet, 0}), 24)
}

// addr is the address by which a host is known: that of IPv6 where it has no other.
func (l *Lab) addr(h *host) netip.Addr {
	if h.IPv6 == OnlyIPv6 {
		return l.addr6(h)
	}
	return l.addr4(h)
}

func (l *Lab) addr4(h *host) netip.Addr {
	a := l.subnet().Addr().As4()
	a[3] = h.Number
	return netip.AddrFrom4(a)
}

// prefix6 is how long the network's part of an IPv6 address is.
const prefix6 = 64

// addr6 has the instance's and the host's numbers of [Lab.addr4] in fd4d:38::/32, which is "M8" behind the byte of local networks.
func (l *Lab) addr6(h *host) netip.Addr {
	four := l.addr4(h).As4()
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x4d, 2: 0x38, 7: four[2], 15: four[3]})
}

func (l *Lab) text6(h *host) string {
	if h.IPv6 == NoIPv6 {
		return ""
	}
	return l.addr6(h).String()
}

func (l *Lab) hostNames() ([]string, error) {
	entries, err := os.ReadDir(l.hostsDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list hosts: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

func (l *Lab) load(name string) (*host, error) {
	if !validHost.MatchString(name) {
		return nil, fmt.Errorf("%w: %q", ErrNoHost, name)
	}
	data, err := os.ReadFile(l.hostFile(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %q (lab ls shows the hosts)", ErrNoHost, name)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read host %s: %w", name, err)
	}
	h := &host{}
	if err := json.Unmarshal(data, h); err != nil || h.Name != name || h.Number == 0 {
		return nil, fmt.Errorf("cannot read host %s: %s is damaged; remove the host with lab down %s", name, l.hostFile(name), name)
	}
	return h, nil
}

func (l *Lab) save(h *host) error {
	data, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(l.hostFile(h.Name), append(data, '\n'), 0o644, nil)
}

func (l *Lab) loadShared() shared {
	var s shared
	if data, err := os.ReadFile(filepath.Join(l.dir(), "lab.json")); err == nil {
		_ = json.Unmarshal(data, &s) // damaged: the switch is found by its cgroup, cuts are lost
	}
	return s
}

func (l *Lab) saveShared(s shared) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(l.dir(), "lab.json"), append(data, '\n'), 0o644, nil)
}

// create records a new host with the lowest free address.
func (l *Lab) create(name string, opt Options) (*host, error) {
	names, err := l.hostNames()
	if err != nil {
		return nil, err
	}
	var used []byte
	for _, n := range names {
		if other, err := l.load(n); err == nil {
			used = append(used, other.Number)
		}
	}
	number := byte(11)
	for slices.Contains(used, number) {
		if number++; number > 250 {
			return nil, fmt.Errorf("cannot create host %s: no free address in %s", name, l.subnet())
		}
	}
	l.log.Info("create host", "host", name)
	if err := os.MkdirAll(l.hostDir(name), 0o755); err != nil {
		return nil, fmt.Errorf("cannot create host %s: %w", name, err)
	}
	h := &host{Name: name, Number: number, Snap: l.snap, DefaultRoute: opt.DefaultRoute, IPv6: opt.IPv6}
	return h, l.save(h)
}

// locked runs f while no other lab command changes this instance.
func (l *Lab) locked(ctx context.Context, f func() error) error {
	if os.Geteuid() != 0 {
		return errors.New("cannot change the lab: it needs root; try again with sudo")
	}
	path := filepath.Join(l.stateDir, l.instance+".lock")
	file, err := flock(ctx, path)
	if err != nil {
		return fmt.Errorf("cannot lock the lab: %w", err)
	}
	defer func() {
		if _, err := os.Lstat(l.dir()); errors.Is(err, fs.ErrNotExist) {
			// Nothing is left of this lab: leave no trace. Whoever waits for the lock sees
			// that the file is gone and makes a new one.
			os.Remove(path)
			os.Remove(l.stateDir) // only if empty
		}
		file.Close()
	}()
	return f()
}

// flock takes an exclusive lock on path, created if missing.
func flock(ctx context.Context, path string) (*os.File, error) {
	for {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the directory was removed with the last lab in it
		}
		if err != nil {
			return nil, err
		}
		for {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
				break
			}
			if err := pause(ctx, 50*time.Millisecond); err != nil {
				f.Close()
				return nil, fmt.Errorf("another lab command is at work: %w", err)
			}
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		mine, err1 := f.Stat()
		there, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(mine, there) {
			return f, nil
		}
		f.Close() // removed by the last owner
	}
}

// identify returns the identity of a live process.
func identify(pid int) (process, error) {
	start, _, err := procStat(pid)
	if err != nil {
		return process{}, err
	}
	return process{PID: pid, Start: start, Boot: bootID()}, nil
}

// alive reports whether exactly this process still runs; a zombie does not.
func (p process) alive() bool {
	if p.PID <= 0 || p.Boot != bootID() {
		return false
	}
	start, state, err := procStat(p.PID)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

func procStat(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name in parentheses may contain anything, so count from its end.
	i := bytes.LastIndexByte(b, ')')
	fields := strings.Fields(string(b[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, 0, fmt.Errorf("cannot parse /proc/%d/stat", pid)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return start, fields[0][0], err
}
