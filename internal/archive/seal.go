package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
)

// Seal is for whom archives are encrypted: a passphrase, or age recipients.
type Seal struct {
	Passphrase string
	Recipients []string // age1…
}

// shortest is how many characters a passphrase has at least. It is stretched with scrypt; shorter ones
// can be guessed all the same by whoever gets the file.
const shortest = 12

// workFactor is age's default for the stretching of a passphrase: 2^18 rounds, about a second.
var workFactor = 18

// Check returns an error where nothing can be encrypted so.
func (s Seal) Check() error {
	switch {
	case s.Passphrase == "" && len(s.Recipients) == 0:
		return errors.New("nothing says for whom archives are encrypted")
	case s.Passphrase != "" && len(s.Recipients) > 0:
		return errors.New("archives are encrypted with a passphrase or for recipients, not both")
	case s.Passphrase != "" && len(s.Passphrase) < shortest:
		return fmt.Errorf("the passphrase has %d characters; it must have at least %d", len(s.Passphrase), shortest)
	}
	for _, r := range s.Recipients {
		if _, err := age.ParseX25519Recipient(r); err != nil {
			return fmt.Errorf("%q is not an age recipient: %w", r, err)
		}
	}
	return nil
}

// For says for whom, without secrets.
func (s Seal) For() []string {
	if s.Passphrase != "" {
		return []string{"passphrase"}
	}
	return s.Recipients
}

// Open returns to whom an archive is encrypted, and an identity that reads exactly this archive. With a
// passphrase that is the passphrase. For recipients, whose identities are not on this machine, it is a
// key for this archive alone, which is forgotten with the process: it is how what was stored can be
// read back and proven.
func (s Seal) Open() ([]age.Recipient, age.Identity, error) {
	if err := s.Check(); err != nil {
		return nil, nil, err
	}
	if s.Passphrase != "" {
		to, err := age.NewScryptRecipient(s.Passphrase)
		if err != nil {
			return nil, nil, err
		}
		to.SetWorkFactor(workFactor)
		who, err := age.NewScryptIdentity(s.Passphrase)
		return []age.Recipient{to}, who, err
	}
	once, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, nil, err
	}
	to := []age.Recipient{once.Recipient()}
	for _, r := range s.Recipients {
		one, err := age.ParseX25519Recipient(r)
		if err != nil {
			return nil, nil, err
		}
		to = append(to, one)
	}
	return to, once, nil
}

// Identities reads what can decrypt: an age identity file, or a passphrase.
func Identities(r io.Reader, passphrase bool) ([]age.Identity, error) {
	data, err := io.ReadAll(io.LimitReader(r, 1<<20))
	if err != nil {
		return nil, err
	}
	if passphrase {
		who, err := age.NewScryptIdentity(Passphrase(data))
		if err != nil {
			return nil, err
		}
		return []age.Identity{who}, nil
	}
	return age.ParseIdentities(bytes.NewReader(data))
}

// Passphrase is the first line of a file.
func Passphrase(data []byte) string {
	line, _, _ := strings.Cut(string(data), "\n")
	return strings.TrimSuffix(line, "\r")
}

// NewIdentity makes a pair: the text of an age identity file, which is the secret, and the recipient.
func NewIdentity() (file, recipient string, err error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return "", "", err
	}
	recipient = id.Recipient().String()
	return "# public key: " + recipient + "\n" + id.String() + "\n", recipient, nil
}
