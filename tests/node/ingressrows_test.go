package node

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
	"testing"
	"time"

	"microk8s/internal/longtest"
)

// rows are Ingresses with what docs/addons.md shows, each at a host of its own. ALLOWED is another host of the lab's.
const rows = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: web, image: "microk8s.test/web:1", imagePullPolicy: Never}
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {selector: {app: shop}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, annotations: {traefik.ingress.kubernetes.io/service.sticky.cookie: "true"}}
spec: {selector: {app: shop}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: traefik.io/v1alpha1
kind: ServersTransport
metadata: {name: inside}
spec: {serverName: kubernetes.default.svc, rootCAs: [{secret: inside-ca}]}
---
apiVersion: traefik.io/v1alpha1
kind: ServersTransport
metadata: {name: stranger}
spec: {serverName: kubernetes.default.svc, rootCAs: [{secret: stranger-ca}]}
---
apiVersion: v1
kind: Service
metadata:
  name: private
  annotations: {traefik.ingress.kubernetes.io/service.serversscheme: https, traefik.ingress.kubernetes.io/service.serverstransport: default-inside@kubernetescrd}
spec: {type: ExternalName, externalName: kubernetes.default.svc.cluster.local, ports: [{port: 443}]}
---
apiVersion: v1
kind: Service
metadata:
  name: unproven
  annotations: {traefik.ingress.kubernetes.io/service.serversscheme: https, traefik.ingress.kubernetes.io/service.serverstransport: default-stranger@kubernetescrd}
spec: {type: ExternalName, externalName: kubernetes.default.svc.cluster.local, ports: [{port: 443}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: private}
spec:
  rules:
  - {host: private.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: private, port: {number: 443}}}}]}}
  - {host: unproven.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: unproven, port: {number: 443}}}}]}}
  - {host: sticky.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: sticky, port: {number: 80}}}}]}}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: private-nginx, annotations: {nginx.ingress.kubernetes.io/backend-protocol: HTTPS, nginx.ingress.kubernetes.io/proxy-ssl-secret: default/inside-ca,
  nginx.ingress.kubernetes.io/proxy-ssl-verify: "on", nginx.ingress.kubernetes.io/proxy-ssl-name: kubernetes.default.svc}}
