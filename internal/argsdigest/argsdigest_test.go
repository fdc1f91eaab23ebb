package argsdigest

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"testing"

	"microk8s/internal/snapenv"
)

func TestChanged(t *testing.T) {
	env := snapenv.Under(t.TempDir())
	write := func(name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(env.ArgsDir(), 0o755), os.MkdirAll(env.RunDir(), 0o755), os.WriteFile(env.Args(name), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Changed(env, "kubelite"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a record: %v", err)
	}
	write("kubelet", "--v=1\n")
	write("kubelite-env", "A=1\n")
	if err := Record(env, "kubelite"); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		do   func()
		want []string
	}{
		{func() {}, nil},
		{func() { write("kubelet", "--v=1\n") }, nil}, // written again, the same
		{func() { write("kubelet", "--v=2\n") }, []string{"kubelet"}},
		{func() { write("kube-proxy", "--v=2\n") }, []string{"kubelet", "kube-proxy"}},
		{func() { os.Remove(env.Args("kubelite-env")) }, []string{"kubelite-env", "kubelet", "kube-proxy"}},
		{func() { write("cluster-agent", "x\n") }, []string{"kubelite-env", "kubelet", "kube-proxy"}},
	} {
		step.do()
		if got, err := Changed(env, "kubelite"); err != nil || !slices.Equal(got, step.want) {
			t.Errorf("%q, %v, want %q", got, err, step.want)
		}
	}
}
