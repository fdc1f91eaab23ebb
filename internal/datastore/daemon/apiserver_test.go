package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/storedir"

	"go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apimachinery/pkg/api/apitesting"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apiserver/pkg/apis/example"
	examplev1 "k8s.io/apiserver/pkg/apis/example/v1"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3"
	storagetesting "k8s.io/apiserver/pkg/storage/testing"
	"k8s.io/apiserver/pkg/storage/value"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	featuregatetesting "k8s.io/component-base/featuregate/testing"
	"k8s.io/utils/clock"
)

// The API server's own storage suites, which it runs against an embedded etcd, against the
// daemon. Left out: RunTestGetListWithErrorAggregation, …WithoutErrorAggregation and
// RunTestWatchWithUnsafeDelete (they need an error type that package etcd3 does not export,
// and are about objects that cannot be decoded), RunTestListContinuation, …PaginationRareObject
// and …ContinuationWithFilter run without the count of the API server's own calls.

const storedPrefix = "test!"

var (
	exampleScheme = runtime.NewScheme()
	exampleCodecs = serializer.NewCodecFactory(exampleScheme)
)

func init() {
	metav1.AddToGroupVersion(exampleScheme, metav1.SchemeGroupVersion)
	utilruntime.Must(example.AddToScheme(exampleScheme))
	utilruntime.Must(examplev1.AddToScheme(exampleScheme))
}

// transformer can be exchanged while the store uses it.
type transformer struct {
	mu sync.RWMutex
	t  value.Transformer
}

func (s *transformer) get() value.Transformer {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.t
}

func (s *transformer) set(t value.Transformer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.t = t
}

func (s *transformer) TransformFromStorage(ctx context.Context, data []byte, c value.Context) ([]byte, bool, error) {
	return s.get().TransformFromStorage(ctx, data, c)
}

func (s *transformer) TransformToStorage(ctx context.Context, data []byte, c value.Context) ([]byte, error) {
	return s.get().TransformToStorage(ctx, data, c)
}

type testStore struct {
	storage.Interface
	t      *testing.T
	tr     *transformer
	client *kubernetes.Client
	codec  runtime.Codec
}

// UpdatePrefixTransformer is part of InterfaceWithPrefixTransformer.
func (s *testStore) UpdatePrefixTransformer(modify storagetesting.PrefixTransformerModifier) func() {
	orig := s.tr.get()
	changed := *orig.(*storagetesting.PrefixTransformer)
	s.tr.set(modify(&changed))
	return func() { s.tr.set(orig) }
}

func (s *testStore) validate(ctx context.Context, t *testing.T, key string) {
	r, err := s.client.KV.Get(ctx, key)
	if err != nil || len(r.Kvs) != 1 {
		t.Fatalf("%s: %v, %v", key, r, err)
	}
	obj, err := runtime.Decode(s.codec, r.Kvs[0].Value[len(storedPrefix):])
	if err != nil {
		t.Fatal(err)
	}
	if obj.(*example.Pod).ResourceVersion != "" {
		t.Error("the stored object has a resource version")
	}
}

func (s *testStore) increase(ctx context.Context, t *testing.T) int64 {
	r, err := s.client.KV.Put(ctx, "increaseRV", "ok")
	if err != nil {
		t.Fatal(err)
	}
	return r.Header.Revision
}

func (s *testStore) compact(ctx context.Context, t *testing.T, resourceVersion string) {
	rv, err := storage.APIObjectVersioner{}.ParseResourceVersion(resourceVersion)
	if err != nil {
		t.Fatal(err)
	}
	version := int64(0)
	for range 2 { // the first try may find another version of the key
		if version, _, _, err = etcd3.Compact(ctx, s.client.Client, version, int64(rv)); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	for utilfeature.DefaultFeatureGate.Enabled(features.ListFromCacheSnapshot) && s.CompactRevision() != int64(rv) {
		select {
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(10 * time.Millisecond): // the store watches the key and offers no other sign
		}
	}
}

// single starts the only member of a cluster.
func single(t *testing.T) *process { return start(t, newDir(t)) }

// follower starts a cluster of two and gives the member that does not lead.
func follower(t *testing.T) *process {
	t.Helper()
	leader := start(t, newDir(t))
	leader.client.Close()
	dir := t.TempDir()
	for _, f := range []string{storedir.CertFile, storedir.KeyFile} {
		data, err := os.ReadFile(filepath.Join(leader.cfg.StorageDir, f))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, f), data)
	}
	members, err := peers.Members(testContext(t), leader.cfg.StorageDir)
	if err != nil || len(members) != 1 {
		t.Fatal(members, err)
	}
	writeFile(t, filepath.Join(dir, "init.yaml"), []byte("Address: "+freeAddress(t)+"\nCluster: ["+members[0].Address+"]\n"))
	return start(t, dir)
}

