package server

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
)

// certificate is a key pair on disk, read again when its files were replaced.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu     sync.Mutex
	pair   *tls.Certificate
	loaded [2]os.FileInfo // as they were when pair was read
}

// get is a tls.Config.GetCertificate. While the files do not fit together, as between the
// replacement of one and of the other, the previous pair is used.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var now [2]os.FileInfo
	same := c.pair != nil
	for i, path := range []string{c.certFile, c.keyFile} {
		st, err := os.Stat(path)
		if err != nil {
			return c.fallback(err)
		}
		now[i] = st
		was := c.loaded[i]
		same = same && was != nil && os.SameFile(was, st) && was.ModTime().Equal(st.ModTime()) && was.Size() == st.Size()
	}
	if same {
		return c.pair, nil
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return c.fallback(err)
	}
	if c.pair != nil {
		c.log.Info("using a new certificate", "file", c.certFile)
	}
	c.pair, c.loaded = &pair, now
	return c.pair, nil
}

func (c *certificate) fallback(err error) (*tls.Certificate, error) {
	if c.pair != nil {
		c.log.Warn("still using the previous certificate", "file", c.certFile, "err", err)
		return c.pair, nil
	}
	return nil, fmt.Errorf("cannot use the certificate %s with the key %s: %w", c.certFile, c.keyFile, err)
}
