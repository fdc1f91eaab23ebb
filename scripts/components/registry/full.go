package main

import (
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry"
)

// fullBelow is what is left of a disk, in bytes, that has no room for a piece of an image.
const fullBelow = 1 << 20

// fullAnswer has the form of the registry API's errors.
const fullAnswer = `{"errors":[{"code":"UNKNOWN","message":"the disk of the registry is full"}]}` + "\n"

func init() {
	registry.RegisterHandler(func(config *configuration.Configuration, next http.Handler) http.Handler {
		root, _ := config.Storage.Parameters()["rootdirectory"].(string)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet || r.Method == http.MethodHead {
				next.ServeHTTP(w, r)
				return
			}
			answer := &fullWriter{ResponseWriter: w, root: root}
			next.ServeHTTP(answer, r)
			if answer.full {
				forget(root, r.URL.Path)
			}
		})
	})
}

// fullWriter says that the disk is full where that is why a push fails: Distribution answers
// "500 unknown error".
type fullWriter struct {
	http.ResponseWriter
	root string
	full bool // and the client knows
}

func (w *fullWriter) WriteHeader(code int) {
	if code != http.StatusInternalServerError || !full(w.root) {
		w.ResponseWriter.WriteHeader(code)
		return
	}
	w.full = true
	w.Header().Del("Content-Length")
	w.ResponseWriter.WriteHeader(http.StatusInsufficientStorage)
	_, _ = io.WriteString(w.ResponseWriter, fullAnswer)
}

func (w *fullWriter) Write(p []byte) (int, error) {
	if w.full {
		return len(p), nil
	}
	return w.ResponseWriter.Write(p)
}

// Unwrap is for http.ResponseController.
func (w *fullWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// forget deletes what has come of an upload that failed: the client begins anew, and the
// registry itself would keep it for a week.
func forget(root, url string) {
	name, id, ok := strings.Cut(path.Clean(url), "/blobs/uploads/")
	if name, found := strings.CutPrefix(name, "/v2/"); ok && found && !strings.Contains(id, "/") {
		_ = os.RemoveAll(filepath.Join(root, "docker/registry/v2/repositories", name, "_uploads", id))
	}
}

func full(dir string) bool {
	var fs syscall.Statfs_t
	return syscall.Statfs(dir, &fs) == nil && (fs.Bavail*uint64(fs.Bsize) < fullBelow || fs.Files > 0 && fs.Ffree == 0)
}
