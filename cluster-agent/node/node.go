// Package node is what one node does when others of its cluster ask it: change arguments,
// restart services, switch addons, import an image, and, for providers of the Cluster API,
// remove a datastore member. Who asks must show this node's callback secret and, between nodes of
// ours, a certificate that only control-plane nodes can make.
//
// The wire is upstream's (cluster-agent.md 1.5.3, 1.5.6, 1.5.7). Every name that reaches a
// file or a program is one of a list, and values are single lines without shell syntax.
package node

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/limit"
	"microk8s/cluster-agent/server"
	"microk8s/internal/args"
	"microk8s/internal/certs"
	"microk8s/internal/coalesce"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/images"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// Restarter restarts services of this node.
type Restarter interface {
	Restart(ctx context.Context, names ...string) error
}

// Node answers the calls. Set the fields before Register.
type Node struct {
	Env      snapenv.Env
	Services Restarter
	Limit    *limit.Limiter
	Log      *slog.Logger

	// Run runs a program of the product to its end, with stdin if it is not nil. Its error
	// says what the program printed.
	Run func(ctx context.Context, stdin io.Reader, argv ...string) error

	// Import reads an archive of images into containerd; nil means [images.Import].
	Import func(ctx context.Context, archive io.Reader) (images.Imported, error)

	// Remove takes the member with an address (host:port) out of the datastore.
	Remove func(ctx context.Context, endpoint string) error

	// Examine says how far this node's copy of the datastore has come. It may take minutes.
	Examine func(ctx context.Context) (*peers.Examined, error)

	// Certificates says which certificates and keys this node has, without the keys.
	Certificates func() (certs.Inventory, error)

	// ChangeCertificates does what is asked of this node's certificates and keys.
	ChangeCertificates func(ctx context.Context, change api.CertificateChange) error

	// Fresh asks the control plane for the callback secrets that this node takes, when a caller shows
	// another one than the node has: it may have changed just now. nil means not to ask.
	Fresh func(ctx context.Context) ([]string, error)

	later     sync.WaitGroup
	examining sync.Mutex
	fresh     coalesce.Reads[[]string] // of Fresh
}

const (
	// maxConfigure bounds the body of configure, in bytes. A change of every argument file has
	// some 10 kB.
	maxConfigure = 64 << 10
	// freshEvery is the least time between two questions for this node's secret: what wrong
	// secrets can cost the API server.
	freshEvery = time.Second
)

// Register adds the routes. The last one is for control-plane nodes only.
func (n *Node) Register(s *server.Server, controlPlane bool) {
	if n.Limit == nil {
		n.Limit = &limit.Limiter{}
	}
	n.fresh.Every = freshEvery
	s.HandleSized(http.MethodPost, api.PathConfigure, maxConfigure, server.BusyFirst(n.Limit, http.HandlerFunc(n.configure)))
	s.HandleStream(http.MethodPost, api.PathImageImport, server.BusyFirst(n.Limit, http.HandlerFunc(n.importImage)))
	s.Handle(http.MethodPost, api.PathCerts, server.BusyFirst(n.Limit, http.HandlerFunc(n.certificates)))
	if controlPlane {
		s.HandleAny(api.PathDqliteRemove, http.HandlerFunc(n.dqliteRemove))
		s.Handle(http.MethodPost, api.PathExamine, server.BusyFirst(n.Limit, http.HandlerFunc(n.examine)))
	}
}

// Wait returns when everything that answers have set off is done.
func (n *Node) Wait() { n.later.Wait() }

func (n *Node) audit(r *http.Request, call string, err error, attr ...any) {
	line := append([]any{"call", call, "from", server.Source(r).String()}, attr...)
	if err != nil {
		n.Log.Warn("audit", append(line, "result", "refused", "reason", err.Error())...)
		return
	}
	n.Log.Info("audit", append(line, "result", "ok")...)
}

