package cli

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"microk8s/internal/images"
)

// Programs that a command hands over to wait for their server without an end, and must be able to:
// a follow, a watch and a wait have none. So the server is asked beforehand whether it answers at
// all, and only where it does not is the program told to end.
const (
	// handOverAsk is how long a server may take to answer that question.
	handOverAsk = 5 * time.Second
	// handOverEnd is the end that the program then gets.
	handOverEnd = "30s"
)

// silentAPI says that the API server of the administrator's kubeconfig takes connections and
// answers nothing; "" where it answers, whatever it says, or is not there, which the program says
// itself.
func (a *App) silentAPI() string {
	cfg, err := clientcmd.BuildConfigFromFlags("", a.Env.AdminKubeconfig())
	if err != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), handOverAsk)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(cfg.Host, "/")+"/livez/ping", nil)
	if err != nil {
		return ""
	}
	// Nothing is sent that anybody may not know, and nothing of the answer is used.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // see above
	resp, err := client.Do(req)
	if err == nil {
		resp.Body.Close()
	}
	if ctx.Err() == nil {
		return ""
	}
	return fmt.Sprintf("the API server at %s did not answer within %s; see: microk8s status, and microk8s logs kubelite", req.URL.Host, handOverAsk)
}

// names reports whether a command line has one of some options, with or without a value.
func names(words []string, options ...string) bool {
	return slices.ContainsFunc(words, func(w string) bool {
		name, _, _ := strings.Cut(w, "=")
		return slices.Contains(options, name)
	})
}

// kubectlEnd returns what kubectl needs in front of the user's words to end although the API server
// does not answer. Commands that do not ask it work all the same.
func (a *App) kubectlEnd(user []string) []string {
	if len(user) == 0 || names(user, "--request-timeout", "--kubeconfig", "--server", "-s", "--context", "--cluster") {
		return nil
	}
	why := a.silentAPI()
	if why == "" {
		return nil
	}
	fmt.Fprintf(a.Err, "microk8s: %s\n  kubectl tries for another %s; to wait without an end: microk8s kubectl --request-timeout=0 ...\n", why, handOverEnd)
	return []string{"--request-timeout=" + handOverEnd}
}

// helmServer are the commands of helm that ask the API server. They know no end for that.
var helmServer = []string{"install", "upgrade", "list", "ls", "get", "history", "hist", "rollback", "status", "test", "uninstall", "delete", "del", "un"}

// helmReady refuses commands of helm that would wait for an API server that does not answer.
func (a *App) helmReady(user []string) error {
	if !slices.ContainsFunc(user, func(w string) bool { return slices.Contains(helmServer, w) }) ||
		names(user, "--kubeconfig", "--kube-apiserver", "--kube-context", "--help", "-h") {
		return nil
	}
	if why := a.silentAPI(); why != "" {
		return failf("helm would wait for it without an end; run the same command again when it answers", "%s", why)
	}
	return nil
}

// ctrEnd returns what ctr needs in front of the user's words to end although containerd does not
// answer.
func (a *App) ctrEnd(user []string) []string {
	if len(user) == 0 || names(user, "--timeout", "--address", "-a", "--help", "-h", "--version", "-v") {
		return nil
	}
	if err := images.Answers(context.Background(), a.Env, handOverAsk); err != nil {
		fmt.Fprintf(a.Err, "microk8s: %v\n  ctr tries for another %s; to wait longer: microk8s ctr --timeout 1h ...\n", err, handOverEnd)
		return []string{"--timeout", handOverEnd}
	}
	return nil
}
