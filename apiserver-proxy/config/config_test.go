package config_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"microk8s/apiserver-proxy/config"
	"microk8s/internal/longtest"
	"microk8s/internal/snapenv"
)

func TestAddress(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"10.0.0.1:16443", "10.0.0.1:16443"},
		{" 10.0.0.1:016443 ", "10.0.0.1:16443"},
		{"10.0.0.1", "10.0.0.1:16443"},
		{"https://10.0.0.1:6443/path?x", "10.0.0.1:6443"},
		{"https://10.0.0.1", "10.0.0.1:16443"},
		{"https://[fd00::1]:6443", "[fd00::1]:6443"},
		{"[fd00::1]:16443", "[fd00::1]:16443"},
		{"[FD00:0::1]:16443", "[fd00::1]:16443"},
		{"fd00::1", "[fd00::1]:16443"},
		{"[fd00::1]", "[fd00::1]:16443"},
		{"::ffff:10.0.0.1", "10.0.0.1:16443"},
		{"fe80::1%eth0", "[fe80::1%eth0]:16443"},
		{"balancer.example.com:443", "balancer.example.com:443"},
		{"balancer", "balancer:16443"},
		{"", ""}, {"[", ""}, {"[::1", ""}, {"::1]", ""}, {"[::1]x", ""}, {"fe80::1%a]:16443", ""}, {":16443", ""}, {"0.0.0.0:16443", ""}, {"[::]:16443", ""}, {"224.0.0.1:16443", ""},
		{"10.0.0.1:0", ""}, {"10.0.0.1:65536", ""}, {"10.0.0.1:x", ""}, {"10.0.0.1:-1", ""}, {"10.0.0.1:+1", ""},
		{"a b:1", ""}, {"a/b:1", ""}, {"a..b:1", ""}, {"<APISERVER>:1", ""}, {"https://%zz", ""}, {"a:b:c", ""},
		{strings.Repeat("a", 300) + ":1", ""},
	} {
		got, err := config.Address(tc.text)
		if got != tc.want || (err != nil) != (tc.want == "") {
			t.Errorf("%q: %q, %v; want %q", tc.text, got, err, tc.want)
		}
	}
}

func TestAddresses(t *testing.T) {
	good, bad := config.Addresses([]string{"10.0.0.2:1", "x y", "10.0.0.1", "https://10.0.0.1:16443"})
	if want := []string{"10.0.0.1:16443", "10.0.0.2:1"}; !slices.Equal(good, want) || len(bad) != 1 {
		t.Errorf("%q %v", good, bad)
	}
	var many []string
	for i := range config.MaxServers + 5 {
		many = append(many, fmt.Sprintf("10.0.0.%d:1", i+1))
	}
	good, bad = config.Addresses(many)
	if len(good) != config.MaxServers || len(bad) != 1 || !strings.Contains(bad[0].Error(), "5 are left out") {
		t.Errorf("%d %v", len(good), bad)
	}
}

func TestParseStatic(t *testing.T) {
	const upstream = "entryPoints:\n  apiserver:\n    address: \":16443\"\nproviders:\n  file:\n    filename: /p.yaml\n    watch: true\n"
	for _, tc := range []struct {
		name, text string
		want       config.Static
		ignored    string // part of what is said of the rest
		err        string
	}{
		{"upstream's", upstream, config.Static{Address: ":16443", ProviderFile: "/p.yaml", Watch: true}, "", ""},
		{"empty", "", config.Static{Address: config.DefaultAddress, Watch: true}, "", ""},
		{"not watched", "providers: {file: {watch: false}}", config.Static{Address: config.DefaultAddress}, "", ""},
		{"IPv6", `entryPoints: {apiserver: {address: "[::1]:1"}}`, config.Static{Address: "[::1]:1", Watch: true}, "", ""},
		{"more of traefik", upstream + "log: {level: DEBUG}\n", config.Static{Address: ":16443", ProviderFile: "/p.yaml", Watch: true}, "log", ""},
		{"no port", `entryPoints: {apiserver: {address: "127.0.0.1"}}`, config.Static{}, "", "host:port"},
		{"bad port", `entryPoints: {apiserver: {address: "127.0.0.1:http"}}`, config.Static{}, "", "not a port"},
		{"no YAML", "\t{", config.Static{}, "", "YAML"},
		{"a list", "- x", config.Static{}, "", "YAML"},
		{"wrong kind", "entryPoints: 7", config.Static{}, "", "YAML"},
	} {
		got, err := config.ParseStatic([]byte(tc.text))
		ignored := got.Ignored
		got.Ignored = nil
		switch {
		case tc.err != "":
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%s: %v, want %q", tc.name, err, tc.err)
			}
		case err != nil || got != tc.want:
			t.Errorf("%s: %+v, %v", tc.name, got, err)
		case (ignored != nil) != (tc.ignored != "") || ignored != nil && !strings.Contains(ignored.Error(), tc.ignored):
			t.Errorf("%s: ignored %v, want %q", tc.name, ignored, tc.ignored)
		}
	}
}

