package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/parse"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// The Corefile imports what it finds in ${MICROK8S_CUSTOM}. That is no longer the ConfigMap coredns-custom
// itself: a key with a mistake in it would keep CoreDNS from starting. Each key is tried first, in a process of
// its own, and what is wrong is left out, logged and written to the ConfigMap reportName.
const (
	customFolder = "/etc/coredns/custom" // the ConfigMap's keys, as the kubelet writes them
	takenFolder  = "/tmp/custom"         // a link to a folder with those that are in force
	customVar    = "MICROK8S_CUSTOM"
	checkVar     = "MICROK8S_CHECK" // set: only read the Corefile, and exit

	reportNamespace, reportName = "kube-system", "coredns-custom-ignored"

	// checkTime bounds a try. Reading a Corefile takes less than a second.
	checkTime = 30 * time.Second
	// reportPause is between two tries to write the report.
	reportPause = 10 * time.Second
)

// checkOnly reads the Corefile as CoreDNS does when it starts, without serving anything.
func checkOnly(file string) error {
	body, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := caddy.ValidateAndExecuteDirectives(caddy.CaddyfileInput{Contents: body, Filepath: file, ServerTypeName: "dns"}, nil, true); err != nil {
		return err
	}
	return checkZones(file, body)
}

// checkZones refuses two server blocks of one zone and port, which CoreDNS does when it makes its servers. Blocks
// that are told apart by address or view are not looked at.
func checkZones(file string, body []byte) error {
	blocks, err := caddyfile.Parse(file, bytes.NewReader(body), nil)
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, b := range blocks {
		if b.Tokens["bind"] != nil || b.Tokens["view"] != nil {
			continue
		}
		for _, key := range b.Keys {
			protocol, rest := parse.Transport(key)
			hosts, port, err := plugin.SplitHostPort(rest)
			if err != nil {
				return err
			}
			for _, host := range hosts {
				zone := fmt.Sprintf("%s://%s:%s", protocol, strings.ToLower(dns.Fqdn(host)), cmp.Or(port, dnsserver.Port))
				if seen[zone] {
					return fmt.Errorf("cannot serve %s - it is already defined", zone)
				}
				seen[zone] = true
			}
		}
	}
	return nil
}

// custom keeps what of coredns-custom is in force.
type custom struct {
	corefile, from, link string
	// try reports what is wrong with the Corefile when it imports from a folder.
	try func(folder string) error
	// report is called after each look with what was left out, and why.
	report func(map[string]string)
}

// take looks at the keys once.
func (c *custom) take() error {
	keys, err := customKeys(c.from)
	if err != nil {
		return err
	}
	left := map[string]string{}
	taken := keys
	if err := c.tried(keys); err != nil && len(keys) > 0 && c.tried(nil) == nil {
		taken = map[string][]byte{}
		for _, name := range slices.Sorted(maps.Keys(keys)) {
			with := maps.Clone(taken)
			with[name] = keys[name]
			if err := c.tried(with); err != nil {
				left[name] = err.Error()
				continue
			}
			taken = with
		}
	}
	if err := c.install(taken); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		fmt.Printf("[ERROR] key %s of the ConfigMap coredns-custom is left out: %s\n", name, left[name])
	}
	c.report(left)
	return nil
}

// customKeys reads the keys that the Corefile imports.
func customKeys(folder string) (map[string][]byte, error) {
	entries, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	out := map[string][]byte{}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext != ".override" && ext != ".server" || strings.HasPrefix(e.Name(), "..") || strings.HasPrefix(e.Name(), noKey) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(folder, e.Name()))
		if errors.Is(err, fs.ErrNotExist) { // it goes at this moment, and a change is seen
			continue
		}
		if err != nil {
			return nil, err
		}
		out[e.Name()] = data
	}
	return out, nil
}

// tried reports what is wrong with the Corefile with these keys.
func (c *custom) tried(keys map[string][]byte) error {
	folder, err := os.MkdirTemp(filepath.Dir(c.link), "try-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	if err := writeKeys(folder, keys); err != nil {
		return err
	}
	return c.try(folder)
}

