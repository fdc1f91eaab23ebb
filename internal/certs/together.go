package certs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"microk8s/internal/datastore/storedir"
	"microk8s/internal/fileaccess"
	"microk8s/internal/snapenv"
)

// A key and its certificate are two files, and a kubeconfig holds both. Where they are replaced together,
// what they become is first written into one file; whoever finds that file finishes the replacement. So no
// interruption leaves a key beside the certificate of another one.

// replacing is the name of that file, in the folder of certificates.
const replacing = ".replacing"

// newFile is one file of a replacement. Folders are named, not given as paths: a refresh of the
// snap in between changes those.
type newFile struct {
	Folder string `json:"folder"` // certs, credentials or datastore
	Name   string `json:"name"`
	Shared bool   `json:"shared,omitempty"` // readable by the group
	Text   []byte `json:"text"`             // none: the file is removed
}

func (f newFile) path(env snapenv.Env) (string, error) {
	if f.Name == "" || f.Name != filepath.Base(f.Name) {
		return "", fmt.Errorf("%q is no name of a file", f.Name)
	}
	switch f.Folder {
	case "certs":
		return env.Cert(f.Name), nil
	case "credentials":
		return env.Credential(f.Name), nil
	case "datastore":
		return storedir.Dir(env.BackendLive()).File(f.Name), nil
	}
	return "", fmt.Errorf("%q is no folder of certificates", f.Folder)
}

// alone keeps other processes from replacing files meanwhile.
func alone(env snapenv.Env, do func() error) error {
	dir, err := os.Open(env.CertsDir())
	if errors.Is(err, fs.ErrNotExist) {
		return do() // nothing is there that two could change
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("cannot lock the certificates: %w", err)
	}
	return do()
}

// replaceTogether replaces files, all or, after an interruption, all at the next [Finish].
func (s *Store) replaceTogether(files []newFile) error {
	return alone(s.env, func() error {
		if err := finish(s.env, nil); err != nil {
			return err
		}
		data, err := json.Marshal(files)
		if err != nil {
			return err
		}
		if err := fileaccess.For(s.env).WriteSecret(s.env.Cert(replacing), data); err != nil {
			return fmt.Errorf("cannot replace certificates: %w", err)
		}
		return finish(s.env, s.between)
	})
}

// ReplacePair replaces the key, the certificate and the kubeconfig of a worker's kubelet or kube-proxy.
func ReplacePair(env snapenv.Env, name string, crt, key, config []byte) error {
	return New(env, Options{}).replaceTogether([]newFile{
		{Folder: "certs", Name: name + ".key", Text: key},
		{Folder: "certs", Name: name + ".crt", Shared: true, Text: crt},
		{Folder: "credentials", Name: name + ".config", Text: config},
	})
}

// Finish ends a replacement of files that was interrupted. It belongs before anything reads them.
func Finish(env snapenv.Env) error {
	if _, err := os.Lstat(env.Cert(replacing)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return alone(env, func() error { return finish(env, nil) })
}

// finish calls between, in tests, before each file.
func finish(env snapenv.Env, between func()) error {
	data, err := os.ReadFile(env.Cert(replacing))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot finish the replacement of certificates: %w", err)
	}
	var files []newFile
	if err := json.Unmarshal(data, &files); err != nil {
		return fmt.Errorf("cannot finish the replacement of certificates: %s is damaged: %w; restore the certificates with: microk8s refresh-certs --undo", env.Cert(replacing), err)
	}
	for _, f := range files {
		if between != nil {
			between()
		}
		path, err := f.path(env)
		if err != nil {
			return fmt.Errorf("cannot finish the replacement of certificates: %w", err)
		}
		switch access := fileaccess.For(env); {
		case f.Text == nil:
			err = os.Remove(path)
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		case f.Shared:
			err = access.WriteShared(path, f.Text)
		default:
			err = access.WriteSecret(path, f.Text)
		}
		if err != nil {
			return fmt.Errorf("cannot finish the replacement of certificates: %w", err)
		}
	}
	if between != nil {
		between()
	}
	return os.Remove(env.Cert(replacing))
}
