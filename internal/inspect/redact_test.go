package inspect

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"microk8s/internal/service"
	"microk8s/internal/service/servicetest"
	"microk8s/internal/snapenv"
)

// names are what secrets are called.
var names = []string{
	"password", "PASSWORD", "passwd", "pass", "pwd", "MYSQL_PWD", "PGPASSWORD", "PGPASS", "requirepass", "db-password", "dbPassword",
	"token", "joinToken", "bootstrap_token", "secret", "clientSecret", "client_secret", "AWS_SECRET_ACCESS_KEY", "secretKey",
	"api-key", "apiKey", "X-Api-Key", "X-JFrog-Art-Api", "private_key", "encryption-key", "accountKey", "auth", "Authorization",
	"identitytoken", "registryToken", "credentials", "passphrase", "cookie", "SAS", "X-Amz-Signature", "connectionString",
}

// shape makes the value of a secret; what of it must not be seen comes with it.
type shape struct {
	name  string
	make  func(r *rand.Rand) (value string, parts []string)
	plain bool // one word without quotes
}

func letters(r *rand.Rand, n int) string {
	const set = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
	b := make([]byte, n)
	for i := range b {
		b[i] = set[r.IntN(len(set))]
	}
	return string(b)
}

func one(v string) (string, []string) { return v, []string{v} }

var shapes = []shape{
	{"a word", func(r *rand.Rand) (string, []string) { return one(letters(r, 12)) }, true},
	{"digits", func(r *rand.Rand) (string, []string) { return one(strconv.Itoa(10000000 + r.IntN(89999999))) }, true},
	{"begins with a slash", func(r *rand.Rand) (string, []string) { return one("/" + letters(r, 11)) }, true},
	{"begins with a dollar", func(r *rand.Rand) (string, []string) { return one("$" + letters(r, 11)) }, true},
	{"begins with dashes", func(r *rand.Rand) (string, []string) { return one("--" + letters(r, 11)) }, true},
	{"base64", func(r *rand.Rand) (string, []string) {
		return one(base64.StdEncoding.EncodeToString([]byte(letters(r, 16))))
	}, true},
	{"a duration", func(r *rand.Rand) (string, []string) { return one(strconv.Itoa(1000000+r.IntN(8999999)) + "s") }, true},
	{"signs", func(r *rand.Rand) (string, []string) { return one(letters(r, 5) + "!%^*+." + letters(r, 5)) }, true},
	{"blanks", func(r *rand.Rand) (string, []string) {
		a, b, c := letters(r, 8), letters(r, 8), letters(r, 8)
		return a + " " + b + " " + c, []string{a, b, c}
	}, false},
	{"several lines", func(r *rand.Rand) (string, []string) {
		a, b, c := letters(r, 10), letters(r, 10), letters(r, 10)
		return a + "\n" + b + "\n" + c, []string{a, b, c}
	}, false},
}

// place is where a secret stands. text is a line, or several, or an object of the API.
type place struct {
	name string
	file string // in the report; "k8s/cluster-info-dump" wants an object
	any  bool   // the name says nothing: everything that is there is a secret
	text func(name string, v string) string
	only func(s shape, v string) bool // nil means every shape
}

func plain(s shape, _ string) bool   { return s.plain }
func oneLine(_ shape, v string) bool { return !strings.Contains(v, "\n") }

func quoted(v string) string {
	data, _ := json.Marshal(v)
	return string(data)
}

func indent(v string) string { return "    " + strings.ReplaceAll(v, "\n", "\n    ") }

const kubeliteLog, dump = "snap.microk8s.daemon-kubelite/journal.log", "k8s/cluster-info-dump"

func pod(spec string) string {
	return `{"kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"c","image":"docker.io/library/nginx:1",` + spec + `}]}}`
}

