package suite

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	k8sasn1 "k8s.io/apimachinery/pkg/apis/asn1"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/server"
	"microk8s/internal/noderegistry"
	"microk8s/internal/pki"
	"microk8s/internal/token"
	"microk8s/internal/tokenstore"
)

// attacks has what is tried against each defence of the folder mutants. An attack fails its test where it succeeds.
var attacks = []struct {
	against string
	name    string
	try     func(t *testing.T, s *site)
}{
	{"token-key", "another token with the id of one that is known", sameID},
	{"token-key", "guesses, blanks, padding, prefixes, bars", malformedTokens},
	{"token-spent", "a token again after its join was confirmed", replay},
	{"token-expiry", "a token after its time", expired},
	{"token-revoked", "a token that was taken back", revoked},
	{"token-role", "a worker's token for the control plane's keys", workerToken},
	{"token-name", "a token for another node's name", otherName},
	{"token-held", "a token with which another node joins just now", whileHeld},
	{"token-held", "a token with which several nodes join in the same moment", sameMoment},
	{"token-names", "joins under one name after the other with one token", manyNames},
	{"proof-chosen", "a proof of a chosen token, to guess it offline", proofOfChosen},
	{"node-name", "host names that are paths, lines and subjects", nodeNames},
	{"name-taken", "the name of a node that is there", takenName},
	{"datastore", "an upstream control plane node", upstreamControlPlane},
	{"host-header", "a Host header that moves the datastore", hostHeader},
	{"advertised", "the address of another node", othersAddress},
	{"joining-name", "the name of a node that joins just now, with another token", joiningName},
	{"confirm-join", "confirming somebody else's join of the same name", othersJoin},
	{"take-back", "taking back somebody else's join of the same name", othersRelease},
	{"member-alive", "the place of a member of the datastore that lives, with a token for its name", livingMember},
	{"member-owner", "the address of a member of the datastore that is another node's", othersMember},
	{"csr-subject", "certificates of others' subjects", subjects},
	{"csr-names", "certificates with others' names", names},
	{"weak-key", "a certificate for a key that can be computed", weakKey},
	{"csr-signature", "a request for somebody else's key", foreignKey},
	{"sign-once", "a second certificate", signTwice},
	{"sign-expiry", "a certificate an hour after the join", signLate},
	{"csr-subject", "a worker's certificate for other identities", workerRenewsOthers},
	{"capi", "a worker's credentials against every call of the control plane", workerCredentials},
	{"client-cert", "renewal with a certificate of another CA", foreignClient},
	{"long-ended", "renewal more than a year after the certificate's end", longEnded},
	{"renew-member", "renewal of a node that was removed", removedNode},
	{"callback", "calls with a worker's callback secret, or none", wrongCallback},
	{"callback", "secrets made of all that the API holds", secretsFromTheAPI},
	{"callback", "a secret that was collected before the node came", collectedSecret},
	{"caller-cert", "the right secret from who is no control plane node", wrongCaller},
	{"registered", "certificates of a node that was removed, or was another", formerNodes},
	{"service-names", "a node that is called as a Service, the API server or an address", serviceNamed},
	{"one-name", "identities of several nodes with one token", severalIdentities},
	{"name-taken", "the name of a node that has joined with the same token", sameTokenSameName},
	{"callback-empty", "an empty secret where the node has none", emptyCallback},
	{"capi", "a wrong Cluster API token", wrongCAPI},
	{"capi-empty", "no Cluster API token where the file is empty", emptyCAPI},
	{"services", "argument files outside of args", serviceNames},
	{"argument-values", "values that are several lines or commands", values},
	{"addons", "addons that are options and paths", addonNames},
	{"endpoint", "datastore endpoints that are commands", endpoints},
	{"body-limit", "bodies without an end", largeBody},
	{"body-time", "bodies that trickle", slowBody},
	{"delay", "thousands of guesses", guessing},
	{"no-store", "keys from a cache", caching},
	{"secret-first", "lists that take memory, with a wrong secret", secretFirst},
	{"busy-first", "bodies while wrong secrets wait", busyFirst},
	{"shared-reads", "wrong secrets that ask the API server", sharedReads},
	{"connections", "connections that say nothing", manyConnections},
	{"call-rate", "calls as fast as they are answered", manyCalls},
	{"gate-record", "the certificates of a removed node at the API server", removedAtTheGate},
	{"gate-tokens", "tokens of pods on a removed node at the API server", tokensAtTheGate},
	{"gate-join", "certificates of an earlier join at the API server", joinAtTheGate},
	{"gate-watch", "a watch that is open when its node is removed", watchAtTheGate},
	{"feed-readers", "the feed of network policies, opened again and again", openFeeds},
	{"ingress-certificates", "an Ingress that names a password", ingressForPassword},
	{"ingress-system", "an Ingress in kube-system", ingressInSystem},
	{"ingress-withdrawn", "the ingress controller's token after the Ingress", ingressIsGone},
	{"carried-role", "a worker's token for the key of encryption at rest", argumentsForWorkers},
	{"carried-flags", "a cluster that sends other arguments of the API server", hostileArguments},
	{"carried-files", "a cluster that sends other files", hostileFiles},
}

func TestAttacks(t *testing.T) {
	t.Parallel()
	for _, a := range attacks {
		t.Run(a.against+"/"+a.name, func(t *testing.T) {
			t.Parallel()
			a.try(t, newSite(t))
		})
	}
	have := defences(t)
	tried := map[string]bool{}
	for _, a := range attacks {
		tried[a.against] = true
		if !slices.Contains(have, a.against) {
			t.Errorf("the attack %q names the defence %q, of which there is no mutants/%s.patch", a.name, a.against, a.against)
		}
	}
	for _, name := range have {
		if !tried[name] {
			t.Errorf("nothing is tried against the defence of mutants/%s.patch", name)
		}
	}
}

