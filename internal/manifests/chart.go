package manifests

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

const (
	// valuesSuffix ends the name of a file with the values of the chart NAME in NAME-VERSION.tgz.
	valuesSuffix = ".values.yaml"
	// helmLimit bounds one call of helm; without --wait it does not wait for pods.
	helmLimit = 10 * time.Minute
)

// chart is one that is to be installed.
type chart struct {
	release
	path, repository, version string
	archive                   []byte // instead of path
	values                    []byte
}

// same reports whether two are one installation.
func (r release) same(o release) bool { return r.Name == o.Name && r.Namespace == o.Namespace }

// same reports whether a release is that of the chart.
func (c chart) same(r release) bool { return c.release.same(r) }

// isChart reports whether a document is a HelmChart, as k3s and RKE2 have them.
func isChart(o *unstructured.Unstructured) bool {
	return o.GroupVersionKind().Group == "helm.cattle.io" && o.GetKind() == "HelmChart"
}

// chartSpec has the fields of a HelmChart (helm.cattle.io/v1) that have a meaning here.
type chartSpec struct {
	Chart           string         `json:"chart"`
	ChartContent    string         `json:"chartContent"` // base64 of an archive
	Repo            string         `json:"repo"`
	Version         string         `json:"version"`
	TargetNamespace string         `json:"targetNamespace"`
	ValuesContent   string         `json:"valuesContent"`
	Set             map[string]any `json:"set"`
}

// chartOf reads a HelmChart. What chart names is a file in the folder, a URL, or a chart of repo.
func (c *Controller) chartOf(o *unstructured.Unstructured) (chart, error) {
	bad := func(format string, a ...any) (chart, error) {
		return chart{}, fmt.Errorf("HelmChart %s: %w", o.GetName(), fmt.Errorf(format, a...))
	}
	var s chartSpec
	spec, _, _ := unstructured.NestedMap(o.Object, "spec")
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(spec, &s); err != nil {
		return bad("cannot read its spec: %w", err)
	}
	ch := chart{release: release{Name: o.GetName(), Namespace: s.TargetNamespace}, path: s.Chart, repository: s.Repo, version: s.Version}
	if ch.Namespace == "" {
		ch.Namespace = o.GetNamespace()
	}
	if ch.Namespace == "" {
		ch.Namespace = "default"
	}
	if s.Set != nil && s.ValuesContent != "" {
		return bad("it has both set and valuesContent; write all values into valuesContent")
	}
	ch.values = []byte(s.ValuesContent)
	if s.Set != nil {
		nested := map[string]any{}
		for name, v := range s.Set {
			if err := unstructured.SetNestedField(nested, v, strings.Split(name, ".")...); err != nil {
				return bad("set: %w", err)
			}
		}
		data, err := yaml.Marshal(nested)
		if err != nil {
			return bad("set: %w", err)
		}
		ch.values = data
	}
	var parsed map[string]any
	if err := yaml.Unmarshal(ch.values, &parsed); err != nil {
		return bad("valuesContent: %w", err)
	}
	switch {
	case s.ChartContent != "":
		data, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s.ChartContent), ""))
		if err != nil {
			return bad("chartContent is not base64: %w", err)
		}
		ch.archive, ch.path = data, ""
	case s.Chart == "":
		return bad("it names no chart: set spec.chart or spec.chartContent")
	case strings.HasPrefix(s.Chart, "-"):
		return bad("spec.chart is %q, which is no chart", s.Chart)
	case s.Repo == "" && !strings.Contains(s.Chart, "://"):
		ch.path = filepath.Join(c.Env.UserManifests(), filepath.Base(s.Chart))
		if s.Chart != filepath.Base(s.Chart) && s.Chart != "./"+filepath.Base(s.Chart) {
			return bad("spec.chart is %q: name a file in %s, a URL, or a chart of spec.repo", s.Chart, c.Env.UserManifests())
		}
		data, err := os.ReadFile(ch.path)
		if err != nil {
			return bad("cannot read its chart: %w", err)
		}
		ch.archive, ch.path = data, ""
	}
	ch.digest()
	return ch, nil
}

