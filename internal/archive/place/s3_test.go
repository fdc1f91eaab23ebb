package place

import (
	"bytes"
	"crypto/rand"
	"crypto/x509/pkix"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"microk8s/internal/longtest"
	"microk8s/internal/pki"
	"microk8s/internal/pki/pkitest"
)

// s3Server starts a real S3 server with the bucket "backups" and returns its address, keys and CA file.
func s3Server(t *testing.T) (endpoint string, keys Keys, ca string) {
	t.Helper()
	program, err := filepath.Abs("../../../build/peers/versitygw")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("this test needs an S3 server; build it with: make build/peers/versitygw.stamp (%v)", err)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "data/backups"), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	maker := pkitest.Maker(nil)
	key, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "s3"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Days: 1, CA: true, ServerAuth: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	ca = filepath.Join(dir, "s3.crt")
	for file, data := range map[string][]byte{ca: pki.EncodeCert(der), filepath.Join(dir, "s3.key"): pki.EncodeKey(key)} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var said bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program, "--port", address, "--cert", ca, "--key", filepath.Join(dir, "s3.key"), "posix", "--sidecar", dir, filepath.Join(dir, "data"))
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY=an-id", "ROOT_SECRET_KEY=a-secret")
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	})
	for {
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			c.Close()
			break
		}
		if cmd.ProcessState != nil || t.Context().Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return "https://" + address, Keys{"an-id", "a-secret"}, ca
}

// TestBucket: a real S3 server, over TLS, with and without a folder, with wrong keys and without the
// bucket.
func TestBucket(t *testing.T) {
	longtest.Only(t)
	endpoint, keys, ca := s3Server(t)
	for _, folder := range []string{"", "/home/lab/"} {
		p, err := Open("s3://backups"+folder+"?endpoint="+endpoint+"&ca="+ca, keys)
		if err != nil {
			t.Fatal(err)
		}
		behaves(t, p)
	}
	p, err := Open("s3://backups?endpoint="+endpoint+"&ca="+ca, keys)
	if err != nil {
		t.Fatal(err)
	}
	// Larger than a part: what comes back is what was sent.
	large := make([]byte, 40<<20)
	if _, err := rand.Read(large); err != nil {
		t.Fatal(err)
	}
	if err := p.Put(t.Context(), "large", bytes.NewReader(large), int64(len(large))); err != nil {
		t.Fatal(err)
	}
	r, err := p.Get(t.Context(), "large")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	r.Close()
	if err != nil || !bytes.Equal(got, large) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for name, tc := range map[string]struct {
		word string
		keys Keys
		says string
	}{
		"wrong keys":   {"s3://backups?endpoint=" + endpoint + "&ca=" + ca, Keys{"an-id", "wrong"}, "refuses the keys"},
		"no bucket":    {"s3://nonesuch?endpoint=" + endpoint + "&ca=" + ca, keys, "has no bucket \"nonesuch\""},
		"unknown CA":   {"s3://backups?endpoint=" + endpoint, keys, "certificate"},
		"nobody there": {"s3://backups?endpoint=https://127.0.0.1:1", keys, "refused"},
	} {
		p, err := Open(tc.word, tc.keys)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Put(t.Context(), "x", strings.NewReader("x"), 1); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