func sameID(t *testing.T, s *site) {
	mine, theirs := token.New(), token.New()
	// Ids are 64 bits of a hash; suppose two were equal.
	err := s.tokens.Backends[0].Update(t.Context(), func(st *tokenstore.State) error {
		r, err := st.Add(theirs, tokenstore.Record{Uses: 1}, s.now)
		if err != nil {
			return err
		}
		id, _ := mine.Derive()
		st.Records = map[token.ID]*tokenstore.Record{id: r}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.refused(from{}, request(mine.Reveal(), "n2", false), http.StatusInternalServerError, api.CodeToken)
}

func malformedTokens(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{}).Reveal()
	for _, guess := range []string{
		"", " ", "\n", strings.Repeat(" ", 40), "|", "null", "*", "%", tok[:31], tok[:16], tok + "0", tok + "|", tok + "|9999999999", "|" + tok, tok + "-kubelet",
		strings.ToUpper(tok[:31]) + "Z", strings.Repeat("0", 32), tok[1:] + tok[:1], tok + "\x00", "../../" + tok, strings.Repeat("a", 10_000),
	} {
		_, status, e := s.join(from{}, request(guess, "n2", false))
		if status != http.StatusInternalServerError || e.Message != "Invalid token" {
			t.Errorf("%.50q: %d %s", guess, status, e.Message)
		}
		if _, status, e := s.sign(guess+api.SuffixKubelet, csr(t, kubeletName("n2"), nil)); status != http.StatusInternalServerError || e.Message != "Invalid token" {
			t.Errorf("sign with %.50q: %d %s", guess, status, e.Message)
		}
		for _, path := range []string{api.PathConfirm, api.PathRelease} {
			if status, e := s.finish(path, guess, "n2"); status != http.StatusInternalServerError || e.Message != "Invalid token" {
				t.Errorf("%s with %.50q: %d %s", path, guess, status, e.Message)
			}
		}
	}
	// White space around the right one is nothing.
	s.joined(from{}, request(" "+tok+"\n", "n2", false))
}

func replay(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{}).Reveal()
	s.joined(from{}, request(tok, "n2", false))
	if status, e := s.finish(api.PathConfirm, tok, "n2"); status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	s.refused(from{}, request(tok, "n2", false), http.StatusInternalServerError, api.CodeTokenUsed)
	s.refused(from{address: "10.0.0.8"}, request(tok, "n3", true), http.StatusInternalServerError, api.CodeTokenUsed)
	if _, status, _ := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName("n2"), nil)); status == http.StatusOK {
		t.Error("a certificate with a spent token")
	}
	// Upstream's worker spends it with its kubelet's certificate.
	tok = s.add(tokenstore.Options{}).Reveal()
	s.joined(from{}, upstream(tok, "n4", true))
	if _, status, e := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName("n4"), nil)); status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	s.refused(from{}, upstream(tok, "n4", true), http.StatusInternalServerError, api.CodeTokenUsed)
}

func expired(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{TTL: time.Minute, Uses: tokenstore.Unlimited}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	s.now = s.now.Add(time.Minute)
	s.refused(from{}, request(tok, "n3", true), http.StatusInternalServerError, api.CodeTokenExpired)
}

func revoked(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{})
	s.joined(from{}, request(tok.Reveal(), "n2", true))
	id, _ := tok.Derive()
	if _, err := s.tokens.Revoke(t.Context(), id.String()[:8]); err != nil {
		t.Fatal(err)
	}
	s.refused(from{}, request(tok.Reveal(), "n2", true), http.StatusInternalServerError, api.CodeTokenRevoked)
	if _, status, _ := s.sign(tok.Reveal()+api.SuffixKubelet, csr(t, kubeletName("n2"), nil)); status == http.StatusOK {
		t.Error("a certificate with a revoked token")
	}
}

func workerToken(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Worker: true}).Reveal()
	for _, role := range []string{"false", "null", `"as-master"`, `""`, "{}"} {
		body, err := json.Marshal(request(tok, "n2", false))
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Replace(string(body), `"worker":null`, `"worker":`+role, 1)
		status, answer, _ := s.call(from{}, api.PathJoin, text)
		if status == http.StatusOK || bytes.Contains(answer, []byte("PRIVATE KEY")) {
			t.Errorf("worker %s: %d, with keys: %v", role, status, bytes.Contains(answer, []byte("PRIVATE KEY")))
		}
	}
	// The refusal did not use the token up, and a worker's answer has no key in it.
	_, answer, _ := s.call(from{}, api.PathJoin, request(tok, "n2", true))
	if bytes.Contains(answer, []byte("PRIVATE KEY")) || !bytes.Contains(answer, []byte(`"ca_key":null`)) || !bytes.Contains(answer, []byte(`"service_account_key":""`)) {
		t.Errorf("a worker is told %s", answer)
	}
}

func otherName(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Name: "n2"}).Reveal()
	s.refused(from{}, request(tok, "n3", true), http.StatusInternalServerError, api.CodeTokenName)
	s.joined(from{}, request(tok, "n2", true))
}

func whileHeld(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	s.refused(from{address: "10.0.0.8"}, request(tok, "n3", true), http.StatusInternalServerError, api.CodeTokenHeld)
	s.joined(from{}, request(tok, "n2", true)) // the same node goes on
	s.now = s.now.Add(tokenstore.Reservation)
	s.joined(from{address: "10.0.0.8"}, request(tok, "n3", true)) // and nobody holds it for ever
}

// sameMoment has as many machines as there are, with one token for one of them.
func sameMoment(t *testing.T, s *site) {
	for _, worker := range []bool{true, false} {
		tok := s.add(tokenstore.Options{}).Reveal()
		var group sync.WaitGroup
		var got atomic.Int32
		for i := range 8 {
			name := fmt.Sprintf("m%d-%v", i, worker)
			group.Go(func() {
				if _, status, _ := s.join(from{address: fmt.Sprintf("10.0.0.%d", 30+i)}, request(tok, name, worker)); status == http.StatusOK {
					got.Add(1)
				}
			})
		}
		group.Wait()
		if got.Load() != 1 {
			t.Errorf("%d nodes join with a token for one", got.Load())
		}
	}
}

// joiningName has a worker's token, and waits until a control-plane node joins.
func joiningName(t *testing.T, s *site) {
	theirs, mine := s.add(tokenstore.Options{}).Reveal(), s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(theirs, "n2", false))
	e := s.refused(from{address: "10.0.0.66"}, request(mine, "n2", true), http.StatusBadRequest, api.CodeNameTaken)
	if !strings.Contains(e.Message, "microk8s remove-node n2") {
		t.Errorf("it does not say what to do: %s", e.Message)
	}
	s.joined(from{}, request(theirs, "n2", false)) // the machine itself goes on
	s.now = s.now.Add(2 * tokenstore.Reservation)
	s.joined(from{address: "10.0.0.66"}, request(mine, "n2", true)) // and nobody has a name for ever
}

// twoOwners has two tokens for the same name, and joins with the one after the other.
func twoOwners(s *site) (first, second string, record noderegistry.Record) {
	first, second = s.add(tokenstore.Options{Name: "w7"}).Reveal(), s.add(tokenstore.Options{Name: "w7"}).Reveal()
	s.joined(from{}, request(first, "w7", true))
	s.joined(from{address: "10.0.0.66"}, request(second, "w7", true))
	r, err := s.nodes.Get(s.t.Context(), "w7")
	if err != nil {
		s.t.Fatal(err)
	}
	return first, second, *r
}