var places = []place{
	{"an option in a file", "args/kubelet", false, func(n, v string) string { return "--" + n + "=" + v }, plain},
	{"an option and its value", "args/kube-apiserver", false, func(n, v string) string { return "--" + n + " " + v }, plain},
	{"a quoted option", "args/kube-apiserver", false, func(n, v string) string { return "--" + n + "='" + v + "'" }, oneLine},
	{"a line of a log, with =", kubeliteLog, false, func(n, v string) string { return "level=info msg=x " + n + "=" + v + " more=1" }, plain},
	{"a line of a log, with :", kubeliteLog, false, func(n, v string) string { return "I0102 15:04:05 x.go:1] " + n + ": " + v }, oneLine},
	{"a quoted value in a log", kubeliteLog, false, func(n, v string) string { return `msg="x" ` + n + "=" + quoted(v) }, nil},
	{"JSON in a log", kubeliteLog, false, func(n, v string) string { return `got {"a":1,` + quoted(n) + ":" + quoted(v) + `,"b":2}` }, nil},
	{"a number in JSON in a log", kubeliteLog, false, func(n, v string) string { return `got {` + quoted(n) + ": " + v + `, "b": 2}` }, func(s shape, _ string) bool { return s.name == "digits" }},
	{"JSON in a quoted message", kubeliteLog, false, func(n, v string) string {
		return `msg=` + quoted(`body {`+quoted(n)+":"+quoted(v)+`}`)
	}, plain},
	{"a list of arguments in a log", kubeliteLog, false, func(n, v string) string { return `args ["x","--` + n + `",` + quoted(v) + `,"y"]` }, nil},
	{"an option in a log", kubeliteLog, false, func(n, v string) string { return "running tool --" + n + " " + v + " --verbose" }, plain},
	{"a header in a log", kubeliteLog, false, func(n, v string) string { return "map[" + n + ":[" + v + "] Accept:[*/*]]" }, plain},
	{"a URL's parameter", kubeliteLog, true, func(_, v string) string {
		return `failed to do request: Get "https://store.example/v2/blob?sig=` + url.QueryEscape(v) + `&limit=5"`
	}, nil},
	{"a URL's user", kubeliteLog, true, func(_, v string) string { return "pulling https://user:" + v + "@registry.example/v2/" }, plain},
	{"mysql -p", kubeliteLog, true, func(_, v string) string { return `exec "mysql -uroot -p` + v + ` db"` }, plain},
	{"redis-cli -a", kubeliteLog, true, func(_, v string) string { return "exec redis-cli -h x -a " + v + " ping" }, plain},
	{"curl -u", kubeliteLog, true, func(_, v string) string { return "exec curl -s -u user:" + v + " https://x" }, plain},
	{"bearer", kubeliteLog, true, func(_, v string) string { return "Authorization: Bearer " + v }, plain},
	{"a variable", "args/containerd-env", true, func(n, v string) string {
		return strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(n)) + "=" + v
	}, oneLine},
	{"a variable with another name", "args/kubelite-env", true, func(_, v string) string { return `DSN2=` + quoted(v) }, oneLine},
	{"TOML", "args/containerd.toml", false, func(n, v string) string { return "  " + n + " = " + quoted(v) }, nil},
	{"TOML with three quotes", "args/containerd.toml", false, func(n, v string) string { return n + ` = """` + "\n" + v + "\n" + `"""` }, nil},
	{"a TOML list", "args/containerd.toml", false, func(n, v string) string { return n + " = [\n  " + quoted(v) + ",\n]" }, nil},
	{"a TOML table of a registry", "args/containerd-template.toml", true, func(_, v string) string {
		return "[plugins.\"io.containerd.cri.v1.images\".registry.configs.\"r.example\".auth]\n  username = " + quoted(v) + "\n[other]\n  x = 1"
	}, nil},
	{"headers of hosts.toml", "args/certs.d/docker.io/hosts.toml", true, func(_, v string) string {
		return "[host.\"https://r.example\".header]\n  X-Custom = " + quoted(v) + "\n[host.\"https://r2.example\"]"
	}, nil},
	{"inline headers of hosts.toml", "args/certs.d/docker.io/hosts.toml", true, func(_, v string) string { return "header = { X-Custom = [" + quoted(v) + "] }" }, nil},
	{"YAML", "args/eventconfig.yaml", false, func(n, v string) string { return "  " + n + ": " + quoted(v) }, nil},
	{"YAML without quotes", "args/admission-control-config-file.yaml", false, func(n, v string) string { return "- " + n + ": " + v }, oneLine},
	{"a YAML block", "args/eventconfig.yaml", false, func(n, v string) string { return "  " + n + ": |\n" + indent(v) + "\n  next: 1" }, nil},
	{"a folded YAML block in a list", "args/eventconfig.yaml", false, func(n, v string) string { return "- " + n + ": >-\n" + indent(v) + "\n- next: 1" }, nil},
	{"a YAML value on the next line", "args/eventconfig.yaml", false, func(n, v string) string { return n + ":\n" + indent(v) + "\nnext: 1" }, nil},
	{"a file of the user's", "args/encryption.yaml", true, func(_, v string) string { return v }, nil},
	{"a manifest of the user's", "args/cni-network/cni.yaml", true, func(_, v string) string { return v }, nil},

	{"container arguments", dump, true, func(n, v string) string { return pod(`"args":["--` + n + `",` + quoted(v) + `]`) }, nil},
	{"a container's command", dump, true, func(n, v string) string { return pod(`"command":["sh","-c",` + quoted("run -p"+v) + `]`) }, nil},
	{"an exec probe", dump, true, func(n, v string) string { return pod(`"livenessProbe":{"exec":{"command":["x",` + quoted(v) + `]}}`) }, nil},
	{"headers of a probe", dump, true, func(n, v string) string {
		return pod(`"readinessProbe":{"httpGet":{"path":"/","port":80,"httpHeaders":[{"name":"X","value":` + quoted(v) + `}]}}`)
	}, nil},
	{"the URL of a probe", dump, true, func(n, v string) string {
		return pod(`"readinessProbe":{"httpGet":{"port":80,"path":` + quoted("/h?k="+url.QueryEscape(v)) + `}}`)
	}, nil},
	{"a lifecycle command", dump, true, func(n, v string) string {
		return pod(`"lifecycle":{"preStop":{"exec":{"command":["x",` + quoted(v) + `]}}}`)
	}, nil},
	{"a variable of a container", dump, true, func(n, v string) string { return pod(`"env":[{"name":"PIN","value":` + quoted(v) + `}]`) }, nil},
	{"a volume of a driver", dump, true, func(n, v string) string {
		return `{"kind":"Pod","metadata":{"name":"p"},"spec":{"volumes":[{"name":"v","csi":{"driver":"x","volumeAttributes":{"a":` + quoted(v) + `}}}]}}`
	}, nil},
	{"the last message of a container", dump, true, func(n, v string) string {
		return `{"kind":"Pod","metadata":{"name":"p"},"status":{"containerStatuses":[{"name":"c","lastState":{"terminated":{"exitCode":1,"message":` + quoted(v) + `}}}]}}`
	}, nil},
	{"an annotation", dump, true, func(n, v string) string {
		return `{"kind":"Pod","metadata":{"name":"p","annotations":{"example.com/x":` + quoted(v) + `}}}`
	}, nil},
	{"the last applied object", dump, true, func(n, v string) string {
		return `{"kind":"Service","metadata":{"name":"s","annotations":{"kubectl.kubernetes.io/last-applied-configuration":` +
			quoted(`{"stringData":{"a":`+quoted(v)+`}}`) + `}}}`
	}, nil},
	{"a label that is called so", dump, false, func(n, v string) string {
		return `{"kind":"Pod","metadata":{"name":"p","labels":{` + quoted(n) + `:` + quoted(v) + `}}}`
	}, nil},
	{"a Secret", dump, true, func(n, v string) string {
		return `{"kind":"Secret","metadata":{"name":"s"},"data":{"a":` + quoted(base64.StdEncoding.EncodeToString([]byte(v))) + `},"stringData":{"b":` + quoted(v) + `}}`
	}, nil},
	{"values of a Helm release", dump, true, func(n, v string) string {
		return `{"kind":"HelmRelease","metadata":{"name":"s"},"spec":{"values":{"db":{"x":` + quoted(v) + `}},"valuesContent":` + quoted("a: "+v) + `}}`
	}, nil},
	{"an object of an unknown kind", dump, true, func(n, v string) string {
		return `{"kind":"X","metadata":{"name":"s"},"spec":{"deep":[{"er":` + quoted(v) + `}]}}`
	}, nil},
	{"a number of an unknown kind", dump, true, func(n, v string) string { return `{"kind":"X","metadata":{"name":"s"},"spec":{"er":` + v + `}}` }, func(s shape, _ string) bool { return s.name == "digits" }},
	{"the message of an event", dump, false, func(n, v string) string {
		return `{"kind":"Event","metadata":{"name":"e"},"reason":"Unhealthy","message":` + quoted("probe failed: "+n+"="+v) + `}`
	}, plain},
}

