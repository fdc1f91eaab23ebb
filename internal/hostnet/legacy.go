package hostnet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"
)

// The old iptables interface of the kernel keeps rules of its own beside nftables. Where a
// host uses it, it has its iptables-legacy programs, and they are the way to change them.

// errNoLegacyTool is returned when the host has legacy rules but no program to edit them.
var errNoLegacyTool = errors.New("the host filters with legacy iptables, but iptables-legacy is not installed; install the package iptables, or allow forwarding to and from the pods yourself")

// legacyChains are the chains that may drop the packets of pods.
var legacyChains = []string{"FORWARD", "INPUT"}

// legacyTool returns the program for the family of p, or "" when the kernel holds no legacy
// filter table for it.
func legacyTool(v4 bool) (string, error) {
	names, tool := "ip_tables_names", "iptables-legacy"
	if !v4 {
		names, tool = "ip6_tables_names", "ip6tables-legacy"
	}
	// Of this thread: /proc/net is that of the process' first thread.
	tables, err := os.ReadFile("/proc/thread-self/net/" + names)
	if err != nil || !bytes.Contains(append([]byte("\n"), tables...), []byte("\nfilter\n")) {
		return "", nil
	}
	path, err := exec.LookPath(tool)
	if err != nil {
		return "", errNoLegacyTool
	}
	return path, nil
}

// legacyRules returns the accept rules of a chain as iptables-save writes them.
func legacyRules(chain string, cluster netip.Prefix) []string {
	tail := ` -m comment --comment "` + Comment + `" -j ACCEPT`
	if chain == "INPUT" {
		tunnel := Tunnel
		if cluster.Addr().Is6() {
			tunnel = Tunnel6
		}
		return []string{
			"-A INPUT -s " + cluster.String() + " -i " + Bridge + tail,
			fmt.Sprintf("-A INPUT -s %s -i %s -p udp -m udp --dport %d%s", cluster, tunnel, CheckPort, tail),
		}
	}
	return []string{
		"-A FORWARD -s " + cluster.String() + tail,
		"-A FORWARD -d " + cluster.String() + tail,
	}
}

func ensureLegacy(cluster netip.Prefix) (changed []string, err error) {
	tool, err := legacyTool(cluster.Addr().Is4())
	if tool == "" {
		return nil, err
	}
	for _, chain := range legacyChains {
		listing, err := runTool(tool, "-S", chain)
		if err != nil {
			return changed, err
		}
		edits := planLegacy(chain, strings.Split(strings.TrimSpace(listing), "\n"), legacyRules(chain, cluster))
		for _, args := range edits {
			if _, err := runTool(tool, args...); err != nil {
				return changed, err
			}
		}
		if len(edits) > 0 {
			changed = append(changed, "legacy filter "+chain)
		}
	}
	return changed, nil
}

// planLegacy returns the argument lists that bring a chain, listed with -S, to hold the wanted
// rules before the point where it drops everything; none when it lets pods through.
func planLegacy(chain string, listing, wanted []string) [][]string {
	drops, end := false, 0 // end: number of the first rule that takes everything, from 1
	number, have := 0, map[string]bool{}
	for _, line := range listing {
		if line == "-P "+chain+" DROP" {
			drops = true
		}
		if !strings.HasPrefix(line, "-A ") {
			continue
		}
		number++
		if end == 0 {
			have[line] = true
		}
		if rest := strings.TrimPrefix(line, "-A "+chain+" "); end == 0 && (rest == "-j DROP" || rest == "-j REJECT" || strings.HasPrefix(rest, "-j REJECT --reject-with")) {
			end, drops = number, true
		}
	}
	if !drops {
		return nil
	}
	var edits [][]string
	for _, rule := range wanted {
		if have[rule] {
			continue
		}
		spec := legacySpec(rule)
		if end > 0 {
			edits = append(edits, append([]string{"-I", chain, fmt.Sprint(end)}, spec...))
			end++
		} else {
			edits = append(edits, append([]string{"-A", chain}, spec...))
		}
	}
	return edits
}

// legacySpec returns the words of a rule behind the chain's name.
func legacySpec(rule string) []string {
	quoted := `"` + Comment + `"`
	words := strings.Fields(strings.Replace(rule, quoted, "\x00", 1))[2:]
	for i, w := range words {
		if w == "\x00" {
			words[i] = Comment
		}
	}
	return words
}

// removeLegacy deletes the rules with our comment.
func removeLegacy() error {
	var errs []error
	for _, v4 := range []bool{true, false} {
		tool, err := legacyTool(v4)
		if tool == "" {
			errs = append(errs, err)
			continue
		}
		for _, chain := range legacyChains {
			listing, err := runTool(tool, "-S", chain)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			for line := range strings.SplitSeq(strings.TrimSpace(listing), "\n") {
				if strings.Contains(line, `"`+Comment+`"`) {
					_, err := runTool(tool, append([]string{"-D", chain}, legacySpec(line)...)...)
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

func runTool(tool string, args ...string) (string, error) {
	// Another program may hold the lock of iptables; -w waits for it, in seconds.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	legacyRuns.Add(1)
	cmd := exec.CommandContext(ctx, tool, append([]string{"-w", "5"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("cannot run %s: %w: %s", cmd, err, bytes.TrimSpace(out))
	}
	return string(out), nil
}
