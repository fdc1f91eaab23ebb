// Package callback keeps the secrets with which one node may ask another to do something
// (ADR 14). They follow from the CA's key, which only control-plane nodes have, and a salt
// in the Secret [SecretName]; each is bound to a node's role, name and join. A node's own lies in its
// credentials/callback-token.txt, with which its agent compares. Beside it, a caller shows a
// certificate that only control-plane nodes can make ([Caller]).
//
// The salt changes when a node is removed. Control-plane nodes watch the Secret and rewrite their
// file; workers ask for theirs (cluster-agent/worker).
package callback

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"microk8s/internal/atomicfile"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/noderegistry"
	"microk8s/internal/snapenv"
	"microk8s/internal/token"
)

// SecretName is the Secret of kube-system that holds the salt.
const SecretName = "microk8s-cluster-agent"

// Entries of the Secret.
const (
	saltName   = "salt"
	legacyName = "callback-key" // of the build before, whose nodes' secrets follow from it alone
	sealedName = "sealed"       // no control-plane node is of the build before any more
)

// FileName is the file of a node's own secret, in credentials/.
const FileName = "callback-token.txt"

// Key makes the secrets of all nodes, as they are at one time.
type Key struct {
	key    []byte
	legacy []byte // nil when no control-plane node is of the build before
}

// Secret is that of a node.
func (k Key) Secret(r noderegistry.Record) string {
	return token.Callback(k.key, string(r.Role), r.Name, r.Join)
}

// Legacy is the one that control-plane nodes of the build before know of a node; "" where there are none.
func (k Key) Legacy(name string) string {
	if k.legacy == nil {
		return ""
	}
	return token.LegacyCallback(k.legacy, name)
}

// NewKey makes the key of a base and a salt; legacy is that of the build before, or nil.
func NewKey(base, salt, legacy []byte) Key { return Key{token.CallbackKey(base, salt), legacy} }

// Keys reads and changes what the cluster's key follows from. It is for control-plane nodes.
type Keys struct {
	Env  snapenv.Env
	Core func() (*kube.Core, error)
}

// Get returns the key, and makes a salt where there is none.
func (k Keys) Get(ctx context.Context) (Key, error) {
	return k.change(ctx, func(map[string][]byte) {})
}

// Rotate changes the salt. The secrets of before count nowhere once the nodes have noticed.
func (k Keys) Rotate(ctx context.Context) error {
	_, err := k.change(ctx, func(data map[string][]byte) {
		data[saltName] = token.NewCallbackKey()
		if data[legacyName] != nil && data[sealedName] == nil {
			data[legacyName] = token.NewCallbackKey()
		}
	})
	return err
}

// Seal ends the secrets of the build before: from then on none that follows from the API alone is
// taken. It is called when every control-plane node is of this build, and does nothing the next time.
func (k Keys) Seal(ctx context.Context) error {
	_, err := k.change(ctx, func(data map[string][]byte) {
		if data[sealedName] == nil {
			if data[legacyName] != nil {
				data[saltName] = token.NewCallbackKey()
			}
			data[sealedName] = []byte("2")
		}
		delete(data, legacyName)
	})
	return err
}

// decode reads the Secret; ok is false where it has no salt.
func (k Keys) decode(data map[string][]byte) (key Key, ok bool, err error) {
	if len(data[saltName]) != token.CallbackKeySize {
		return Key{}, false, nil
	}
	base, err := loadBase(k.Env)
	if err != nil {
		return Key{}, false, err
	}
	var legacy []byte
	if data[sealedName] == nil && len(data[legacyName]) == token.CallbackKeySize {
		legacy = data[legacyName]
	}
	return NewKey(base, data[saltName], legacy), true, nil
}

func (k Keys) change(ctx context.Context, change func(map[string][]byte)) (Key, error) {
	core, err := k.Core()
	if err != nil {
		return Key{}, err
	}
	var key Key
	err = kube.RetryConflict(ctx, func() error {
		secret, err := core.Secret(ctx, SecretName)
		fresh := apierrors.IsNotFound(err)
		if err != nil && !fresh {
			return fmt.Errorf("cannot read the salt of callback secrets: %w", err)
		}
		if fresh {
			secret = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: SecretName}, Type: "microk8s.io/cluster-agent"}
		}
		data := maps.Clone(secret.Data)
		if data == nil {
			data = map[string][]byte{}
		}
		if len(data[saltName]) != token.CallbackKeySize {
			data[saltName] = token.NewCallbackKey()
		}
		change(data)
		same := !fresh && maps.EqualFunc(data, secret.Data, bytes.Equal)
		secret.Data = data
		switch {
		case same:
			err = nil
		case fresh:
			_, err = core.CreateSecret(ctx, secret)
		default:
			_, err = core.UpdateSecret(ctx, secret)
		}
		if err != nil {
			return fmt.Errorf("cannot write the salt of callback secrets: %w", err)
		}
		key, _, err = k.decode(data)
		return err
	})
	return key, err
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

