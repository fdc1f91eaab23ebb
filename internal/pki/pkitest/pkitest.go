// Package pkitest makes certificates cheap in tests: small keys, taken from a pool that the
// whole process shares. It leaves everything else as the product has it.
package pkitest

import (
	"crypto/rand"
	"crypto/rsa"
	"sync"
	"time"

	"microk8s/internal/pki"
)

var pool struct {
	sync.Mutex
	keys []*rsa.PrivateKey
}

// Keys returns a source of keys of 1024 bits, whatever size is asked for. Each source begins at
// the start of the process' pool, so keys of one source differ and those of two sources do not.
func Keys() func(bits int) (*rsa.PrivateKey, error) {
	next := 0
	return func(int) (*rsa.PrivateKey, error) {
		pool.Lock()
		defer pool.Unlock()
		if next == len(pool.keys) {
			key, err := rsa.GenerateKey(rand.Reader, 1024)
			if err != nil {
				return nil, err
			}
			pool.keys = append(pool.keys, key)
		}
		next++
		return pool.keys[next-1], nil
	}
}

// Maker is a [pki.Maker] with cheap keys and, if now is not nil, that clock.
func Maker(now func() time.Time) pki.Maker {
	return pki.Maker{NewKey: Keys(), Now: now}
}
