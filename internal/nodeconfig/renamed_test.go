package nodeconfig

import (
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

func TestRenamed(t *testing.T) {
	for _, tc := range []struct {
		name  string
		files map[string]string
		locks []string
		keep  string // the name under which the node registered
		host  string
		says  []string // nil: it may start
		not   string
	}{
		{name: "before the first start", host: "n1"},
		{name: "the same name", keep: "n1", host: "n1"},
		{name: "the same name, written otherwise", keep: "n1", host: "N1\n"},
		{name: "another name", keep: "n1", host: "n1b", says: []string{"is n1 in its cluster", "called n1b now", "hostnamectl set-hostname n1", "start --new-name"}},
		{name: "another name, and the old one kept", files: map[string]string{Kubelet: "--hostname-override=n1\n"}, keep: "n1", host: "n1b"},
		{name: "an override set later", files: map[string]string{Kubelet: "--hostname-override=n2\n"}, keep: "n1", host: "n1", says: []string{"is n1 in its cluster", "args/kubelet is n2 now: change it to n1 there", "start --new-name"}, not: "hostnamectl"},
		{name: "in a cluster", locks: []string{snapenv.LockNoReissue}, keep: "n1", host: "n1b", says: []string{"hostnamectl"}, not: "--new-name"},
		{name: "a worker", locks: []string{snapenv.LockWorker}, keep: "n1", host: "n1b", says: []string{"hostnamectl"}, not: "--new-name"},
		{name: "while it joins", locks: []string{snapenv.LockJoining}, keep: "n1", host: "n1b"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := node(t, tc.files, tc.locks...)
			if tc.keep != "" {
				for range 2 {
					if err := KeepName(env, tc.keep); err != nil {
						t.Fatal(err)
					}
				}
			}
			err := load(env, host(tc.host)).Err(PartRenamed)
			if (err == nil) != (tc.says == nil) {
				t.Fatalf("error: %v", err)
			}
			for _, want := range tc.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not contain %q", err, want)
				}
			}
			if tc.not != "" && strings.Contains(err.Error(), tc.not) {
				t.Errorf("%v contains %q", err, tc.not)
			}
			if err := ForgetName(env); err != nil {
				t.Fatal(err)
			}
			if err := load(env, host(tc.host)).Err(PartRenamed); err != nil {
				t.Errorf("after it was forgotten: %v", err)
			}
		})
	}
}