func othersJoin(t *testing.T, s *site) {
	first, second, record := twoOwners(s)
	if status, _ := s.finish(api.PathConfirm, first, "w7"); status == http.StatusOK {
		t.Error("the join of another machine is confirmed")
	}
	if r, err := s.nodes.Get(t.Context(), "w7"); err != nil || *r != record {
		t.Errorf("the record is %+v, %v; it was %+v", r, err, record)
	}
	if status, e := s.finish(api.PathConfirm, second, "w7"); status != http.StatusOK {
		t.Errorf("the machine itself: %d %s", status, e.Message)
	}
}

func othersRelease(t *testing.T, s *site) {
	first, second, record := twoOwners(s)
	s.finish(api.PathRelease, first, "w7")
	if r, err := s.nodes.Get(t.Context(), "w7"); err != nil || *r != record {
		t.Errorf("the record is %+v, %v; it was %+v", r, err, record)
	}
	if status, e := s.finish(api.PathConfirm, second, "w7"); status != http.StatusOK {
		t.Errorf("the machine itself: %d %s", status, e.Message)
	}
	// Nor is one of before that is in taken back.
	s.finish(api.PathRelease, first, "w7")
	s.finish(api.PathRelease, second, "w7")
	if _, err := s.nodes.Get(t.Context(), "w7"); err != nil {
		t.Errorf("a node that is in: %v", err)
	}
}

// livingMember has the administrator's word for the name of a control-plane node, which runs.
func livingMember(t *testing.T, s *site) {
	s.members(here+":19001", 0, there+":19001", 0)
	if _, err := s.nodes.Add(t.Context(), noderegistry.Record{Name: "n2", Role: noderegistry.ControlPlane, Secrets: 2, Member: s.store[1].ID}); err != nil {
		t.Fatal(err)
	}
	tok := s.add(tokenstore.Options{Name: "n2"}).Reveal()
	s.refused(from{}, request(tok, "n2", false), http.StatusInternalServerError, api.CodeMember)
	s.refused(from{address: "10.0.0.66"}, request(tok, "n2", false), http.StatusBadRequest, api.CodeNameTaken)
	if len(s.removed) > 0 {
		t.Errorf("removed from the datastore: %v", s.removed)
	}
}

func manyNames(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{}).Reveal()
	got := 0
	for i := range 30 {
		name := fmt.Sprintf("n%d", i+10)
		if _, status, _ := s.join(from{}, request(tok, name, true)); status == http.StatusOK {
			got++
		}
		s.finish(api.PathRelease, tok, name)
	}
	if got > 8 {
		t.Errorf("joins of %d names with a token for one", got)
	}
}

func nodeNames(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{}).Reveal()
	for _, name := range []string{
		"", " ", "..", "../../etc/cron.d/x", "a/b", "n2\n- Address: 1.2.3.4:1", "N2", "n2,O=system:masters", "n2\x00", "-n", strings.Repeat("a", 300), "système",
	} {
		for _, worker := range []bool{true, false} {
			s.refused(from{}, request(tok, name, worker), http.StatusBadRequest, api.CodeRequest)
		}
	}
}

func takenName(t *testing.T, s *site) {
	free := s.add(tokenstore.Options{}).Reveal()
	for _, worker := range []bool{true, false} {
		s.refused(from{}, request(free, "w1", worker), http.StatusBadRequest, api.CodeNameTaken)
		s.refused(from{}, request(free, "n1", worker), http.StatusBadRequest, api.CodeNameTaken)
	}
	// Nor with the owner's word, while the node reports.
	bound := s.add(tokenstore.Options{Name: "w1"}).Reveal()
	s.refused(from{}, request(bound, "w1", true), http.StatusBadRequest, api.CodeNameTaken)
	s.cluster.nodes[1] = aNode("w1", workers, false)
	s.joined(from{address: workers}, request(bound, "w1", true))
}

func upstreamControlPlane(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{}).Reveal()
	e := s.refused(from{}, upstream(tok, "n2", false), http.StatusNotImplemented, api.CodeDatastore)
	if !strings.Contains(e.Message, "--worker") {
		t.Errorf("it does not say what to do: %s", e.Message)
	}
	if len(s.services.restarts) > 0 {
		t.Errorf("restarted %v for a refused join", s.services.restarts)
	}
	s.joined(from{}, upstream(tok, "n2", true)) // the token was not used
}

func hostHeader(t *testing.T, s *site) {
	s.members("127.0.0.1:19001", 0)
	moves := 0
	s.services.do = func(string) error {
		moves++
		text, err := os.ReadFile(filepath.Join(s.env.Backend(), "update.yaml"))
		if err != nil {
			return err
		}
		if string(text) != "Address: "+here+":19001\n" {
			t.Errorf("the datastore moves to %q", text)
		}
		s.members(here+":19001", 0)
		return nil
	}
	for i, host := range []string{"evil.example:25000", "8.8.8.8:25000", "no-port", ":25000", "127.0.0.1:25000", "10.0.100.100:25000"} {
		s.members("127.0.0.1:19001", 0)
		s.joined(from{host: host}, request(s.add(tokenstore.Options{}).Reveal(), fmt.Sprintf("m%d", i), false))
	}
	if moves != 6 {
		t.Errorf("moved %d times", moves)
	}
	// Where the connection comes over the loopback the header chooses among our own addresses.
	s.members("127.0.0.1:19001", 0)
	s.joined(from{local: "127.0.0.1", host: here + ":25000"}, request(s.add(tokenstore.Options{}).Reveal(), "n2", false))
	s.members("127.0.0.1:19001", 0)
	tok := s.add(tokenstore.Options{}).Reveal()
	e := s.refused(from{local: "127.0.0.1", host: "8.8.8.8:25000"}, request(tok, "n3", false), http.StatusInternalServerError, api.CodeAddress)
	if !strings.Contains(e.Message, "failed to find matching dqlite bind address for 8.8.8.8:25000: address 8.8.8.8 was not found in any host interface. refuse to update dqlite bind address to 8.8.8.8 as it would break the cluster") {
		t.Error(e.Message)
	}
}

func othersAddress(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{}).Reveal()
	for _, worker := range []bool{true, false} {
		r := request(tok, "n2", worker)
		r.AdvertiseAddress = workers
		s.refused(from{}, r, http.StatusBadRequest, api.CodeMember)
		for _, bad := range []string{"127.0.0.1", "0.0.0.0", "224.0.0.1", "::", "nonsense", "10.0.0.300", "fe80::1%eth0", "10.0.0.7 # "} {
			r.AdvertiseAddress = bad
			s.refused(from{}, r, http.StatusBadRequest, api.CodeRequest)
		}
		r.AdvertiseAddress = here
		s.refused(from{}, r, http.StatusServiceUnavailable, api.CodeSameAddress)
	}
}

