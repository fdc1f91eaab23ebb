package ranges

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"microk8s/internal/args"
	"microk8s/internal/atomicfile"
	"microk8s/internal/fileaccess"
	"microk8s/internal/hostinfo"
	"microk8s/internal/hostnet"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// record is what this package remembers of a node.
type record struct {
	// Flags were written from the file, by argument file and flag: the file may change them again.
	Flags map[string]map[string]string `json:"flags,omitempty"`
	// Started: a cluster has these ranges, in its objects and in its nodes.
	Started bool `json:"started,omitempty"`
}

// recordFile is in $SNAP_COMMON, so that a revert of the snap does not bring an old one back.
func recordFile(env snapenv.Env) string { return filepath.Join(env.Common, "var/ranges.json") }

func readRecord(env snapenv.Env) (r record, err error) {
	data, err := os.ReadFile(recordFile(env))
	if errors.Is(err, fs.ErrNotExist) {
		// A node of an earlier release that has run: it has noted its name, or has a pod network.
		name, err := nodeconfig.RegisteredName(env)
		_, none := os.Stat(hostnet.Conflist(env))
		return record{Started: name != "" || none == nil}, err
	}
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil {
		return r, fmt.Errorf("cannot read which ranges this node has: %w", err)
	}
	return r, nil
}

func (r record) write(env snapenv.Env) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(recordFile(env)), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(recordFile(env), append(data, '\n'), 0o644, nil)
}

// Begin notes, before the first start is tried, that there was none: one that fails leaves the choice.
func Begin(env snapenv.Env) error {
	if _, err := os.Stat(recordFile(env)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	r, err := readRecord(env)
	if err != nil {
		return err
	}
	return r.write(env)
}

// MarkStarted notes that an API server has run with this node's ranges: from now on they are the cluster's.
func MarkStarted(env snapenv.Env) error {
	r, err := readRecord(env)
	if _, missing := os.Stat(recordFile(env)); err != nil || r.Started && missing == nil {
		return err
	}
	r.Started = true
	return r.write(env)
}

// fixed reports whether the ranges of this node are those of a cluster, which cannot change them.
func fixed(env snapenv.Env, r record) bool {
	s := nodeconfig.ReadState(env)
	return r.Started || s.Clustered || s.Worker || s.Changing
}

// Current returns the ranges that the daemons' arguments have.
func Current(env snapenv.Env) (r Ranges, err error) {
	c := nodeconfig.Load(env)
	r.Pods, r.Services = ordered(c.ClusterCIDRs), ordered(c.APIServer.ServiceCIDRs)
	if r.Masks, err = currentMasks(env, r.Pods); err != nil {
		return r, err
	}
	return r, c.Err(nodeconfig.PartClusterCIDRs, nodeconfig.PartServiceCIDRs)
}

// ordered has IPv4 first, which is the order of this package; the arguments may have another.
func ordered(list []netip.Prefix) []netip.Prefix {
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b netip.Prefix) int { return a.Addr().BitLen() - b.Addr().BitLen() })
	return list
}

// currentMasks are the lengths of a node's share as the controller manager has them.
func currentMasks(env snapenv.Env, pods []netip.Prefix) (out []int, err error) {
	file, err := nodeconfig.File(env, "kube-controller-manager")
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		f := familyOf(p)
		mask := f.mask
		for _, flag := range []string{"node-cidr-mask-size", "node-cidr-mask-size-" + strings.ToLower(strings.TrimSuffix(f.prefix, "_"))} {
			if v, ok := file.Value(flag, env.Lookup); ok {
				if _, err := fmt.Sscanf(v, "%d", &mask); err != nil {
					return nil, fmt.Errorf("--%s=%s in %s is no number", flag, v, env.Args("kube-controller-manager"))
				}
			}
		}
		out = append(out, mask)
	}
	return out, nil
}

// same reports whether nothing is to be changed. A share that the file does not name is as it is.
func same(want, now Ranges) bool { return want.Equal(now) && slices.Equal(want.Masks, now.Masks) }

