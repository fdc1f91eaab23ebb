package node

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"regexp"
	"strings"
	"testing"
	"time"

	"microk8s/internal/longtest"
	"microk8s/tests/console"
	"microk8s/tests/lab/labtest"
)

// TestConsole goes through every page of the console in a browser, in dark, light and narrow, with the API server
// killed meanwhile.
func TestConsole(t *testing.T) {
	longtest.Only(t)
	n := newNode(t)
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.waitReady(t)
	n.loadWebImage(t)
	console.Run(t, labtest.Host{Lab: n.lab, Name: n.name}, build, true)
}

// testConsole is the short part, on a node that is Ready and has the image of the tests.
func (n *node) testConsole(t *testing.T) {
	console.Run(t, labtest.Host{Lab: n.lab, Name: n.name}, build, false)
}

// testDashboard serves the console in the cluster by a host name: everybody has their own rights there, and only
// the ingress controller reaches the port that is meant for it.
func (n *node) testDashboard(t *testing.T) {
	const host = "dashboard.example.com"
	if out := n.run(t, "microk8s", "enable", "dashboard", "--host", host); !strings.Contains(out, "Ingress is enabled") || !strings.Contains(out, "Dashboard is enabled") {
		t.Errorf("enable dashboard printed %q", out)
	}
	n.wantAddon(t, "dashboard", "enabled")
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{
		Jar: jar, Timeout: 20 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // the controller's own certificate
			DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				_, port, err := net.SplitHostPort(address)
				if err != nil {
					return nil, err
				}
				return n.lab.Dial(ctx, n.name, "tcp", net.JoinHostPort(n.ip(t), port))
			},
		},
	}
	defer client.CloseIdleConnections()
	call := func(url, body string) (int, string) {
		t.Helper()
		var resp *http.Response
		eventually(t, time.Minute, func() (err error) {
			if body == "" {
				resp, err = client.Get(url)
			} else {
				resp, err = client.Post(url, "application/json", strings.NewReader(body))
			}
			return err
		})
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(data)
	}
	eventually(t, time.Minute, func() error { // the controller follows Ingresses
		if status, page := call("https://"+host+"/nodes", ""); status != http.StatusOK || !strings.Contains(page, "<title>MicroK8s") {
			return fmt.Errorf("the page: %d %s", status, page)
		}
		return nil
	})
	if status, _ := call("http://"+host+"/", ""); status != http.StatusPermanentRedirect {
		t.Errorf("by HTTP: %d", status)
	}
	config := n.run(t, "microk8s", "config", "--user", "console-ann", "--role", "view")
	token := regexp.MustCompile(`token: (\S+)`).FindStringSubmatch(config)
	if token == nil {
		t.Fatalf("the kubeconfig has no token:\n%s", config)
	}
	login, err := json.Marshal(map[string]string{"token": token[1]})
	if err != nil {
		t.Fatal(err)
	}
	if status, answer := call("https://"+host+"/api/login", string(login)); status != http.StatusOK {
		t.Fatalf("login: %d %s", status, answer)
	}
	for path, want := range map[string]int{"pods": http.StatusOK, "secrets": http.StatusForbidden} {
		if status, answer := call("https://"+host+"/k8s/api/v1/namespaces/kube-system/"+path, ""); status != want {
			t.Errorf("a viewer reads %s: %d %s, want %d", path, status, answer, want)
		}
	}
	pod := strings.TrimSpace(n.run(t, "microk8s", "kubectl", "-n", "kube-system", "get", "pod", "-l", "k8s-app=kubernetes-dashboard", "-o", "jsonpath={.items[0].status.podIP}"))
	n.startPod(t, "stranger")
	eventually(t, time.Minute, func() error {
		_, err := n.try(t, "microk8s", "kubectl", "exec", "stranger", "--", "/web", "hostname")
		return err
	})
	if out, err := n.try(t, "microk8s", "kubectl", "exec", "stranger", "--", "/web", "wget", "http://"+net.JoinHostPort(pod, "8080")+"/", "2"); err == nil {
		t.Errorf("another pod reaches the ingress controller's port: %s", out)
	}
	n.run(t, "microk8s", "kubectl", "delete", "pod", "stranger", "--now")
	n.run(t, "microk8s", "config", "--revoke", "console-ann")
	n.run(t, "microk8s", "disable", "dashboard", "ingress")
	n.wantAddon(t, "dashboard", "disabled")
}