func newStoreOn(t *testing.T, p *process) (context.Context, *testStore, *storagetesting.KubernetesRecorder) {
	t.Helper()
	client, err := kubernetes.New(clientConfig(p.cfg.Listen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	recorder := storagetesting.NewKubernetesRecorder(client.Kubernetes)
	client.KV = storagetesting.NewKVRecorder(client.KV, recorder)
	client.Kubernetes = recorder
	ctx := testContext(t)
	tr := &transformer{t: storagetesting.NewPrefixTransformer([]byte(storedPrefix), false)}
	codec := apitesting.TestCodec(exampleCodecs, examplev1.SchemeGroupVersion)
	compactor := etcd3.NewCompactor(client.Client, 0, clock.RealClock{}, nil)
	t.Cleanup(compactor.Stop)
	versioner := storage.APIObjectVersioner{}
	s, err := etcd3.New(client, compactor, codec,
		func() runtime.Object { return &example.Pod{} }, func() runtime.Object { return &example.PodList{} },
		"", "/pods/", schema.GroupResource{Resource: "pods"}, tr,
		etcd3.LeaseManagerConfig{ReuseDurationSeconds: 1, MaxObjectCount: 1000},
		etcd3.NewDefaultDecoder(codec, versioner), versioner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return ctx, &testStore{Interface: s, t: t, tr: tr, client: client, codec: codec}, recorder
}

func TestStorageSuite(t *testing.T)           { storageSuite(t, single) }
func TestStorageSuiteOnFollower(t *testing.T) { storageSuite(t, follower) }
func TestWatchSuite(t *testing.T)             { watchSuite(t, single) }
func TestWatchSuiteOnFollower(t *testing.T)   { watchSuite(t, follower) }

func storageSuite(t *testing.T, member func(*testing.T) *process) {
	none := func(*testing.T, uint64, uint64) {}
	for name, run := range map[string]func(context.Context, *testing.T, *testStore){
		"Create": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestCreate(ctx, t, s, s.validate)
		},
		"CreateWithTTL": func(ctx context.Context, t *testing.T, s *testStore) { storagetesting.RunTestCreateWithTTL(ctx, t, s) },
		"CreateWithKeyExist": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestCreateWithKeyExist(ctx, t, s)
		},
		"Get": func(ctx context.Context, t *testing.T, s *testStore) { storagetesting.RunTestGet(ctx, t, s) },
		"UnconditionalDelete": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestUnconditionalDelete(ctx, t, s)
		},
		"ConditionalDelete": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestConditionalDelete(ctx, t, s)
		},
		"DeleteWithSuggestion": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestDeleteWithSuggestion(ctx, t, s)
		},
		"DeleteWithSuggestionAndConflict": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestDeleteWithSuggestionAndConflict(ctx, t, s)
		},
		"DeleteWithConflict": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestDeleteWithConflict(ctx, t, s)
		},
		"DeleteWithSuggestionOfDeletedObject": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestDeleteWithSuggestionOfDeletedObject(ctx, t, s)
		},
		"ValidateDeletionWithSuggestion": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestValidateDeletionWithSuggestion(ctx, t, s)
		},
		"ValidateDeletionWithOnlySuggestionValid": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestValidateDeletionWithOnlySuggestionValid(ctx, t, s)
		},
		"PreconditionalDeleteWithSuggestion": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestPreconditionalDeleteWithSuggestion(ctx, t, s)
		},
		"PreconditionalDeleteWithOnlySuggestionPass": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestPreconditionalDeleteWithOnlySuggestionPass(ctx, t, s)
		},
		"ListPaging": func(ctx context.Context, t *testing.T, s *testStore) { storagetesting.RunTestListPaging(ctx, t, s) },
		"GetListNonRecursive": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestGetListNonRecursive(ctx, t, s.increase, s)
		},
		"GetListRecursivePrefix": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestGetListRecursivePrefix(ctx, t, s)
		},
		"KeySchema": func(ctx context.Context, t *testing.T, s *testStore) { storagetesting.RunTestKeySchema(ctx, t, s) },
		"GuaranteedUpdate": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestGuaranteedUpdate(ctx, t, s, s.validate)
		},
		"GuaranteedUpdateWithTTL": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestGuaranteedUpdateWithTTL(ctx, t, s)
		},
		"GuaranteedUpdateChecksStoredData": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestGuaranteedUpdateChecksStoredData(ctx, t, s)
		},
		"GuaranteedUpdateWithConflict": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestGuaranteedUpdateWithConflict(ctx, t, s)
		},
		"GuaranteedUpdateWithSuggestionAndConflict": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestGuaranteedUpdateWithSuggestionAndConflict(ctx, t, s)
		},
		"TransformationFailure": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestTransformationFailure(ctx, t, s)
		},
		"ListContinuation": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestListContinuation(ctx, t, s, none)
		},
		"ListPaginationRareObject": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestListPaginationRareObject(ctx, t, s, none)
		},
		"ListContinuationWithFilter": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestListContinuationWithFilter(ctx, t, s, none)
		},
		"NamespaceScopedList": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestNamespaceScopedList(ctx, t, s)
		},
		"ListInconsistentContinuation": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestListInconsistentContinuation(ctx, t, s, s.compact)
		},
		"ListResourceVersionMatch": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestListResourceVersionMatch(ctx, t, s)
		},
		"CompactRevision": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestCompactRevision(ctx, t, s, s.increase, s.compact)
		},
		"Stats": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestStats(ctx, t, s, s.codec, s.tr, false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, s, _ := newStoreOn(t, member(t))
			run(ctx, t, s)
		})
	}
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("RangeStream=%t", stream), func(t *testing.T) {
			featuregatetesting.SetFeatureGateDuringTest(t, utilfeature.DefaultFeatureGate, features.EtcdRangeStream, stream)
			t.Run("List", func(t *testing.T) {
				ctx, s, recorder := newStoreOn(t, member(t))
				storagetesting.RunTestList(ctx, t, s, s.compact, false, recorder)
				if n := s.client.KV.(*storagetesting.KVRecorder).GetStreamReadsAndReset(); (n > 0) != stream {
					t.Errorf("%d lists were streamed", n)
				}
			})
			t.Run("ConsistentList", func(t *testing.T) {
				ctx, s, _ := newStoreOn(t, member(t))
				storagetesting.RunTestConsistentList(ctx, t, s, s.increase, false, true, false)
			})
			t.Run("WatchSemantics", func(t *testing.T) {
				ctx, s, _ := newStoreOn(t, member(t))
				storagetesting.RunWatchSemantics(ctx, t, s)
			})
			t.Run("WatchSemanticInitialEventsExtended", func(t *testing.T) {
				ctx, s, _ := newStoreOn(t, member(t))
				storagetesting.RunWatchSemanticInitialEventsExtended(ctx, t, s)
			})
			t.Run("WatchListMatchSingle", func(t *testing.T) {
				ctx, s, _ := newStoreOn(t, member(t))
				storagetesting.RunWatchListMatchSingle(ctx, t, s)
			})
		})
	}
}

