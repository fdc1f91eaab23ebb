package cli

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestFirstFailureOfAHook runs hooks as enable does: what fails in one is its exit code, although it goes on.
func TestFirstFailureOfAHook(t *testing.T) {
	file, err := filepath.Abs("../../snap/local/actions/common/first-failure.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, hook string
		code       int
		says       string
	}{
		{"nothing fails", "#!/bin/bash\necho a\n", 0, ""},
		{"a program that is not there", "#!/bin/bash\n\"$SNAP/bin/no-such\" x\necho done\n", 127, "line 2 had failed with exit code 127"},
		{"the first of several", "#!/usr/bin/env bash\nbash -c 'exit 7'\nfalse\ntrue\n", 7, "line 2 had failed with exit code 7"},
		{"conditions", "#!/bin/bash\nset -u\nif false; then :; fi\nfalse || true\nfalse && true\n! true\nf() { false; true; }\nf\necho a\n", 0, ""},
		{"its own end counts", "#!/bin/bash\nbash -c 'exit 7'\nexit 3\n", 3, ""},
		{"set -e", "#!/bin/bash\nset -e\nbash -c 'exit 7'\necho b\n", 7, ""},
		{"programs of the hook", "#!/bin/bash\nbash -c 'false; true'\n[ -z \"${BASH_ENV:-}\" ]\n", 0, ""},
		{"another shell", "#!/bin/sh\nfalse\ntrue\n", 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			hook := filepath.Join(t.TempDir(), "enable")
			if err := os.WriteFile(hook, []byte(tc.hook), 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), hook)
			cmd.Env = append(os.Environ(), "SNAP=/nowhere", "BASH_ENV="+file, fmt.Sprintf("MICROK8S_HOOK_OF=%d", os.Getpid()))
			var out bytes.Buffer
			cmd.Stderr = &out
			code := 0
			var exit *exec.ExitError
			if err := cmd.Run(); errors.As(err, &exit) {
				code = exit.ExitCode()
			} else if err != nil {
				t.Fatal(err)
			}
			if code != tc.code || !bytes.Contains(out.Bytes(), []byte(tc.says)) {
				t.Errorf("exit code %d, want %d; said %q, want %q", code, tc.code, out.String(), tc.says)
			}
		})
	}
}
