// Package schedule is when archives of the cluster are made, and what became of the last ones: a
// ConfigMap and a Secret in kube-system, which every control-plane node reads. Which node makes an
// archive is settled by a claim in the ConfigMap, which is taken over when its holder does not renew it
// (ADR 51).
package schedule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"microk8s/internal/archive"
	"microk8s/internal/kube"
)

// Name is that of the ConfigMap and of the Secret.
const Name = "microk8s-backup"

// Keys of the ConfigMap and of the Secret.
const (
	settingsKey   = "settings"
	recordKey     = "record"
	claimKey      = "claim"
	passphraseKey = "passphrase"
	idKey         = "s3-access-key-id"
	secretKey     = "s3-secret-access-key"
)

// Settings say where archives are kept, and when they are made.
type Settings struct {
	To         string          `json:"to"`    // a place, as the package archive/place has it
	Every      metav1.Duration `json:"every"` // from one archive to the next
	Keep       int             `json:"keep"`  // newest archives that are kept
	Recipients []string        `json:"recipients,omitempty"`
}

// Least and most time between two archives.
const (
	Least = 10 * time.Minute
	Most  = 31 * 24 * time.Hour
)

// Check returns an error where nothing can be made so.
func (s Settings) Check() error {
	switch {
	case s.Every.Duration < Least || s.Every.Duration > Most:
		return fmt.Errorf("archives cannot be made every %s; choose from %s to %d days", s.Every.Duration, Least, Most/(24*time.Hour))
	case s.Keep < 1:
		return fmt.Errorf("%d archives cannot be kept; it must be at least 1", s.Keep)
	}
	return nil
}

// Record says what became of the last archives. Whoever makes one writes it, on a schedule or not.
type Record struct {
	Attempt time.Time     `json:"attempt"`         // when the last one was begun
	Node    string        `json:"node"`            // where
	Error   string        `json:"error,omitempty"` // why there is none of it
	Proven  *archive.Note `json:"proven,omitempty"`
	At      string        `json:"at,omitempty"` // the place of the newest proven one
}

// Claim is a node's, that makes an archive now.
type Claim struct {
	Node  string    `json:"node"`
	Until time.Time `json:"until"` // unless it is renewed
}

// Secrets are what archives are encrypted with and the keys of an S3 server.
type Secrets struct{ Passphrase, ID, Secret string }

// State is all that the ConfigMap says. Fields are nil where it says nothing.
type State struct {
	Settings *Settings
	Record   *Record
	Claim    *Claim

	object *corev1.ConfigMap // nil where there is none
}

// Parse reads the ConfigMap.
func Parse(m *corev1.ConfigMap) (*State, error) {
	s := &State{object: m}
	for key, into := range map[string]any{settingsKey: &s.Settings, recordKey: &s.Record, claimKey: &s.Claim} {
		if text := m.Data[key]; text != "" {
			if err := json.Unmarshal([]byte(text), into); err != nil {
				return nil, fmt.Errorf("the ConfigMap %s/%s is damaged: %s: %w", kube.SystemNamespace, Name, key, err)
			}
		}
	}
	return s, nil
}

// Load reads the ConfigMap; one that is not there says nothing.
func Load(ctx context.Context, c *kube.Core) (*State, error) {
	var m corev1.ConfigMap
	err := c.Get().Namespace(kube.SystemNamespace).Resource("configmaps").Name(Name).Timeout(call).Do(ctx).Into(&m)
	if apierrors.IsNotFound(err) {
		return &State{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the schedule of backups: %w", err)
	}
	return Parse(&m)
}

// call bounds each call.
const call = 30 * time.Second

// Change reads the ConfigMap, has change change it and writes it, again when somebody else has written
// meanwhile. An error of change ends it.
func Change(ctx context.Context, c *kube.Core, change func(*State) error) error {
	return kube.RetryConflict(ctx, func() error {
		s, err := Load(ctx, c)
		if err != nil {
			return err
		}
		if err := change(s); err != nil {
			return err
		}
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: Name, Namespace: kube.SystemNamespace}}
		if s.object != nil {
			m = s.object.DeepCopy()
		}
		m.Data = map[string]string{}
		put := func(key string, v any) error {
			data, err := json.Marshal(v)
			m.Data[key] = string(data)
			return err
		}
		if s.Settings != nil {
			err = put(settingsKey, s.Settings)
		}
		if s.Record != nil && err == nil {
			err = put(recordKey, s.Record)
		}
		if s.Claim != nil && err == nil {
			err = put(claimKey, s.Claim)
		}
		if err != nil {
			return err
		}
		if s.object == nil {
			return c.Post().Namespace(kube.SystemNamespace).Resource("configmaps").Body(m).Timeout(call).Do(ctx).Error()
		}
		return c.Put().Namespace(kube.SystemNamespace).Resource("configmaps").Name(Name).Body(m).Timeout(call).Do(ctx).Error()
	})
}