func FuzzParseStatic(f *testing.F) {
	f.Add([]byte("entryPoints:\n  apiserver:\n    address: \":16443\"\n"))
	f.Add([]byte("providers: {file: {filename: /a, watch: false}}"))
	f.Add([]byte("a: &a [*a, *a]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := config.ParseStatic(data)
		if err == nil && !strings.Contains(s.Address, ":") {
			t.Errorf("%q: the address %q has no port", data, s.Address)
		}
	})
}

func FuzzAddress(f *testing.F) {
	for _, s := range []string{"10.0.0.1:1", "https://[::1]:2/x", "fe80::1%a", "a.b", ":1", "[", "::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := config.Address(text)
		if err != nil {
			return
		}
		if again, err := config.Address(a); again != a || err != nil {
			t.Errorf("%q becomes %q, which becomes %q, %v", text, a, again, err)
		}
	})
}

func TestDefaultProviderFile(t *testing.T) {
	for data, want := range map[string]string{
		"":                           "/var/snap/microk8s/current/args/traefik/provider.yaml",
		"/var/snap/microk8s/current": "/var/snap/microk8s/current/args/traefik/provider.yaml",
		"/var/snap/microk8s/1010":    "/var/snap/microk8s/current/args/traefik/provider.yaml",
		"/var/snap/other/1010/":      "/var/snap/other/current/args/traefik/provider.yaml",
	} {
		if got := config.DefaultProviderFile(data); got != want {
			t.Errorf("%q: %s, want %s", data, got, want)
		}
	}
}

const golden = "tcp:\n  routers:\n    Router-1:\n      rule: HostSNI(`*`)\n      service: kube-apiserver\n      tls:\n        passthrough: true\n" +
	"  services:\n    kube-apiserver:\n      loadBalancer:\n        servers:\n        - address: 10.0.0.1:16443\n        - address: '[fd00::2]:16443'\n"

func TestWriteProvider(t *testing.T) {
	path := filepath.Join(t.TempDir(), "provider.yaml")
	for _, empty := range [][]string{nil, {}, {"x y"}} {
		if err := config.WriteProvider(path, empty); err == nil {
			t.Errorf("%q was written", empty)
		}
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("a refused list left a file")
	}
	if err := config.WriteProvider(path, []string{"[fd00::2]:16443", "10.0.0.1:16443"}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, path); got != golden {
		t.Errorf("%s\nwant\n%s", got, golden)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := config.WriteProvider(path, []string{"10.0.0.9:16443"}); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("the mode became %v, %v", st.Mode(), err)
	}
	if err := config.WriteProvider(filepath.Join(t.TempDir(), "provider.toml"), []string{"10.0.0.9:16443"}); err == nil || !strings.Contains(err.Error(), "only YAML") {
		t.Errorf("YAML in a TOML file: %v", err)
	}
}

