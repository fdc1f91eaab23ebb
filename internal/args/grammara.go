package args

import (
	"fmt"
	"os"
	"strings"
)

// tokensA splits at blanks and deletes quotes, line by line.
func tokensA(data []byte) ([]token, error) {
	var tokens []token
	offset, line := 0, 0
	for text := range strings.Lines(string(data)) {
		line++
		if !strings.HasPrefix(strings.TrimSpace(text), "#") {
			for i := 0; i < len(text); {
				if isBlank(text[i]) {
					i++
					continue
				}
				start := i
				for i < len(text) && !isBlank(text[i]) {
					i++
				}
				plain := strings.NewReplacer(`"`, "", "'", "").Replace(text[start:i])
				if plain == "" {
					continue // an empty pair of quotes is nothing
				}
				if strings.Contains(plain, "$(") || strings.Contains(plain, "`") {
					return nil, &SyntaxError{Line: line, Msg: fmt.Sprintf("%q asks for a command to be run, which is not supported; write the value itself", plain)}
				}
				tokens = append(tokens, token{
					start: offset + start, end: offset + i, line: line, plain: plain,
					expand: func(lookup func(string) (string, bool)) []string {
						return []string{os.Expand(plain, func(name string) string {
							v, _ := lookup(name)
							return v
						})}
					},
				})
			}
		}
		offset += len(text)
	}
	return tokens, nil
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }

// quote returns the written form of a value.
func (f *File) quote(value string) (string, error) {
	if strings.ContainsAny(value, "\n\r") {
		return "", fmt.Errorf("a value may not have several lines")
	}
	if f.grammar == GrammarA {
		if strings.ContainsAny(value, " \t\"'") {
			return "", fmt.Errorf("the value %q has blanks or quotes, which this file cannot hold", value)
		}
		return value, nil
	}
	return quoteB(value), nil
}
