package inspect

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
)

// certificates adds what the certificates say, never their files: a key may have been put
// behind a certificate.
func (in *Inspector) certificates() {
	var b strings.Builder
	paths, _ := filepath.Glob(filepath.Join(in.Env.CertsDir(), "*.crt"))
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", filepath.Base(path), err)
			continue
		}
		block, _ := pem.Decode(data)
		if block == nil {
			fmt.Fprintf(&b, "%s: not a certificate\n", filepath.Base(path))
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", filepath.Base(path), err)
			continue
		}
		fmt.Fprintf(&b, "%s: subject %q, issuer %q, from %s to %s, names %v %v\n", filepath.Base(path), c.Subject, c.Issuer,
			c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339), c.DNSNames, c.IPAddresses)
	}
	in.add("certificates", b.String())
}

// system adds what the machine is and how it is doing.
func (in *Inspector) system(ctx context.Context) {
	in.say("  Copy processes list to the final report tarball")
	in.add("sys/ps", processes(in.Env))
	in.say("  Copy disk usage information to the final report tarball")
	in.command(ctx, "sys/disk_usage", "df", "-h", "-x", "overlay", "-x", "tmpfs")
	in.say("  Copy memory usage information to the final report tarball")
	in.file("/proc/meminfo", "sys/memory_usage")
	in.say("  Copy server uptime to the final report tarball")
	in.file("/proc/uptime", "sys/uptime")
	in.say("  Copy the operating system's name to the final report tarball")
	in.file("/etc/os-release", "sys/lsb_release")
	in.file("/proc/version", "sys/kernel")
	in.file("/proc/cgroups", "sys/cgroups")
	in.file("/proc/mounts", "sys/mounts")
	for name, path := range map[string]string{
		"aio-max-nr": "fs/aio-max-nr", "aio-nr": "fs/aio-nr",
		"inotify_max_user_instances": "fs/inotify/max_user_instances", "inotify_max_user_watches": "fs/inotify/max_user_watches",
	} {
		in.file("/proc/sys/"+path, "sys/"+name)
	}
	if _, err := os.Stat(in.Env.HostPath("run/snapd.socket")); err == nil { // else snap asks for half a minute
		in.command(ctx, "sys/snap-version", "snap", "version")
		in.command(ctx, "sys/snap-list", "snap", "list")
	}
	in.say("  Copy network configuration to the final report tarball")
	in.command(ctx, "network/ip-addr", "ip", "addr")
	in.command(ctx, "network/ip-route", "ip", "route")
	in.command(ctx, "network/ss", "ss", "-pln")
	in.command(ctx, "network/iptables-S", "iptables", "-S")
	in.command(ctx, "network/nft", "nft", "list", "ruleset")
}

// processes lists the processes of the machine. Only our own are shown with their arguments;
// those of others, which may hold anything, are not ours to pass on.
func processes(env snapenv.Env) string {
	var b strings.Builder
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		comm, err := os.ReadFile(dir + "/comm")
		if err != nil {
			continue
		}
		line := fmt.Sprintf("%7s %s", e.Name(), strings.TrimSpace(string(comm)))
		if exe, err := os.Readlink(dir + "/exe"); err == nil && strings.Contains(exe, "/"+env.Name+"/") {
			cmdline, _ := os.ReadFile(dir + "/cmdline")
			line += " " + strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
		if text, err := os.ReadFile(dir + "/statm"); err == nil {
			if f := strings.Fields(string(text)); len(f) > 1 {
				pages, _ := strconv.Atoi(f[1])
				line += fmt.Sprintf(" (resident %d KiB)", pages*os.Getpagesize()/1024)
			}
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

// kubernetes adds what the cluster says of itself. Secrets and ConfigMaps are not asked for.
func (in *Inspector) kubernetes(ctx context.Context) {
	kubectl := func(args ...string) []string {
		return append([]string{filepath.Join(in.Env.Snap, "kubectl"), "--kubeconfig=" + in.Env.AdminKubeconfig(), "--request-timeout=10s"}, args...)
	}
	if _, err := os.Stat(in.Env.AdminKubeconfig()); err != nil {
		return
	}
	if !in.answers(ctx, kubectl("get", "--raw=/api/v1/namespaces?limit=1", "--request-timeout=5s")) {
		return // each of the others would wait as long
	}
	in.command(ctx, "k8s/version", kubectl("version")...)
	in.command(ctx, "k8s/cluster-info", kubectl("cluster-info")...)
	in.command(ctx, "k8s/get-all", kubectl("get", "all", "--all-namespaces", "-o", "wide")...)
	in.command(ctx, "k8s/get-pv", kubectl("get", "pv")...)
	in.command(ctx, "k8s/get-pvc", kubectl("get", "pvc", "--all-namespaces")...)

	ctx, cancel := context.WithTimeout(ctx, maxRuntime)
	defer cancel()
	out, err := in.Run(ctx, kubectl("get", "nodes,pods,events,services,deployments,daemonsets,statefulsets,replicasets,jobs", "--all-namespaces", "-o", "json")...)
	if err == nil {
		in.put("k8s/cluster-info-dump", in.redact.RedactJSON(out))
	}
}

// answers reports whether one read of the API, which goes as far as the datastore, is answered.
func (in *Inspector) answers(ctx context.Context, argv []string) bool {
	ctx, cancel := context.WithTimeout(ctx, maxRuntime)
	defer cancel()
	out, err := in.Run(ctx, argv...)
	if err != nil {
		in.say(" FAIL:  the API server does not answer, so the report has none of the cluster's objects")
		in.add("k8s/left-out", fmt.Sprintf("%s\nthe API server did not answer this, so nothing else was asked for: %v\n", out, err))
	}
	return err == nil
}

// minMemoryKiB is the memory below which a control plane does not fit (cli.md 1.13).
const minMemoryKiB = 524288

// findings warns of what can be seen to be wrong, in the report and to the person.
func (in *Inspector) findings(ctx context.Context) {
	var b strings.Builder
	warn := func(format string, a ...any) {
		text := fmt.Sprintf(format, a...)
		in.say("WARNING:  %s", text)
		in.Warnings = append(in.Warnings, text)
		fmt.Fprintln(&b, text)
	}
	p := &status.Prober{Env: in.Env, Manager: in.Manager, Now: in.Now, Budget: 2 * time.Second, Node: in.Node}
	report := p.Probe(ctx)
	slow, unseen := p.Slow(ctx, report.Services)
	for _, problem := range append(report.Problems, slow...) {
		warn("%s (%s: from %s)", problem, problem.ID, problem.Looked())
	}
	for _, u := range append(report.Unseen, unseen...) {
		warn("not looked at: %s (%s): %s", u.Looked(), u.ID, u.Why)
	}
	for _, finding := range hostFindings(in.Env.Host, nodeconfig.Load(in.Env)) {
		warn("%s", finding)
	}
	if nodeconfig.ReadState(in.Env).LowMemory {
		warn("the low memory guard is on: this machine is too small for a control plane")
	}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		var total int
		if _, err := fmt.Sscanf(string(text), "MemTotal: %d kB", &total); err == nil && total <= minMemoryKiB {
			warn("this machine has %d MiB of memory, which is too little for a control plane", total/1024)
		}
	}
	if data, err := os.ReadFile("/proc/net/route"); err == nil && !strings.Contains(string(data), "\t00000000\t") {
		warn("there is no default route; set one, some programs need it to find their own address")
	}
	in.add("findings", b.String())
}
