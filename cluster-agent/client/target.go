package client

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"microk8s/internal/token"
)

// Lengths of the fingerprint in a connection string, in hex digits (cluster-agent.md 3.1). What
// is shorter than safeCheck can be ground out by somebody who wants to pass for the server.
const (
	minCheck  = 12
	safeCheck = 32
	maxCheck  = 64
)

// Target is a parsed connection string, HOST:PORT/TOKEN[/CHECK]. It holds a secret, which its
// String method does not show.
type Target struct {
	Host  string // address or name, without brackets
	Port  int
	Token token.Token
	Check string // first digits of the SHA-256 of the server's certificate, lower case; may be ""
}

// Parse reads a connection string. IPv6 addresses are in brackets. The errors are what cli.md 3.1
// wants to be said behind "Invalid connection: ".
func Parse(s string) (Target, error) {
	parts := strings.Split(strings.TrimSpace(s), "/")
	format := errors.New("Expected format: <master_IP>:<master_PORT>/<token>[/<fingerprint>]") //nolint:staticcheck // upstream's text
	if len(parts) != 2 && len(parts) != 3 {
		return Target{}, format
	}
	host, port, err := net.SplitHostPort(parts[0])
	if err != nil {
		return Target{}, format
	}
	var t Target
	if t.Port, err = strconv.Atoi(port); err != nil {
		return Target{}, errors.New("Master PORT not a number") //nolint:staticcheck // upstream's text
	}
	if t.Port < 1 || t.Port > 65535 {
		return Target{}, errors.New("Master PORT not in range 1:65535") //nolint:staticcheck // upstream's text
	}
	if !validHost(host) {
		return Target{}, errors.New("Invalid master IP") //nolint:staticcheck // upstream's text
	}
	t.Host = host
	if t.Token, err = token.Parse(parts[1]); errors.Is(err, token.ErrLength) {
		return Target{}, errors.New("Cluster token size should be at least 32 bytes") //nolint:staticcheck // upstream's text
	} else if err != nil {
		return Target{}, err
	}
	if len(parts) == 3 {
		t.Check = strings.ToLower(parts[2])
		if len(t.Check) < minCheck {
			return Target{}, errors.New("Fingerprint should be at least 12 bytes") //nolint:staticcheck // upstream's text
		}
		if len(t.Check) > maxCheck || strings.Trim(t.Check, "0123456789abcdef") != "" {
			return Target{}, errors.New("the fingerprint is not hex digits of a SHA-256 sum")
		}
	}
	return t, nil
}

// validHost accepts addresses (with a zone, for link-local ones) and host names.
func validHost(host string) bool {
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	if host == "" || len(host) > 253 || strings.Trim(strings.ToLower(host), "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "" {
		return false
	}
	// What consists of digits and dots and is no address is a mistyped one.
	return strings.Trim(host, "0123456789.") != ""
}

// proves reports whether the server must prove that it knows the token before it sees it: one
// that this product made, or a chosen one without a fingerprint that nobody could guess.
func (t Target) proves() bool {
	return t.Token.Generated() || t.Check == "" && t.Token.Guessable() == nil
}

// Address is host:port.
func (t Target) Address() string { return net.JoinHostPort(t.Host, strconv.Itoa(t.Port)) }

// String does not show the token.
func (t Target) String() string { return t.Address() }

// Reveal returns the connection string, with the token.
func (t Target) Reveal() string {
	s := t.Address() + "/" + t.Token.Reveal()
	if t.Check != "" {
		s += "/" + t.Check
	}
	return s
}

// GoString does not show the token either.
func (t Target) GoString() string { return fmt.Sprintf("client.Target{%s}", t.Address()) }
