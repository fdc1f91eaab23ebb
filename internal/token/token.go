// Package token is the secret that lets a machine join a cluster: its two forms, what is
// derived from it, and the proof by which a server shows that it knows a token without being
// told it (ADR 10).
//
// It does no I/O. Where tokens are kept, with their roles and uses, is in internal/tokenstore.
package token

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// MinLength is the least number of characters of a token, as upstream's `add-node` wants it.
const MinLength = 32

// MaxLength bounds what is looked at; no program makes longer ones.
const MaxLength = 512

// Sizes, in bytes, of what is derived from a token, and in hex digits of a generated one.
const (
	IDSize     = 8
	KeySize    = 32
	NonceSize  = 32
	ProofSize  = sha256.Size
	randomHex  = 28
	checkHex   = 4
	checkLabel = "microk8s-join-1"
	hkdfInfo   = "microk8s join 1"
	// ExporterLabel names the TLS exporter (RFC 8446 7.5) that ties a proof to its connection.
	ExporterLabel = "EXPORTER-microk8s-join-1"
	proofLabel    = "server"
)

// Token is a join token that was read with [Parse] or made with [New]. Its String method does
// not show it, so that it cannot get into a log by accident; [Token.Reveal] does.
type Token struct {
	text      string
	generated bool
}

// ErrLength is wrapped for texts that are too short or too long to be a token.
var ErrLength = errors.New("the token must have 32 characters at least")

// New makes a token of 112 random bits: 28 hex digits, and 4 that tell it apart from others.
func New() Token {
	var b [randomHex / 2]byte
	_, _ = rand.Read(b[:]) // it never fails (crypto/rand)
	text := hex.EncodeToString(b[:])
	return Token{text: text + check(text), generated: true}
}

// check returns the last digits of a generated token from the ones before.
func check(digits string) string {
	sum := sha256.Sum256([]byte(checkLabel + digits))
	return hex.EncodeToString(sum[:checkHex/2])
}

// Parse reads a token as a person typed it or a request carries it: white space around it does
// not count. Characters that would make it something else in a connection string or a token
// file ('/', '|', white space, control characters) are refused.
func Parse(text string) (Token, error) {
	text = strings.TrimSpace(text)
	if len(text) < MinLength || len(text) > MaxLength {
		return Token{}, ErrLength
	}
	for _, c := range []byte(text) {
		if c <= ' ' || c >= 0x7f || c == '/' || c == '|' {
			return Token{}, fmt.Errorf("the token has a character that tokens cannot have (%q)", rune(c))
		}
	}
	return Token{text: text, generated: isGenerated(text)}, nil
}

func isGenerated(text string) bool {
	if len(text) != randomHex+checkHex {
		return false
	}
	for _, c := range []byte(text) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return check(text[:randomHex]) == text[randomHex:]
}

// Generated reports whether this product made the token. Then its server must prove itself before
// it is told the token, and the client accepts nothing less. One in 65 536 tokens of upstream
// looks like one by chance.
func (t Token) Generated() bool { return t.generated }

// Reveal returns the token itself.
func (t Token) Reveal() string { return t.text }

// String does not show the token.
func (t Token) String() string { return "[token]" }

// GoString does not show it either, for %#v.
func (t Token) GoString() string { return "token.Token{}" }

// ID names a token without telling it.
type ID [IDSize]byte

// Key is what a server keeps of a token. It proves knowledge of the token, so it is a secret
// too, but nobody can join with it.
type Key [KeySize]byte

// String returns the 16 hex digits of an id.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// String does not show the key.
func (k Key) String() string { return "[key]" }

// ParseID reads 16 hex digits.
func ParseID(s string) (id ID, err error) {
	if err := decodeHex(id[:], s); err != nil {
		return ID{}, fmt.Errorf("%q is not the id of a token: %w", s, err)
	}
	return id, nil
}

// Derive returns the id and the key of a token: 40 bytes of HKDF-SHA256 without a salt.
func (t Token) Derive() (ID, Key) {
	out, err := hkdf.Key(sha256.New, []byte(t.text), nil, hkdfInfo, IDSize+KeySize)
	if err != nil { // only for lengths beyond what SHA-256 gives
		panic(err)
	}
	return ID(out[:IDSize]), Key(out[IDSize:])
}

// Equal compares keys in constant time.
func (k Key) Equal(other Key) bool { return subtle.ConstantTimeCompare(k[:], other[:]) == 1 }

// Nonce makes the random part of a client's question.
func Nonce() []byte {
	b := make([]byte, NonceSize)
	_, _ = rand.Read(b)
	return b
}

// ErrNoExporter is given for connections to which a proof cannot be tied.
var ErrNoExporter = errors.New("a proof needs a TLS 1.3 connection that was not resumed")

// Exporter returns the value that only the two ends of this TLS connection know. The connection
// must be TLS 1.3 and a full handshake.
func Exporter(state *tls.ConnectionState) ([]byte, error) {
	if state == nil || state.Version != tls.VersionTLS13 || state.DidResume || !state.HandshakeComplete {
		return nil, ErrNoExporter
	}
	out, err := state.ExportKeyingMaterial(ExporterLabel, nil, 32)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoExporter, err)
	}
	return out, nil
}

// Proof is the server's answer:
//
//	HMAC-SHA256(key, "server" ‖ exporter ‖ id ‖ nonce)
//
// All parts have fixed lengths, so nothing can be moved from one into the next.
func Proof(key Key, exporter []byte, id ID, nonce []byte) []byte {
	mac := hmac.New(sha256.New, key[:])
	for _, part := range [][]byte{[]byte(proofLabel), exporter, id[:], nonce} {
		mac.Write(part)
	}
	return mac.Sum(nil)
}

// CheckProof compares, in constant time, what a server answered with what it must be.
func CheckProof(key Key, exporter []byte, id ID, nonce, proof []byte) bool {
	return hmac.Equal(Proof(key, exporter, id, nonce), proof)
}

func decodeHex(to []byte, s string) error {
	if len(s) != hex.EncodedLen(len(to)) {
		return fmt.Errorf("it must be %d hex digits", hex.EncodedLen(len(to)))
	}
	_, err := hex.Decode(to, []byte(s))
	return err
}

// MarshalText writes the key in base64, for the files and the Secret that keep it.
func (k Key) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, k[:]), nil
}

// UnmarshalText reads what MarshalText wrote.
func (k *Key) UnmarshalText(text []byte) error {
	b, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil || len(b) != KeySize {
		return errors.New("the key of a token must be 32 bytes in base64")
	}
	copy(k[:], b)
	return nil
}
