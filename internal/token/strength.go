package token

import (
	"errors"
	"strings"
	"unicode"
)

// What [Token.Guessable] wants of a token that somebody has chosen. All 32 hex digits of
// `openssl rand -hex 16`, UUIDs and random letters with digits are far from each of them
// (TestRandomTokensAreNotGuessable); words, dates, repetitions and rows of the keyboard are not.
const (
	minRandom   = 26 // characters, punctuation not counted
	minDistinct = 8  // different characters
	minPairs    = 18 // different pairs of neighbours
	minSteps    = 9  // different distances between neighbours
	minMixed    = 4  // places at which digits and letters change, or a capital letter does not begin a word
)

// ErrGuessable is wrapped by the error of [Token.Guessable].
var ErrGuessable = errors.New("the token could be guessed")

// guessable is an error with a reason that users read.
type guessable string

func (g guessable) Error() string        { return ErrGuessable.Error() + ": " + string(g) }
func (g guessable) Is(target error) bool { return target == ErrGuessable }

// Guessable returns why somebody might guess this token, as an error that wraps ErrGuessable, or
// nil. A server proves that it knows a token only where this is nil: an answer to somebody who
// could try all likely tokens against it would give the token away (docs/adr/0027).
//
// Strength of what a person typed cannot be computed. So the rule is not about how long a token
// is but whether it looks like what a generator of random texts prints.
func (t Token) Guessable() error {
	if t.generated {
		return nil
	}
	var text []rune
	for _, c := range t.text {
		if unicode.IsLetter(c) || unicode.IsDigit(c) {
			text = append(text, c)
		}
	}
	chars, pairs, steps := map[rune]bool{}, map[[2]rune]bool{}, map[rune]bool{}
	mixed, neighbours := 0, 0
	for i, c := range text {
		chars[c] = true
		if i == 0 {
			continue
		}
		before := text[i-1]
		pairs[[2]rune{before, c}] = true
		steps[c-before] = true
		switch {
		case unicode.IsDigit(before) != unicode.IsDigit(c),
			unicode.IsLower(before) && unicode.IsUpper(c) && i+1 < len(text) && !unicode.IsLower(text[i+1]):
			mixed++
		}
		if adjacent(before, c) {
			neighbours++
		}
	}
	switch {
	case len(text) < minRandom:
		return guessable("it has too few letters and digits")
	case len(chars) < minDistinct, len(pairs) < minPairs, len(steps) < minSteps:
		return guessable("it repeats itself")
	case 2*neighbours > len(text)-1:
		return guessable("it follows the alphabet or the keyboard")
	case mixed < minMixed:
		return guessable("it looks like words")
	}
	return nil
}

// keyboard are the rows of the keys, which are also columns: 1 q a z.
var keyboard = []string{"1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm"}

// adjacent reports whether two characters are the same, follow each other in the alphabet, or
// lie beside each other on the keyboard.
func adjacent(a, b rune) bool {
	a, b = unicode.ToLower(a), unicode.ToLower(b)
	if a-b >= -1 && a-b <= 1 {
		return true
	}
	ra, ca := key(a)
	rb, cb := key(b)
	return ra >= 0 && rb >= 0 && abs(ra-rb) <= 1 && abs(ca-cb) <= 1
}

func key(c rune) (row, column int) {
	for row, keys := range keyboard {
		if column := strings.IndexRune(keys, c); column >= 0 {
			return row, column
		}
	}
	return -1, -1
}

func abs(n int) int { return max(n, -n) }