// TestWritersAndReaders is upstream's: whoever reads while many write finds a complete file.
func TestWritersAndReaders(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "provider-*") // thousands of writes, each of which is synced
	if err != nil {
		dir = t.TempDir()
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "provider.yaml")
	const writers = 200
	rounds := longtest.Of(200, 20)
	texts := map[string]bool{}
	lists := make([][]string, writers)
	for i := range writers {
		for j := range 1 + i%7 {
			lists[i] = append(lists[i], fmt.Sprintf("10.%d.0.%d:16443", i, j))
		}
		text, err := config.Encode(lists[i])
		if err != nil {
			t.Fatal(err)
		}
		texts[string(text)] = true
	}
	var wg sync.WaitGroup
	for _, list := range lists {
		wg.Go(func() {
			for range rounds {
				if err := config.WriteProvider(path, list); err != nil {
					t.Error(err)
					return
				}
				if data, err := os.ReadFile(path); err != nil || !texts[string(data)] {
					t.Errorf("an incomplete file: %q, %v", data, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func newEnv(t *testing.T) snapenv.Env {
	t.Helper()
	env := snapenv.Under(t.TempDir())
	for _, name := range []string{"apiserver-proxy", "traefik/traefik-template.yaml"} {
		data, err := os.ReadFile(filepath.Join("../../snap/local/default-args", name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(env.DefaultArgs(), name), string(data))
	}
	write(t, env.Args("kubelet"), "")
	return env
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestInstallAndUninstall(t *testing.T) {
	env := newEnv(t)
	if err := config.Install(env, nil); err == nil {
		t.Error("installed without a server")
	}
	for range 2 {
		if err := config.Install(env, []string{"10.0.0.1:16443", "[fd00::2]:16443"}); err != nil {
			t.Fatal(err)
		}
	}
	static, err := config.LoadStatic(config.StaticFile(env))
	if err != nil || static.Ignored != nil || static.Address != "127.0.0.1:16443" || static.ProviderFile != env.Args("traefik/provider.yaml") || !static.Watch {
		t.Errorf("%+v, %v", static, err)
	}
	if got := read(t, env.Args("traefik/provider.yaml")); got != golden {
		t.Errorf("%s", got)
	}
	if got := read(t, env.Args("apiserver-proxy")); !strings.Contains(got, "--refresh-interval 30s") {
		t.Errorf("%s", got)
	}
	if a, err := config.ClientAddress(env); a != "127.0.0.1:16443" || err != nil {
		t.Errorf("%s, %v", a, err)
	}

	// What people have changed stays, and counts.
	write(t, config.TemplateFile(env), "entryPoints:\n  apiserver:\n    address: \":26443\"\nproviders:\n  file:\n    filename: ${SNAP_COMMON}/list.yaml\n")
	write(t, env.Args("apiserver-proxy"), "--refresh-interval 0\n")
	if err := os.MkdirAll(env.Common, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := config.Install(env, []string{"10.0.0.1:16443", "fd00::2"}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(env.Common, "list.yaml")); got != golden {
		t.Errorf("%s", got)
	}
	if got := read(t, env.Args("apiserver-proxy")); got != "--refresh-interval 0\n" {
		t.Errorf("%s", got)
	}
	if a, err := config.ClientAddress(env); a != "127.0.0.1:26443" || err != nil {
		t.Errorf("%s, %v", a, err)
	}

	write(t, config.LastGood(filepath.Join(env.Common, "list.yaml")), "x")
	for range 2 {
		if err := config.Uninstall(env); err != nil {
			t.Fatal(err)
		}
	}
	var left []string
	for _, dir := range []string{env.ArgsDir(), env.Common} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				left = append(left, filepath.Base(path))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"apiserver-proxy", "kubelet", "traefik-template.yaml"}; !slices.Equal(left, want) {
		t.Errorf("left: %q, want %q", left, want)
	}
}

func TestRenderWithoutTemplate(t *testing.T) {
	env := newEnv(t)
	write(t, config.StaticFile(env), "providers: {}\n")
	if err := config.Render(env); err != nil {
		t.Fatal(err)
	}
	if got := read(t, config.StaticFile(env)); got != "providers: {}\n" {
		t.Errorf("%q", got)
	}
}

func TestTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "traefik.yaml")
	write(t, path, strings.Repeat("#", config.MaxSize+1))
	if _, err := config.LoadStatic(path); err == nil || !strings.Contains(err.Error(), "no configuration") {
		t.Errorf("%v", err)
	}
}