// seeded returns a source of random choices and prints how to have the same again.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("MICROK8S_TEST_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("seed %d (MICROK8S_TEST_SEED)", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

type planted struct {
	what  string
	file  string
	line  string
	parts []string
}

// TestNoFormOfASecretGetsOut plants secrets in every place, with names and shapes that are drawn
// again for each run, and looks for them in the report. What people need is still there.
func TestNoFormOfASecretGetsOut(t *testing.T) {
	r := seeded(t)
	env := snapenv.Under(t.TempDir())
	var all []planted
	texts := map[string][]string{}
	for _, p := range places {
		for _, s := range shapes {
			for range 2 {
				name := names[r.IntN(len(names))]
				v, parts := s.make(r)
				if p.only != nil && !p.only(s, v) {
					continue
				}
				line := p.text(name, v)
				all = append(all, planted{fmt.Sprintf("%s called %q: %s", p.name, name, s.name), p.file, line, parts})
				texts[p.file] = append(texts[p.file], line)
			}
		}
	}
	if len(all) < 60 {
		t.Fatalf("only %d forms", len(all))
	}
	const ordinary = "an ordinary line stays"
	objects := []string{
		`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web-0","namespace":"shop","labels":{"app":"web"}},"spec":{"nodeName":"n1","containers":[` +
			`{"name":"web","image":"docker.io/library/nginx:1.29","ports":[{"containerPort":8080}],"resources":{"limits":{"memory":"64Mi"}}}],` +
			`"volumes":[{"name":"t","secret":{"secretName":"web-tls"}}]},"status":{"phase":"Running","podIP":"10.1.0.7","containerStatuses":[{"name":"web","restartCount":3,` +
			`"state":{"waiting":{"reason":"CrashLoopBackOff","message":"back-off 5m0s restarting failed container"}},"lastState":{"terminated":{"exitCode":137,"reason":"OOMKilled"}}}]}}`,
		`{"apiVersion":"v1","kind":"Event","metadata":{"name":"e","namespace":"shop"},"reason":"FailedScheduling","message":"0/3 nodes are available: 3 Insufficient memory."}`,
		`{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},"spec":{"podCIDR":"10.1.0.0/24"},"status":{"conditions":[{"type":"Ready","status":"False","reason":"KubeletNotReady"}],"nodeInfo":{"kubeletVersion":"v1.37.1"}}}`,
	}
	for file, lines := range texts {
		switch dir, rest, _ := strings.Cut(file, "/"); {
		case file == dump:
			objects = append(objects, lines...)
		case dir == "args":
			write(t, filepath.Join(env.ArgsDir(), rest), strings.Join(lines, "\n")+"\n"+ordinary+"\n")
		default:
			write(t, env.ServiceLog(service.Kubelite), strings.Join(lines, "\n")+"\n"+ordinary+"\n")
		}
	}
	flags := "--authorization-mode=Node,RBAC\n--secure-port=16443\n--service-account-key-file=${SNAP_DATA}/certs/serviceaccount.key\n--authentication-token-webhook-cache-ttl=2m0s\n"
	write(t, env.Args("kube-scheduler"), flags)
	write(t, env.AdminKubeconfig(), "")
	in := &Inspector{Env: env, Manager: &servicetest.Manager{}, Out: &bytes.Buffer{}, Now: time.Now, Run: func(ctx context.Context, argv ...string) ([]byte, error) {
		if argv[len(argv)-1] == "json" {
			return []byte("Warning: v1 Endpoints is deprecated\n" + `{"items":[` + strings.Join(objects, ",") + `]}`), nil
		}
		if filepath.Base(argv[0]) == "kubectl" {
			return nil, nil // it answers
		}
		return fakeRunner{}.run(ctx, argv...)
	}}
	path, err := in.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	files := unpack(t, path)
	failed := 0
	for _, p := range all {
		for name, text := range files {
			for _, part := range p.parts {
				i := strings.Index(text, part)
				if i < 0 {
					i = strings.Index(text, strings.Trim(quoted(part), `"`))
				}
				if i < 0 {
					continue
				}
				if failed++; failed < 30 {
					t.Errorf("%s: %q is in %s: …%s…\nfrom %s", p.what, part, name, text[max(0, i-40):min(len(text), i+len(part)+10)], p.line)
				}
			}
		}
	}
	t.Logf("%d secrets in %d places", len(all), len(places))
	for file := range texts {
		if file != dump && !strings.Contains(file, "encryption") && !strings.Contains(file, "cni-network") && !strings.Contains(files["inspection-report/"+file], ordinary) {
			t.Errorf("%s lost its ordinary line", file)
		}
	}
	if got := files["inspection-report/args/kube-scheduler"]; got != flags {
		t.Errorf("our options became %q", got)
	}
	for _, want := range []string{
		"docker.io/library/nginx:1.29", `"web-0"`, `"shop"`, `"app": "web"`, `"Running"`, `"CrashLoopBackOff"`, "back-off 5m0s", "OOMKilled", "137", `"restartCount": 3`,
		"FailedScheduling", "3 Insufficient memory", "10.1.0.7", "web-tls", `"64Mi"`, "KubeletNotReady", "v1.37.1", "10.1.0.0/24", "8080",
	} {
		if !strings.Contains(files["inspection-report/"+dump], want) {
			t.Errorf("the objects lost %s", want)
		}
	}
}

