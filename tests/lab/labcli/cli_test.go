package labcli

import (
	"bytes"
	"strings"
	"testing"

	"microk8s/tests/lab/labtest"
)

// lab runs the program on an instance nobody else uses and gives its exit code and streams.
func runLab(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = Run(append([]string{"--instance", labtest.Instance(t), "--snap", "/nonexistent"}, args...),
		Streams{strings.NewReader(stdin), &out, &errOut})
	return code, out.String(), errOut.String()
}

func TestLabWrongUse(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
		say  string
	}{
		{"--nonsense", exitUsage, "--help"},
		{"nonsense", exitFailure, "unknown command"},
		{"up", exitUsage, "usage: lab up NAME…"},
		{"up n1", exitFailure, "make build"},
		{"exec n1", exitUsage, "usage: lab exec NAME -- CMD…"},
		{"exec n1 -- true", exitCannot, "no such host"},
		{"exec n1 --", exitUsage, "usage:"},
		{"ip n1", exitFailure, "no such host"},
		{"ls extra", exitUsage, "usage: lab ls"},
		{"ls -o xml", exitUsage, "json"},
		{"disk n1 plenty", exitUsage, "500M"},
		{"disk n1 -1", exitUsage, "flag"},
		{"cut", exitUsage, "usage: lab cut A [B]"},
		{"heal a b c", exitUsage, "usage: lab heal"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			code, stdout, stderr := runLab(t, "", strings.Fields(tc.args)...)
			if code != tc.code || !strings.Contains(stderr, tc.say) || stdout != "" {
				t.Errorf("exit %d, stdout %q, stderr %q; want exit %d and %q on stderr", code, stdout, stderr, tc.code, tc.say)
			}
		})
	}
}

func TestLabCommands(t *testing.T) {
	labtest.New(t, "") // removes the lab of this test before and after it
	step := func(wantCode int, wantOut, stdin string, args ...string) string {
		t.Helper()
		code, stdout, stderr := runLab(t, stdin, args...)
		if code != wantCode || (wantOut != "" && !strings.Contains(stdout, wantOut)) {
			t.Fatalf("lab %q: exit %d, stdout %q, stderr %q; want exit %d and %q", args, code, stdout, stderr, wantCode, wantOut)
		}
		return stdout
	}
	step(0, "", "", "ls")
	step(0, "[]", "", "ls", "-o", "json")
	step(0, "", "", "up", "--no-start", "n1", "n2")
	ip := strings.TrimSpace(step(0, "10.77.", "", "ip", "n1"))
	step(0, ip, "", "ls")
	step(0, `"state": "running"`, "", "ls", "-o", "json")
	step(0, "hello", "hello", "exec", "n1", "--", "cat")
	step(0, "a -- b", "", "exec", "n1", "--", "echo", "a", "--", "b")
	step(5, "", "", "exec", "n1", "--", "sh", "-c", "exit 5")
	step(128+15, "", "", "exec", "n1", "--", "sh", "-c", "kill -TERM $$")
	step(exitNotFound, "", "", "exec", "n1", "--", "no-such-command")
	step(0, "", "", "cut", "n1", "n2")
	step(0, "n2", "", "ls")
	step(0, "", "", "heal")
	step(0, "", "", "pause", "n1")
	step(0, "paused", "", "ls")
	step(exitCannot, "", "", "exec", "n1", "--", "true")
	step(0, "", "", "resume", "n1")
	step(0, "", "", "disk", "n1", "32M")
	step(0, "32Mi", "", "ls")
	step(0, "", "", "kill", "n1", "n2")
	step(0, "off", "", "ls")
	step(0, "", "", "start", "n1")
	step(0, "n1\nn2\n", "", "__complete", "exec", "")
	step(0, "", "", "down", "n1")
	step(exitFailure, "", "", "down", "n1")
	step(0, "", "", "down")
	step(0, "", "", "down")
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "1048576": 1 << 20, "500M": 500 << 20, "500Mi": 500 << 20, "500MiB": 500 << 20, "2g": 2 << 30, "64k": 64 << 10,
	} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "-1", "M", "1.2.3"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", in, got)
		}
	}
}
