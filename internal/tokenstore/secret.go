package tokenstore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/coalesce"
	"microk8s/internal/kube"
	"microk8s/internal/token"
)

// SecretName is the Secret of kube-system with the cluster's tokens, one key for each id.
const SecretName = "microk8s-join-tokens"

// Secret is the Backend that all control-plane nodes share. The API server's resource
// versions make a change atomic.
type Secret struct {
	// Core returns the client; it is asked for each Update, so that new credentials are used.
	Core func() (*kube.Core, error)
	// Reads lets questions about tokens share reads of the Secret, so that a flood of wrong ones
	// costs the API server little. nil means a read for each.
	Reads *coalesce.Reads[*corev1.Secret]
}

// read returns the Secret as it is after the call began. The result may be shared.
func (s Secret) read(ctx context.Context, core *kube.Core) (*corev1.Secret, error) {
	get := func(ctx context.Context) (*corev1.Secret, error) { return core.Secret(ctx, SecretName) }
	if s.Reads == nil {
		return get(ctx)
	}
	return s.Reads.Do(ctx, get)
}

// ErrUnavailable is wrapped where the API server cannot be asked.
var ErrUnavailable = errors.New("the API server does not answer")

// Update implements Backend.
func (s Secret) Update(ctx context.Context, change func(*State) error) error {
	core, err := s.Core()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	err = kube.RetryConflict(ctx, func() error { return s.try(ctx, core, change) })
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) || ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func (s Secret) try(ctx context.Context, core *kube.Core, change func(*State) error) error {
	secret, err := s.read(ctx, core)
	fresh := apierrors.IsNotFound(err)
	if err != nil && !fresh {
		return fmt.Errorf("%w: cannot read the join tokens: %w", ErrUnavailable, err)
	}
	if fresh {
		secret = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: SecretName}, Type: "microk8s.io/join-tokens"}
	}
	st := &State{Records: map[token.ID]*Record{}}
	for name, raw := range secret.Data {
		r, err := decodeRecord(name, raw)
		if err != nil {
			return fmt.Errorf("cannot read the join tokens in the Secret %s/%s: %w; delete it, and make new tokens", kube.SystemNamespace, SecretName, err)
		}
		st.Records[r.ID] = r
	}
	if err := change(st); err != nil {
		return err
	}
	data := map[string][]byte{}
	for id, r := range st.Records {
		raw, err := json.Marshal(r)
		if err != nil {
			return err
		}
		data[id.String()] = raw
	}
	if maps.EqualFunc(data, secret.Data, bytes.Equal) {
		return nil
	}
	secret = secret.DeepCopy() // others may look at the same one
	secret.Data = data
	if fresh {
		_, err = core.CreateSecret(ctx, secret)
	} else {
		_, err = core.UpdateSecret(ctx, secret)
	}
	if err != nil && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("%w: cannot write the join tokens: %w", ErrUnavailable, err)
	}
	return err
}
