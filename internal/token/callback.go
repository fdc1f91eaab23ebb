package token

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"strings"
)

// CallbackKeySize is the size, in bytes, of the salt in the API and of what is derived from it.
const CallbackKeySize = 32

// callbackInfo separates this use of the CA's key from all others.
const callbackInfo = "microk8s node calls 2"

// callbackForm is in front of every secret of this form. An agent that has such a secret knows that
// its caller also has a certificate of a control-plane node.
const callbackForm = "2-"

// NewCallbackKey makes a salt, which is kept in the API and changes when a node is removed.
func NewCallbackKey() []byte {
	b := make([]byte, CallbackKeySize)
	_, _ = rand.Read(b)
	return b
}

// CallbackBase is what control-plane nodes have in common and nobody else: it follows from the CA's
// key, by HKDF-SHA256, and tells nothing of it.
func CallbackBase(ca *rsa.PrivateKey) []byte {
	out, err := hkdf.Key(sha256.New, x509.MarshalPKCS1PrivateKey(ca), nil, callbackInfo, CallbackKeySize)
	if err != nil { // only for lengths beyond what SHA-256 gives
		panic(err)
	}
	return out
}

// CallbackKey is the key of all callback secrets at one time: HMAC-SHA256(base, salt). Who reads the
// salt in the API has no base, and who was removed no salt.
func CallbackKey(base, salt []byte) []byte {
	mac := hmac.New(sha256.New, base)
	mac.Write(salt)
	return mac.Sum(nil)
}

// Callback is the secret that a caller must show to the node that came as role, under name, with the
// join that the nonce join names: "2-" and 64 hex digits of HMAC-SHA256(key, role ‖ 0 ‖ name ‖ 0 ‖ join).
// None of the three has a zero byte in it.
func Callback(key []byte, role, name, join string) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(role + "\x00" + name + "\x00" + join))
	return callbackForm + hex.EncodeToString(mac.Sum(nil))
}

// IsCallback reports whether a secret has the form of [Callback]. Upstream's and those of the build
// before have not.
func IsCallback(secret string) bool { return strings.HasPrefix(secret, callbackForm) }

// LegacyCallback is the secret of a node in a cluster that has control-plane nodes of the build
// before, which know no other: 64 hex digits of HMAC-SHA256(key, name).
func LegacyCallback(key []byte, name string) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(name))
	return hex.EncodeToString(mac.Sum(nil))
}

// NewJoin makes the nonce that names one join, 32 hex digits. It is no secret.
func NewJoin() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
