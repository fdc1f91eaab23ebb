package token

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// generators print what common tools print when they are asked for something random.
var generators = map[string]func(b []byte) string{
	"openssl rand -hex 16": func(b []byte) string { return hex.EncodeToString(b[:16]) },
	"openssl rand -hex 32": func(b []byte) string { return hex.EncodeToString(b[:32]) },
	"capital hex digits":   func(b []byte) string { return strings.ToUpper(hex.EncodeToString(b[:16])) },
	"uuidgen": func(b []byte) string {
		b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
		return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
	},
	"secrets.token_urlsafe": func(b []byte) string { return base64.RawURLEncoding.EncodeToString(b[:32]) },
	"base32":                func(b []byte) string { return base32.StdEncoding.EncodeToString(b[:25]) },
	"pwgen 32":              func(b []byte) string { return letters(b, "abcdefghijklmnopqrstuvwxyz0123456789") },
	"random_password": func(b []byte) string {
		return letters(b, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
	},
}

func letters(b []byte, alphabet string) string {
	out := make([]byte, 32)
	for i := range out {
		out[i] = alphabet[int(b[i])%len(alphabet)]
	}
	return string(out)
}

// TestRandomTokensAreNotGuessable bounds how often a random token is refused by mistake: then
// the person makes another one.
func TestRandomTokensAreNotGuessable(t *testing.T) {
	const tries = 3000
	for name, generate := range generators {
		refused := 0
		var last error
		for range tries {
			b := make([]byte, 64)
			_, _ = rand.Read(b)
			tok, err := Parse(generate(b))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if err := tok.Guessable(); err != nil {
				refused, last = refused+1, err
			}
		}
		if refused > tries/50 {
			t.Errorf("%s: %d of %d are refused, for instance since %v", name, refused, tries, last)
		}
	}
}

func TestGuessable(t *testing.T) {
	for _, text := range []string{
		"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
		"0123456789abcdef0123456789abcdef",
		"fedcba9876543210fedcba9876543210",
		"deadbeefdeadbeefdeadbeefdeadbeef",
		"12345678901234567890123456789012",
		"1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik9ol",
		"a-token-that-a-person-has-chosen!",
		"this-is-a-token-that-ann-has-chosen",
		"MySecretClusterTokenForProduction1",
		"my-cluster-token-2026-11-28-rack-07",
		"passwordpasswordpasswordpassword",
		"................................",
		"ein-langes-deutsches-kennwort-fuer-uns",
	} {
		tok, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := tok.Guessable(); !errors.Is(err, ErrGuessable) || strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := New().Guessable(); err != nil {
		t.Errorf("a generated token: %v", err)
	}
}
