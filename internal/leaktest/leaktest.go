// Package leaktest fails the tests of a package that leave goroutines behind. A package that starts
// goroutines has
//
//	func TestMain(m *testing.M) { leaktest.Main(m) }
package leaktest

import (
	"testing"

	"go.uber.org/goleak"
)

// Main runs the tests and exits, with 1 also where goroutines are left once all have ended.
func Main(m *testing.M) {
	goleak.VerifyTestMain(m)
}