// othersMember has a token for its name, and the address of a control-plane node that does not answer
// just now, or whose Node somebody has deleted.
func othersMember(t *testing.T, s *site) {
	s.members(here+":19001", 0, there+":19001", 0)
	s.store[1].Online = false
	owner := noderegistry.Record{Name: "n2", Role: noderegistry.ControlPlane, Secrets: 2, Member: s.store[1].ID}
	if _, err := s.nodes.Add(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	for _, worker := range []bool{true, false} {
		tok := s.add(tokenstore.Options{Name: "n9", Worker: worker}).Reveal()
		e := s.refused(from{}, request(tok, "n9", worker), http.StatusInternalServerError, api.CodeMember)
		if !strings.Contains(e.Message, "microk8s remove-node n2 --force") {
			t.Errorf("it does not say what to do: %s", e.Message)
		}
	}
	if len(s.removed) > 0 {
		t.Errorf("removed from the datastore: %v", s.removed)
	}
}

func subjects(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	for _, bad := range []pkix.Name{
		{CommonName: "admin", Organization: []string{"system:masters"}},
		{CommonName: "system:node:n2", Organization: []string{"system:masters"}},
		{CommonName: "system:node:n2", Organization: []string{"system:nodes", "system:masters"}},
		{CommonName: "system:node:n2"},
		{CommonName: "system:node:n1", Organization: []string{"system:nodes"}},
		{CommonName: "system:node:w1", Organization: []string{"system:nodes"}},
		{CommonName: "system:kube-controller-manager"},
		{CommonName: "n2", Organization: []string{callback.Organization}},
		{CommonName: "system:node:n2", Organization: []string{"system:nodes", callback.Organization}},
		{CommonName: "kube-apiserver", Organization: []string{"system:nodes"}},
		{CommonName: "system:node:n2", Organization: []string{"system:nodes"}, OrganizationalUnit: []string{"x"}},
		{},
	} {
		for _, suffix := range []string{api.SuffixKubelet, api.SuffixProxy} {
			cert, status, e := s.sign(tok+suffix, csr(t, bad, nil))
			if status == http.StatusOK {
				t.Errorf("%s: a certificate for %s", suffix, cert.Subject)
			} else if e.Code != api.CodeCertificate {
				t.Errorf("%s: %d %s", bad, status, e.Message)
			}
		}
	}
	if _, status, _ := s.sign(tok+api.SuffixProxy, csr(t, kubeletName("n2"), nil)); status == http.StatusOK {
		t.Error("the node's identity for the proxy's token")
	}
	// None of this used up what the node may have.
	cert, status, e := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName("n2"), []string{"n2"}, there))
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	if cert.IsCA || cert.Subject.CommonName != "system:node:n2" || !slices.Equal(cert.Subject.Organization, []string{"system:nodes"}) || time.Until(cert.NotAfter) > 31*24*time.Hour {
		t.Errorf("%s, a CA: %v, until %s", cert.Subject, cert.IsCA, cert.NotAfter)
	}
}

func names(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	for _, bad := range []struct {
		dns []string
		ips []string
	}{
		{dns: []string{"kubernetes"}}, {dns: []string{"n2", "kubernetes.default.svc"}}, {dns: []string{"*"}}, {dns: []string{"n1"}}, {dns: []string{""}},
		{ips: []string{here}}, {ips: []string{there, workers}}, {ips: []string{"127.0.0.1"}}, {ips: []string{"::1"}}, {ips: []string{"10.152.183.1"}}, {ips: []string{"0.0.0.0"}},
	} {
		if cert, status, _ := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName("n2"), bad.dns, bad.ips...)); status == http.StatusOK {
			t.Errorf("a certificate for %v %v", cert.DNSNames, cert.IPAddresses)
		}
		if cert, status, _ := s.sign(tok+api.SuffixProxy, csr(t, pkix.Name{CommonName: "system:kube-proxy"}, bad.dns, bad.ips...)); status == http.StatusOK {
			t.Errorf("a proxy's certificate for %v %v", cert.DNSNames, cert.IPAddresses)
		}
	}
}

func foreignKey(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	text := csr(t, kubeletName("n2"), nil)
	block, _ := pem.Decode([]byte(text))
	block.Bytes[len(block.Bytes)-3] ^= 0x55 // somebody else's signature
	if _, status, _ := s.sign(tok+api.SuffixKubelet, string(pem.EncodeToMemory(block))); status == http.StatusOK {
		t.Error("a certificate for a key that the sender does not have")
	}
}

func weakKey(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	key, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // it is short
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: kubeletName("n2"), SignatureAlgorithm: x509.SHA256WithRSA}, key)
	if err != nil {
		t.Fatal(err)
	}
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	if _, status, e := s.sign(tok+api.SuffixKubelet, text); status == http.StatusOK || e.Code != api.CodeCertificate {
		t.Errorf("a certificate for a key of %d bits: %d %s", key.N.BitLen(), status, e.Message)
	}
}

func signTwice(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	for _, kind := range []struct {
		suffix  string
		subject pkix.Name
	}{{api.SuffixProxy, pkix.Name{CommonName: "system:kube-proxy"}}, {api.SuffixKubelet, kubeletName("n2")}} {
		if _, status, e := s.sign(tok+kind.suffix, csr(t, kind.subject, nil)); status != http.StatusOK {
			t.Fatalf("%d %s", status, e.Message)
		}
		if _, status, _ := s.sign(tok+kind.suffix, csr(t, kind.subject, nil)); status == http.StatusOK {
			t.Errorf("%s: two certificates", kind.suffix)
		}
	}
	s.joined(from{}, request(tok, "n2", true)) // who begins again gets them again
	if _, status, e := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName("n2"), nil)); status != http.StatusOK {
		t.Errorf("%d %s", status, e.Message)
	}
}

func signLate(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	s.now = s.now.Add(time.Hour)
	if _, status, _ := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName("n2"), nil)); status == http.StatusOK {
		t.Error("a request token lives longer than ten minutes")
	}
}

func wrongCallback(t *testing.T, s *site) {
	own, err := callback.Load(s.env)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{
		"", " ", own[:63], own + "0", own[1:], strings.ToUpper(own), "\x00",
		s.secret("w1"), // what a worker has
		token.LegacyCallback(nil, "n1"), token.Callback(nil, "control-plane", "n1", ""), token.Callback([]byte{}, "control-plane", "n1", ""),
	} {
		status, answer, _ := s.call(from{address: workers, cert: s.caller()}, api.PathConfigure, api.ConfigureRequest{
			Callback: secret,
			Services: []api.ConfigureService{{Name: "kubelet", Update: []map[string]string{{"--v": "9"}}, Restart: true}},
			Addons:   []api.ConfigureAddon{{Name: "dns", Disable: true}},
		})
		if status != http.StatusInternalServerError || !bytes.Contains(answer, []byte("Invalid token")) {
			t.Errorf("configure with %.10q: %d %s", secret, status, answer)
		}
		body := &countedBody{Reader: strings.NewReader("an image")}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+here+api.PathImageImport, body)
		if err != nil {
			t.Fatal(err)
		}
		req.RemoteAddr = workers + ":40000"
		req.Header[http.CanonicalHeaderKey(api.HeaderCallback)] = []string{secret}
		rec := newRecorder()
		s.srv.Handler().ServeHTTP(rec, req)
		if rec.Code != http.StatusUnauthorized || body.read > 0 {
			t.Errorf("import with %.10q: %d, %d bytes were read", secret, rec.Code, body.read)
		}
	}
	s.nothingDone()
}

