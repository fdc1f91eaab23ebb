package longtest

import (
	"os"
	"strings"
	"testing"
)

// TestMark: the gate knows a test that is not run from one that is skipped by this text.
func TestMark(t *testing.T) {
	t.Parallel()
	script, err := os.ReadFile("../../scripts/test")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(script), ": "+notRun+"$") {
		t.Errorf("scripts/test does not know the text %q", notRun)
	}
}
