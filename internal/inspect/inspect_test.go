package inspect

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"microk8s/internal/service"
	"microk8s/internal/service/servicetest"
	"microk8s/internal/snapenv"
)

// fakeRunner stands in for the machine's programs; those that are not in its table are not
// installed.
type fakeRunner map[string]string

func (f fakeRunner) run(_ context.Context, argv ...string) ([]byte, error) {
	line := strings.Join(append([]string{filepath.Base(argv[0])}, argv[1:]...), " ")
	for prefix, out := range f {
		if strings.HasPrefix(line, prefix) {
			return []byte(out), nil
		}
	}
	return nil, &exec.Error{Name: argv[0], Err: exec.ErrNotFound}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// unpack returns the files of a report.
func unpack(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(data)
	}
}

func randomHex(t *testing.T, n int) string {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

func newKey(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
}

// TestNoSecretGetsOut plants a secret of its own into every file of the node that holds one,
// repeats all of them, in every coding, wherever the report collects from, and looks for them
// in the tarball.
func TestNoSecretGetsOut(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	var secrets []string
	plant := func(s string) string {
		secrets = append(secrets, s)
		return s
	}
	plantKey := func() string {
		key := newKey(t)
		for _, line := range strings.Split(key, "\n") {
			if line != "" && !strings.HasPrefix(line, "-----") {
				secrets = append(secrets, line)
			}
		}
		return key
	}
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

	// The node's own secret files.
	for _, name := range []string{"ca", "front-proxy-ca", "server", "front-proxy-client", "client", "kubelet", "proxy", "serviceaccount"} {
		write(t, env.Cert(name+".key"), plantKey())
	}
	write(t, filepath.Join(env.BackendLive(), "cluster.key"), plantKey())
	write(t, filepath.Join(env.Data, "certs-backup/certs/ca.key"), plantKey())
	write(t, filepath.Join(env.Data, "certs-backup-2026-11-01-12-00-00/certs/ca.key"), plantKey())
	for _, name := range []string{"client.config", "kubelet.config", "controller.config"} {
		key := plantKey()
		write(t, env.Credential(name), fmt.Sprintf("apiVersion: v1\nclusters:\n- cluster:\n    server: https://127.0.0.1:16443\n  name: microk8s-cluster\nusers:\n- name: admin\n  user:\n    client-key-data: %s\n    token: %s\n    password: %q\n",
			b64(key), plant(randomHex(t, 20)), plant("pw-"+randomHex(t, 9))))
	}
	write(t, env.Credential("cluster-tokens.txt"), plant(randomHex(t, 16))+"|1893456000\n"+plant(randomHex(t, 16))+"\n")
	write(t, env.Credential("persistent-cluster-tokens.txt"), plant(randomHex(t, 16))+"\n")
	write(t, env.Credential("certs-request-tokens.txt"), plant(randomHex(t, 16))+"-kubelet\n")
	write(t, env.Credential("callback-token.txt"), plant("CB"+randomHex(t, 31))+"\n")
	write(t, env.Credential("callback-tokens.txt"), "10.0.0.2:25000 "+plant("CB"+randomHex(t, 31))+"\n")
	write(t, env.Credential("known_tokens.csv"), plant("KT"+randomHex(t, 20))+",admin,admin,\"system:masters\"\n")
	fromFiles := slices.Clone(secrets)

	// Secrets that are in no secret file: only their surroundings give them away.
	jwt := "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ." + "eyJpc3MiOiJrdWJlcm5ldGVzIn0" + plant(randomHex(t, 12)) + ".c2ln" + plant(randomHex(t, 12))
	loose := []string{
		"HTTPS_PROXY=http://user:" + plant("px"+randomHex(t, 8)) + "@proxy.example:3128",
		"--etcd-password=" + plant("ep"+randomHex(t, 8)),
		"--token " + plant("st"+randomHex(t, 8)),
		`Authorization = ["Basic ` + plant(b64("user:"+randomHex(t, 8))) + `"]`,
		"Authorization: Bearer " + jwt,
		`{"secret":"` + plant("js"+randomHex(t, 8)) + `","apiKey": "` + plant("ak"+randomHex(t, 8)) + `"}`,
		"DB_PASSWORD: '" + plant("db"+randomHex(t, 8)) + "'",
		"microk8s join 10.0.0.1:25000/" + plant(randomHex(t, 16)) + "/" + randomHex(t, 6),
		plantKey(),
	}
	var everything strings.Builder
	for _, s := range loose {
		everything.WriteString(s + "\n")
	}
	for _, s := range fromFiles {
		fmt.Fprintf(&everything, "seen %s and %s\n", s, hex.EncodeToString([]byte(s)))
		for shift := range 3 {
			fmt.Fprintf(&everything, "coded %s %s\n", b64("abc"[:shift]+s+"tail"), base64.URLEncoding.EncodeToString([]byte("abc"[:shift]+s)))
		}
	}
	noise := "an ordinary line stays\n"

	// Everything that is collected.
	for _, name := range []string{"kubelet", "kube-apiserver", "containerd-env", "kubectl-env", "containerd.toml", "certs.d/docker.io/hosts.toml", "own.conf"} {
		write(t, env.Args(name), noise+everything.String())
	}
	write(t, env.Args("user.key"), everything.String())
	for _, n := range append(service.Names(), "supervisor") {
		write(t, env.ServiceLog(n), noise+everything.String())
	}
	for _, n := range []string{"cluster.yaml", "info.yaml"} {
		write(t, filepath.Join(env.Backend(), n), noise+everything.String())
	}
	write(t, env.BOM(), noise+everything.String())
	write(t, env.Cert("ca.crt"), everything.String())
	all := noise + everything.String()
	runner := fakeRunner{"ip": all, "ss": all, "nft": all, "df": all, "dmesg": all, "iptables": all, "aa-status": all, "kubectl": all}
	pods := `{"items":[{"metadata":{"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"` + plant("la"+randomHex(t, 8)) +
		`"}},"spec":{"containers":[{"name":"c","env":[{"name":"PIN","value":"` + plant("pin"+randomHex(t, 8)) + `"}]}]}}]}`
	runs := func(ctx context.Context, argv ...string) ([]byte, error) {
		if argv[len(argv)-1] == "json" {
			return []byte(pods), nil
		}
		return runner.run(ctx, argv...)
	}

	var out bytes.Buffer
	in := &Inspector{Env: env, Manager: &servicetest.Manager{}, Out: &out, Now: time.Now, Run: runs}
	path, err := in.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	files := unpack(t, path)
	files["the terminal"] = out.String()
	if !strings.Contains(out.String(), "certs.d/docker.io/hosts.toml:") {
		t.Errorf("nothing is said of a hosts.toml that containerd cannot read:\n%s", &out)
	}
	for name, text := range files {
		for _, s := range secrets {
			for _, form := range append(forms(s), base64.StdEncoding.EncodeToString([]byte(s))) {
				if i := strings.Index(text, form); i >= 0 {
					t.Errorf("%s holds a secret: …%s…", name, text[max(0, i-40):min(len(text), i+len(form)+10)])
				}
			}
		}
	}
	for _, name := range []string{"args/kubelet", "snap.microk8s.daemon-kubelite/journal.log", "dqlite/info.yaml", "network/ip-addr", "k8s/get-all"} {
		text := files["inspection-report/"+name]
		if !strings.HasPrefix(text, noise) || !strings.Contains(text, removed) {
			t.Errorf("%s is not the collected text: %.80q", name, text)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("mode of the report: %v, %v", fi.Mode(), err)
	}
}

func TestOrdinaryTextStays(t *testing.T) {
	r := newRedactor(map[string]bool{})
	for _, line := range []string{
		"--service-account-private-key-file=${SNAP_DATA}/certs/serviceaccount.key",
		"--authentication-token-webhook=true",
		"--authentication-token-webhook-cache-ttl=2m0s",
		"--authorization-mode=Node,RBAC",
		"--anonymous-auth=false",
		"--tls-private-key-file=/var/snap/microk8s/current/certs/server.key",
		"--use-service-account-credentials",
		"the token expired an hour ago",
		"I0102 15:04:05.000000 1 server.go:88] \"Serving\" address=\"0.0.0.0:10250\"",
		"image sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
		"https://127.0.0.1:16443/api/v1/namespaces/kube-system/secrets",
	} {
		if got := r.Redact(line); got != line {
			t.Errorf("%q became %q", line, got)
		}
	}
}

func TestStoppedServiceIsTold(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.Data, 0o755); err != nil {
		t.Fatal(err)
	}
	m := &servicetest.Manager{Phases: map[string]service.Phase{service.Kubelite: service.Stopped}}
	var out bytes.Buffer
	in := &Inspector{Env: env, Manager: m, Out: &out, Now: func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }, Run: fakeRunner{}.run}
	path, err := in.Inspect(t.Context())
	if !errors.Is(err, ErrDown) {
		t.Errorf("error: %v, want ErrDown", err)
	}
	if want := filepath.Join(env.Data, "inspection-report-20260102_030405.tar.gz"); path != want {
		t.Errorf("report at %s, want %s", path, want)
	}
	for _, want := range []string{
		"  Service snap.microk8s.daemon-containerd is running\n",
		" FAIL:  Service snap.microk8s.daemon-kubelite is not running\n",
		"  Report tarball is at " + path + "\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, out.String())
		}
	}
	left, _ := filepath.Glob(env.Data + "/.inspection-report*")
	if len(left) > 0 {
		t.Errorf("temporary files left: %v", left)
	}
}

