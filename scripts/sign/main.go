// Command sign signs the files of a release by a key file, and verifies the signatures, in
// minisign's format: the minisign program of distributions verifies them too.
//
//	go run ./scripts/sign --key FILE.key NAME…     # writes NAME.minisig beside each
//	go run ./scripts/sign --public FILE.pub NAME…  # verifies; exit code 1 if one is wrong
//	go run ./scripts/sign --new PREFIX             # makes PREFIX.key and PREFIX.pub
//
// The key's password is asked for, or read from MINISIGN_PASSWORD. A signature holds the name of
// its file, and does not hold for another. No key belongs into the repository.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"aead.dev/minisign"
	"golang.org/x/term"

	"microk8s/internal/atomicfile"
)

func main() {
	key := flag.String("key", "", "file of the private key: sign")
	public := flag.String("public", "", "file of the public key: verify")
	fresh := flag.String("new", "", "make a key: beginning of the names of its two files")
	flag.Parse()
	err := errors.New("one of --key, --public and --new is needed")
	switch {
	case *fresh != "":
		err = makeKey(*fresh, password)
	case flag.NArg() == 0:
		err = errors.New("name the files")
	case *key != "":
		err = sign(*key, password, os.Getenv("SOURCE_DATE_EPOCH"), flag.Args())
	case *public != "":
		err = verify(os.Stdout, *public, flag.Args())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sign:", err)
		os.Exit(1)
	}
}

// password returns the key's password: that of the environment, or what a person types.
func password() (string, error) {
	if p, ok := os.LookupEnv("MINISIGN_PASSWORD"); ok {
		return p, nil
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return "", errors.New("the key has a password: set MINISIGN_PASSWORD")
	}
	fmt.Fprint(os.Stderr, "Password of the key: ")
	p, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(os.Stderr)
	return string(p), err
}

// makeKey writes a new key, which is never replaced by another.
func makeKey(prefix string, password func() (string, error)) error {
	for _, file := range []string{prefix + ".key", prefix + ".pub"} {
		if _, err := os.Lstat(file); err == nil {
			return fmt.Errorf("%s is there already", file)
		}
	}
	pass, err := password()
	if err != nil {
		return err
	}
	public, private, err := minisign.GenerateKey(nil)
	if err != nil {
		return err
	}
	secret, err := private.MarshalText() // not encrypted: whoever wants no password
	if pass != "" {
		secret, err = minisign.EncryptKey(pass, private)
	}
	if err != nil {
		return err
	}
	text, err := public.MarshalText()
	if err != nil {
		return err
	}
	return errors.Join(atomicfile.Write(prefix+".key", secret, 0o600, nil), atomicfile.Write(prefix+".pub", append(text, '\n'), 0o644, nil))
}

// sign writes the signature of each file beside it. The same file, key and epoch make the same
// signature.
func sign(keyFile string, password func() (string, error), epoch string, files []string) error {
	key, err := privateKey(keyFile, password)
	if err != nil {
		return fmt.Errorf("cannot use the key %s: %w", keyFile, err)
	}
	for _, file := range files {
		r, err := hashed(file)
		if err != nil {
			return err
		}
		comment := fmt.Sprintf("timestamp:%s\tfile:%s\thashed", cmp.Or(epoch, "0"), filepath.Base(file))
		signature := r.SignWithComments(key, comment, "signature of "+filepath.Base(file))
		if err := atomicfile.Write(file+".minisig", append(signature, '\n'), 0o644, nil); err != nil {
			return err
		}
		fmt.Printf("%s.minisig\n", file)
	}
	return nil
}

func privateKey(file string, password func() (string, error)) (key minisign.PrivateKey, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return key, err
	}
	if !minisign.IsEncrypted(text) {
		return key, key.UnmarshalText(text)
	}
	pass, err := password()
	if err != nil {
		return key, err
	}
	return minisign.DecryptKey(pass, text)
}

// hashed reads a file, which may be large, to its end.
func hashed(file string) (*minisign.Reader, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := minisign.NewReader(f)
	_, err = io.Copy(io.Discard, r)
	return r, err
}

// verify checks the signature beside each file, all of them, and reports those that are good.
func verify(out io.Writer, publicFile string, files []string) error {
	public, err := minisign.PublicKeyFromFile(publicFile)
	if err != nil {
		return fmt.Errorf("cannot use the public key %s: %w", publicFile, err)
	}
	var errs []error
	for _, file := range files {
		if err := verifyFile(public, file); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", file, err))
			continue
		}
		fmt.Fprintf(out, "%s: good\n", file)
	}
	return errors.Join(errs...)
}

func verifyFile(public minisign.PublicKey, file string) error {
	text, err := os.ReadFile(file + ".minisig")
	if err != nil {
		return fmt.Errorf("there is no signature: %w", err)
	}
	var s minisign.Signature
	if err := s.UnmarshalText(text); err != nil {
		return fmt.Errorf("its signature cannot be read: %w", err)
	}
	if s.KeyID != public.ID() {
		return fmt.Errorf("it was signed with another key (%016X)", s.KeyID)
	}
	r, err := hashed(file)
	if err != nil {
		return err
	}
	if !r.Verify(public, text) {
		return errors.New("the signature is not that of this file: file or signature was changed")
	}
	for field := range strings.SplitSeq(s.TrustedComment, "\t") {
		if name, ok := strings.CutPrefix(field, "file:"); ok && name != filepath.Base(file) {
			return fmt.Errorf("the signature is that of a file called %s", name)
		}
	}
	return nil
}