// nothingDone wants that no call had an effect.
func (s *site) nothingDone() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.services.restarts)+len(s.ran)+len(s.removed) > 0 {
		s.t.Errorf("restarted %v, ran %v, removed %v", s.services.restarts, s.ran, s.removed)
	}
	text, err := os.ReadFile(s.env.Args("kubelet"))
	if err != nil || !strings.HasPrefix(string(text), "--root-dir=") || strings.Contains(string(text), "--v") {
		s.t.Errorf("args/kubelet: %q, %v", text, err)
	}
}

func emptyCallback(t *testing.T, s *site) {
	for _, file := range []string{"", "\n", "  "} {
		s.write(s.env.Credential(callback.FileName), file)
		for _, secret := range []string{"", " ", "\n"} {
			status, _, _ := s.call(from{}, api.PathConfigure, api.ConfigureRequest{Callback: secret, Services: []api.ConfigureService{{Name: "kubelet", Restart: true}}})
			if status != http.StatusInternalServerError {
				t.Errorf("%q where the file has %q: %d", secret, file, status)
			}
		}
	}
	s.nothingDone()
}

func wrongCAPI(t *testing.T, s *site) {
	s.write(s.env.HostPath("capi/etc/token"), "the-right-one\n")
	for _, given := range []string{"", "the-right", "the-right-one2", "wrong"} {
		status, answer, _ := s.call(from{header: map[string]string{api.HeaderCAPI: given}}, api.PathDqliteRemove, api.RemoveRequest{Endpoint: here + ":19001"})
		if status != http.StatusUnauthorized || given != "" && bytes.Contains(answer, []byte(given)) {
			t.Errorf("%q: %d %s", given, status, answer)
		}
	}
	s.nothingDone()
}

func emptyCAPI(t *testing.T, s *site) {
	s.write(s.env.HostPath("capi/etc/token"), "\n")
	status, _, _ := s.call(from{}, api.PathDqliteRemove, api.RemoveRequest{Endpoint: here + ":19001"})
	if status != http.StatusUnauthorized {
		t.Errorf("without a token: %d", status)
	}
	s.nothingDone()
}

// configure with the right secret.
func (s *site) configure(r api.ConfigureRequest) (int, string) {
	s.t.Helper()
	own, err := callback.Load(s.env)
	if err != nil {
		s.t.Fatal(err)
	}
	r.Callback = own
	status, answer, _ := s.call(from{cert: s.caller()}, api.PathConfigure, r)
	return status, string(answer)
}

func serviceNames(t *testing.T, s *site) {
	before := tree(t, s.env.Host)
	for _, name := range []string{
		"../credentials/x", "../../../../../etc/cron.d/x", "kubelet/../x", "/etc/x", "", ".", "..", "x", "kubelet\x00", "certs.d/x", "csr.conf", "kubelet.backup",
	} {
		status, _ := s.configure(api.ConfigureRequest{Services: []api.ConfigureService{{Name: name, Update: []map[string]string{{"--v": "9"}}}}})
		if status == http.StatusOK {
			t.Errorf("%q was changed", name)
		}
		if status, _ := s.configure(api.ConfigureRequest{Services: []api.ConfigureService{{Name: name, Restart: true}}}); status == http.StatusOK {
			t.Errorf("%q was restarted", name)
		}
	}
	if after := tree(t, s.env.Host); !slices.Equal(before, after) {
		t.Errorf("files changed from %v to %v", before, after)
	}
}

// tree lists the files below a folder.
func tree(t *testing.T, root string) (out []string) {
	t.Helper()
	err := filepath.Walk(root, func(path string, st os.FileInfo, err error) error {
		if err == nil && st.Mode().IsRegular() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func values(t *testing.T, s *site) {
	for _, bad := range []map[string]string{
		{"--v": "1\n--anonymous-auth=true"}, {"--v": "1\r--x=y"}, {"--v": "$(reboot)"}, {"--v": "`reboot`"}, {"--v": "a\x00b"},
		{"--v=1\n--anonymous-auth": "true"}, {"--v x": "1"}, {"": "1"}, {"--": "1"}, {"#": "1"}, {"--v": strings.Repeat("x", 100_000)},
	} {
		status, answer := s.configure(api.ConfigureRequest{Services: []api.ConfigureService{
			{Name: "kubelet", Restart: true}, {Name: "kubelet", Update: []map[string]string{bad}},
		}})
		if status == http.StatusOK {
			t.Errorf("%.60v: %s", bad, answer)
		}
	}
	s.nothingDone() // not even what stood before the bad one
}

func addonNames(t *testing.T, s *site) {
	for _, bad := range []string{"--help", "-f", "../x", "a b", "dns;reboot", "", "$(x)", "dns\n", "a/b/c", "/etc/passwd"} {
		if status, _ := s.configure(api.ConfigureRequest{Addons: []api.ConfigureAddon{{Name: bad, Enable: true}}}); status == http.StatusOK {
			t.Errorf("%q was enabled", bad)
		}
	}
	s.nothingDone()
}

func endpoints(t *testing.T, s *site) {
	s.write(s.env.HostPath("capi/etc/token"), "right")
	for _, bad := range []string{"", "x", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:99999", "10.0.0.1:19001; .leave", "10.0.0.1:19001 x", "\n.reset:1", "-x:1"} {
		status, _, _ := s.call(from{header: map[string]string{api.HeaderCAPI: "right"}}, api.PathDqliteRemove, api.RemoveRequest{Endpoint: bad})
		if status != http.StatusBadRequest {
			t.Errorf("%q: %d", bad, status)
		}
	}
	s.nothingDone()
}

func largeBody(t *testing.T, s *site) {
	for _, path := range []string{api.PathProof, api.PathPreflight, api.PathJoin, api.PathSignCert, api.PathConfirm, api.PathRelease, api.PathRenew, api.PathConfigure} {
		body := &countedBody{Reader: io.LimitReader(spaces{}, 64<<20)}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+here+path, body)
		if err != nil {
			t.Fatal(err)
		}
		req.RemoteAddr = there + ":40000"
		rec := newRecorder()
		s.srv.Handler().ServeHTTP(rec, req)
		most := 2 * server.MaxBody
		if path == api.PathConfigure {
			most = 128 << 10
		}
		if rec.Code != http.StatusBadRequest || body.read > most {
			t.Errorf("%s: %d after %d bytes", path, rec.Code, body.read)
		}
	}
}

// spaces is a body of blanks, which JSON allows anywhere.
type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

type countedBody struct {
	io.Reader
	read int
}

func (c *countedBody) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.read += n
	return n, err
}

func guessing(t *testing.T, s *site) {
	for range 100 {
		s.join(from{}, request(token.New().Reveal(), "n2", false))
	}
	s.mu.Lock()
	n := len(s.slept)
	var longest time.Duration
	for _, d := range s.slept {
		longest = max(longest, d)
	}
	s.mu.Unlock()
	if n != 100 || longest < 5*time.Second {
		t.Errorf("%d of 100 wrong answers were late, the last by %v", n, longest)
	}
	// Who is right is not kept waiting, not even from the same address.
	s.joined(from{}, request(s.add(tokenstore.Options{}).Reveal(), "n2", false))
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.slept) != n {
		t.Error("the right token had to wait")
	}
}