const (
	retry = 5 * time.Second // after the API server did not answer
	// sweep is how often a Controller ends joins that were never confirmed, and renews what lets members
	// of the group call other nodes.
	sweep = 10 * time.Minute
	// Grace is how long after the end of its time the record of a join that was not confirmed is kept:
	// a node that is in, and could not say so, says so within it.
	Grace = time.Hour
)

// Controller writes the secret of a control-plane node when the salt changes, and keeps the node's record.
type Controller struct {
	Env   snapenv.Env
	Keys  Keys
	Nodes noderegistry.Registry
	Node  string
	Log   *slog.Logger
	// Connected is called each time the API server answers again; it may be nil.
	Connected func(ctx context.Context) error
	Now       func() time.Time // nil means time.Now
}

func (k *Controller) now() time.Time {
	if k.Now != nil {
		return k.Now()
	}
	return time.Now()
}

// Run goes on until ctx ends.
func (k *Controller) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := k.watch(ctx)
		if err != nil && ctx.Err() == nil {
			k.Log.Debug("the salt of callback secrets cannot be watched now", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
	return nil
}

// watch follows the Secret until the API server ends the watch.
func (k *Controller) watch(ctx context.Context) error {
	if err := WriteCaller(k.Env, k.Node, k.now()); err != nil {
		return err
	}
	core, err := k.Keys.Core()
	if err != nil {
		return err
	}
	// Made now and not by the first call between nodes, which may come when the disk is full.
	key, err := k.Keys.Get(ctx)
	if err != nil {
		return err
	}
	self, err := k.self(ctx)
	if err != nil {
		return err
	}
	if err := Store(k.Env, key.Secret(*self)); err != nil {
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
	tick := time.NewTicker(sweep)
	defer tick.Stop()
	for {
		select {
		case e, open := <-w.ResultChan():
			if !open {
				return nil
			}
			secret, ok := e.Object.(*corev1.Secret)
			if !ok {
				continue
			}
			key, ok, err := k.Keys.decode(secret.Data)
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			if err := Store(k.Env, key.Secret(*self)); err != nil {
				return err
			}
		case <-tick.C:
			if err := k.sweep(ctx); err != nil {
				return err
			}
		}
	}
}

// self reads this node's record, or makes one, and notes that it is a control-plane node of this
// build, and which member of the datastore it has. It has the CA's key, so it is one.
func (k *Controller) self(ctx context.Context) (*noderegistry.Record, error) {
	own := noderegistry.Record{Name: k.Node, Role: noderegistry.ControlPlane, Since: k.now(), Secrets: 2, Member: k.member()}
	if added, err := k.Nodes.Add(ctx, own); added || err != nil {
		return &own, err
	}
	err := k.Nodes.Change(ctx, k.Node, func(r *noderegistry.Record) error {
		if r.Role == noderegistry.Worker { // of who had the name before: what it was given is not this node's
			r.Join = ""
		}
		r.Role, r.Secrets, r.Member = noderegistry.ControlPlane, 2, k.member()
		if r.Pending() && k.now().After(r.Until) { // it is in, and nobody was told
			r.Until = time.Time{}
		}
		own = *r
		return nil
	})
	return &own, err
}

// member is the ID of this node's member of the datastore; 0 with an external etcd.
func (k *Controller) member() uint64 {
	if !nodeconfig.Load(k.Env).Datastore.Own() {
		return 0
	}
	self, err := storedir.Dir(k.Env.Backend()).Self()
	if err != nil { // its first start is not over
		return 0
	}
	return self.ID
}

func (k *Controller) sweep(ctx context.Context) error {
	if err := WriteCaller(k.Env, k.Node, k.now()); err != nil {
		return err
	}
	if _, err := k.self(ctx); err != nil {
		return err
	}
	gone, err := k.Nodes.Prune(ctx, k.now().Add(-Grace))
	if len(gone) > 0 {
		k.Log.Info("joins that were never confirmed have ended", "nodes", gone)
	}
	return err
}
