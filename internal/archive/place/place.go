// Package place is where archives are kept: a directory of this machine or of a network file system,
// or a bucket of a server that speaks S3. What is stored is not its business; names are plain.
package place

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Entry is a stored file.
type Entry struct {
	Name     string
	Size     int64 // bytes
	Modified time.Time
}

// Place keeps files. What is missing is an error that is fs.ErrNotExist.
type Place interface {
	// Put stores size bytes under a name. A reader of the place sees all of it or what was there before.
	Put(ctx context.Context, name string, r io.Reader, size int64) error
	// Get reads a file; the caller closes it.
	Get(ctx context.Context, name string) (io.ReadCloser, error)
	// List returns all files, sorted by name.
	List(ctx context.Context) ([]Entry, error)
	// Remove removes a file; one that is not there is no error.
	Remove(ctx context.Context, name string) error
}

// Keys are those of an S3 server; the zero value is none.
type Keys struct{ ID, Secret string }

// Open returns the place that a word names; nothing is asked yet.
//
//	/DIR                       a directory, which is made if its parent exists
//	nfs:/DIR                   the same, but it must lie on a network file system that is mounted
//	s3://BUCKET[/FOLDER]?endpoint=URL[&region=R][&ca=FILE]
func Open(word string, keys Keys) (Place, error) {
	if err := Check(word); err != nil {
		return nil, err
	}
	if strings.HasPrefix(word, "s3://") {
		return openBucket(word, keys)
	}
	dir, network := strings.CutPrefix(word, "nfs:")
	return &directory{dir: filepath.Clean(dir), network: network}, nil
}

// bucketName as S3 has it, without dots, which certificates of servers do not cover.
var bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$`)

// Check returns an error where a word names no place.
func Check(word string) error {
	const forms = "a place is /DIRECTORY, nfs:/DIRECTORY or s3://BUCKET/FOLDER?endpoint=https://HOST"
	rest, bucket := strings.CutPrefix(word, "s3://")
	switch {
	case word == "":
		return errors.New("no place was named; " + forms)
	case bucket:
		u, err := url.Parse(word)
		if err != nil {
			return fmt.Errorf("cannot read %q: %w; %s", word, err, forms)
		}
		if u.User != nil {
			return errors.New("the keys of an S3 server do not belong in its address, which everybody can read; name a file with --s3-credentials-file")
		}
		if !bucketName.MatchString(u.Host) {
			return fmt.Errorf("%q is not the name of a bucket; %s", u.Host, forms)
		}
		for name := range u.Query() {
			if !slices.Contains([]string{"endpoint", "region", "ca"}, name) {
				return fmt.Errorf("unknown option %q of %s; there are endpoint, region and ca", name, rest)
			}
		}
		end, err := url.Parse(u.Query().Get("endpoint"))
		if err != nil || end.Host == "" || end.Scheme != "https" && end.Scheme != "http" || end.Path != "" && end.Path != "/" {
			return fmt.Errorf("the address of the S3 server is missing or wrong; append ?endpoint=https://HOST[:PORT] to s3://%s", u.Host)
		}
		return nil
	}
	dir, _ := strings.CutPrefix(word, "nfs:")
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("%q is not the path of a directory, beginning with /; %s", word, forms)
	}
	return nil
}

// plain is what names look like: nothing that leads elsewhere.
var plain = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$`)

func checkName(name string) error {
	if !plain.MatchString(name) {
		return fmt.Errorf("%q is not the name of an archive: %w", name, fs.ErrInvalid)
	}
	return nil
}
