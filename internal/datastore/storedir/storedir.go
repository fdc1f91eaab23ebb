// Package storedir is the one owner of the datastore's storage directory: the names and formats
// of its files, its members as they are written there, and the protocol that the members' daemons
// speak. It needs no cgo, so every program uses it.
//
// What the daemon does with the files at its start is internal/datastore/member's, asking a
// running daemon internal/datastore/peers'. Raft's own files are dqlite's.
package storedir

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// Protocol names what the daemons of members speak with each other, in the TLS handshake (ALPN)
// and in a request to join: only nodes with the same one can be members of one datastore.
const Protocol = "microk8s-datastore-1"

// DefaultPort is where a member listens.
const DefaultPort = 19001

// FirstAddress is where the member of a new node listens, until another node joins (cli.md 6.7).
const FirstAddress = Loopback + ":19001"

// Loopback is the host of the address of a member that no other machine reaches.
const Loopback = "127.0.0.1"

// Names of the files in the directory.
const (
	CertFile          = "cluster.crt"     // the key pair that all members share
	KeyFile           = "cluster.key"     //
	InfoFile          = "info.yaml"       // who this member is
	ClusterFile       = "cluster.yaml"    // who all members are
	InitFile          = "init.yaml"       // what a directory without data becomes at the next start
	UpdateFile        = "update.yaml"     // the address that the only member gets at the next start
	JoinFile          = "join"            // there while this member is not one of the cluster's yet
	FailureDomainFile = "failure-domain"  // a number
	TuningFile        = "tuning.yaml"     // see member.Tuning
	EncryptionFile    = "encryption.yaml" // the API server's keys for what is in the directory; see internal/encryption
	ReseedFile        = ".reseed"         // what init.yaml is to be when the old files are moved away: a reseed that is under way
	IdentityFolder    = ".identity"       // copies of the four files that say who this member is, and let it reach the others
	DamageFile        = ".damage.json"    // what was wrong with the files; see Damage
	SeenFile          = ".seen.json"      // how far the other members were known to have come
	RecoveredFile     = ".recovered.json" // which members a recovery has left out; see Recovered
	MembersSocket     = "members.sock"    // where the daemon says who the members are; see package peers
)

// MetadataFiles are dqlite's own: Raft's term and vote, in the newer of the two.
var MetadataFiles = []string{"metadata1", "metadata2"}

// Recovered is a recovery of the datastore from one member: the others that it left out must not go on with
// their data, which a majority of them could.
type Recovered struct {
	At      time.Time `json:"at"`
	By      string    `json:"by"`      // address of the member
	LeftOut []uint64  `json:"leftOut"` // IDs
}

// ParseRecovered reads the file.
func ParseRecovered(data []byte) (r Recovered, err error) { return r, json.Unmarshal(data, &r) }

// Role is what a member does, with dqlite's numbers.
type Role int

// The roles.
const (
	Voter   Role = 0 // holds the data and votes
	StandBy Role = 1 // holds the data
	Spare   Role = 2 // reaches the data through the leader
)

// String returns the role in dqlite's words.
func (r Role) String() string {
	switch r {
	case Voter:
		return "voter"
	case StandBy:
		return "stand-by"
	case Spare:
		return "spare"
	}
	return strconv.Itoa(int(r))
}

// Member is a member as info.yaml and cluster.yaml name it. The ID of one that has not joined yet
// is 0 in the others' lists.
type Member struct {
	ID      uint64 `json:"ID"`
	Address string `json:"Address"` // host:port
	Role    Role   `json:"Role"`
}

// Host returns the address without its port; "" where there is none.
func (m Member) Host() string {
	host, _, err := net.SplitHostPort(m.Address)
	if err != nil {
		return ""
	}
	return host
}

// OnLoopback reports whether no other machine reaches the member.
func (m Member) OnLoopback() bool {
	ip := net.ParseIP(m.Host())
	return ip != nil && ip.IsLoopback()
}

func (m Member) yaml(indent string) string {
	address := m.Address
	if strings.HasPrefix(address, "[") { // IPv6, which would begin a list
		address = "'" + address + "'"
	}
	return fmt.Sprintf("Address: %s\n%sID: %d\n%sRole: %d\n", address, indent, m.ID, indent, m.Role)
}

// EncodeSelf writes info.yaml.
func EncodeSelf(m Member) []byte { return []byte(m.yaml("")) }

// EncodeMembers writes cluster.yaml.
func EncodeMembers(members []Member) []byte {
	var list strings.Builder
	for _, m := range members {
		list.WriteString("- " + m.yaml("  "))
	}
	return []byte(list.String())
}

// ParseSelf reads info.yaml, and refuses one that is not whole.
func ParseSelf(data []byte) (m Member, err error) {
	if err := yaml.Unmarshal(data, &m); err != nil {
		return m, err
	}
	// It is the last line. A file that ends within the one before has another member's ID.
	if !bytes.Contains(data, []byte("Role:")) {
		return m, errors.New("Role is missing")
	}
	if m.ID == 0 {
		return m, errors.New("ID is missing or 0")
	}
	if m.Role < Voter || m.Role > Spare {
		return m, fmt.Errorf("Role is %d; it must be 0, 1 or 2", int(m.Role))
	}
	return m, checkAddress(m.Address)
}

