package certs

import (
	"context"
	"crypto/rsa"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"microk8s/internal/atomicfile"
	"microk8s/internal/fileaccess"
	"microk8s/internal/pki"
	"microk8s/internal/snapenv"
)

// Reasons why given CA files are refused; refresh-certs has an exit code for each.
var (
	ErrMissing = errors.New("ca.crt and ca.key are both needed")
	ErrKey     = errors.New("ca.key is not a valid RSA key")
	ErrCert    = errors.New("ca.crt is not a certificate that can be used")
	ErrNoSaved = errors.New("there is no backup")
)

// Expiry is when the certificate (ca, server, front-proxy-client …) ends.
func (s *Store) Expiry(name string) (time.Time, error) {
	cert, _, err := readCert(s.crt(name))
	if err != nil {
		return time.Time{}, err
	}
	return cert.NotAfter, nil
}

// DaysLeft is Expiry counted from now in whole days, negative when it has passed.
func (s *Store) DaysLeft(name string) (int, error) {
	end, err := s.Expiry(name)
	if err != nil {
		return 0, err
	}
	left := end.Sub(s.opts.Maker.Time())
	days := int(left / (24 * time.Hour))
	if left < 0 {
		days--
	}
	return days, nil
}

// Reissue issues one certificate again for its old key, whether due or not, with the names of
// csr.conf.template as they are now. Restart names what does not read it again by itself.
func (s *Store) Reissue(_ context.Context, name string) (Change, error) {
	var change Change
	hostname, err := s.nodeName()
	if err != nil {
		return change, err
	}
	all := specs(hostname)
	i := slices.IndexFunc(all, func(sp spec) bool { return sp.name == name })
	if i < 0 {
		return change, fmt.Errorf("cannot issue %q: there is no such certificate", name)
	}
	want, err := s.names()
	if err != nil {
		return change, err
	}
	if err := s.issue(all[i], want[name]); err != nil {
		return change, err
	}
	change.add(all[i], true)
	if name == Server {
		if err := s.writeChanged(s.env.Cert("csr.conf"), want[name].rendered); err != nil {
			return change, err
		}
	}
	return change, s.writeKubeconfig(all[i])
}

// ValidateCA checks the ca.crt and ca.key of a directory: both there, a usable key, a CA
// certificate in its time, and belonging together. The error wraps ErrMissing, ErrKey or ErrCert.
func (s *Store) ValidateCA(dir string) error {
	_, _, err := s.readCA(dir)
	return err
}

func (s *Store) readCA(dir string) (crt, key []byte, err error) {
	crt, err1 := os.ReadFile(filepath.Join(dir, "ca.crt"))
	key, err2 := os.ReadFile(filepath.Join(dir, "ca.key"))
	if err := errors.Join(err1, err2); err != nil {
		return nil, nil, fmt.Errorf("cannot use %s: %w: %w", dir, ErrMissing, err)
	}
	parsedKey, err := pki.ParseKey(key)
	if err == nil {
		err = parsedKey.Validate()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("cannot use %s: %w: %w", dir, ErrKey, err)
	}
	cert, err := pki.ParseCert(crt)
	switch {
	case err != nil:
	case !cert.IsCA:
		err = errors.New("it may not sign others")
	case s.opts.Maker.Time().After(cert.NotAfter):
		err = fmt.Errorf("it expired on %s", cert.NotAfter.Format(time.DateOnly))
	default:
		err = pki.Matches(cert, parsedKey.Public())
	}
	if err != nil {
		return nil, nil, fmt.Errorf("cannot use %s: %w: %w", dir, ErrCert, err)
	}
	return crt, key, nil
}

