package snap

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// state is what a machine looks like to those who administer it: lines, sorted, by kind.
type state map[string][]string

// What snapd and the machine itself change without us. Everything else must be as it was.
var notOurs = []string{
	"/run/snapd", "/run/systemd", "/run/udev", "/run/log", "/run/user", "/run/dbus", "/run/lock", "/run/initctl", "/run/utmp", "/run/sudo", "/run/mount",
	"/var/lib/snapd", "/var/lib/systemd", "/var/log/journal", "/var/cache", "/var/tmp", "/var/lib/dbus", "/etc/machine-id", "/etc/udev/rules.d",
	"/etc/sudoers.d", "/root/snap", "/root/.", "/home", "/etc/.pwd.lock", "/run/agetty",
	// The group stays, since users were added to it.
	"/etc/group", "/etc/gshadow",
}

// takeState looks at files outside the snap's own, links, addresses, routes, netfilter rules,
// mounts, cgroups, processes, units and kernel settings.
func (m *machine) takeState(t *testing.T) state {
	t.Helper()
	const script = `
echo '== files'
find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /snap -o -path /var/snap -o -path /mnt \) -prune -o -printf '%p %y %m %U:%G %l\n'
find /run /var/snap -maxdepth 3 -xdev -path /var/snap/microk8s/\* -prune -o -printf '%p %y %m %U:%G %l\n'
echo '== group'; grep -v ^microk8s /etc/group
echo '== links'; ip -o link | sed -E 's/^[0-9]*: //; s/@[^:]*//; s/ qlen.*//'
echo '== addresses'; { ip -o -br -4 addr; ip route show table all; ip rule; } | grep -v fe80 | sed 's/@[^ ]*//'
echo '== iptables'; for t in iptables iptables-legacy ip6tables ip6tables-legacy; do $t-save 2>/dev/null | grep -v '^#' | sed "s/\[.*\]//; s/^/$t /"; done
echo '== mounts'; awk '{print $5, $9}' /proc/self/mountinfo | grep -v '/run/user\|/snap/'
echo '== cgroups'; find /sys/fs/cgroup -maxdepth 2 -type d ! -path '*/system.slice/*' ! -path '*/user.slice/*' ! -path '*.slice/*'; find /sys/fs/cgroup -path '*kube*' -type d; for d in $(find /sys/fs/cgroup -name '*microk8s*' -type d); do [ ! -s $d/cgroup.procs ] || echo $d; done
echo '== processes'; for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline 2>/dev/null; echo; done | grep -E '^[^ ]*(microk8s|containerd|kube|pause|dqlite)'
echo '== units'; ls /etc/systemd/system /run/systemd/system 2>/dev/null | grep -i microk8s; systemctl list-units --all --no-legend --plain '*microk8s*.service' '*microk8s*.mount' | awk '{print $1, $3}'
echo '== sysctl.d'; cat /etc/sysctl.d/* /etc/sysctl.conf
echo '== netns'; ls /run/netns 2>/dev/null
true`
	s := state{}
	kind := ""
	add := func(line string) {
		if strings.HasPrefix(line, "== ") {
			kind = line[3:]
			s[kind] = []string{}
			return
		}
		if line == "" || kind == "files" && slices.ContainsFunc(notOurs, func(p string) bool { return strings.HasPrefix(line, p) }) {
			return
		}
		s[kind] = append(s[kind], line)
	}
	for line := range strings.Lines(m.run(t, "bash", "-c", script)) {
		add(strings.TrimRight(line, "\n"))
	}
	// nft is not in the machine, as it may be missing on a user's.
	var out, errOut bytes.Buffer
	cmd := snapdHost(t.Context(), "net", m.name, "nft", "--stateless", "list", "ruleset")
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("nft: %v\n%s", err, &errOut)
	}
	add("== nft")
	for line := range strings.Lines(out.String()) {
		add(strings.TrimRight(line, "\n"))
	}
	for k := range s {
		slices.Sort(s[k])
		s[k] = slices.Compact(s[k])
	}
	return s
}

var revisionPart = regexp.MustCompile(`\bx\d+\b`)

// anyRevision makes states of different revisions of the snap comparable.
func (s state) anyRevision() state {
	out := state{}
	for kind, lines := range s {
		same := make([]string, 0, len(lines))
		for _, l := range lines {
			same = append(same, revisionPart.ReplaceAllString(l, "x0"))
		}
		slices.Sort(same)
		out[kind] = slices.Compact(same)
	}
	return out
}

// settledState takes the state when DNS has its pods again: without them its Services are refused,
// by other rules.
func (m *machine) settledState(t *testing.T) (s state) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		s = m.takeState(t)
		for _, line := range s["nft"] {
			if strings.Contains(line, "kube-dns") && strings.Contains(line, "goto reject-chain") {
				return errors.New("DNS has no pods")
			}
		}
		return nil
	})
	return s
}

// sameButRevision fails if a refresh or revert changed more of the machine than the revision.
func (m *machine) sameButRevision(t *testing.T, before state) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		if diff := cmp.Diff(before.anyRevision(), m.takeState(t).anyRevision()); diff != "" {
			return fmt.Errorf("the machine is not as it was before (- before, + now):\n%s", diff)
		}
		return nil
	})
}

// ours are what an installation may add to a machine (docs/install.md), by kind.
var ours = map[string]*regexp.Regexp{
	"files": regexp.MustCompile(`^/(var/lib/(kubelet|calico|cni)|etc/cni|opt/cni|var/log/(pods|containers)|run/(containerd|netns|flannel|xtables.lock|microk8s)|var/snap/microk8s|etc/systemd/system/([a-z.-]*.wants/)?snap[.-]microk8s)`),
	"links": regexp.MustCompile(`^(cni0|flannel\.1|veth)`), "addresses": regexp.MustCompile(`cni0|flannel\.1|veth`),
	"mounts": regexp.MustCompile(`microk8s|/run/netns`), "cgroups": regexp.MustCompile(`kubepods|snap\.microk8s`),
	"processes": regexp.MustCompile(`.`), "units": regexp.MustCompile(`snap[.-]microk8s`), "netns": regexp.MustCompile(`^cni-`),
}

// onlyOurs fails if an installation took something from the machine, or added what it may not.
func onlyOurs(t *testing.T, before, after state) {
	t.Helper()
	for kind, lines := range before {
		for _, l := range lines {
			if !slices.Contains(after[kind], l) {
				t.Errorf("%s: the installation took away or changed %q", kind, l)
			}
		}
	}
	for kind, lines := range after {
		for _, l := range lines {
			if kind == "nft" && !strings.HasPrefix(l, "table ") || slices.Contains(before[kind], l) {
				continue
			}
			if kind == "nft" && regexp.MustCompile(`^table (ip|ip6|inet) (kube-proxy|microk8s-pods|microk8s-policy)\b`).MatchString(l) {
				continue
			}
			if ours[kind] == nil || !ours[kind].MatchString(l) {
				t.Errorf("%s: the installation added %q", kind, l)
			}
		}
	}
}

// sameState fails if the machine is not what it was. It gives what ends in the background some
// time.
func (m *machine) sameState(t *testing.T, before state) {
	t.Helper()
	var diff string
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); {
		if diff = cmp.Diff(before, m.takeState(t)); diff == "" {
			return
		}
		time.Sleep(time.Second)
	}
	t.Errorf("the machine is not as it was before (- before, + now):\n%s", diff)
}
