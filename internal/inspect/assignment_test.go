package inspect

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// assignment is what nextAssignment finds, as an expression. It is an order of magnitude slower.
var assignment = regexp.MustCompile(`(--?)?([A-Za-z_][\w.-]*)(\\?["'])?(\s*(?:=>|:=|[:=])[ \t]*|\\?["']?[\s,]+)`)

// sameAssignment compares both on one text.
func sameAssignment(t *testing.T, text string) {
	t.Helper()
	got, ok := nextAssignment(text)
	m := assignment.FindStringSubmatchIndex(text)
	if ok != (m != nil) {
		t.Fatalf("%q: found %t, %+v; the expression finds %v", text, ok, got, m)
	}
	if !ok {
		return
	}
	want := found{dashes: m[4], name: m[4], end: m[5], quoted: m[6] >= 0, sep: m[8], sepEnd: m[9]}
	if m[2] >= 0 {
		want.dashes = m[2]
	}
	if got != want {
		t.Fatalf("%q: found %+v; the expression finds %+v", text, got, want)
	}
}

func FuzzAssignment(f *testing.F) {
	for _, text := range []string{"--password=x", "a b", `"a": "b"`, `\"a\":1`, "1--x y", "--- a-b.c => d", `a\ b`, `a\"`, `a'`, "a \n:= \tb", `a"" ,`, "a-=", "--9a=", "é=1", `a\\"=`} {
		f.Add(text)
	}
	f.Fuzz(sameAssignment)
}

// TestAssignmentsOfAllSigns compares them on every short text of the signs that matter.
func TestAssignmentsOfAllSigns(t *testing.T) {
	const signs = "a-=:> ,\"'\\\n9"
	var walk func(string, int)
	walk = func(text string, left int) {
		sameAssignment(t, text)
		if left > 0 {
			for _, c := range signs {
				walk(text+string(c), left-1)
			}
		}
	}
	walk("", 4)
	walk("-a", 3)
}

// TestRedactIsLinear wants a text of four times the size to take about four times as long, whatever
// it repeats.
func TestRedactIsLinear(t *testing.T) {
	r := newRedactor(map[string]bool{"0123456789abcdef": true})
	for _, piece := range []string{"a ", "a=", "token=", `token="`, "://a:", "://@", "eyJ", "token=[", "token={x ", "--password ", "LS0tLS1CRUdJTi", "-----BEGIN PRIVATE KEY-----", "?a=", "mysql -p", "bearer ", "token:\n", "token: |\n", `X="`, "a\n", "\v"} {
		for _, name := range []string{"", "kubelet", "kubelet-env"} {
			took := func(size int) time.Duration {
				text := strings.Repeat(piece, size/len(piece))
				best := time.Hour
				for range 2 { // the least disturbed one
					began := time.Now()
					if name == "" {
						r.Redact(text)
					} else {
						r.RedactFile(name, text)
					}
					best = min(best, time.Since(began))
				}
				return best
			}
			// Quadratic would be 256 times as long. A fixed part keeps what takes nothing from counting. Other work on
			// the machine may hit one measurement; what is quadratic is so each time.
			for attempt := 1; ; attempt++ {
				small, large := took(4<<10), took(64<<10)
				if large <= 80*(small+time.Millisecond) {
					break
				}
				if attempt == 5 {
					t.Errorf("%q as %q: 4 KiB take %v, 64 KiB %v", piece, name, small, large)
					break
				}
			}
		}
	}
}