// Wanted returns what args/cni-env asks for; said is false where it says nothing, or there is none.
func Wanted(env snapenv.Env) (r Ranges, said bool, err error) {
	text, err := os.ReadFile(env.Args(FileName))
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err != nil {
		return r, false, err
	}
	return wanted(env, Read(text))
}

func wanted(env snapenv.Env, v Values) (r Ranges, said bool, err error) {
	if !slices.ContainsFunc(Keys(), func(k string) bool { return v[k] != "" }) && len(misspelled(v)) == 0 {
		return r, false, nil
	}
	if r, err = Parse(v); err != nil {
		return r, true, inFile(env.Args(FileName), err)
	}
	if now, err := Current(env); err == nil && r.Grown(now) { // a share that is not named stays as it is
		for i, p := range r.Pods {
			if f := familyOf(p); v[f.prefix+nodeMask] == "" && (p.Addr().Is4() || now.Masks[i]-p.Bits() <= maxShares) && p.Bits() <= now.Masks[i] {
				r.Masks[i] = now.Masks[i]
			}
		}
	}
	return r, true, nil
}

func inFile(path string, err error) error { return fmt.Errorf("cannot use %s: %w", path, err) }

// shipped is what the file says that comes with the product.
func shipped(env snapenv.Env) (r Ranges, flags func(file, flag string) string) {
	text, err := os.ReadFile(filepath.Join(env.DefaultArgs(), FileName))
	if err == nil {
		r, _ = Parse(Read(text))
	}
	return r, func(file, flag string) string {
		data, err := os.ReadFile(filepath.Join(env.DefaultArgs(), file))
		if err != nil {
			return ""
		}
		f, err := args.Parse(data, args.GrammarA)
		if err != nil {
			return ""
		}
		v, _ := f.Get(flag)
		return v
	}
}

// Prepare sets the daemons' arguments as args/cni-env asks, where this node was never started. On one that was, the file can
// give pods more addresses, and nodes another share; anything else in it is left aside (see [Differs]). Errors are about ranges that
// cannot work on this host; then nothing was changed. changed reports whether the ranges of Services, which certificates have, are others.
func Prepare(env snapenv.Env) (changed bool, err error) { return prepare(env, hostinfo.Joinable) }

func prepare(env snapenv.Env, addresses func() ([]net.IP, error)) (changed bool, err error) {
	rec, err := readRecord(env)
	if err != nil {
		return false, err
	}
	now, err := Current(env)
	if err != nil {
		return false, err
	}
	want, said, err := Wanted(env)
	if fixed(env, rec) {
		if err != nil || !said || !want.Grown(now) || same(want, now) || nodeconfig.ReadState(env).Changing {
			return false, nil //nolint:nilerr // status has it: a cluster goes on with the ranges that it has
		}
		if err := freeOf(want.Pods, now.Pods); err != nil {
			return false, err
		}
		return false, grow(env, want)
	}
	if err != nil {
		return false, err
	}
	set, chosen := now, false
	if said {
		if set, chosen, err = choose(env, want, now, rec); err != nil {
			return false, err
		}
	}
	if err := check(env, set, addresses); err != nil {
		return false, err
	}
	if !chosen {
		return false, nil
	}
	return write(env, want, rec)
}

// grow gives pods more addresses, or nodes another share, in a cluster that has nodes.
func grow(env snapenv.Env, want Ranges) error {
	pods := slices.Clone(want.Pods)
	if c := nodeconfig.Load(env).ClusterCIDRs; len(c) == 2 && c[0].Addr().Is6() { // somebody's own order
		slices.Reverse(pods)
	}
	manager := want.ShareFlags()
	manager["cluster-cidr"] = join(pods)
	for file, flags := range map[string]map[string]string{"kube-controller-manager": manager, nodeconfig.KubeProxy: {"cluster-cidr": join(pods)}} {
		if _, err := nodeconfig.SetFlags(env, file, flags); err != nil {
			return err
		}
	}
	return nil
}

