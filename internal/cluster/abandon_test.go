package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"microk8s/internal/addon"
	"microk8s/internal/snapenv"
)

// TestJoinEndsACluster: a node whose own cluster has other nodes, or is in use, does not join another one
// unless it is told to. A fresh node, with its addons, does.
func TestJoinEndsACluster(t *testing.T) {
	type object struct{ path, name, namespace, label string }
	system := []object{{"/api/v1/namespaces", "default", "", ""}, {"/api/v1/namespaces", "kube-system", "", ""}, {"/api/v1/namespaces", "ingress", "", "ingress"}}
	for _, tc := range []struct {
		name    string
		nodes   []string // besides this one
		objects []object
		down    bool // the API server
		joined  bool // others have joined this node
		nodesIn []string
		data    []string
		unknown bool
	}{
		{name: "fresh", objects: system},
		{name: "a worker", nodes: []string{"w1"}, nodesIn: []string{"w1"}},
		{name: "a deployment", objects: append(slices.Clone(system), object{"/apis/apps/v1/namespaces/default/deployments", "web", "default", ""}), data: []string{"deployment default/web"}},
		{name: "a namespace and a volume", objects: []object{{"/api/v1/namespaces", "shop", "", ""}, {"/api/v1/persistentvolumeclaims", "db", "shop", ""}},
			data: []string{"namespace shop", "volume claim shop/db"}},
		{name: "the API server is down", down: true},
		{name: "down, and others have joined", down: true, joined: true, unknown: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSite(t)
			node := s.apis.Config.Handler
			own := func(r *http.Request) bool { return r.Header.Get("Accept") == addon.MetadataOnly }
			s.apis.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				switch {
				case tc.down && (own(r) || r.URL.Path == "/api/v1/nodes"):
					w.WriteHeader(http.StatusServiceUnavailable)
				case r.URL.Path == "/api/v1/nodes":
					var items []string
					for _, n := range append([]string{"n2"}, tc.nodes...) {
						items = append(items, fmt.Sprintf(`{"metadata":{"name":%q},"status":{"addresses":[{"type":"InternalIP","address":"10.9.7.1"}]}}`, n))
					}
					fmt.Fprintf(w, `{"kind":"NodeList","apiVersion":"v1","items":[%s]}`, strings.Join(items, ","))
				case own(r):
					items := []any{}
					for _, o := range tc.objects {
						if o.path == r.URL.Path {
							m := map[string]any{"name": o.name, "namespace": o.namespace}
							if o.label != "" {
								m["labels"] = map[string]any{addon.Label: o.label}
							}
							items = append(items, map[string]any{"metadata": m})
						}
					}
					_ = json.NewEncoder(w).Encode(map[string]any{"kind": "PartialObjectMetadataList", "items": items})
				default:
					node.ServeHTTP(w, r)
				}
			})
			if tc.joined {
				if err := s.node().lock(snapenv.LockNoReissue); err != nil {
					t.Fatal(err)
				}
			}
			before := s.tree(t)
			j := s.journal(t)
			err := s.node().Join(t.Context(), j, s.options(t, false))
			var ends *AbandonError
			if refused := tc.nodesIn != nil || tc.data != nil || tc.unknown; errors.As(err, &ends) != refused {
				t.Fatalf("error: %v", err)
			} else if !refused {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !slices.Equal(ends.Nodes, tc.nodesIn) || !slices.Equal(ends.Data, tc.data) || (ends.Unknown != nil) != tc.unknown {
				t.Errorf("refused with %+v", ends)
			}
			compare(t, before, s.tree(t))
			if s.events != nil {
				t.Errorf("the agent saw %q", s.events)
			}
			o := s.options(t, false)
			o.Force = true
			if err := s.node().Join(t.Context(), j, o); err != nil {
				t.Errorf("by force: %v", err)
			}
			s.wantJoined(t, false)
		})
	}
}
