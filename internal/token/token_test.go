package token

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"
)

func TestGenerated(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		tok := New()
		text := tok.Reveal()
		if len(text) != 32 || seen[text] {
			t.Fatalf("made %d characters, or the same twice", len(text))
		}
		seen[text] = true
		again, err := Parse("  " + text + "\n")
		if err != nil || !again.Generated() || again.Reveal() != text {
			t.Fatalf("%v, generated %v", err, again.Generated())
		}
		if again.String() == text || strings.Contains(fmt.Sprintf("%v %+v %#v %s", again, again, again, again), text) {
			t.Fatal("printing a token shows it")
		}
	}
}

func TestParse(t *testing.T) {
	upstream := "0123456789abcdef0123456789abcdef"
	for _, tc := range []struct {
		text      string
		ok, genby bool
	}{
		{"", false, false},
		{"    ", false, false},
		{strings.Repeat(" ", 40), false, false},
		{upstream[:31], false, false},
		{upstream, true, false},
		{" " + upstream + " ", true, false},
		{strings.ToUpper(New().Reveal()), true, false}, // not the form that is generated
		{upstream + "|", false, false},
		{upstream[:16] + " " + upstream[:16], false, false},
		{upstream + "/x", false, false},
		{upstream + "\x00", false, false},
		{strings.Repeat("a", MaxLength+1), false, false},
		{"a-token-that-a-person-has-chosen!", true, false},
	} {
		tok, err := Parse(tc.text)
		if (err == nil) != tc.ok || tok.Generated() != tc.genby {
			t.Errorf("%q: %v, generated %v", tc.text, err, tok.Generated())
		}
	}
	if _, err := Parse("short"); !errors.Is(err, ErrLength) {
		t.Errorf("a short one: %v", err)
	}
}

// TestDerive pins what is derived, since both ends of a join and two versions of the product
// must agree on it.
func TestDerive(t *testing.T) {
	tok, err := Parse("0123456789abcdef0123456789abcdef")
	if err != nil {
		t.Fatal(err)
	}
	id, key := tok.Derive()
	if got := id.String() + " " + hex.EncodeToString(key[:]); got != "a83f8c743574ad74 1e31e33712b0135705949b24b4b927abae36463fa0fe02cc0c260ea93b5d5183" {
		t.Errorf("%s", got)
	}
	back, err := ParseID(id.String())
	if err != nil || back != id {
		t.Errorf("%v, %v", back, err)
	}
	text, _ := key.MarshalText()
	var again Key
	if err := again.UnmarshalText(text); err != nil || !again.Equal(key) {
		t.Errorf("the key as text: %v", err)
	}
	other := again
	other[31] ^= 1
	if other.Equal(key) {
		t.Error("another key is equal")
	}
	for _, bad := range []string{"", "00", "zz23456789abcdef", "0123456789abcdef0"} {
		if _, err := ParseID(bad); err == nil {
			t.Errorf("%q is an id", bad)
		}
	}
}

// connect returns both ends of a TLS connection.
func connect(t *testing.T, version uint16) (client, server tls.ConnectionState) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "n"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	s := tls.Server(a, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MaxVersion: version})
	c := tls.Client(b, &tls.Config{InsecureSkipVerify: true})
	done := make(chan error, 1)
	go func() { done <- s.HandshakeContext(t.Context()) }()
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if version == tls.VersionTLS13 { // takes the session tickets
		go func() { _, _ = c.Read(make([]byte, 1)) }()
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return c.ConnectionState(), s.ConnectionState()
}

func TestProof(t *testing.T) {
	c, s := connect(t, tls.VersionTLS13)
	mine, err := Exporter(&c)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := Exporter(&s)
	if err != nil || !bytes.Equal(mine, theirs) {
		t.Fatalf("the ends disagree: %v", err)
	}
	id, key := New().Derive()
	nonce := Nonce()
	proof := Proof(key, theirs, id, nonce)
	if !CheckProof(key, mine, id, nonce, proof) {
		t.Error("a right proof is refused")
	}
	otherID, otherKey := New().Derive()
	c2, _ := connect(t, tls.VersionTLS13)
	otherConn, err := Exporter(&c2)
	if err != nil {
		t.Fatal(err)
	}
	for name, wrong := range map[string]bool{
		"of another key":         CheckProof(otherKey, mine, id, nonce, proof),
		"of another id":          CheckProof(key, mine, otherID, nonce, proof),
		"for another nonce":      CheckProof(key, mine, id, Nonce(), proof),
		"for another connection": CheckProof(key, otherConn, id, nonce, proof),
		"empty":                  CheckProof(key, mine, id, nonce, nil),
		"cut":                    CheckProof(key, mine, id, nonce, proof[:31]),
	} {
		if wrong {
			t.Errorf("a proof %s is taken", name)
		}
	}
	old, _ := connect(t, tls.VersionTLS12)
	if _, err := Exporter(&old); !errors.Is(err, ErrNoExporter) {
		t.Errorf("a proof over TLS 1.2: %v", err)
	}
	c.DidResume = true
	if _, err := Exporter(&c); !errors.Is(err, ErrNoExporter) {
		t.Errorf("a proof over a resumed connection: %v", err)
	}
	if _, err := Exporter(nil); !errors.Is(err, ErrNoExporter) {
		t.Errorf("without TLS: %v", err)
	}
}

// TestCallback: a secret is of one node, in one role, from one join, under one salt, of one CA.
func TestCallback(t *testing.T) {
	ca, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	salt := NewCallbackKey()
	key := CallbackKey(CallbackBase(ca), salt)
	one := Callback(key, "worker", "n1", "00")
	if !IsCallback(one) || len(one) != 66 || one != Callback(CallbackKey(CallbackBase(ca), salt), "worker", "n1", "00") {
		t.Errorf("%q", one)
	}
	for what, secret := range map[string]string{
		"another name":     Callback(key, "worker", "n2", "00"),
		"another role":     Callback(key, "control-plane", "n1", "00"),
		"another join":     Callback(key, "worker", "n1", "01"),
		"no join":          Callback(key, "worker", "n1", ""),
		"parts that moved": Callback(key, "worke", "rn1", "00"),
		"another salt":     Callback(CallbackKey(CallbackBase(ca), NewCallbackKey()), "worker", "n1", "00"),
		"another CA":       Callback(CallbackKey(CallbackBase(other), salt), "worker", "n1", "00"),
		"the salt alone":   Callback(salt, "worker", "n1", "00"),
		"the form before":  LegacyCallback(salt, "n1"),
	} {
		if secret == one {
			t.Errorf("%s gives the same secret", what)
		}
	}
	if IsCallback(LegacyCallback(salt, "n1")) {
		t.Error("the form before counts as the present one")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(New().Reveal())
	f.Add("  ")
	f.Add(strings.Repeat("0", 32) + "|5")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := Parse(text)
		if err != nil {
			return
		}
		if got := tok.Reveal(); len(got) < MinLength || strings.ContainsAny(got, " \n\t|/\x00") {
			t.Errorf("%q is a token", got)
		}
		if again, err := Parse(tok.Reveal()); err != nil || again != tok {
			t.Errorf("read again: %v", err)
		}
		if _, err := ParseID(text); err == nil && len(text) != 2*IDSize {
			t.Errorf("%q is an id", text)
		}
	})
}