// noKey begins the names of two empty files, so that what is imported is never nothing: CoreDNS warns of that
// every half minute.
const noKey = "microk8s-none."

func writeKeys(folder string, keys map[string][]byte) error {
	for _, ext := range []string{"override", "server"} {
		if err := os.WriteFile(filepath.Join(folder, noKey+ext), nil, 0o600); err != nil {
			return err
		}
	}
	for name, data := range keys {
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// install puts keys in force: all of them in one step.
func (c *custom) install(keys map[string][]byte) error {
	old, _ := os.Readlink(c.link)
	if have, err := customKeys(c.link); old != "" && err == nil && maps.EqualFunc(have, keys, bytes.Equal) {
		return nil
	}
	// A new name: the pod's memory outlives its container, and with it the folder that is in force.
	folder, err := os.MkdirTemp(filepath.Dir(c.link), filepath.Base(c.link)+"-")
	if err != nil {
		return err
	}
	if err := writeKeys(folder, keys); err != nil {
		return err
	}
	if err := os.Symlink(folder, c.link+".new"); err != nil {
		return err
	}
	if err := os.Rename(c.link+".new", c.link); err != nil {
		return err
	}
	if old != "" {
		_ = os.RemoveAll(old) // a leftover in the pod's memory
	}
	return nil
}

// follow looks again whenever the kubelet has written the ConfigMap again. It returns if it cannot watch.
func (c *custom) follow() error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// The kubelet replaces the link ..data.
	if _, err := unix.InotifyAddWatch(fd, c.from, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE); err != nil {
		return err
	}
	buffer := make([]byte, 64<<10)
	for {
		if err := c.take(); err != nil { // also what changed before the watch
			fmt.Printf("[ERROR] cannot read the ConfigMap coredns-custom: %v\n", err)
		}
		if _, err := unix.Read(fd, buffer); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		time.Sleep(time.Second) // it is several changes
	}
}

// tryCorefile reads the Corefile in a process of its own, since plugins keep what they are told.
func tryCorefile(corefile string) func(folder string) error {
	return func(folder string) error {
		program, err := os.Executable()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), checkTime)
		defer cancel()
		cmd := exec.CommandContext(ctx, program)
		cmd.Env = append(os.Environ(), checkVar+"="+corefile, customVar+"="+folder)
		var out bytes.Buffer
		cmd.Stderr = &out
		if err := cmd.Run(); err != nil {
			if text := reason(out.String(), folder); text != "" && ctx.Err() == nil {
				return errors.New(text)
			}
			return err
		}
		return nil
	}
}

// reason is what a try has said of the mistake, without warnings and without the names of folders.
func reason(said, folder string) string {
	var lines []string
	for line := range strings.Lines(said) {
		if line = strings.TrimSpace(line); line != "" && !strings.Contains(line, "[WARNING]") {
			lines = append(lines, line)
		}
	}
	return strings.ReplaceAll(strings.Join(lines, "; "), folder+"/", "")
}

// reporter writes what was left out into the ConfigMap, as key to reason; the last report counts.
func reporter() func(map[string]string) {
	reports := make(chan map[string]string, 1)
	go func() {
		var due <-chan time.Time
		var last map[string]string
		for {
			select {
			case last = <-reports:
			case <-due:
			}
			due = nil
			if err := writeReport(last); err != nil {
				fmt.Printf("[WARNING] cannot write which keys of coredns-custom are left out: %v\n", err)
				due = time.After(reportPause)
			}
		}
	}()
	return func(left map[string]string) {
		select {
		case <-reports: // it was not written yet, and is outdated
		default:
		}
		reports <- left
	}
}

func writeReport(left map[string]string) error {
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	cfg.Timeout = reportPause
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	patch, err := json.Marshal([]map[string]any{{"op": "add", "path": "/data", "value": left}})
	if err != nil {
		return err
	}
	_, err = client.CoreV1().ConfigMaps(reportNamespace).Patch(context.Background(), reportName, types.JSONPatchType, patch, metav1.PatchOptions{})
	return err
}
