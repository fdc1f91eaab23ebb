// Package longtest marks what only the long run of the tests has (scripts/test long): whole tests,
// and the full number of cases where the others draw a sample.
package longtest

import (
	"os"
	"testing"
)

const notRun = "only in the long run: set MICROK8S_TEST_LONG=1" // scripts/test knows this text

// Enabled reports whether this is the long run.
func Enabled() bool { return os.Getenv("MICROK8S_TEST_LONG") != "" }

// Only ends a test that only the long run has. To scripts/test it is no skipped test: that would
// be a failure on CI.
func Only(t testing.TB) {
	t.Helper()
	if !Enabled() {
		t.Skip(notRun)
	}
}

// Of returns how many rounds or cases a test does: so many in the long run, else sample.
func Of(long, sample int) int {
	if Enabled() {
		return long
	}
	return sample
}
