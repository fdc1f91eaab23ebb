// Package encryption is about the configuration with which the API server encrypts Secrets and
// ConfigMaps before they reach the datastore: making it with a new key, and changing its keys.
//
// The file is in the datastore's folder, because key and data belong together: what sets the
// folder aside, puts it back or keeps a copy of it keeps the key with it, and no revert of the
// snap takes an old key back (docs/adr/0022). Only configurations of the form that [New] writes are
// changed by this package; one that somebody wrote by hand is read, and left alone.
package encryption

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"sigs.k8s.io/yaml"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/snapenv"
)

// FileName is the name of the configuration in the datastore's folder.
const FileName = storedir.EncryptionFile

// Flag is the API server's argument that names the configuration.
const Flag = "encryption-provider-config"

// ReloadFlag is the API server's argument with which it reads a changed configuration by itself.
const ReloadFlag = "encryption-provider-config-automatic-reload"

// Argument is the value of [Flag] in the default arguments.
const Argument = "${SNAP_DATA}/var/kubernetes/backend/" + FileName

// Path is where the configuration of a node is.
func Path(env snapenv.Env) string { return filepath.Join(env.Backend(), FileName) }

// ErrForeign is wrapped by the error of [Parse] for a configuration that this package did not write.
var ErrForeign = errors.New("the encryption configuration was written by hand")

// Key is one key, of 32 random bytes.
type Key struct {
	Name   string `json:"name"`
	Secret string `json:"secret"` // base64
}

// Keys are those of a configuration. New data is encrypted with the first one; the others are
// for data that was encrypted with them.
type Keys []Key

// header says what the file is, for whoever opens it.
const header = `# The keys with which the API server encrypts Secrets and ConfigMaps. Without this file they are
# lost: keep it with backups of the datastore. Change keys with: microk8s encryption rotate
`

// resources are what is encrypted.
var resources = []string{"secrets", "configmaps"}

type (
	configuration struct {
		APIVersion string  `json:"apiVersion"`
		Kind       string  `json:"kind"`
		Resources  []group `json:"resources"`
	}
	group struct {
		Resources []string   `json:"resources"`
		Providers []provider `json:"providers"`
	}
	provider struct {
		Secretbox *secretbox `json:"secretbox,omitempty"`
		Identity  *struct{}  `json:"identity,omitempty"`
	}
	secretbox struct {
		Keys Keys `json:"keys"`
	}
)

// NewKey makes a key. Its name is random too: it tells keys apart in `encryption status` and in
// the datastore, where it precedes each value.
func NewKey() Key {
	var id [4]byte
	var secret [32]byte
	rand.Read(id[:])
	rand.Read(secret[:])
	return Key{Name: "key-" + hex.EncodeToString(id[:]), Secret: base64.StdEncoding.EncodeToString(secret[:])}
}

// New returns a configuration with one new key.
func New() []byte { return Keys{NewKey()}.Encode() }

// Encode returns the configuration with these keys, of which there must be one at least. Data that is
// not encrypted can be read with it too: it is there after encryption is switched on, or an old
// backup was restored.
func (k Keys) Encode() []byte {
	data, err := yaml.Marshal(configuration{
		APIVersion: "apiserver.config.k8s.io/v1", Kind: "EncryptionConfiguration",
		Resources: []group{{Resources: resources, Providers: []provider{{Secretbox: &secretbox{k}}, {Identity: &struct{}{}}}}},
	})
	if err != nil {
		panic(err) // strings only
	}
	return append([]byte(header), data...)
}

// Parse returns the keys of a configuration that this package wrote.
func Parse(data []byte) (Keys, error) {
	var c configuration
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	if len(c.Resources) != 1 || !slices.Equal(c.Resources[0].Resources, resources) || len(c.Resources[0].Providers) != 2 {
		return nil, ErrForeign
	}
	p := c.Resources[0].Providers
	if p[0].Secretbox == nil || p[1].Identity == nil || len(p[0].Secretbox.Keys) == 0 {
		return nil, ErrForeign
	}
	keys := p[0].Secretbox.Keys
	for i, k := range keys {
		if secret, err := base64.StdEncoding.DecodeString(k.Secret); err != nil || len(secret) != 32 || k.Name == "" {
			return nil, fmt.Errorf("%w: key %q is not one of 32 bytes", ErrForeign, k.Name)
		}
		if slices.ContainsFunc(keys[:i], func(o Key) bool { return o.Name == k.Name }) {
			return nil, fmt.Errorf("%w: two keys are called %q", ErrForeign, k.Name)
		}
	}
	return keys, nil
}

// Merge adds keys that are not there yet, to read with. Keys with the same name and another
// secret are an error.
func (k Keys) Merge(others Keys) (Keys, error) {
	out := slices.Clone(k)
	for _, o := range others {
		i := slices.IndexFunc(out, func(x Key) bool { return x.Name == o.Name })
		switch {
		case i < 0:
			out = append(out, o)
		case out[i].Secret != o.Secret:
			return nil, fmt.Errorf("there are two different keys with the name %s", o.Name)
		}
	}
	return out, nil
}

// First returns the keys with the named one in front; the rest keeps its order.
func (k Keys) First(name string) (Keys, error) {
	i := slices.IndexFunc(k, func(x Key) bool { return x.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("there is no key %s", name)
	}
	return append(Keys{k[i]}, slices.Concat(k[:i], k[i+1:])...), nil
}

// Names lists the keys' names, the one for new data first.
func (k Keys) Names() []string {
	var out []string
	for _, x := range k {
		out = append(out, x.Name)
	}
	return out
}
