// Package object is the API of addons in the cluster: the kind Addon of the group microk8s.io, by which kubectl and
// GitOps see and change what is on. Its definition is in snap/manifests/addons.yaml. Who writes an object, and who
// does what it asks for, is in internal/addon and cluster-agent/addons.
package object

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

const (
	// Finalizer keeps an object that is deleted until its addon is off.
	Finalizer = "microk8s.io/addon"

	// DoneAnnotation has the digest of the spec that was carried out, or that was written because the addon was
	// enabled or disabled in another way. An object with another spec is to be carried out.
	DoneAnnotation = "microk8s.io/done"

	// Core is the repository of the addons of the product.
	Core = "core"
)

// Group and Resource are those of the objects.
var (
	Group    = schema.GroupVersion{Group: "microk8s.io", Version: "v1"}
	Resource = Group.WithResource("addons")
)

// Phases of an addon.
const (
	Disabled  = "Disabled"
	Enabling  = "Enabling"
	Enabled   = "Enabled"
	Disabling = "Disabling"
)

// Ready is the type of the condition which says that what the spec asks for is the case.
const Ready = "Ready"

// Reasons of the condition, besides the phases.
const (
	Starting = "Starting" // its pods are not ready yet
	NotReady = "NotReady" // its pods did not become ready, or do not answer
	Invalid  = "InvalidArguments"
	Unknown  = "UnknownAddon"
	Conflict = "ObjectsOfOthers"
	Failed   = "Failed"
)

// Addon is one addon.
type Addon struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              Spec   `json:"spec"`
	Status            Status `json:"status,omitzero"`
}

// Spec is what is wanted.
type Spec struct {
	Enabled    bool     `json:"enabled"`
	Arguments  []string `json:"arguments,omitempty"`
	Repository string   `json:"repository,omitempty"`
	// Online: the nodes pull images from registries.
	Online bool `json:"online,omitempty"`
	// Adopt: objects that others made are taken over.
	Adopt bool `json:"adopt,omitempty"`
}

// Status is what is the case.
type Status struct {
	Phase              string             `json:"phase,omitempty"`
	Version            string             `json:"version,omitempty"`
	Message            string             `json:"message,omitempty"`
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

// Name is that of the object of an addon.
func Name(repository, addon string) string {
	if repository == Core {
		return addon
	}
	return repository + "." + addon
}

// FullName is the addon of an object, as repository/name.
func (a *Addon) FullName() string {
	if a.Spec.Repository == "" || a.Spec.Repository == Core {
		return Core + "/" + a.Name
	}
	return a.Spec.Repository + "/" + strings.TrimPrefix(a.Name, a.Spec.Repository+".")
}

// Digest changes with the spec.
func (s Spec) Digest() string {
	if s.Repository == Core {
		s.Repository = ""
	}
	data, _ := json.Marshal(s) // cannot fail
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// Done reports whether the spec was carried out, or not changed since the addon was in another way.
func (a *Addon) Done() bool {
	return a.DeletionTimestamp == nil && a.Annotations[DoneAnnotation] == a.Spec.Digest()
}

// Settled reports whether there is nothing to do about the object.
func (a *Addon) Settled() bool {
	return a.Done() && a.Status.ObservedGeneration == a.Generation && meta.IsStatusConditionTrue(a.Status.Conditions, Ready)
}

// Set puts a phase, with the condition Ready, into the status of the object.
func (a *Addon) Set(phase, version, reason, message string) {
	ready := metav1.ConditionFalse
	if reason == Enabled || reason == Disabled {
		ready = metav1.ConditionTrue
	}
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "") + " …"
	}
	a.Status.Phase, a.Status.Version, a.Status.Message, a.Status.ObservedGeneration = phase, version, message, a.Generation
	meta.SetStatusCondition(&a.Status.Conditions, metav1.Condition{
		Type: Ready, Status: ready, Reason: reason, Message: message, ObservedGeneration: a.Generation,
	})
}

// maxMessage bounds a message, in bytes.
const maxMessage = 1024

// DeepCopyObject implements runtime.Object.
func (a *Addon) DeepCopyObject() runtime.Object {
	out := *a
	a.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.Arguments = append([]string(nil), a.Spec.Arguments...)
	out.Status.Conditions = append([]metav1.Condition(nil), a.Status.Conditions...)
	return &out
}

// AddonList is a list of addons.
type AddonList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []Addon `json:"items"`
}

// DeepCopyObject implements runtime.Object.
func (l *AddonList) DeepCopyObject() runtime.Object {
	out := *l
	l.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = make([]Addon, 0, len(l.Items))
	for i := range l.Items {
		out.Items = append(out.Items, *l.Items[i].DeepCopyObject().(*Addon))
	}
	return &out
}

// AddToScheme makes a scheme know the kind.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(Group, &Addon{}, &AddonList{})
	metav1.AddToGroupVersion(s, Group)
	return nil
}
