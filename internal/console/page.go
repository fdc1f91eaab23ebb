package console

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"embed"
	"io"
	"io/fs"
	"net/http"
	"path"
	"regexp"
	"strings"
)

// page has what `make console` built, each file compressed: index.html.gz, and assets/NAME-HASH.EXT.gz.
//
//go:embed all:page
var page embed.FS

// noPage is served by a program that was built without the page.
const noPage = "This program was built without the page of the console: run make console, then make build.\n"

// Built reports whether the page is in this program.
func Built() bool {
	_, err := fs.Stat(page, "page/index.html.gz")
	return err == nil
}

// noncePlace is replaced in index.html by a value that is new for each answer. The terminal makes style
// elements with it; nothing else is allowed to be inline.
const noncePlace = "NONCE-OF-THIS-ANSWER"

func (s *Server) index(w http.ResponseWriter, r *http.Request) {
	data, err := page.ReadFile("page/index.html.gz")
	if err != nil {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, noPage)
		return
	}
	text, err := gunzip(data)
	if err != nil {
		fail(w, http.StatusInternalServerError, "", "the page cannot be read: %v", err)
		return
	}
	nonce := rand.Text()
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-"+nonce+"'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "+
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
	h.Set("Content-Type", "text/html; charset=utf-8")
	if r.Method == http.MethodGet {
		_, _ = w.Write(bytes.ReplaceAll(text, []byte(noncePlace), []byte(nonce)))
	}
}

var assetName = regexp.MustCompile(`^/assets/[A-Za-z0-9._-]+$`)

// types of assets; a browser runs nothing of another type.
var types = map[string]string{".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml", ".txt": "text/plain; charset=utf-8"}

func (s *Server) asset(w http.ResponseWriter, r *http.Request) {
	name := r.URL.EscapedPath()
	kind := types[path.Ext(name)]
	data, err := page.ReadFile("page" + name + ".gz")
	if err != nil || kind == "" || !assetName.MatchString(name) {
		fail(w, http.StatusNotFound, "", "not found")
		return
	}
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("Cache-Control", "public, max-age=31536000, immutable") // the name has a hash
	h.Add("Vary", "Accept-Encoding")
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
	} else if data, err = gunzip(data); err != nil {
		fail(w, http.StatusInternalServerError, "", "the page cannot be read: %v", err)
		return
	}
	if r.Method == http.MethodGet {
		_, _ = w.Write(data)
	}
}

func gunzip(data []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}