// choose decides between the file and arguments that somebody has set by hand; both may not say different things.
func choose(env snapenv.Env, want, now Ranges, rec record) (set Ranges, chosen bool, err error) {
	usual, flag := shipped(env)
	if rec.Flags == nil && same(want, usual) {
		return now, false, nil // nobody has chosen anything in the file
	}
	for file, flags := range want.flags() {
		f, err := nodeconfig.File(env, file)
		if err != nil {
			return set, false, err
		}
		for name, value := range flags {
			has, _ := f.Get(name)
			switch {
			case has == value, has == flag(file, name), has == rec.Flags[file][name]: // the file's to change
			case name == "max-pods", name == "cluster-dns" && want.Equal(now):
			case want.Equal(usual): // nobody has chosen anything in the file
				return now, false, nil
			default:
				return set, false, inFile(env.Args(FileName), fmt.Errorf("it asks for %s, and --%s in %s is %q; take that argument out, or make both the same", want, name, env.Args(file), has))
			}
		}
	}
	return want, true, nil
}

// write sets the arguments. Those of max-pods that somebody has chosen stay.
func write(env snapenv.Env, r Ranges, rec record) (changed bool, err error) {
	flags := r.flags()
	for file, values := range flags {
		f, err := nodeconfig.File(env, file)
		if err != nil {
			return false, err
		}
		if has, _ := f.Get("max-pods"); file == nodeconfig.Kubelet && has != "" && has != rec.Flags[file]["max-pods"] {
			delete(values, "max-pods")
		}
	}
	before := nodeconfig.Load(env).APIServer.ServiceCIDRs
	rec.Flags = flags
	if err := rec.write(env); err != nil { // before: what is half written is ours to write again
		return false, err
	}
	for file, values := range flags {
		if _, err := os.Stat(env.Args(file)); errors.Is(err, fs.ErrNotExist) {
			continue // not set up, or no control plane
		}
		if _, err := nodeconfig.SetFlags(env, file, values); err != nil {
			return false, err
		}
	}
	return !slices.Equal(before, nodeconfig.Load(env).APIServer.ServiceCIDRs), nil
}

// check refuses ranges that cannot work on this host.
func check(env snapenv.Env, r Ranges, addresses func() ([]net.IP, error)) error {
	for _, sign := range []string{hostnet.Conflist(env), hostnet.SubnetEnv(env), env.CNIManifest()} {
		if _, err := os.Stat(sign); err == nil {
			return nil // it has run, or the pods' network is the user's
		}
	}
	if len(r.Pods) == 0 || len(r.Services) == 0 {
		return nil // the daemons refuse it
	}
	if err := hasFamilies(env, r, addresses); err != nil {
		return err
	}
	overlaps, err := hostnet.Overlaps(slices.Concat(r.Pods, r.Services))
	if err != nil || len(overlaps) == 0 {
		return err
	}
	var what []string
	for _, o := range overlaps {
		whose := "the pods' "
		if slices.Contains(r.Services, o.Range) {
			whose = "the Services' "
		}
		what = append(what, fmt.Sprintf("this host's network %s (%s) overlaps %s%s", o.Network, o.Link, whose, o.Range))
	}
	return fmt.Errorf("%s; choose other ranges before the first start:\n%s\n  microk8s start", strings.Join(what, ", and "), otherRanges(env, r))
}

// hasFamilies wants an address of each family on this host, by which other nodes reach it.
func hasFamilies(env snapenv.Env, r Ranges, addresses func() ([]net.IP, error)) error {
	own, err := addresses()
	if err != nil {
		return err
	}
	for _, p := range r.Pods {
		f := familyOf(p)
		if slices.ContainsFunc(own, func(ip net.IP) bool { return (ip.To4() == nil) == p.Addr().Is6() }) {
			continue
		}
		name := strings.TrimSuffix(f.prefix, "_")
		if f.on && len(r.Pods) == 1 {
			if len(own) == 0 {
				continue // the host may get it later, and IPv4 is nobody's choice
			}
			return fmt.Errorf("this host has no IPv4 address, and pods are to have some of %s; have them use IPv6 alone:\n  sed -i 's|^IPv4_SUPPORT=.*|IPv4_SUPPORT=false|; s|^IPv6_SUPPORT=.*|IPv6_SUPPORT=true|' %s\n  microk8s start", p, env.Args(FileName))
		}
		return inFile(env.Args(FileName), fmt.Errorf("%s%s=true: this host has no address of %s that other machines reach; set one, or %[1]s%[2]s=false", f.prefix, support, name))
	}
	return nil
}

