// Package inspect collects what is needed to find out what is wrong with a node into one
// tarball that can be shown to others: no key, token or password gets into it (redact.go).
// The layout is that of cli.md 1.13. What could not be collected is noted in the report; it
// never ends the inspection.
package inspect

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/nodecheck"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
	"microk8s/internal/status"
)

// Inspector makes one report.
type Inspector struct {
	Env     snapenv.Env
	Manager service.Manager
	Out     io.Writer
	Now     func() time.Time

	// Warnings are what was found to be wrong, when Inspect has returned.
	Warnings []string

	// Node, if not nil, changes what is looked at by the checks of this node. It is for tests.
	Node func(*nodecheck.Node)

	// Run returns the output of a program, standard error included; nil runs it for real.
	Run func(ctx context.Context, argv ...string) ([]byte, error)

	redact *Redactor
	files  *tar.Writer
	prefix string
	err    error // the first failure to write the tarball
}

// Limits: of one collected file (the end of it counts), and of one program's run.
const (
	maxFile    = 16 << 20
	maxRuntime = 15 * time.Second
)

// ErrDown is wrapped when a service that should run does not; the report is complete.
var ErrDown = errors.New("a service is not running")

// Inspect makes the report and gives its path.
func (in *Inspector) Inspect(ctx context.Context) (path string, err error) {
	if in.Run == nil {
		in.Run = run
	}
	in.redact = NewRedactor(in.Env)
	name := "inspection-report-" + in.Now().Format("20060102_150405") + ".tar.gz"
	path = filepath.Join(in.Env.Data, name)
	f, err := os.CreateTemp(in.Env.Data, ".inspection-report.*")
	if err != nil {
		return "", fmt.Errorf("cannot write the report: %w", err)
	}
	defer os.Remove(f.Name()) // nothing is left where it was renamed
	defer f.Close()
	zip := gzip.NewWriter(f)
	in.files = tar.NewWriter(zip)
	in.prefix = "inspection-report/"

	down := in.collect(ctx)

	in.say("")
	in.say("Building the report tarball")
	err = errors.Join(in.err, ctx.Err(), in.files.Close(), zip.Close(), f.Chmod(0o640), f.Sync())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return "", fmt.Errorf("cannot write the report: %w", err)
	}
	in.say("  Report tarball is at %s", path)
	if down {
		return path, ErrDown
	}
	return path, nil
}

func (in *Inspector) say(format string, a ...any) { fmt.Fprintf(in.Out, format+"\n", a...) }

func (in *Inspector) collect(ctx context.Context) (down bool) {
	in.say("Inspecting system")
	in.say("Inspecting Certificates")
	in.certificates()
	in.say("Inspecting services")
	down = in.services(ctx)
	in.say("  Copy service arguments to the final report tarball")
	in.tree(in.Env.ArgsDir(), "args")
	in.say("Inspecting AppArmor configuration")
	in.command(ctx, "apparmor/aa-status", "aa-status")
	in.command(ctx, "apparmor/dmesg", "dmesg")
	in.say("Gathering system information")
	in.system(ctx)
	in.say("Inspecting kubernetes cluster")
	in.say("  Inspect kubernetes cluster")
	in.kubernetes(ctx)
	in.say("Inspecting dqlite")
	in.say("  Inspect dqlite")
	for _, name := range []string{storedir.ClusterFile, storedir.InfoFile} {
		in.file(filepath.Join(in.Env.Backend(), name), "dqlite/"+name)
	}
	in.listing(in.Env.BackendLive(), "dqlite/list.out")
	in.file(in.Env.BOM(), "bom.json")
	in.findings(ctx)
	return down
}

// add puts one file into the tarball, without its secrets.
func (in *Inspector) add(name, text string) { in.put(name, in.redact.Redact(text)) }

func (in *Inspector) put(name, text string) {
	if in.err != nil {
		return
	}
	head := &tar.Header{Name: in.prefix + name, Mode: 0o644, Size: int64(len(text)), ModTime: in.Now(), Format: tar.FormatPAX}
	if in.err = in.files.WriteHeader(head); in.err == nil {
		_, in.err = io.WriteString(in.files, text)
	}
}

// file adds the end of a file; one that does not exist is passed over.
func (in *Inspector) file(path, name string) {
	in.with(path, name, func(_, text string) string { return in.redact.Redact(text) })
}

// with is file with another way to redact, which gets the name too.
func (in *Inspector) with(path, name string, redact func(name, text string) string) {
	text, err := tail(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		in.add(name, "cannot collect: "+err.Error()+"\n")
	default:
		in.put(name, redact(name, text))
	}
}

