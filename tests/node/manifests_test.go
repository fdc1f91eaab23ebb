package node

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// testManifests lays an object and a chart into args/manifests; helm is the real one.
func (n *node) testManifests(t *testing.T) {
	const dir = "/var/snap/microk8s/current/args/manifests/"
	var chart bytes.Buffer
	z := gzip.NewWriter(&chart)
	w := tar.NewWriter(z)
	for name, text := range map[string]string{
		"laid/Chart.yaml":        "apiVersion: v2\nname: laid\nversion: 1.0.0\nkubeVersion: '>=1.30.0-0'\n",
		"laid/templates/cm.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: from-chart}\ndata: {k: {{ .Values.k | quote }}}\n",
	} {
		err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))})
		if err == nil {
			_, err = w.Write([]byte(text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	n.runIn(t, chart.String(), "sh", "-c", "cat >"+dir+"laid-1.0.0.tgz")
	n.runIn(t, "k: from values\n", "sh", "-c", "cat >"+dir+"laid.values.yaml")
	n.runIn(t, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: from-file}\ndata: {k: from a file}\n", "sh", "-c", "cat >"+dir+"laid.yaml")
	want := func(when, text string) {
		t.Helper()
		eventually(t, time.Minute, func() error {
			out, err := n.try(t, "microk8s", "kubectl", "get", "configmaps", "from-chart", "from-file", "--ignore-not-found", "-o", "jsonpath={.items[*].data.k}")
			if err == nil && strings.TrimSpace(out) != text {
				err = fmt.Errorf("%s: the cluster has %q, want %q", when, out, text)
			}
			return err
		})
	}
	want("laid", "from values from a file")
	n.run(t, "rm", dir+"laid-1.0.0.tgz", dir+"laid.values.yaml", dir+"laid.yaml")
	want("removed", "")
}