// archive reads a chart that lies in the folder: it is installed under its own name into the namespace
// default, with the values of NAME.values.yaml.
func (c *Controller) archive(path string) (chart, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return chart{}, fmt.Errorf("cannot read it: %w", err)
	}
	name, err := chartName(data)
	if err != nil {
		return chart{}, err
	}
	ch := chart{release: release{Name: name, Namespace: "default"}, archive: data}
	ch.values, err = os.ReadFile(filepath.Join(c.Env.UserManifests(), name+valuesSuffix))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return chart{}, fmt.Errorf("cannot read its values: %w", err)
	}
	ch.digest()
	return ch, nil
}

// chartName returns the name that an archive's Chart.yaml has.
func chartName(data []byte) (string, error) {
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return "", fmt.Errorf("it is no chart: %w", err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err != nil {
			return "", fmt.Errorf("it is no chart, it has no Chart.yaml: %w", err)
		}
		if parts := strings.Split(filepath.ToSlash(filepath.Clean(h.Name)), "/"); len(parts) != 2 || parts[1] != "Chart.yaml" {
			continue
		}
		text, err := io.ReadAll(io.LimitReader(r, 1<<20))
		if err != nil {
			return "", fmt.Errorf("it is damaged: %w", err)
		}
		var about struct {
			Name string `json:"name"`
		}
		if err := yaml.Unmarshal(text, &about); err != nil || about.Name == "" || strings.ContainsAny(about.Name, "/ \n") {
			return "", errors.New("its Chart.yaml has no name")
		}
		return about.Name, nil
	}
}

// digest sets the digest of everything that the chart is installed from.
func (c *chart) digest() {
	data, _ := json.Marshal([]any{c.Name, c.Namespace, c.path, c.repository, c.version, c.archive, c.values}) // cannot fail
	sum := sha256.Sum256(data)
	c.Digest = hex.EncodeToString(sum[:])
}

func (c *Controller) install(ctx context.Context, ch chart) error {
	path := ch.path
	if ch.archive != nil {
		f, err := os.CreateTemp("", "chart-*.tgz")
		if err != nil {
			return fmt.Errorf("cannot install the chart %s: %w", ch.Name, err)
		}
		defer os.Remove(f.Name())
		_, err = f.Write(ch.archive)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("cannot install the chart %s: %w", ch.Name, err)
		}
		path = f.Name()
	}
	argv := []string{"upgrade", "--install", "--create-namespace", "--namespace", ch.Namespace, "--values", "-"}
	if ch.repository != "" {
		argv = append(argv, "--repo", ch.repository)
	}
	if ch.version != "" {
		argv = append(argv, "--version", ch.version)
	}
	if err := c.helm(ctx, ch.values, append(argv, "--", ch.Name, path)...); err != nil {
		return fmt.Errorf("cannot install the chart %s: %w", ch.Name, err)
	}
	return nil
}

func (c *Controller) uninstall(ctx context.Context, r release) error {
	err := c.helm(ctx, nil, "uninstall", "--ignore-not-found", "--namespace", r.Namespace, "--", r.Name)
	if err != nil {
		return fmt.Errorf("cannot remove the chart %s: %w", r.Name, err)
	}
	c.Log.Info("removed a chart", "release", r.Name, "namespace", r.Namespace)
	return nil
}

func (c *Controller) helm(ctx context.Context, stdin []byte, argv ...string) error {
	ctx, cancel := context.WithTimeout(ctx, helmLimit)
	defer cancel()
	if c.Helm != nil {
		return c.Helm(ctx, stdin, argv...)
	}
	home, err := os.MkdirTemp("", "helm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(home)
	cmd := exec.CommandContext(ctx, c.Env.Bin("helm"), argv...)
	cmd.Env = slices.Concat(os.Environ(), []string{"KUBECONFIG=" + c.Env.AdminKubeconfig(), "HELM_CACHE_HOME=" + home, "HELM_CONFIG_HOME=" + home, "HELM_DATA_HOME=" + home})
	cmd.Stdin, cmd.WaitDelay = bytes.NewReader(stdin), time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("helm %s: %w: %s", argv[0], err, strings.Join(strings.Fields(string(out)), " "))
	}
	return nil
}
