package daemons

import (
	"errors"
	"reflect"
	"testing"
	"unsafe"

	proxyapp "k8s.io/kubernetes/cmd/kube-proxy/app"
)

// TestProxyServer puts a server where kube-proxy puts it. That its rules come back is seen on a node (TestHeal in
// tests/node).
func TestProxyServer(t *testing.T) {
	opts := proxyapp.NewOptions()
	if _, err := proxyServer(opts); !errors.Is(err, errNoProxy) {
		t.Errorf("before it runs: %v", err)
	}
	want := &proxyapp.ProxyServer{}
	field := reflect.ValueOf(opts).Elem().FieldByName("proxyServer")
	reflect.NewAt(field.Type(), unsafe.Pointer(field.UnsafeAddr())).Elem().Set(reflect.ValueOf(want))
	if got, err := proxyServer(opts); got != want || err != nil {
		t.Errorf("got %p, %v, want %p", got, err, want)
	}
}
