package images

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
)

// refused are forms of compression that are recognized, to say so, by their first bytes.
var refused = []struct{ name, magic string }{
	{"xz", "\xfd7zXZ\x00"},
	{"bzip2", "BZh"},
	{"lz4", "\x04\x22\x4d\x18"},
	{"zip", "PK\x03\x04"},
}

// decompress returns what r holds, unpacked when it is of gzip or zstd. Close it.
func decompress(r io.Reader) (io.ReadCloser, error) {
	buffered := bufio.NewReader(r)
	start, err := buffered.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	for _, f := range refused {
		if bytes.HasPrefix(start, []byte(f.magic)) {
			return nil, fmt.Errorf("it is compressed with %s; gzip and zstd are accepted, and archives that are not compressed", f.name)
		}
	}
	plain, err := compression.DecompressStream(buffered)
	if err != nil {
		return nil, fmt.Errorf("it is damaged: %w", err)
	}
	return plain, nil
}
