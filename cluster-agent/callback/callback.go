// Package callback keeps the secrets with which one node may ask another to do something
// (ADR 4). The cluster's key K_cb is in a Secret that control-plane nodes can
// read; the secret of node N is made from it and N's name, and lies in N's
// credentials/callback-token.txt, with which N's agent compares.
//
// The key changes when a control-plane node was removed, since that node knew it. Control-plane
// nodes watch the Secret and rewrite their file; workers ask for theirs (cluster-agent/worker).
package callback

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"microk8s/internal/atomicfile"
	"microk8s/internal/kube"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// SecretName is the Secret of kube-system that holds the key, under keyName.
const (
	SecretName = "microk8s-cluster-agent"
	keyName    = "callback-key"
)

// FileName is the file of a node's own secret, in credentials/.
const FileName = "callback-token.txt"

// Keys reads and changes the cluster's key.
type Keys struct {
	Core func() (*kube.Core, error)
}

// Get gives the key, and makes it where there is none.
func (k Keys) Get(ctx context.Context) ([]byte, error) {
	key, _, err := k.get(ctx, false)
	return key, err
}

// Rotate makes a new key. The old one counts nowhere once the nodes have noticed.
func (k Keys) Rotate(ctx context.Context) error {
	_, _, err := k.get(ctx, true)
	return err
}

func (k Keys) get(ctx context.Context, renew bool) (key []byte, changed bool, err error) {
	core, err := k.Core()
	if err != nil {
		return nil, false, err
	}
	for {
		secret, err := core.Secret(ctx, SecretName)
		switch {
		case apierrors.IsNotFound(err):
			secret = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: SecretName}, Type: "microk8s.io/cluster-agent"}
			secret.Data = map[string][]byte{keyName: token.NewCallbackKey()}
			_, err = core.CreateSecret(ctx, secret)
		case err != nil:
			return nil, false, fmt.Errorf("cannot read the key of callback secrets: %w", err)
		case renew || len(secret.Data[keyName]) != token.CallbackKeySize:
			if secret.Data == nil {
				secret.Data = map[string][]byte{}
			}
			secret.Data[keyName] = token.NewCallbackKey()
			_, err = core.UpdateSecret(ctx, secret)
		default:
			return secret.Data[keyName], false, nil
		}
		if err == nil {
			return secret.Data[keyName], true, nil
		}
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			return nil, false, fmt.Errorf("cannot write the key of callback secrets: %w", err)
		}
		if ctx.Err() != nil {
			return nil, false, ctx.Err()
		}
	}
}

// Store writes a node's own secret.
func Store(env snapenv.Env, secret string) error {
	path := env.Credential(FileName)
	if data, err := os.ReadFile(path); err == nil && string(data) == secret {
		return nil
	}
	return atomicfile.Write(path, []byte(secret), 0o600, nil)
}

// Load reads it; "" where there is none.
func Load(env snapenv.Env) (string, error) {
	data, err := os.ReadFile(env.Credential(FileName))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(data), err
}

// retry is how long a Keeper waits after the API server did not answer.
const retry = 5 * time.Second

// Keeper writes the secret of a control-plane node when the key changes.
type Keeper struct {
	Env  snapenv.Env
	Keys Keys
	Node string
	Log  *slog.Logger
	// Connected is called each time the API server answers again; it may be nil.
	Connected func(ctx context.Context) error
}

// Run goes on until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := k.watch(ctx)
		if err != nil && ctx.Err() == nil {
			k.Log.Debug("the key of callback secrets cannot be watched now", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
	return nil
}

// watch follows the Secret until the API server ends the watch.
func (k *Keeper) watch(ctx context.Context) error {
	core, err := k.Keys.Core()
	if err != nil {
		return err
	}
	// Made now and not by the first call between nodes, which may come when the disk is full.
	if _, err := k.Keys.Get(ctx); err != nil {
		return err
	}
	// Without a resource version the watch begins with what there is.
	opts := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", SecretName).String(), Watch: true}
	w, err := core.Get().Namespace(kube.SystemNamespace).Resource("secrets").
		VersionedParams(&opts, metav1.ParameterCodec).Timeout(0).Watch(ctx)
	if err != nil {
		return err
	}
	defer w.Stop()
	if k.Connected != nil {
		if err := k.Connected(ctx); err != nil {
			return err
		}
	}
	for e := range w.ResultChan() {
		secret, ok := e.Object.(*corev1.Secret)
		if !ok || len(secret.Data[keyName]) != token.CallbackKeySize {
			continue
		}
		if err := Store(k.Env, token.Callback(secret.Data[keyName], k.Node)); err != nil {
			return err
		}
	}
	return nil
}