// otherRanges are the lines with which ranges are chosen that no network of this host touches.
func otherRanges(env snapenv.Env, r Ranges) string {
	var lines []string
	change := func(key string, to netip.Prefix) {
		lines = append(lines, fmt.Sprintf("  sed -i 's|^#*%s=.*|%s=%s|' %s", key, key, to, env.Args(FileName)))
	}
	for _, p := range r.Pods {
		if p.Addr().Is4() {
			change(families[0].prefix+cluster, free("10.%d.0.0/16", 200))
			change(families[0].prefix+service, free("10.%d.183.0/24", 153))
		} else {
			change(families[1].prefix+cluster, free("fd%02x::/64", 0x11))
			change(families[1].prefix+service, free("fd%02x::/108", 0xa8))
		}
	}
	return strings.Join(lines, "\n")
}

// free returns the first range of a form, from a number on, that no network of this host touches.
func free(form string, from int) netip.Prefix {
	for i := range 256 {
		p := netip.MustParsePrefix(fmt.Sprintf(form, (from+i)%256))
		if o, err := hostnet.Overlaps([]netip.Prefix{p}); err == nil && len(o) == 0 {
			return p
		}
	}
	return netip.MustParsePrefix(fmt.Sprintf(form, from))
}

// freeOf refuses more addresses for pods where a network of this host has some of those that come along.
func freeOf(pods, before []netip.Prefix) error {
	overlaps, err := hostnet.Overlaps(pods)
	if err != nil {
		return err
	}
	for _, o := range overlaps {
		if !slices.ContainsFunc(before, func(p netip.Prefix) bool { return p.Overlaps(o.Network) }) {
			return fmt.Errorf("this host's network %s (%s) overlaps the pods' %s, which was %s before: take another range, or the former one", o.Network, o.Link, o.Range, join(before))
		}
	}
	return nil
}

// Differs returns why args/cni-env has no effect on a node that was started: it asks for other ranges than the cluster has, or cannot be
// used. It is nil where the file says what is.
func Differs(env snapenv.Env) error {
	rec, err := readRecord(env)
	if err != nil || !fixed(env, rec) {
		return err
	}
	want, said, err := Wanted(env)
	if err != nil || !said {
		return err
	}
	return differ(env, want, rec)
}

func differ(env snapenv.Env, want Ranges, rec record) error {
	now, err := Current(env)
	if err != nil {
		return nil //nolint:nilerr // the daemons say what is wrong with their arguments
	}
	if usual, _ := shipped(env); want.Grown(now) || want.Equal(usual) && rec.Flags == nil {
		return nil
	}
	return fmt.Errorf("the cluster has %s since its first start, which cannot be changed to %s: only more addresses for pods, such as a /%d that holds %s", now, want, max(1, now.Pods[0].Bits()-1), now.Pods[0])
}

// Try looks at changes of args/cni-env before they are made: nil removes a variable. The error says why the file would have no
// effect, or could not be used.
func Try(env snapenv.Env, changes map[string]*string) error {
	text, err := os.ReadFile(env.Args(FileName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	v := Read(text)
	for key, value := range changes {
		if delete(v, key); value != nil {
			v[key] = *value
		}
	}
	rec, err := readRecord(env)
	if err != nil {
		return err
	}
	r, said, err := wanted(env, v)
	if err != nil || !said || !fixed(env, rec) {
		return err
	}
	if err := differ(env, r, rec); err != nil {
		return inFile(env.Args(FileName), err)
	}
	return nil
}

// TakeOver has a joining node say in args/cni-env what its cluster has. Its arguments are the caller's business.
func TakeOver(env snapenv.Env, r Ranges) error {
	text, err := os.ReadFile(env.Args(FileName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if after := Edit(text, r.Values()); string(after) != string(text) {
		return fileaccess.For(env).WriteShared(env.Args(FileName), after)
	}
	return nil
}