func caching(t *testing.T, s *site) {
	_, _, header := s.call(from{}, api.PathJoin, request(s.add(tokenstore.Options{}).Reveal(), "n2", false))
	if header.Get("Cache-Control") != "no-store" {
		t.Errorf("Cache-Control: %q", header.Get("Cache-Control"))
	}
}

// live serves the site over TLS.
func (s *site) live() (address string, roots *x509.CertPool) {
	s.t.Helper()
	l, err := (&net.ListenConfig{}).Listen(s.t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := contextOf(s.t)
	ended := make(chan error, 1)
	go func() { ended <- s.srv.Serve(ctx, l) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Error(err)
		}
	})
	ca, err := os.ReadFile(s.env.Cert("ca.crt"))
	if err != nil {
		s.t.Fatal(err)
	}
	roots = x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return l.Addr().String(), roots
}

func slowBody(t *testing.T, s *site) {
	address, roots := s.live()
	conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 1000\r\n\r\n", api.PathJoin, address)
	var answer bytes.Buffer
	over := make(chan struct{})
	go func() {
		defer close(over)
		_, _ = io.Copy(&answer, conn)
	}()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	sent := 0
	for limit := time.After(10 * time.Second); ; {
		select {
		case <-over:
			if !strings.Contains(answer.String(), " 400 ") {
				t.Errorf("answered %q", answer.String())
			}
			return
		case <-limit:
			t.Fatalf("it still waits after %d bytes of a body that trickles", sent)
		case <-tick.C:
			if sent < 990 {
				if _, err := conn.Write([]byte(" ")); err == nil {
					sent++
				}
			}
		}
	}
}

func proofOfChosen(t *testing.T, s *site) {
	tok, err := token.Parse("a-token-that-can-be-guessed-from-a-list")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.tokens.Add(t.Context(), tok, tokenstore.Options{Uses: 1}); err != nil {
		t.Fatal(err)
	}
	address, roots := s.live()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	id, _ := tok.Derive()
	body, err := json.Marshal(api.ProofRequest{ID: id.String(), Nonce: token.Nonce()})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Post("https://"+address+api.PathProof, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		t.Error("a proof of a token that can be guessed")
	}
}

// renewWith asks over TLS with a client certificate for this node, made by this CA.
func (s *site) renewWith(ca *x509.Certificate, caKey any, nodeName pkix.Name) int {
	s.t.Helper()
	node := strings.TrimPrefix(nodeName.CommonName, "system:node:")
	return s.renewFor(ca, caKey, nodeName, api.RenewRequest{Kubelet: csr(s.t, kubeletName(node), []string{node})})
}

// renewFor shows, for w1, a certificate of its present join.
func (s *site) renewFor(ca *x509.Certificate, caKey any, nodeName pkix.Name, request api.RenewRequest) int {
	s.t.Helper()
	if nodeName.CommonName == "system:node:w1" {
		nodeName.ExtraNames = []pkix.AttributeTypeAndValue{{Type: k8sasn1.X509UID(), Value: joinOfW1}}
	}
	return s.renewAs(ca, caKey, nodeName, request)
}

func (s *site) renewAs(ca *x509.Certificate, caKey any, nodeName pkix.Name, request api.RenewRequest) int {
	s.t.Helper()
	address, roots := s.live()
	_, key := csrKey(s.t, nodeName, nil)
	der, err := issueWith(ca, caKey, nodeName, &key.PublicKey)
	if err != nil {
		s.t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
		RootCAs: roots, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}}}
	defer client.CloseIdleConnections()
	node := strings.TrimPrefix(nodeName.CommonName, "system:node:")
	body, err := json.Marshal(request)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := client.Post("https://"+address+api.PathRenew, "application/json", bytes.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK && request.Kubelet != "" {
		var answer api.RenewResponse
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.CallbackToken != s.secret(node) {
			s.t.Errorf("the secret of %s is not given: %v", node, err)
		}
		cert, err := pki.ParseCert([]byte(answer.Kubelet))
		if err != nil || cert.Subject.CommonName != nodeName.CommonName {
			s.t.Errorf("%v", err)
		}
	}
	return resp.StatusCode
}

func (s *site) ca() (*x509.Certificate, any) {
	s.t.Helper()
	crt, err := os.ReadFile(s.env.Cert("ca.crt"))
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := os.ReadFile(s.env.Cert("ca.key"))
	if err != nil {
		s.t.Fatal(err)
	}
	cert, err := pki.ParseCert(crt)
	if err != nil {
		s.t.Fatal(err)
	}
	parsed, err := pki.ParseKey(key)
	if err != nil {
		s.t.Fatal(err)
	}
	return cert, parsed
}

func foreignClient(t *testing.T, s *site) {
	ca, key := freshCA(t)
	if status := s.renewWith(ca, key, kubeletName("w1")); status != http.StatusUnauthorized {
		t.Errorf("a certificate of another CA: %d", status)
	}
	ca, key = s.ca()
	for _, name := range []pkix.Name{{CommonName: "system:kube-proxy"}, {CommonName: "system:node:w1"}, {CommonName: "w1", Organization: []string{"system:nodes"}}} {
		if status := s.renewWith(ca, key, name); status != http.StatusUnauthorized {
			t.Errorf("%s: %d", name, status)
		}
	}
	if status := s.renewWith(ca, key, kubeletName("w1")); status != http.StatusOK {
		t.Errorf("the node itself: %d", status)
	}
}

// longEnded has a worker's certificate from a drawer.
func longEnded(t *testing.T, s *site) {
	ca, key := s.ca()
	for days, want := range map[int]int{0: http.StatusOK, 364: http.StatusOK, 367: http.StatusUnauthorized, 2000: http.StatusUnauthorized} {
		s.now = time.Now().AddDate(0, 0, days) // the certificate is good for an hour
		if status := s.renewWith(ca, key, kubeletName("w1")); status != want {
			t.Errorf("%d days later: %d, want %d", days, status, want)
		}
	}
}

