package fanout

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"time"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/client"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/hostinfo"
	"microk8s/internal/nodeconfig"
)

// examineTimeout bounds an examination: the agent copies its datastore.
const examineTimeout = 4 * time.Minute

// Examine asks the agent of another control-plane node, at host:port, how far its copy of the datastore has
// come. No API server is needed: this node shows the certificate that only those make who have the CA's key.
func (c *Cluster) Examine(ctx context.Context, address string) (*peers.Examined, error) {
	ca, err := os.ReadFile(c.Env.Cert("ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("cannot call the other nodes: %w", err)
	}
	own, err := nodeconfig.NodeName(c.Env, hostinfo.Hostname)
	if err != nil {
		return nil, err
	}
	pair, err := callback.Caller(c.Env, own)
	if err != nil {
		return nil, fmt.Errorf("cannot call the other nodes: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := Transport(roots, Target{Address: address})
	transport.TLSClientConfig.Certificates = []tls.Certificate{pair}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	data, err := client.Post(ctx, transport, address, api.PathExamine, http.Header{}, bytes.NewReader([]byte("{}")))
	if err != nil {
		return nil, err
	}
	var x peers.Examined
	if err := json.Unmarshal(data, &x); err != nil {
		return nil, fmt.Errorf("cannot read the answer of the agent at %s: %w", address, err)
	}
	return &x, nil
}
