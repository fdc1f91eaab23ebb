package fanout

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/callback"
	"microk8s/cluster-agent/client"
	"microk8s/internal/certs"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/hostinfo"
	"microk8s/internal/nodeconfig"
)

// examineTimeout bounds an examination: the agent copies its datastore.
const examineTimeout = 4 * time.Minute

// Examine asks the agent of another control-plane node, at host:port, how far its copy of the datastore has
// come. No API server is needed: this node shows the certificate that only those make who have the CA's key.
func (c *Cluster) Examine(ctx context.Context, address string) (*peers.Examined, error) {
	x := new(peers.Examined)
	return x, c.question(ctx, Target{Address: address}, examineTimeout, api.PathExamine, x)
}

// question asks one agent something that this node's certificate for such calls is enough for.
func (c *Cluster) question(ctx context.Context, t Target, limit time.Duration, path string, answer any) error {
	ca, err := os.ReadFile(c.Env.Cert("ca.crt"))
	if err != nil {
		return fmt.Errorf("cannot call the other nodes: %w", err)
	}
	own, err := nodeconfig.NodeName(c.Env, hostinfo.Hostname)
	if err != nil {
		return err
	}
	pair, err := callback.Caller(c.Env, own)
	if err != nil {
		return fmt.Errorf("cannot call the other nodes: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := Transport(roots, t)
	transport.TLSClientConfig.Certificates = []tls.Certificate{pair}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	data, err := client.Post(ctx, transport, t.Address, path, http.Header{}, bytes.NewReader([]byte("{}")))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("cannot read the answer of the agent at %s: %w", t.Address, err)
	}
	return nil
}

// certsTimeout bounds a question about certificates, which are files.
const certsTimeout = 15 * time.Second

// Certificates asks the agents of all nodes for their certificates and keys. A node that does not
// answer is in the second list, with the reason; certificates that nodes should share and do not are
// noted as problems.
func (c *Cluster) Certificates(ctx context.Context) ([]certs.Inventory, []Result, error) {
	targets, err := c.Targets(ctx)
	if err != nil {
		return nil, nil, err
	}
	found, failed := make([]certs.Inventory, len(targets)), make([]Result, len(targets))
	var group errgroup.Group
	group.SetLimit(atOnce)
	for i, t := range targets {
		failed[i].Target = t
		group.Go(func() error {
			if t.Address == "" {
				failed[i].Err = errors.New("it has no address")
				return nil
			}
			err := c.question(ctx, t, certsTimeout, api.PathCerts, &found[i])
			var refused *client.ServerError
			if errors.As(err, &refused) && refused.Status == http.StatusNotFound {
				err = errors.New("it runs an earlier release, which does not say")
			}
			found[i].Node, failed[i].Err = t.Name, err
			return nil
		})
	}
	_ = group.Wait() // the functions give no errors
	var answered []certs.Inventory
	var silent []Result
	for i, r := range failed {
		if r.Err == nil {
			answered = append(answered, found[i])
		} else {
			silent = append(silent, r)
		}
	}
	certs.Compare(answered)
	return answered, silent, nil
}