// LoadSecrets reads the Secret; one that is not there has nothing.
func LoadSecrets(ctx context.Context, c *kube.Core) (Secrets, error) {
	s, err := c.Secret(ctx, Name)
	if apierrors.IsNotFound(err) {
		return Secrets{}, nil
	}
	if err != nil {
		return Secrets{}, fmt.Errorf("cannot read the Secret of the backups: %w", err)
	}
	return Secrets{string(s.Data[passphraseKey]), string(s.Data[idKey]), string(s.Data[secretKey])}, nil
}

// StoreSecrets replaces what the Secret has; with the zero value it is removed.
func StoreSecrets(ctx context.Context, c *kube.Core, want Secrets) error {
	if want == (Secrets{}) {
		err := c.Delete().Namespace(kube.SystemNamespace).Resource("secrets").Name(Name).Timeout(call).Do(ctx).Error()
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	}
	return kube.RetryConflict(ctx, func() error {
		s, err := c.Secret(ctx, Name)
		fresh := apierrors.IsNotFound(err)
		if err != nil && !fresh {
			return err
		}
		if fresh {
			s = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: Name}}
		}
		s.Data = map[string][]byte{}
		for key, value := range map[string]string{passphraseKey: want.Passphrase, idKey: want.ID, secretKey: want.Secret} {
			if value != "" {
				s.Data[key] = []byte(value)
			}
		}
		if fresh {
			_, err = c.CreateSecret(ctx, s)
		} else {
			_, err = c.UpdateSecret(ctx, s)
		}
		return err
	})
}

// again is how long after one that failed the next archive is tried, where that is before it is due.
const again = 15 * time.Minute

// Due returns when the next archive is to be begun.
func (s *State) Due() time.Time {
	if s.Record == nil {
		return time.Time{}
	}
	every := s.Settings.Every.Duration
	if s.Record.Error != "" {
		every = min(every, again)
	}
	return s.Record.Attempt.Add(every)
}

// Age says how old the newest proven archive is, and whether that is too old: older than the time from
// one archive to the next and half of it, or a day and a half without a schedule. ok is false where
// there is none.
func (s *State) Age(now time.Time) (age time.Duration, old, ok bool) {
	if s.Record == nil || s.Record.Proven == nil {
		return 0, s.Settings != nil, false
	}
	age = now.Sub(s.Record.Proven.Created)
	every := 24 * time.Hour
	if s.Settings != nil {
		every = s.Settings.Every.Duration
	}
	return age, age > every+every/2, true
}

// Expired returns the archives of a cluster, among the names of a place, that are beyond the newest keep:
// of those that were proven, which have a note. Files of one that was never proven are expired when a
// later one is proven.
func Expired(names []string, cluster string, keep int) (out []string) {
	var proven, others []string
	for _, name := range names {
		if of, _, ok := archive.ParseName(name); !ok || of != cluster {
			continue
		}
		if slices.Contains(names, name+archive.NoteSuffix) {
			proven = append(proven, name)
		} else {
			others = append(others, name)
		}
	}
	slices.Sort(proven) // by time
	if len(proven) == 0 {
		return nil
	}
	newest := proven[len(proven)-1]
	if n := len(proven) - keep; n > 0 {
		out = append(out, proven[:n]...)
	}
	for _, name := range others {
		if name < newest {
			out = append(out, name)
		}
	}
	return out
}

// errTaken is returned by the change of a claim that another node has.
var errTaken = errors.New("another node makes the archive")