func tail(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	cut := fi.Mode().IsRegular() && fi.Size() > maxFile
	if cut {
		if _, err := f.Seek(-maxFile, io.SeekEnd); err != nil {
			return "", err
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if cut { // half a line could be half a secret
		_, after, _ := strings.Cut(string(data), "\n")
		return after, err
	}
	return string(data), err
}

// tree adds the files of the product below a folder. Links, names that promise secrets and files
// that are not the product's are left out: the folder belongs to the user, who may have put
// anything there.
func (in *Inspector) tree(dir, name string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return nil
		}
		switch {
		case slices.Contains([]string{".key", ".pem", ".p12", ".config", ".kubeconfig"}, filepath.Ext(path)):
			in.add(filepath.Join(name, rel), "left out: it may hold a key\n")
		case !ourFile(rel):
			in.add(filepath.Join(name, rel), "left out: it is not a file of this product; read it before you show it to others\n")
		default:
			in.with(path, filepath.Join(name, rel), in.redact.RedactFile)
		}
		return nil
	})
}

// ourFile reports whether a file of args/, by its path there, is one that the product reads
// and knows the form of.
func ourFile(rel string) bool {
	if ok, _ := filepath.Match("certs.d/*/hosts.toml", rel); ok {
		return true
	}
	return argsFiles[strings.TrimSuffix(rel, "-env")] || argsFiles[rel]
}

// argsFiles are the files of args/; each may have one beside it with -env behind its name.
var argsFiles = words(`kubelet kube-apiserver kube-proxy kube-scheduler kube-controller-manager kubelite kubectl containerd
	containerd.toml containerd-template.toml k8s-dqlite cluster-agent apiserver-proxy pod-network ctr ha-conf tuning.yaml
	eventconfig.yaml admission-control-config-file.yaml audit-policy.yaml authentication-config.yaml pod-security.yaml cni fips traefik/traefik.yaml traefik/traefik-template.yaml
	traefik/provider.yaml etcd flanneld`)

// listing adds the names and sizes of the files of a folder.
func (in *Inspector) listing(dir, name string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	var b strings.Builder
	for _, e := range entries {
		if fi, err := e.Info(); err == nil {
			fmt.Fprintf(&b, "%s %12d %s %s\n", fi.Mode(), fi.Size(), fi.ModTime().UTC().Format(time.RFC3339), e.Name())
		}
	}
	in.add(name, b.String())
}

// command adds the output of a program; one that is not installed is passed over.
func (in *Inspector) command(ctx context.Context, name string, argv ...string) {
	ctx, cancel := context.WithTimeout(ctx, maxRuntime)
	defer cancel()
	out, err := in.Run(ctx, argv...)
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return
	}
	text := string(out)
	if err != nil {
		text += fmt.Sprintf("\n%s: %v\n", strings.Join(argv, " "), err)
	}
	in.add(name, text)
}

// run runs a program. One that cannot be ended when ctx is over, such as df on a network file
// system whose server is gone, is left behind.
func run(ctx context.Context, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = time.Second
	type result struct {
		out []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := cmd.CombinedOutput()
		done <- result{out, err}
	}()
	select {
	case r := <-done:
		return r.out, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r.out, r.err
	case <-time.After(2 * cmd.WaitDelay):
		return nil, fmt.Errorf("%s does not end: it waits for a disk or a network file system: %w", argv[0], ctx.Err())
	}
}

// services says which services run and adds their logs.
func (in *Inspector) services(ctx context.Context) (down bool) {
	states, err := in.Manager.Status(ctx)
	if err != nil {
		in.say(" FAIL:  cannot get the state of the services: %v", err)
		return true
	}
	for _, s := range states {
		if !status.Expected(in.Env, s.Name) {
			continue
		}
		unit := "snap." + in.Env.Name + ".daemon-" + s.Name
		if s.Phase == service.Running {
			in.say("  Service %s is running", unit)
		} else {
			down = true
			in.say(" FAIL:  Service %s is not running", unit)
			if in.Env.Snapd {
				in.say("For more details look at: sudo journalctl -u %s", unit)
			} else {
				in.say("For more details look at: sudo microk8s logs %s", s.Name)
			}
		}
		in.add(unit+"/status", fmt.Sprintf("%s\nenabled: %t\npid: %d\nsince: %s\nrestarts: %d\nlast exit: %s\n",
			s.Phase, s.Enabled, s.PID, s.Since.Format(time.RFC3339), s.Restarts, s.LastExit))
		if in.Env.Snapd {
			in.command(ctx, unit+"/journal.log", "journalctl", "--no-pager", "-n", "100000", "-u", unit)
			continue
		}
		in.file(in.Env.ServiceLog(s.Name), unit+"/journal.log")
	}
	if !in.Env.Snapd {
		in.file(in.Env.ServiceLog("supervisor"), "supervisor/journal.log")
	}
	return down
}
