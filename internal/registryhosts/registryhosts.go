// Package registryhosts checks the files args/certs.d/REGISTRY/hosts.toml, which say where images
// are pulled from, with containerd's own parser. containerd itself logs what it cannot read and
// then asks the original registry, as if the file were not there.
package registryhosts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
)

const file = "hosts.toml"

// CheckAll checks the file of each registry below root, args/certs.d of a node, and what the
// files name. It returns one error for each file that pulls would pass over or fail with.
func CheckAll(root string) []error {
	files, _ := filepath.Glob(filepath.Join(root, "*", file)) // the only error is a bad pattern
	var errs []error
	for _, path := range files {
		data, err := os.ReadFile(path)
		if err == nil {
			if err = check(path, filepath.Dir(path)); err == nil {
				err = unknownKeys(path, data)
			}
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// Check checks the text of a file that is going to be named name: whether containerd can read it.
// Certificates that it names need not be there yet, and keys may be those of another version.
func Check(name string, text []byte) error {
	dir, err := os.MkdirTemp("", "hosts-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
		return err
	}
	err = check(name, dir)
	if errors.As(err, &unusable{}) {
		return nil
	}
	return err
}

// unusable is the error of a file that can be read, and names what cannot be used.
type unusable struct{ error }

func (u unusable) Unwrap() error { return u.error }

// check has containerd read the file in dir as for a pull. Its parser reports to a log only.
func check(name, dir string) error {
	var said error
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(hook(func(e *logrus.Entry) {
		if err, ok := e.Data[logrus.ErrorKey].(error); ok && e.Level <= logrus.ErrorLevel {
			said = err
		}
	}))
	ctx := log.WithLogger(context.Background(), logrus.NewEntry(logger))
	_, err := config.ConfigureHosts(ctx, config.HostOptions{HostDir: func(string) (string, error) { return dir, nil }})("registry.example")
	switch {
	case said != nil:
		return place(name, said)
	case err != nil:
		return unusable{fmt.Errorf("%s: %w", name, err)}
	}
	return nil
}

type hook func(*logrus.Entry)

func (hook) Levels() []logrus.Level { return logrus.AllLevels }

func (h hook) Fire(e *logrus.Entry) error {
	h(e)
	return nil
}

// unknownKeys finds keys that are not containerd's (its documentation of registry hosts), which it passes over: a
// typing error has no effect.
func unknownKeys(name string, text []byte) error {
	type host struct {
		Capabilities any `toml:"capabilities"`
		CA           any `toml:"ca"`
		Client       any `toml:"client"`
		SkipVerify   any `toml:"skip_verify"`
		Header       any `toml:"header"`
		OverridePath any `toml:"override_path"`
		DialTimeout  any `toml:"dial_timeout"`
	}
	var known struct {
		host
		Server any             `toml:"server"`
		Hosts  map[string]host `toml:"host"`
	}
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&known)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		row, _ := strict.Errors[0].Position()
		return fmt.Errorf("%s:%d: containerd does not know the key %s", name, row, strings.Join(strict.Errors[0].Key(), "."))
	}
	return place(name, err)
}

// place puts file and, where it is known, line in front of a parser's error.
func place(name string, err error) error {
	if err == nil {
		return nil
	}
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, _ := at.Position()
		return fmt.Errorf("%s:%d: %w", name, row, err)
	}
	return fmt.Errorf("%s: %w", name, err)
}
