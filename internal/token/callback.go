package token

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
)

// CallbackKeySize is the size, in bytes, of the key from which callback secrets are made.
const CallbackKeySize = 32

// NewCallbackKey makes the cluster's key K_cb.
func NewCallbackKey() []byte {
	b := make([]byte, CallbackKeySize)
	_, _ = rand.Read(b)
	return b
}

// Callback is the secret that a caller must show to node name: 64 hex digits of
// HMAC-SHA256(key, name). Control-plane nodes hold the key and can make everyone's; another
// node knows its own only.
func Callback(key []byte, name string) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(name))
	return hex.EncodeToString(mac.Sum(nil))
}
