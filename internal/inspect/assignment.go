package inspect

import "strings"

// found is a name in a text and what separates it from its value. The fields are offsets.
type found struct {
	dashes      int // where the dashes before the name begin: name if there are none
	name, end   int // the name
	quoted      bool
	sep, sepEnd int // the separator; a quote that closes the name may be part of it
}

// nextAssignment finds the first name that something follows as a value does: with up to two dashes
// before it, and behind it perhaps a quote, then one of => := : =, or blanks and commas. It looks
// at each byte a few times at most: lines of logs have megabytes.
func nextAssignment(s string) (found, bool) {
	for i := 0; i < len(s); {
		if !nameStart(s[i]) {
			i++
			continue
		}
		f := found{dashes: i, name: i, end: i + 1}
		for f.end < len(s) && (nameStart(s[f.end]) || s[f.end] >= '0' && s[f.end] <= '9' || s[f.end] == '.' || s[f.end] == '-') {
			f.end++
		}
		if f.separated(s) {
			for f.dashes > 0 && f.name-f.dashes < 2 && s[f.dashes-1] == '-' {
				f.dashes--
			}
			return f, true
		}
		i = f.end
	}
	return found{}, false
}

func nameStart(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' }

// separated sets the separator behind the name, and reports whether there is one.
func (f *found) separated(s string) bool {
	quote := f.end
	if quote < len(s) && s[quote] == '\\' {
		quote++
	}
	quoted := quote < len(s) && (s[quote] == '"' || s[quote] == '\'')
	if quoted {
		f.sep = quote + 1
		if f.sepEnd = separator(s, f.sep); f.sepEnd > f.sep {
			f.quoted = true
			return true
		}
	}
	f.sep = f.end
	f.sepEnd = separator(s, f.sep)
	return f.sepEnd > f.sep
}

// separator returns where the separator at i ends; i if there is none.
func separator(s string, i int) int {
	at := i
	for at < len(s) && blank(s[at]) {
		at++
	}
	rest := s[at:]
	sign := 0
	switch {
	case strings.HasPrefix(rest, "=>"), strings.HasPrefix(rest, ":="):
		sign = 2
	case strings.HasPrefix(rest, ":"), strings.HasPrefix(rest, "="):
		sign = 1
	}
	if sign > 0 {
		for at += sign; at < len(s) && (s[at] == ' ' || s[at] == '\t'); at++ {
		}
		return at
	}
	// A quote, blanks and commas.
	at = i
	if at < len(s) && s[at] == '\\' {
		at++
	}
	if at < len(s) && (s[at] == '"' || s[at] == '\'') {
		at++
	}
	from := at
	for at < len(s) && (blank(s[at]) || s[at] == ',') {
		at++
	}
	if at == from {
		return i
	}
	return at
}

func blank(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\f' || c == '\r' }