func TestInterruptedInspectionLeavesNothing(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if err := os.MkdirAll(env.Data, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	in := &Inspector{Env: env, Manager: &servicetest.Manager{}, Out: io.Discard, Now: time.Now, Run: fakeRunner{}.run}
	if _, err := in.Inspect(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error: %v", err)
	}
	if entries, _ := os.ReadDir(env.Data); len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
}

// TestSilentAPIServer: what the API server does not answer is asked for once, and the report says so.
func TestSilentAPIServer(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	if err := errors.Join(os.MkdirAll(env.Data, 0o755), os.MkdirAll(env.CredentialsDir(), 0o755), os.WriteFile(env.AdminKubeconfig(), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	var asked []string
	in := &Inspector{Env: env, Manager: &servicetest.Manager{}, Out: io.Discard, Now: time.Now, Run: func(_ context.Context, argv ...string) ([]byte, error) {
		if filepath.Base(argv[0]) == "kubectl" {
			asked = append(asked, argv[len(argv)-1])
			return []byte("net/http: request canceled"), errors.New("exit status 1")
		}
		return nil, fs.ErrNotExist
	}}
	path, err := in.Inspect(t.Context())
	if err != nil && !errors.Is(err, ErrDown) {
		t.Fatal(err)
	}
	files := unpack(t, path)
	if len(asked) != 1 || !strings.Contains(files["inspection-report/k8s/left-out"], "net/http: request canceled\nthe API server did not answer") {
		t.Errorf("asked for %q; the report says %q", asked, files["inspection-report/k8s/left-out"])
	}
}