// ParseMembers reads cluster.yaml; a list of none is an error.
func ParseMembers(data []byte) (members []Member, err error) {
	if err := yaml.Unmarshal(data, &members); err != nil {
		return nil, err
	}
	if len(members) == 0 {
		return nil, errors.New("it lists no member")
	}
	for _, m := range members {
		if err := checkAddress(m.Address); err != nil {
			return nil, err
		}
	}
	return members, nil
}

// Init is init.yaml, what a directory without data becomes: the first member of a new datastore,
// or one that joins others. update.yaml is the same with an address alone.
type Init struct {
	Address string   `json:"Address"`           // host:port of this member
	Cluster []string `json:"Cluster,omitempty"` // addresses of members that are there; none for a new datastore
}

// Encode writes the file.
func (i Init) Encode() ([]byte, error) { return yaml.Marshal(i) }

// ParseInit reads init.yaml or update.yaml.
func ParseInit(data []byte) (i Init, err error) {
	if err := yaml.Unmarshal(data, &i); err != nil {
		return i, err
	}
	if err := checkAddress(i.Address); err != nil {
		return i, err
	}
	for _, a := range i.Cluster {
		if err := checkAddress(a); err != nil {
			return i, fmt.Errorf("in Cluster: %w", err)
		}
	}
	return i, nil
}

func checkAddress(a string) error {
	if a == "" {
		return fmt.Errorf("Address is empty; it must be host:port, such as %s", FirstAddress)
	}
	host, port, err := net.SplitHostPort(a)
	if err != nil {
		return fmt.Errorf("the address %q is not host:port", a)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" || strings.ContainsAny(host, " \n\t#'\"{}") {
		return fmt.Errorf("the address %q is not host:port", a)
	}
	return nil
}

// Dir is the path of a storage directory. Its methods read and write files; several processes
// may, since the files are replaced as a whole.
type Dir string

// File is the path of one of the files.
func (d Dir) File(name string) string { return filepath.Join(string(d), name) }

// Has reports whether a file is there.
func (d Dir) Has(name string) bool {
	_, err := os.Lstat(d.File(name))
	return err == nil
}

// Read returns a file's content decoded. The error wraps fs.ErrNotExist where there is no such
// file; any other says what to do.
func Read[T any](d Dir, name string, decode func([]byte) (T, error)) (v T, err error) {
	data, err := os.ReadFile(d.File(name))
	if errors.Is(err, fs.ErrNotExist) {
		return v, err
	}
	if err == nil {
		v, err = decode(data)
	}
	if err != nil {
		return v, fmt.Errorf("cannot read %s: %w; correct the file or restore it from a backup", d.File(name), err)
	}
	return v, nil
}

// Self returns who this member is, from info.yaml. The error wraps fs.ErrNotExist before the first
// start.
func (d Dir) Self() (Member, error) { return Read(d, InfoFile, ParseSelf) }

// Members returns who the members are, from cluster.yaml, which the daemon keeps and which may be
// a moment old. The error wraps fs.ErrNotExist before the first start.
func (d Dir) Members() ([]Member, error) { return Read(d, ClusterFile, ParseMembers) }

// Known returns the members that the files name, this one alone where there is no list yet; nil
// where nothing can be read.
func (d Dir) Known() []Member {
	if members, err := d.Members(); err == nil {
		return members
	}
	if self, err := d.Self(); err == nil {
		return []Member{self}
	}
	if address := d.Address(); address != "" {
		return []Member{{Address: address}}
	}
	return nil
}

// Addresses are those of all members that the files name, sorted; nil where they cannot be read.
func (d Dir) Addresses() []string {
	var out []string
	members, _ := d.Members()
	if self, err := d.Self(); err == nil {
		members = append(members, self)
	}
	for _, m := range members {
		out = append(out, m.Address)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Address is where this member listens, or will from its first start on; "" where the files do not
// say.
func (d Dir) Address() string {
	if self, err := d.Self(); err == nil {
		return self.Address
	}
	init, _ := Read(d, InitFile, ParseInit)
	return init.Address
}

// Port is that of [Dir.Address], or the default one.
func (d Dir) Port() int {
	if _, port, err := net.SplitHostPort(d.Address()); err == nil {
		if n, err := strconv.Atoi(port); err == nil {
			return n
		}
	}
	return DefaultPort
}

// Used reports whether a member has started here before.
func (d Dir) Used() bool {
	return slices.ContainsFunc(append([]string{InfoFile, ClusterFile}, MetadataFiles...), d.Has)
}

// Begin makes a directory without data that of a new member, from its next start on. write replaces
// a file, such as Access.WriteShared of internal/fileaccess.
func (d Dir) Begin(i Init, write func(path string, data []byte) error) error {
	return d.request(InitFile, i, write)
}

// Move has the only member of a datastore listen on another address from its next start on.
func (d Dir) Move(address string, write func(path string, data []byte) error) error {
	return d.request(UpdateFile, Init{Address: address}, write)
}

func (d Dir) request(name string, i Init, write func(path string, data []byte) error) error {
	data, err := i.Encode()
	if err != nil {
		return err
	}
	if _, err := ParseInit(data); err != nil {
		return fmt.Errorf("cannot write %s: %w", d.File(name), err)
	}
	return write(d.File(name), data)
}
