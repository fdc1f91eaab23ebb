package inspect

import (
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
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

// TestLongLines: the report says how much of a line it left out, and no part of a secret is left at the cut.
func TestLongLines(t *testing.T) {
	r := newRedactor(map[string]bool{"a-secret-of-the-node": true})
	mark := regexp.MustCompile(` \[left out: the last (\d+) of (\d+) bytes of this line\](\r?\n)?$`)
	for name, c := range map[string]struct{ first, rest string }{
		"a log":               {strings.Repeat("x", maxLine+100), "second line\n"},
		"with its line's end": {strings.Repeat("x", maxLine+1) + "\r\n", "second line\n"},
		"a character is cut":  {strings.Repeat("é", maxLine/2-1) + "x" + strings.Repeat("é", 100) + "\n", "second line\n"},
		"a secret at the cut": {strings.Repeat("x", maxLine-6) + " a-secret-of-the-node " + strings.Repeat("x", 100) + "\n", "second line\n"},
		"a name at the cut":   {strings.Repeat("x", maxLine-12) + ` password="hunter2` + strings.Repeat("hunter2", 100) + "\" y\n", "second line\n"},
	} {
		for _, file := range []string{"", "kubelet"} {
			text := c.first
			if strings.HasSuffix(text, "\n") {
				text += c.rest
			}
			out := r.Redact(text)
			if file != "" {
				out = r.RedactFile(file, text)
			}
			first, rest, _ := strings.Cut(out, "\n")
			if strings.HasSuffix(c.first, "\n") {
				first += "\n"
			}
			m := mark.FindStringSubmatchIndex(first)
			if m == nil {
				t.Errorf("%s as %q: no mark, at the end is %.200q", name, file, first[max(0, len(first)-200):])
				continue
			}
			left, _ := strconv.Atoi(first[m[2]:m[3]])
			all, _ := strconv.Atoi(first[m[4]:m[5]])
			if m[0] > maxLine || m[0]+left != all || m[0] < maxLine-4 {
				t.Errorf("%s as %q: %d bytes are there, %d of %d are said to be left out", name, file, m[0], left, all)
			}
			if text != c.first && rest != c.rest {
				t.Errorf("%s as %q: the next line is %q", name, file, rest)
			}
			if strings.Contains(out, "a-sec") || strings.Contains(out, "hunter") || !utf8.ValidString(out) {
				t.Errorf("%s as %q: the end is %q", name, file, first[max(0, len(first)-200):])
			}
		}
	}
	whole := strings.Repeat("x", maxLine) + "\n"
	if got := r.Redact(whole); got != whole {
		t.Errorf("a line of the length that is allowed was changed to %d bytes", len(got))
	}
}