// removedNode is about a cluster in which not every node has a record yet: then its Node counts.
func removedNode(t *testing.T, s *site) {
	for _, path := range s.api.Paths("clusterroles", "clusterrolebindings") {
		s.api.Remove(path)
	}
	ca, key := s.ca()
	s.cluster.nodes = s.cluster.nodes[:1]
	if status := s.renewWith(ca, key, kubeletName("w1")); status != http.StatusUnauthorized {
		t.Errorf("%d", status)
	}
}

// formerNodes has certificates that are good, for a name that is in the cluster or was.
func formerNodes(t *testing.T, s *site) {
	ca, key := s.ca()
	if status := s.renewWith(ca, key, kubeletName("w1")); status != http.StatusOK {
		t.Fatalf("the node itself: %d", status)
	}
	// Its Node is there, and somebody shows a certificate of an earlier join, or of none.
	for what, join := range map[string]string{"an earlier join": "ffffffffffffffffffffffffffffffff", "a longer one": joinOfW1 + "0", "none": ""} {
		who := kubeletName("w1")
		if join != "" {
			who.ExtraNames = []pkix.AttributeTypeAndValue{{Type: k8sasn1.X509UID(), Value: join}}
		}
		if status := s.renewAs(ca, key, who, api.RenewRequest{}); status != http.StatusUnauthorized {
			t.Errorf("a certificate of %s: %d", what, status)
		}
	}
	// One of a worker that has become a control-plane node.
	if err := s.nodes.Put(t.Context(), noderegistry.Record{Name: "w1", Role: noderegistry.ControlPlane, Join: joinOfW1}); err != nil {
		t.Fatal(err)
	}
	if status := s.renewWith(ca, key, kubeletName("w1")); status != http.StatusUnauthorized {
		t.Errorf("a worker's certificate for a control plane node: %d", status)
	}
	// It was removed. Its kubelet has made its Node again.
	if err := s.nodes.Delete(t.Context(), "w1"); err != nil {
		t.Fatal(err)
	}
	if status := s.renewWith(ca, key, kubeletName("w1")); status != http.StatusUnauthorized {
		t.Errorf("removed: %d", status)
	}
	// Another machine has come under its name.
	tok := s.add(tokenstore.Options{Name: "w1"}).Reveal()
	s.cluster.nodes = s.cluster.nodes[:1]
	s.joined(from{}, request(tok, "w1", true))
	if status, e := s.finish(api.PathConfirm, tok, "w1"); status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	if status := s.renewWith(ca, key, kubeletName("w1")); status != http.StatusUnauthorized {
		t.Errorf("the machine before: %d", status)
	}
}

// secretsFromTheAPI has what a reader of all Secrets and ClusterRoleBindings has, of a backup too.
func secretsFromTheAPI(t *testing.T, s *site) {
	known := s.secretValues()
	if len(known) < 2 {
		t.Fatalf("only %d values", len(known))
	}
	for _, key := range append(known, token.CallbackKey(known[0], known[1]), token.CallbackKey(known[1], known[0])) {
		for _, secret := range []string{
			token.LegacyCallback(key, "n1"), token.Callback(key, "control-plane", "n1", ""), token.Callback(key, "worker", "n1", ""), string(key),
			token.Callback(token.CallbackKey(nil, key), "control-plane", "n1", ""),
		} {
			status, answer, _ := s.call(from{cert: s.caller()}, api.PathConfigure, api.ConfigureRequest{Callback: secret, Services: []api.ConfigureService{{Name: "kubelet", Restart: true}}})
			if status == http.StatusOK {
				t.Errorf("configure with what follows from the API: %s", answer)
			}
		}
	}
	s.nothingDone()
}

// collectedSecret joins under names of nodes that are to come, and keeps what it is told.
func collectedSecret(t *testing.T, s *site) {
	tok := s.add(tokenstore.Options{Uses: tokenstore.Unlimited, TTL: time.Hour}).Reveal()
	if a := s.joined(from{}, request(tok, "n3", true)); a.CallbackToken != "" {
		t.Error("a secret is told before the join is confirmed")
	}
	old := request(tok, "n3", true) // a client of the build before gets one
	old.Secrets = 0
	noted := s.joined(from{}, old).CallbackToken
	if noted == "" {
		t.Fatal("a client of the build before gets no secret")
	}
	if status, e := s.finish(api.PathRelease, tok, "n3"); status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	for _, worker := range []bool{true, false} {
		s.joined(from{}, request(tok, "n3", worker))
		if status, e := s.finish(api.PathConfirm, tok, "n3"); status != http.StatusOK {
			t.Fatalf("%d %s", status, e.Message)
		}
		if s.secret("n3") == noted {
			t.Errorf("the secret of a join that was given up is that of the node (worker: %v)", worker)
		}
		noted = s.secret("n3")
		if err := s.nodes.Delete(t.Context(), "n3"); err != nil {
			t.Fatal(err)
		}
	}
	// And one that was noted opens no door here.
	status, _, _ := s.call(from{cert: s.caller()}, api.PathConfigure, api.ConfigureRequest{Callback: noted, Services: []api.ConfigureService{{Name: "kubelet", Restart: true}}})
	if status == http.StatusOK {
		t.Error("another node's secret is taken")
	}
}

