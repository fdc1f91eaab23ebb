package faults

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/argsdigest"
	"microk8s/internal/hostnet"
	"microk8s/internal/nodecheck"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
)

// well are the files of a host on which nothing is wrong.
var well = map[string]string{
	"etc/machine-id":                              "0123456789abcdef0123456789abcdef\n",
	"etc/resolv.conf":                             "nameserver 127.0.0.53\n",
	"run/systemd/resolve/resolv.conf":             "nameserver 192.0.2.1\n",
	"proc/cgroups":                                "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t1\t1\t1\ncpu\t1\t1\t1\nmemory\t9\t120\t1\npids\t1\t1\t1\n",
	"proc/swaps":                                  "Filename\tType\tSize\tUsed\tPriority\n",
	"proc/uptime":                                 "99999.00 50.00\n",
	"proc/loadavg":                                "0.1 0.1 0.1 1/300 5\n",
	"proc/filesystems":                            "nodev\toverlay\n",
	"dev/kmsg":                                    "6,1,1,-;hello\n",
	"proc/sys/kernel/osrelease":                   "6.1.0-1\n",
	"proc/sys/kernel/pid_max":                     "4194304\n",
	"proc/sys/fs/file-max":                        "9223372036854775807\n",
	"proc/sys/fs/file-nr":                         "2000\t0\t9223372036854775807\n",
	"proc/sys/fs/aio-nr":                          "10\n",
	"proc/sys/fs/aio-max-nr":                      "1048576\n",
	"proc/sys/fs/inotify/max_user_instances":      "1024\n",
	"proc/sys/fs/inotify/max_user_watches":        "1048576\n",
	"proc/sys/net/netfilter/nf_conntrack_count":   "10\n",
	"proc/sys/net/netfilter/nf_conntrack_max":     "131072\n",
	"proc/sys/net/bridge/bridge-nf-call-iptables": "1\n",
	"lib/modules/6.1.0-1/modules.dep":             "kernel/net/netfilter/nf_tables.ko:\n",
	"sys/module/vxlan/refcnt":                     "1\n",
	"DATA/args/kubelet":                           "--cluster-dns=10.152.183.10\n",
	"DATA/args/kube-proxy":                        "--cluster-cidr=10.1.0.0/16\n",
	"DATA/args/certs.d/docker.io/hosts.toml":      "server = \"https://registry-1.docker.io\"\n",
	"proc/100/cgroup":                             "0::/system.slice/snap.microk8s.daemon-kubelite.service\n",
	"sys/fs/cgroup/system.slice/snap.microk8s.daemon-kubelite.service/memory.events": "low 0\noom 0\noom_kill 0\n",
}

// node makes a node that is well but for what the fault breaks.
func node(t *testing.T, f Fault) *nodecheck.Node {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	env.Host = t.TempDir()
	put := func(path, text string) {
		t.Helper()
		target := filepath.Join(env.Host, path)
		if rest, ok := strings.CutPrefix(path, "DATA/"); ok {
			target = filepath.Join(env.Data, rest)
		}
		if text == "-" {
			if err := os.RemoveAll(target); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(path, "sys/module/") {
				os.Remove(filepath.Dir(target))
			}
			return
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(target), 0o755), os.WriteFile(target, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	files := maps.Clone(well)
	files["DATA/"+strings.TrimPrefix(hostnet.Conflist(env), env.Data+"/")] = `{"plugins": [{"bridge": "cni0", "ipam": {"ranges": [[{"subnet": "10.1.4.0/24"}]]}}]}`
	for path, text := range files {
		put(path, text)
	}
	if err := os.MkdirAll(env.RunDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	n := &nodecheck.Node{Env: env, Config: nodeconfig.Load(env), Now: func() time.Time { return time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC) }}
	for i, name := range service.Names() {
		n.Services = append(n.Services, service.State{Name: name, Phase: service.Running, PID: 100 + i})
		if err := argsdigest.Record(env, name); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n.Services {
		if n.Services[i].Name == service.Kubelite {
			n.Services[i].PID = 100
		} else {
			n.Services[i].PID = 0
		}
	}
	addresses("10.1.4.1/24")(n)
	n.Statfs = func(path string) (unix.Statfs_t, error) {
		return unix.Statfs_t{Blocks: 1e9, Bsize: 4096, Bavail: 1e8, Files: 1000, Ffree: 900}, nil
	}
	n.Synced = func() (bool, error) { return true, nil }
	n.Date = func(_ context.Context, host string) (time.Time, error) {
		if host == n.Config.AgentHost {
			return n.Now(), nil
		}
		return time.Time{}, fs.ErrNotExist
	}
	for path, text := range f.Files {
		put(path, text)
	}
	if f.Set != nil {
		f.Set(n)
	}
	return n
}

func report(results []nodecheck.Result) (out []string) {
	for _, r := range results {
		for _, f := range r.Findings {
			out = append(out, r.Check.ID+": "+f.What+"; "+f.Do)
		}
		if r.Unseen != nil {
			out = append(out, r.Check.ID+" was not looked at: "+r.Unseen.Error())
		}
	}
	return out
}

// TestNothing holds that a node that is well is called so, and that everything could be looked at.
func TestNothing(t *testing.T) {
	if got := report(nodecheck.Run(t.Context(), node(t, Fault{}), true)); got != nil {
		t.Errorf("found:\n%s", strings.Join(got, "\n"))
	}
}

// TestFaults breaks one thing at a time in files and answers. Those that take a running node are broken in
// tests/node.
func TestFaults(t *testing.T) {
	if len(Catalogue) < 40 {
		t.Errorf("%d faults, there should be 40", len(Catalogue))
	}
	seen := map[string]bool{}
	for _, f := range Catalogue {
		t.Run(f.Name, func(t *testing.T) {
			if seen[f.Name] || status.Looks[f.ID] == "" || f.Says == "" || f.Do == "" || (f.Break == "") != (f.Repair == "") || (f.Break == "") != (f.Why != "") {
				t.Fatalf("the entry is not complete: %+v", f)
			}
			seen[f.Name] = true
			if f.Files == nil && f.Set == nil {
				return // on a running node only
			}
			got := report(nodecheck.Run(t.Context(), node(t, f), f.Inspect))
			if len(got) != 1 || !strings.HasPrefix(got[0], f.ID+": ") || !strings.Contains(got[0], f.Says) || !strings.Contains(got[0], f.Do) {
				t.Errorf("found:\n%s\nwant one of %s with %q and %q", strings.Join(got, "\n"), f.ID, f.Says, f.Do)
			}
		})
	}
}