func watchSuite(t *testing.T, member func(*testing.T) *process) {
	for name, run := range map[string]func(context.Context, *testing.T, *testStore){
		"Watch": func(ctx context.Context, t *testing.T, s *testStore) { storagetesting.RunTestWatch(ctx, t, s) },
		"ClusterScopedWatch": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestClusterScopedWatch(ctx, t, s)
		},
		"NamespaceScopedWatch": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestNamespaceScopedWatch(ctx, t, s)
		},
		"DeleteTriggerWatch": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestDeleteTriggerWatch(ctx, t, s)
		},
		"WatchFromZero": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestWatchFromZero(ctx, t, s, s.compact)
		},
		"WatchFromNonZero": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestWatchFromNonZero(ctx, t, s)
		},
		"DelayedWatchDelivery": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestDelayedWatchDelivery(ctx, t, s)
		},
		"WatchError": func(ctx context.Context, t *testing.T, s *testStore) { storagetesting.RunTestWatchError(ctx, t, s) },
		"WatchContextCancel": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestWatchContextCancel(ctx, t, s)
		},
		"WatcherTimeout": func(ctx context.Context, t *testing.T, s *testStore) { storagetesting.RunTestWatcherTimeout(ctx, t, s) },
		"WatchDeleteEventObjectHaveLatestRV": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestWatchDeleteEventObjectHaveLatestRV(ctx, t, s)
		},
		"WatchInitializationSignal": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestWatchInitializationSignal(ctx, t, s)
		},
		"ProgressNotify": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunOptionalTestProgressNotify(ctx, t, s, s.increase)
		},
		"WatchDispatchBookmarkEvents": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunTestWatchDispatchBookmarkEvents(ctx, t, s, false)
		},
		"SendInitialEventsBackwardCompatibility": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunSendInitialEventsBackwardCompatibility(ctx, t, s)
		},
		"WatchErrorIsBlockingFurtherEvents": func(ctx context.Context, t *testing.T, s *testStore) {
			storagetesting.RunWatchErrorIsBlockingFurtherEvents(ctx, t, s)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, s, _ := newStoreOn(t, member(t))
			run(ctx, t, s)
		})
	}
}