// wrongCaller has the secret of this node, from a file or a log, and certificates that others have.
func wrongCaller(t *testing.T, s *site) {
	own := s.secret("n1")
	ca, caKey := s.ca()
	foreign, foreignKey := freshCA(t)
	cert := func(ca *x509.Certificate, key any, name pkix.Name) *x509.Certificate {
		_, own := csrKey(t, name, nil)
		der, err := issueWith(ca, key, name, &own.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		out, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	text, err := os.ReadFile(s.env.Cert("server.crt"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := pki.ParseCert(text)
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]*x509.Certificate{
		"no certificate":                    nil,
		"a worker's":                        cert(ca, caKey, kubeletName("w1")),
		"a worker's proxy's":                cert(ca, caKey, pkix.Name{CommonName: "system:kube-proxy", Organization: []string{"microk8s:node:w1"}}),
		"one of another CA":                 cert(foreign, foreignKey, pkix.Name{CommonName: "x", Organization: []string{callback.Organization}}),
		"an API server's":                   server,
		"one with another organization too": cert(ca, caKey, pkix.Name{CommonName: "x", Organization: []string{"system:nodes", callback.Organization}}),
	} {
		f := from{cert: c, header: map[string]string{api.HeaderCallback: own}}
		if status, answer, _ := s.call(f, api.PathConfigure, api.ConfigureRequest{Callback: own, Services: []api.ConfigureService{{Name: "kubelet", Restart: true}}}); status == http.StatusOK {
			t.Errorf("configure with %s: %s", what, answer)
		}
		if status, answer, _ := s.call(f, api.PathImageImport, "an image"); status == http.StatusOK {
			t.Errorf("import with %s: %s", what, answer)
		}
		if status, answer, _ := s.call(f, api.PathExamine, struct{}{}); status == http.StatusOK {
			t.Errorf("examine with %s: %s", what, answer)
		}
		if status, answer, _ := s.call(f, api.PathCerts, struct{}{}); status == http.StatusOK {
			t.Errorf("certificates with %s: %s", what, answer)
		}
	}
	s.nothingDone()
	// The broker signs no such certificate.
	tok := s.add(tokenstore.Options{}).Reveal()
	s.joined(from{}, request(tok, "n2", true))
	for _, suffix := range []string{api.SuffixKubelet, api.SuffixProxy} {
		if c, status, _ := s.sign(tok+suffix, csr(t, pkix.Name{CommonName: "x", Organization: []string{callback.Organization}}, nil)); status == http.StatusOK {
			t.Errorf("%s: a certificate for %s", suffix, c.Subject)
		}
	}
}

// serviceNamed joins under names that mean something else, and has certificates signed for them.
func serviceNamed(t *testing.T, s *site) {
	for _, name := range []string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster", "kubernetes.default.svc.cluster.local", "cluster.local",
		"x.svc", "web.shop.svc", "web.shop.svc.cluster.local", "web.shop", "metrics-server.kube-system", "anything.cluster.local", "svc",
		"10.152.183.1", "10.0.0.1", here, "localhost", "w1.localhost", "1.2.3.4",
	} {
		for _, ours := range []bool{true, false} {
			tok := s.add(tokenstore.Options{}).Reveal()
			r := request(tok, name, true)
			if !ours {
				r = upstream(tok, name, true)
			}
			if _, status, _ := s.join(from{}, r); status != http.StatusOK {
				continue
			}
			t.Errorf("a node is called %s", name)
			if cert, status, _ := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName(name), []string{name})); status == http.StatusOK && len(cert.DNSNames) > 0 {
				t.Errorf("and serves under it: %v", cert.DNSNames)
			}
		}
	}
	for _, name := range []string{"n2", "n2.example.com", "rack1.lab", "svc-1", "local", "shop", "kube", "web.shop.example.com"} {
		s.joined(from{}, request(s.add(tokenstore.Options{}).Reveal(), name, true))
		if status, _ := s.finish(api.PathRelease, "", name); status == http.StatusOK {
			t.Error("a release without a token")
		}
	}
}

// severalIdentities has one certificate after the other with a token for one node.
func severalIdentities(t *testing.T, s *site) {
	for _, end := range []string{"release", "wait"} {
		tok := s.add(tokenstore.Options{}).Reveal()
		var got []string
		for i := range 10 {
			name := fmt.Sprintf("n%d-%s", i+10, end)
			if _, status, _ := s.join(from{}, request(tok, name, true)); status != http.StatusOK {
				continue
			}
			if _, status, _ := s.sign(tok+api.SuffixKubelet, csr(t, kubeletName(name), nil)); status == http.StatusOK {
				got = append(got, name)
			}
			if end == "release" {
				s.finish(api.PathRelease, tok, name)
			} else {
				s.now = s.now.Add(tokenstore.Reservation)
			}
		}
		if len(got) > 1 {
			t.Errorf("identities of %v with a token for one node", got)
		}
		s.joined(from{}, request(tok, "n10-"+end, true)) // the node goes on
	}
}

// sameTokenSameName has a token that lets several nodes in, one of which is there.
func sameTokenSameName(t *testing.T, s *site) {
	for _, o := range []tokenstore.Options{{Uses: 3}, {Uses: tokenstore.Unlimited, TTL: time.Hour}} {
		tok, name := s.add(o).Reveal(), fmt.Sprintf("w%d", 5+o.Uses)
		s.joined(from{}, request(tok, name, true))
		if status, e := s.finish(api.PathConfirm, tok, name); status != http.StatusOK {
			t.Fatalf("%d %s", status, e.Message)
		}
		s.cluster.nodes = append(s.cluster.nodes, aNode(name, "10.0.0.7"+fmt.Sprint(5+o.Uses), true))
		s.refused(from{address: "10.0.0.66"}, request(tok, name, true), http.StatusBadRequest, api.CodeNameTaken)
	}
}

// workerRenewsOthers has the worker w1 ask, with its own certificate, for what is not its own.
func workerRenewsOthers(t *testing.T, s *site) {
	ca, key := s.ca()
	masters := pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}
	for what, r := range map[string]api.RenewRequest{
		"the administrator":        {Kubelet: csr(t, masters, nil)},
		"the administrator, again": {Proxy: csr(t, masters, nil)},
		"another node":             {Kubelet: csr(t, kubeletName("n1"), nil)},
		"itself as the proxy":      {Proxy: csr(t, kubeletName("w1"), nil)},
	} {
		if status := s.renewFor(ca, key, kubeletName("w1"), r); status == http.StatusOK {
			t.Errorf("a worker gets the certificate of %s", what)
		}
	}
}

// workerCredentials shows all secrets that a worker has, in every place of every call.
func workerCredentials(t *testing.T, s *site) {
	s.write(s.env.HostPath("capi/etc/token"), "a provider's\n")
	joinToken := s.add(tokenstore.Options{Worker: true}).Reveal()
	s.joined(from{}, request(joinToken, "w2", true))
	if status, e := s.finish(api.PathConfirm, joinToken, "w2"); status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Message)
	}
	for _, secret := range []string{joinToken, s.secret("w1"), s.secret("w2")} {
		f := from{address: workers, header: map[string]string{api.HeaderCallback: secret, api.HeaderCAPI: secret, "Authorization": "Bearer " + secret}}
		for path, body := range map[string]any{
			api.PathJoin:         request(secret, "w3", false),
			api.PathPreflight:    api.PreflightRequest{JoinRequest: request(secret, "w3", false)},
			api.PathSignCert:     api.SignRequest{Token: secret + api.SuffixKubelet, Request: csr(t, kubeletName("n1"), nil)},
			api.PathConfigure:    api.ConfigureRequest{Callback: secret, Services: []api.ConfigureService{{Name: "kubelet", Restart: true}}},
			api.PathImageImport:  "an image",
			api.PathDqliteRemove: api.RemoveRequest{Endpoint: here + ":19001"},
			api.PathRenew:        api.RenewRequest{Kubelet: csr(t, kubeletName("w1"), nil)},
		} {
			if status, answer, _ := s.call(f, path, body); status == http.StatusOK || bytes.Contains(answer, []byte("PRIVATE KEY")) {
				t.Errorf("%s with %.8s…: %d %s", path, secret, status, answer)
			}
		}
	}
	s.nothingDone()
}