// equal compares secrets in constant time, whatever their lengths.
func equal(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

var errToken = errors.New("invalid token")

// refuse waits before the sender of a wrong secret is answered. Nothing of the request may be
// held meanwhile.
func (n *Node) refuse(r *http.Request) error {
	n.Limit.Failed(r.Context(), server.Source(r))
	return errToken
}

// caller checks the certificate that control-plane nodes show beside the secret, where the secret is
// one of ours, and returns the name in it. In a cluster of upstream's, or one that has control-plane
// nodes of the build before, callers have none, and the name is "".
func (n *Node) caller(r *http.Request, given string) (string, error) {
	if !token.IsCallback(strings.TrimSpace(given)) {
		server.Authenticated(r)
		return "", nil
	}
	return n.certified(r)
}

// certified returns the name in the certificate that only control-plane nodes make, and that a caller shows.
func (n *Node) certified(r *http.Request) (string, error) {
	ca, err := os.ReadFile(n.clusterCA())
	if err != nil {
		return "", fmt.Errorf("cannot read the cluster's CA: %w", err)
	}
	name, err := callback.CheckCaller(r.TLS, ca, time.Now())
	if err != nil {
		return "", err
	}
	server.Authenticated(r)
	return name, nil
}

// clusterCA is the file of the cluster's CA: a worker keeps it beside its own.
func (n *Node) clusterCA() string {
	if nodeconfig.ReadState(n.Env).Worker {
		return n.Env.Cert("ca.remote.crt")
	}
	return n.Env.Cert("ca.crt")
}

// answerRefusal answers a call whose sender is not authorized.
func answerRefusal(w http.ResponseWriter, status int, err error) {
	code := api.CodeToken
	if errors.Is(err, callback.ErrCaller) {
		code = api.CodeCertificate
	}
	server.WriteFailure(w, status, code, err.Error())
}

// changes lists what a request changes, for the audit line: names, never values, which may be
// confidential.
func changes(req api.ConfigureRequest) (out []string) {
	for _, s := range req.Services {
		name := shorten(s.Name)
		for _, m := range s.Update {
			for _, key := range slices.Sorted(maps.Keys(m)) {
				out = append(out, name+": set "+shorten(key))
			}
		}
		for _, key := range s.Remove {
			out = append(out, name+": remove "+shorten(key))
		}
		if s.Restart {
			out = append(out, name+": restart")
		}
	}
	if c := req.Certificates; c != nil {
		if len(c.Leaves) > 0 {
			out = append(out, "certificates: new keys")
		}
		if c.FrontProxy != "" {
			out = append(out, "front proxy: "+shorten(c.FrontProxy))
		}
		if c.SigningKeys != "" {
			out = append(out, "keys of service account tokens")
		}
		if c.DatastoreCert != "" {
			out = append(out, "the datastore's pair")
		}
	}
	for _, a := range req.Addons {
		switch {
		case bool(a.Enable):
			out = append(out, "addon "+shorten(a.Name)+": enable")
		case bool(a.Disable):
			out = append(out, "addon "+shorten(a.Name)+": disable")
		}
	}
	const most = 100
	if len(out) > most {
		out = append(out[:most], fmt.Sprintf("and %d more", len(out)-most))
	}
	return out
}

// knows reports whether the caller has shown this node's callback secret.
func (n *Node) knows(r *http.Request, given string) bool {
	want, err := callback.Load(n.Env)
	if err != nil {
		n.Log.Error("cannot read this node's callback secret", "err", err)
	}
	want, given = strings.TrimSpace(want), strings.TrimSpace(given)
	good := want != "" && equal(given, want)
	if !good && n.Fresh != nil && given != "" {
		taken, err := n.ask(r.Context())
		if err != nil {
			n.Log.Warn("cannot ask the control plane for this node's callback secret", "err", err)
		}
		for _, one := range taken {
			good = good || one != "" && equal(given, one)
		}
	}
	return good
}

// ask calls Fresh, at most once each freshEvery: callers that come meanwhile share the next
// answer, which is never older than their call.
func (n *Node) ask(ctx context.Context) ([]string, error) {
	return n.fresh.Do(ctx, n.Fresh)
}

// argumentFiles are the files that configure may change.
var argumentFiles = []string{
	"kubelet", "kube-apiserver", "kube-proxy", "kube-scheduler", "kube-controller-manager",
	"kubelite", "containerd", "k8s-dqlite", "cluster-agent", "apiserver-proxy",
}

func (n *Node) configure(w http.ResponseWriter, r *http.Request) {
	body, ok := server.ReadBody(w, r)
	if !ok {
		return
	}
	// Nothing but the secret is decoded before it is known to be right: a list of empty objects
	// takes forty times its bytes.
	var first struct {
		Callback string `json:"callback"`
	}
	if !server.Decode(w, body, &first) {
		return
	}
	if !n.knows(r, first.Callback) { // from here on, body is garbage
		err := n.refuse(r)
		n.audit(r, "configure", err)
		answerRefusal(w, http.StatusInternalServerError, err)
		return
	}
	caller, err := n.caller(r, first.Callback)
	if err != nil {
		n.audit(r, "configure", err)
		answerRefusal(w, http.StatusInternalServerError, err)
		return
	}
	var req api.ConfigureRequest
	if !server.Decode(w, body, &req) {
		n.audit(r, "configure", errors.New("the request cannot be read"))
		return
	}
	self, err := n.apply(r.Context(), req)
	n.audit(r, "configure", err, "by", caller, "changes", changes(req))
	if err != nil {
		server.WriteFailure(w, http.StatusInternalServerError, api.CodeInternal, err.Error())
		return
	}
	server.WriteJSON(w, http.StatusOK, api.Result{Result: "ok"})
	if self { // this process ends with it, so the answer goes first
		n.later.Go(func() {
			if err := n.Services.Restart(context.WithoutCancel(r.Context()), service.ClusterAgent); err != nil {
				n.Log.Error("cannot restart the cluster agent", "err", err)
			}
		})
	}
}

// apply does what is asked, in order; self says that this agent must be restarted then.
func (n *Node) apply(ctx context.Context, req api.ConfigureRequest) (self bool, err error) {
	// Everything is looked at before anything is done.
	for _, s := range req.Services {
		if err := checkService(s); err != nil {
			return false, fmt.Errorf("Failed to update arguments of service %q: %w", shorten(s.Name), err) //nolint:staticcheck // as upstream's agent says it
		}
	}
	for _, a := range req.Addons {
		if !addonName.MatchString(a.Name) {
			return false, fmt.Errorf("Failed to enable addon %q: it is not the name of an addon", shorten(a.Name)) //nolint:staticcheck // as upstream's agent says it
		}
	}
	if err := n.encryption(req.Encryption); err != nil {
		return false, err
	}
	if req.Certificates != nil {
		if err := n.ChangeCertificates(ctx, *req.Certificates); err != nil {
			return false, fmt.Errorf("Failed to change certificates: %w", err) //nolint:staticcheck // as the other texts of this call
		}
	}
	for _, s := range req.Services {
		if err := n.update(s); err != nil {
			return self, fmt.Errorf("Failed to update arguments of service %q: %w", s.Name, err) //nolint:staticcheck // as upstream's agent says it
		}
		if !s.Restart {
			continue
		}
		name, err := service.Resolve(s.Name)
		if err == nil && name == service.ClusterAgent {
			self = true
			continue
		}
		if err == nil {
			err = n.Services.Restart(ctx, name)
		}
		if err != nil {
			return self, fmt.Errorf("Failed to restart service %q: %w", s.Name, err) //nolint:staticcheck // as upstream's agent says it
		}
	}
	for _, a := range req.Addons {
		verb := ""
		switch {
		case bool(a.Enable):
			verb = "enable"
		case bool(a.Disable):
			verb = "disable"
		default:
			continue
		}
		if err := n.Run(ctx, nil, n.Env.Bin("microk8s"), verb, a.Name); err != nil {
			return self, fmt.Errorf("Failed to %s addon %q: %w", verb, a.Name, err) //nolint:staticcheck // as upstream's agent says it
		}
	}
	return self, nil
}

// encryption replaces the keys of encryption at rest, where this node's are kept as the product
// keeps them. A key with which data may have been written is only dropped by a set that shares its
// first key: what two nodes disagree about is left to a person.
func (n *Node) encryption(content string) error {
	if content == "" {
		return nil
	}
	refuse := func(err error) error { return fmt.Errorf("Failed to replace the keys of encryption at rest: %w", err) } //nolint:staticcheck // as the other texts of this call
	if nodeconfig.Load(n.Env).Worker {
		return refuse(errors.New("this node is a worker"))
	}
	keys, err := encryption.Parse([]byte(content))
	if err != nil {
		return refuse(err)
	}
	old, err := os.ReadFile(encryption.Path(n.Env))
	if err != nil {
		return refuse(err)
	}
	have, err := encryption.Parse(old)
	if err != nil {
		return refuse(err)
	}
	if !slices.Contains(keys.Names(), have[0].Name) {
		return refuse(fmt.Errorf("new data is encrypted with %s here, which is not among the new keys", have[0].Name))
	}
	return fileaccess.For(n.Env).WriteSecret(encryption.Path(n.Env), keys.Encode())
}

var (
	addonName = regexp.MustCompile(`^([a-z0-9][a-z0-9-]{0,62}/)?[a-z0-9][a-z0-9.-]{0,62}$`)
	flagName  = regexp.MustCompile(`^-{0,2}[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$`)
)

func shorten(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

func checkService(s api.ConfigureService) error {
	changes := len(s.Update)+len(s.Remove) > 0
	if changes && !slices.Contains(argumentFiles, s.Name) {
		return errors.New("it is not one of the product's argument files")
	}
	if _, err := service.Resolve(s.Name); bool(s.Restart) && err != nil {
		return err
	}
	for _, m := range s.Update {
		for key, value := range m {
			if err := CheckArgument(key, value); err != nil {
				return err
			}
		}
	}
	for _, key := range s.Remove {
		if err := CheckArgument(key, ""); err != nil {
			return err
		}
	}
	return nil
}

// CheckArgument refuses what cannot be one option of an argument file, or would be more than
// one, or would be run by the shell of an upstream node.
func CheckArgument(key, value string) error {
	if !flagName.MatchString(key) {
		return fmt.Errorf("%q is not the name of an option", shorten(key))
	}
	if strings.ContainsAny(value, "\n\r\x00`") || strings.Contains(value, "$(") || len(value) > 16<<10 {
		return fmt.Errorf("the value of %s is not one line, or holds a command for a shell", key)
	}
	return nil
}

// update changes one argument file; without changes it is not touched.
func (n *Node) update(s api.ConfigureService) error {
	if len(s.Update)+len(s.Remove) == 0 {
		return nil
	}
	return Update(n.Env, s.Name, s.Update, s.Remove)
}

// Update changes options of one argument file: first the ones to remove, then the new values,
// so that an option in both is set. A missing file counts as empty.
func Update(env snapenv.Env, name string, update []map[string]string, remove []string) error {
	merged := map[string]string{}
	for _, m := range update {
		for key, value := range m {
			merged[strings.TrimLeft(key, "-")] = value
		}
	}
	_, err := nodeconfig.Edit(env, name, func(f *args.File) error {
		for _, key := range remove {
			f.Unset(strings.TrimLeft(key, "-"))
		}
		for _, key := range slices.Sorted(maps.Keys(merged)) {
			if err := f.Set(key, merged[key]); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// importTimeout bounds the import of one image. A caller that disconnects ends it with the body.
const importTimeout = time.Hour

// importImage hands the body to containerd. The secret is checked before any of it is read.
func (n *Node) importImage(w http.ResponseWriter, r *http.Request) {
	if !n.knows(r, r.Header.Get(api.HeaderCallback)) {
		err := n.refuse(r)
		n.audit(r, "image-import", err)
		w.Header().Set("Connection", "close")
		answerRefusal(w, http.StatusUnauthorized, err)
		return
	}
	caller, err := n.caller(r, r.Header.Get(api.HeaderCallback))
	if err != nil {
		n.audit(r, "image-import", err)
		w.Header().Set("Connection", "close")
		answerRefusal(w, http.StatusUnauthorized, err)
		return
	}
	// Images are large and links slow: the limits of a call do not hold for the body.
	control := http.NewResponseController(w)
	body := &steady{body: r.Body, control: control}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), importTimeout)
	defer cancel()
	got, err := n.importArchive(ctx, body)
	n.audit(r, "image-import", err, "by", caller, "bytes", body.bytes, "images", got.Names)
	if err != nil {
		server.WriteFailure(w, http.StatusInternalServerError, api.CodeInternal, "Failed to import the image: "+importFailure(err))
		return
	}
	server.WriteJSON(w, http.StatusOK, api.ImportResponse{Status: "OK", Images: got.Names, Skipped: got.Skipped, Pack: got.Pack})
}

func (n *Node) importArchive(ctx context.Context, archive io.Reader) (images.Imported, error) {
	if n.Import != nil {
		return n.Import(ctx, archive)
	}
	return images.Import(ctx, n.Env, archive)
}

// importFailure is what matters of a failed import. containerd's errors come as text.
func importFailure(err error) string {
	if strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
		return "the disk of this node is full, free some space there"
	}
	return err.Error()
}

// examine says how far this node's copy of the datastore has come, to another control-plane node. It has to
// work while no API server does, so that there is no secret to ask for: the certificate, which only those can
// make who have the CA's key, is all that is shown.
func (n *Node) examine(w http.ResponseWriter, r *http.Request) {
	caller, err := n.certified(r)
	if err != nil {
		n.Limit.Failed(r.Context(), server.Source(r))
		n.audit(r, "examine", err)
		answerRefusal(w, http.StatusUnauthorized, err)
		return
	}
	if !n.examining.TryLock() { // it copies the datastore
		server.WriteFailure(w, http.StatusTooManyRequests, api.CodeBusy, "another examination is under way")
		return
	}
	defer n.examining.Unlock()
	x, err := n.Examine(r.Context())
	n.audit(r, "examine", err, "by", caller)
	if err != nil {
		server.WriteFailure(w, http.StatusInternalServerError, api.CodeInternal, err.Error())
		return
	}
	server.WriteJSON(w, http.StatusOK, x)
}

// certificates says which certificates and keys this node has, to a control-plane node. As for an examination
// the certificate is all that is shown: a node whose callback secret is not in order is looked at too.
func (n *Node) certificates(w http.ResponseWriter, r *http.Request) {
	caller, err := n.certified(r)
	if err != nil {
		n.Limit.Failed(r.Context(), server.Source(r))
		n.audit(r, "certificates", err)
		answerRefusal(w, http.StatusUnauthorized, err)
		return
	}
	list, err := n.Certificates()
	n.audit(r, "certificates", err, "by", caller)
	if err != nil {
		server.WriteFailure(w, http.StatusInternalServerError, api.CodeInternal, err.Error())
		return
	}
	server.WriteJSON(w, http.StatusOK, list)
}

// capiToken is where a Cluster API provider leaves its token.
const capiToken = "capi/etc/token"

func (n *Node) dqliteRemove(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	const prefix = "Failed to remove from dqlite: "
	answer := func(status int, code api.Code, err error, attr ...any) {
		n.audit(r, "dqlite-remove", err, attr...)
		server.WriteFailure(w, status, code, prefix+err.Error())
	}
	if n.Limit.Busy(server.Source(r)) {
		answer(http.StatusTooManyRequests, api.CodeBusy, errors.New("too many wrong tokens"))
		return
	}
	want, err := os.ReadFile(n.Env.HostPath(capiToken))
	if err != nil {
		answer(http.StatusInternalServerError, api.CodeInternal, fmt.Errorf("failed to validate CAPI auth token: failed to read token file: %w", err))
		return
	}
	given, right := strings.TrimSpace(r.Header.Get(api.HeaderCAPI)), strings.TrimSpace(string(want))
	if right == "" || !equal(given, right) {
		n.Limit.Failed(r.Context(), server.Source(r))
		answer(http.StatusUnauthorized, api.CodeToken, errors.New("invalid CAPI auth token"))
		return
	}
	var req api.RemoveRequest
	if !server.ReadJSON(w, r, &req) {
		n.audit(r, "dqlite-remove", errors.New("the request cannot be read"))
		return
	}
	if err := checkEndpoint(req.Endpoint); err != nil {
		answer(http.StatusBadRequest, api.CodeRequest, err)
		return
	}
	err = n.Remove(r.Context(), req.Endpoint)
	if err != nil {
		answer(http.StatusInternalServerError, api.CodeInternal, fmt.Errorf("failed to remove node from dqlite: %w", err), "endpoint", req.Endpoint)
		return
	}
	n.audit(r, "dqlite-remove", nil, "endpoint", req.Endpoint)
	server.WriteJSON(w, http.StatusOK, nil)
}

// checkEndpoint wants host:port, so that nothing else gets into a command of the dqlite program.
func checkEndpoint(endpoint string) error {
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return fmt.Errorf("%q is not host:port", shorten(endpoint))
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 || !hostName.MatchString(host) {
		return fmt.Errorf("%q is not host:port", shorten(endpoint))
	}
	return nil
}

var hostName = regexp.MustCompile(`^[A-Za-z0-9:][A-Za-z0-9.:-]{0,252}$`)
