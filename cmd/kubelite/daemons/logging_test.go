package daemons

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestShareLogging(t *testing.T) {
	tests := []struct {
		name        string
		words, want map[string][]string
	}{
		{
			"none",
			map[string][]string{Proxy: {"--a=1"}, Kubelet: nil},
			map[string][]string{Proxy: {"--a=1"}, Kubelet: nil},
		},
		{
			"of one daemon",
			map[string][]string{Proxy: {"--v=4", "--a=1"}, Kubelet: {"--b", "2"}},
			map[string][]string{Proxy: {"--a=1", "--v=4"}, Kubelet: {"--b", "2", "--v=4"}},
		},
		{
			"the highest verbosity, in all forms",
			map[string][]string{APIServer: {"-v=2"}, Scheduler: {"-v", "6"}, Proxy: {"-v3"}, Kubelet: {"--v", "10"}},
			map[string][]string{APIServer: {"--v=10"}, Scheduler: {"--v=10"}, Proxy: {"--v=10"}, Kubelet: {"--v=10"}},
		},
		{
			"of other flags the first",
			map[string][]string{APIServer: {"--logging_format=json"}, Kubelet: {"--logging-format=text", "--log-text-split-stream"}},
			map[string][]string{
				APIServer: {"--log-text-split-stream=true", "--logging-format=json"},
				Kubelet:   {"--log-text-split-stream=true", "--logging-format=json"},
			},
		},
		{
			"what is wrong stays wrong",
			map[string][]string{Proxy: {"--v"}, Kubelet: {"--v=many"}},
			map[string][]string{Proxy: {"--v", "--v=many"}, Kubelet: {"--v=many"}},
		},
		{
			"others that look alike stay",
			map[string][]string{Kubelet: {"--volume-plugin-dir=/v", "-version", "--vmodules=1"}},
			map[string][]string{Kubelet: {"--volume-plugin-dir=/v", "-version", "--vmodules=1"}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, shareLogging(tt.words)); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}