spec: {ingressClassName: nginx, rules: [{host: private-nginx.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: plain, port: {number: 443}}}}]}}]}
---
apiVersion: v1
kind: Service
metadata: {name: plain}
spec: {type: ExternalName, externalName: kubernetes.default.svc.cluster.local, ports: [{port: 443}]}
---
apiVersion: traefik.io/v1alpha1
kind: Middleware
metadata: {name: networks}
spec: {ipAllowList: {sourceRange: [ALLOWED/32, 203.0.113.0/24]}}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: networks, annotations: {traefik.ingress.kubernetes.io/router.middlewares: default-networks@kubernetescrd}}
spec: {rules: [{host: networks.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: networks-nginx, annotations: {nginx.ingress.kubernetes.io/whitelist-source-range: "ALLOWED/32,203.0.113.0/24"}}
spec: {ingressClassName: nginx, rules: [{host: networks-nginx.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: traefik.io/v1alpha1
kind: Middleware
metadata: {name: size}
spec: {buffering: {maxRequestBodyBytes: 1000}}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: size, annotations: {traefik.ingress.kubernetes.io/router.middlewares: default-size@kubernetescrd}}
spec: {rules: [{host: size.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: size-nginx, annotations: {nginx.ingress.kubernetes.io/proxy-body-size: "1k", nginx.ingress.kubernetes.io/proxy-request-buffering: "on"}}
spec: {ingressClassName: nginx, rules: [{host: size-nginx.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: sticky-nginx, annotations: {nginx.ingress.kubernetes.io/affinity: cookie}}
spec: {ingressClassName: nginx, rules: [{host: sticky-nginx.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
---
apiVersion: traefik.io/v1alpha1
kind: TLSOption
metadata: {name: modern}
spec: {minVersion: VersionTLS13}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: modern, annotations: {traefik.ingress.kubernetes.io/router.entrypoints: websecure, traefik.ingress.kubernetes.io/router.tls.options: default-modern@kubernetescrd}}
spec: {tls: [{hosts: [modern.example.test]}], rules: [{host: modern.example.test, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}]}}]}
`

// TestIngressRows asks for what docs/addons.md promises of the ingress, from two hosts: backends with a CA of their own, source
// ranges, limits of bodies, sticky sessions, TLS options, the PROXY protocol.
func TestIngressRows(t *testing.T) {
	longtest.Only(t)
	n := newNode(t, "n2")
	step := n.steps(t)
	n.run(t, "microk8s", "start")
	n.connect(t)
	n.waitReady(t)
	n.loadWebImage(t)
	other, err := n.lab.IP("n2")
	if err != nil {
		t.Fatal(err)
	}
	stranger, _ := selfSigned(t, "kubernetes.default.svc")
	n.run(t, "microk8s", "enable", "ingress")
	n.runIn(t, stranger, "microk8s", "kubectl", "create", "secret", "generic", "stranger-ca", "--from-file=ca.crt=/dev/stdin")
	n.run(t, "microk8s", "kubectl", "create", "secret", "generic", "inside-ca", "--from-file=ca.crt=/var/snap/microk8s/current/certs/ca.crt")
	n.runIn(t, strings.ReplaceAll(rows, "ALLOWED", other), "microk8s", "kubectl", "apply", "-f", "-")

	client := func(host string, config *tls.Config, jar http.CookieJar) *http.Client {
		return &http.Client{Timeout: 10 * time.Second, Jar: jar, Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: config,
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				_, port, err := net.SplitHostPort(address)
				if err != nil {
					return nil, err
				}
				return n.lab.Dial(ctx, host, network, net.JoinHostPort(n.ip(t), port))
			},
		}}
	}
	do := func(c *http.Client, url, body string) (int, string, error) {
		method := http.MethodGet
		if body != "" {
			method = http.MethodPost
		}
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		if err != nil {
			return 0, "", err
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text), err
	}
	want := func(t *testing.T, c *http.Client, url, body string, code int, text string) {
		t.Helper()
		eventually(t, 2*time.Minute, func() error {
			got, out, err := do(c, url, body)
			if err == nil && (got != code || !strings.Contains(out, text)) {
				err = fmt.Errorf("%s: %d %q, want %d and %q", url, got, out, code, text)
			}
			return err
		})
	}
	near, far := client("n1", nil, nil), client("n2", nil, nil)

	step("backends with a CA of their own", func(t *testing.T) {
		want(t, far, "http://private.example.test/readyz", "", 200, "ok")
		want(t, far, "http://private-nginx.example.test/readyz", "", 200, "ok")
		want(t, far, "http://unproven.example.test/readyz", "", 500, "")
	})
	step("source ranges", func(t *testing.T) {
		for _, host := range []string{"networks", "networks-nginx"} {
			want(t, far, "http://"+host+".example.test/", "", 200, "shop-")
			want(t, near, "http://"+host+".example.test/", "", 403, "")
		}
	})
	step("limits of bodies", func(t *testing.T) {
		for _, host := range []string{"size", "size-nginx"} {
			want(t, far, "http://"+host+".example.test/client", strings.Repeat("x", 900), 200, ":")
			want(t, far, "http://"+host+".example.test/client", strings.Repeat("x", 2000), 413, "")
		}
	})
	step("sticky sessions", func(t *testing.T) {
		n.waitDeployment(t, "shop")
		for _, host := range []string{"sticky", "sticky-nginx"} {
			address := "http://" + host + ".example.test/"
			want(t, far, address, "", 200, "shop-")
			eventually(t, time.Minute, func() error { // all three pods are backends
				seen := map[string]bool{}
				for range 12 {
					if _, out, err := do(far, address, ""); err == nil {
						seen[out] = true
					}
				}
				if len(seen) < 2 {
					return fmt.Errorf("without a cookie %v answer", seen)
				}
				return nil
			})
			jar, err := cookiejar.New(nil)
			if err != nil {
				t.Fatal(err)
			}
			same := client("n2", nil, jar)
			_, first, err := do(same, address, "")
			if err != nil {
				t.Fatal(err)
			}
			if u, _ := url.Parse(address); len(jar.Cookies(u)) == 0 {
				t.Fatalf("%s sets no cookie", address)
			}
			for range 12 {
				if _, out, err := do(same, address, ""); err != nil || out != first {
					t.Errorf("%s: %q, %v after %q", address, out, err, first)
				}
			}
		}
	})
	step("TLS options", func(t *testing.T) {
		want(t, client("n2", &tls.Config{InsecureSkipVerify: true}, nil), "https://modern.example.test/", "", 200, "shop-")
		old := client("n2", &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, nil)
		eventually(t, time.Minute, func() error {
			if code, _, err := do(old, "https://modern.example.test/", ""); err == nil {
				return fmt.Errorf("TLS 1.2 is answered with %d", code)
			}
			return nil
		})
	})
	step("the PROXY protocol, of those who are trusted", func(t *testing.T) {
		n.run(t, "microk8s", "enable", "ingress", "--keep-client-address="+other)
		said := func(host, client string) (string, error) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			conn, err := n.lab.Dial(ctx, host, "tcp", net.JoinHostPort(n.ip(t), "80"))
			if err != nil {
				return "", err
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := fmt.Fprintf(conn, "PROXY TCP4 %s 192.0.2.1 40000 80\r\nGET / HTTP/1.1\r\nHost: networks.example.test\r\nConnection: close\r\n\r\n", client); err != nil {
				return "", err
			}
			out, err := io.ReadAll(conn)
			if len(out) > 0 {
				err = nil
			}
			line, _, _ := strings.Cut(string(out), "\r\n")
			return line, err
		}
		for _, tc := range []struct{ host, client, want string }{
			{"n2", "203.0.113.9", "200"},
			{"n2", "198.51.100.9", "403"},
			{"n1", "203.0.113.9", "40"}, // what it says of another is no request, or not believed
		} {
			eventually(t, 2*time.Minute, func() error {
				line, err := said(tc.host, tc.client)
				if err == nil && !strings.Contains(line, " "+tc.want) {
					err = fmt.Errorf("from %s, said to be %s: %q, want %s", tc.host, tc.client, line, tc.want)
				}
				return err
			})
		}
	})
}
