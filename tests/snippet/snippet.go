// Package snippet finds the fenced snippets of a page that tests run: those that have words behind
// the language, as in ```sh capi first.
package snippet

import (
	"fmt"
	"os"
	"strings"
)

// Snippet is one of a page.
type Snippet struct {
	Language string
	Name     string // the words behind it
	Text     string
	Line     int // of its first line
}

// Read returns the snippets of a page in their order. Fenced blocks without a name are left out. A
// fence that is not closed, and a name that is there twice, are errors.
func Read(page string) ([]Snippet, error) {
	data, err := os.ReadFile(page)
	if err != nil {
		return nil, err
	}
	var out []Snippet
	var open *Snippet
	seen := map[string]bool{}
	number := 0
	for line := range strings.Lines(string(data)) {
		number++
		info, fence := strings.CutPrefix(line, "```")
		switch {
		case !fence && open != nil:
			open.Text += line
		case !fence:
		case open != nil:
			if open.Name != "" {
				out = append(out, *open)
			}
			open = nil
		default:
			language, name, _ := strings.Cut(strings.TrimSpace(info), " ")
			if name != "" && seen[name] {
				return nil, fmt.Errorf("%s:%d: a second snippet %q", page, number, name)
			}
			seen[name] = true
			open = &Snippet{Language: language, Name: name, Line: number + 1}
		}
	}
	if open != nil {
		return nil, fmt.Errorf("%s:%d: the snippet is not closed", page, open.Line)
	}
	return out, nil
}