// ReplaceCA installs the CA of dir, or with dir "" a new one with a new key, and issues every
// certificate under it and every kubeconfig again, with new keys for the clients' ones. Call
// [Store.Backup] before. If it is interrupted, [Store.Undo] brings the old state back, and
// running it again finishes.
func (s *Store) ReplaceCA(ctx context.Context, dir string) (Change, error) {
	var crt, key []byte
	var err error
	if dir != "" {
		crt, key, err = s.readCA(dir)
	} else {
		crt, key, err = s.newCA()
	}
	if err != nil {
		return Change{}, err
	}
	a := fileaccess.For(s.env)
	// The key first: a crash in between is seen at the next start as a pair that does not
	// match, never as certificates of two CAs.
	if err := a.WriteSecret(s.key(CA), key); err != nil {
		return Change{}, err
	}
	if err := a.WriteShared(s.crt(CA), crt); err != nil {
		return Change{}, err
	}
	hostname, err := s.nodeName()
	if err != nil {
		return Change{}, err
	}
	for _, sp := range specs(hostname) {
		if sp.issuer == CA && !sp.server { // nodes that left must not keep valid credentials
			if err := os.Remove(s.key(sp.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return Change{}, fmt.Errorf("cannot replace the key: %w", err)
			}
		}
	}
	change, err := s.Renew(ctx)
	if err == nil {
		change.Issued = slices.Insert(change.Issued, 0, CA)
		change.Restart = []string{"kubelite", "cluster-agent"} // every running trust in the old CA
	}
	return change, err
}

func (s *Store) newCA() (crt, keyPEM []byte, err error) {
	key, err := s.opts.Maker.Key(2048)
	if err != nil {
		return nil, nil, err
	}
	ips, err := serviceIPs(s.env)
	if err != nil {
		return nil, nil, err
	}
	der, err := s.opts.Maker.Issue(pki.Request{Subject: pkix.Name{CommonName: ips[0].String()}, Days: caDays, CA: true}, key.Public(), nil, key)
	if err != nil {
		return nil, nil, err
	}
	return pki.EncodeCert(der), pki.EncodeKey(key), nil
}

// KeptBackups is how many backups are kept beside the last one.
const KeptBackups = 5

// BackupDir is where Backup copies to. Earlier backups are beside it, with the date at which each was
// made behind the name.
func (s *Store) BackupDir() string { return filepath.Join(s.env.Data, "certs-backup") }

// BackedUp returns a file of the last backup, such as ca.crt.
func (s *Store) BackedUp(name string) ([]byte, error) {
	return os.ReadFile(filepath.Join(s.BackupDir(), "certs", name))
}

// Backup copies certificates and credentials aside. The backup of before is kept, and its new path
// returned, "" if there was none; of such ones the oldest go beyond [KeptBackups].
func (s *Store) Backup() (earlier string, err error) {
	if earlier, err = s.backup(); err != nil {
		return "", fmt.Errorf("cannot back up the certificates: %w", err)
	}
	return earlier, nil
}

func (s *Store) backup() (earlier string, err error) {
	staging := s.BackupDir() + ".new"
	if err := os.RemoveAll(staging); err != nil {
		return "", err
	}
	for from, name := range map[string]string{s.env.CertsDir(): "certs", s.env.CredentialsDir(): "credentials"} {
		if err := os.MkdirAll(filepath.Join(staging, name), 0o700); err != nil {
			return "", err
		}
		if err := copyFiles(from, filepath.Join(staging, name)); err != nil {
			return "", errors.Join(err, os.RemoveAll(staging))
		}
	}
	if err := os.Chmod(staging, 0o700); err != nil {
		return "", err
	}
	if st, err := os.Lstat(s.BackupDir()); err == nil {
		if earlier, err = s.keep(st.ModTime()); err != nil {
			return "", err
		}
	}
	return earlier, os.Rename(staging, s.BackupDir())
}

// keep moves the last backup to a name of its own, and removes the oldest ones.
func (s *Store) keep(made time.Time) (string, error) {
	prefix := s.BackupDir() + "-"
	to := prefix + made.UTC().Format("2006-01-02-15-04-05")
	for name, i := to, 2; ; i++ {
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			break
		}
		to = name + "." + strconv.Itoa(i)
	}
	if err := os.Rename(s.BackupDir(), to); err != nil {
		return "", err
	}
	all, err := filepath.Glob(prefix + "*") // in the order of their dates
	if err != nil {
		return "", err
	}
	all = slices.DeleteFunc(all, func(path string) bool { return path == to })
	for ; len(all) >= KeptBackups; all = all[1:] {
		if err := os.RemoveAll(all[0]); err != nil {
			return "", err
		}
	}
	return to, nil
}

// Undo puts certificates and credentials back as Backup found them and removes what was added
// since. The error wraps ErrNoSaved when there is no backup. It may be run again.
func (s *Store) Undo() error {
	if _, err := os.Stat(s.BackupDir()); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot go back to earlier certificates: %w", ErrNoSaved)
	}
	for to, name := range map[string]string{s.env.CertsDir(): "certs", s.env.CredentialsDir(): "credentials"} {
		from := filepath.Join(s.BackupDir(), name)
		if err := copyFiles(from, to); err != nil {
			return fmt.Errorf("cannot go back to earlier certificates: %w", err)
		}
		entries, err := os.ReadDir(to)
		if err != nil {
			return fmt.Errorf("cannot go back to earlier certificates: %w", err)
		}
		for _, e := range entries {
			if _, err := os.Lstat(filepath.Join(from, e.Name())); errors.Is(err, fs.ErrNotExist) && e.Type().IsRegular() {
				if err := os.Remove(filepath.Join(to, e.Name())); err != nil {
					return fmt.Errorf("cannot go back to earlier certificates: %w", err)
				}
			}
		}
	}
	return nil
}

// copyFiles copies the regular files of one directory with mode and owner.
func copyFiles(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		path := filepath.Join(from, e.Name())
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := atomicfile.Write(filepath.Join(to, e.Name()), data, st.Mode().Perm(), fileaccess.OwnerOf(st)); err != nil {
			return err
		}
	}
	return nil
}

// Check reads every certificate that is there with its key and says which do not belong
// together or cannot be read. It changes nothing, but finishes a replacement that was interrupted.
func Check(env snapenv.Env) error {
	errs := []error{Finish(env)}
	for _, name := range []string{CA, FrontProxyCA, Server, FrontProxyClient, Kubelet, "apiserver-kubelet-client"} {
		crt, keyFile := env.Cert(name+".crt"), env.Cert(name+".key")
		cert, _, err := readCert(crt)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the program that needs it says so
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		data, err := os.ReadFile(keyFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var key *rsa.PrivateKey
		if err == nil {
			key, err = pki.ParseKey(data)
		}
		if err == nil {
			err = pki.Matches(cert, key.Public())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot use %s with %s: %w; restore the pair, or run: microk8s refresh-certs --undo", crt, keyFile, err))
		}
	}
	return errors.Join(errs...)
}
