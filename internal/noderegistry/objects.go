package noderegistry

import rbacv1 "k8s.io/api/rbac/v1"

// Decode reads a record from its object, for those that watch the objects themselves.
func Decode(b *rbacv1.ClusterRoleBinding) *Record { return decode(b) }

// IsComplete reports whether the records are complete, by the ClusterRole [Role]; see
// [Registry.Complete].
func IsComplete(r *rbacv1.ClusterRole) bool { return r.Annotations[annotationComplete] == "true" }
