package place

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

type bucket struct {
	client       *minio.Client
	host         string
	name, folder string
}

func openBucket(word string, keys Keys) (Place, error) {
	u, err := url.Parse(word)
	if err != nil {
		return nil, err
	}
	if keys.ID == "" || keys.Secret == "" {
		return nil, errors.New("the keys of the S3 server are missing: name a file that has them, with --s3-credentials-file")
	}
	end, err := url.Parse(u.Query().Get("endpoint"))
	if err != nil {
		return nil, err
	}
	transport, err := minio.DefaultTransport(end.Scheme == "https")
	if err != nil {
		return nil, err
	}
	transport.ResponseHeaderTimeout = time.Minute
	if file := u.Query().Get("ca"); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("cannot read the certificate of the S3 server's CA: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in it", file)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	client, err := minio.New(end.Host, &minio.Options{
		Creds: credentials.NewStaticV4(keys.ID, keys.Secret, ""), Secure: end.Scheme == "https", Transport: transport,
		Region: u.Query().Get("region"), BucketLookup: minio.BucketLookupPath,
		// Checksums in trailers are refused by some servers over plain HTTP. An archive has its own.
		TrailingHeaders: false,
	})
	if err != nil {
		return nil, fmt.Errorf("cannot use the S3 server %s: %w", end.Host, err)
	}
	// One slash between folder and name: some servers take two for one, others do not.
	return &bucket{client: client, host: end.Host, name: u.Host, folder: strings.Trim(path.Clean("/"+u.Path), "/")}, nil
}

func (b *bucket) key(name string) string { return strings.TrimPrefix(b.folder+"/"+name, "/") }

// failed says which server did what, and makes what is missing fs.ErrNotExist.
func (b *bucket) failed(what string, err error) error {
	switch minio.ToErrorResponse(err).Code {
	case minio.NoSuchKey:
		return fmt.Errorf("cannot %s: %w", what, fs.ErrNotExist)
	case minio.NoSuchBucket:
		return fmt.Errorf("cannot %s: the S3 server %s has no bucket %q; make it there", what, b.host, b.name)
	case minio.AccessDenied, "InvalidAccessKeyId", "SignatureDoesNotMatch":
		return fmt.Errorf("cannot %s: the S3 server %s refuses the keys for the bucket %q: %w", what, b.host, b.name, err)
	}
	return fmt.Errorf("cannot %s at the S3 server %s: %w", what, b.host, err)
}

func (b *bucket) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if err := checkName(name); err != nil {
		return err
	}
	got, err := b.client.PutObject(ctx, b.name, b.key(name), r, size, minio.PutObjectOptions{ContentType: "application/octet-stream", DisableContentSha256: false})
	if err != nil {
		return b.failed("store the backup", err)
	}
	if got.Size != size {
		return fmt.Errorf("the S3 server %s stored %d of %d bytes", b.host, got.Size, size)
	}
	return nil
}

func (b *bucket) Get(ctx context.Context, name string) (io.ReadCloser, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	o, err := b.client.GetObject(ctx, b.name, b.key(name), minio.GetObjectOptions{})
	if err == nil {
		if _, err = o.Stat(); err != nil { // only now it is asked
			o.Close()
		}
	}
	if err != nil {
		return nil, b.failed("read the backup", err)
	}
	return o, nil
}

func (b *bucket) List(ctx context.Context) (out []Entry, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the channel ends with it
	prefix := b.key("")
	for o := range b.client.ListObjects(ctx, b.name, minio.ListObjectsOptions{Prefix: prefix, Recursive: false}) {
		if o.Err != nil {
			return nil, b.failed("list the backups", o.Err)
		}
		name := strings.TrimPrefix(o.Key, prefix)
		if checkName(name) == nil {
			out = append(out, Entry{name, o.Size, o.LastModified.UTC()})
		}
	}
	return out, nil // in the order of names, as S3 has it
}

func (b *bucket) Remove(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	if err := b.client.RemoveObject(ctx, b.name, b.key(name), minio.RemoveObjectOptions{}); err != nil && minio.ToErrorResponse(err).StatusCode != http.StatusNotFound {
		return b.failed("remove a backup", err)
	}
	return nil
}