// TestWhatIsNoJSONIsLeftOut has kubectl fail in the middle.
func TestWhatIsNoJSONIsLeftOut(t *testing.T) {
	r := newRedactor(map[string]bool{})
	for _, text := range []string{"", "error: hunter2hunter2", `{"items":[{"data":{"a":"hunter2hunter2`, `["hunter2hunter2"]`} {
		if got := r.RedactJSON([]byte(text)); strings.Contains(got, "hunter2") || !strings.Contains(got, "left out") {
			t.Errorf("%q became %q", text, got)
		}
	}
}

// FuzzRedact feeds the redactor any text around a secret that is a flag's value, on a line of its
// own: it neither fails nor lets the secret through.
func FuzzRedact(f *testing.F) {
	f.Add("password: |\n  x\n", "key=\"\"\"", true)
	f.Add(`{"a":"b`, "[[x.header]]\n", false)
	f.Add("token=", "://a:b@c?d=e&f", true)
	f.Add("HEADER = {", "", true)
	r := newRedactor(map[string]bool{})
	const secret = "Zq7wPfX2kVbN"
	f.Fuzz(func(t *testing.T, before, after string, file bool) {
		if strings.Contains(before+after, secret) {
			return
		}
		text := before + "\n--password=" + secret + "\n" + after
		got := r.Redact(text)
		if file {
			got = r.RedactFile("kubelet", text)
		}
		if strings.Contains(got, secret) {
			t.Errorf("%q became %q", text, got)
		}
		if got := r.RedactFile("kubelet-env", text+"\nX="+secret); strings.Contains(got, secret) {
			t.Errorf("as variables, %q became %q", text, got)
		}
	})
}
