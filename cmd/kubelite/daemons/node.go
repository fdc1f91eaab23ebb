package daemons

import (
	"context"
	"io"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"
	kubeletapp "k8s.io/kubernetes/cmd/kubelet/app"
	kubeletoptions "k8s.io/kubernetes/cmd/kubelet/app/options"
)

// The kubelet is run through its own command: how a command line and a configuration file combine is
// decided inside it, and not exported. Of all five only the kubelet may do that and install
// Kubernetes' signal handler, which panics when it is installed twice in a process.

func newKubelet(words []string) (func(context.Context) error, error) {
	// The command parses for itself when it runs, which is after the API server is up; a
	// wrong flag is better found before anything starts.
	config, err := kubeletoptions.NewKubeletConfiguration()
	if err != nil {
		return nil, err
	}
	fs := pflag.NewFlagSet(Kubelet, pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	fs.Usage = func() {}
	fs.SetOutput(io.Discard) // notes about deprecated flags come when the command parses
	kubeletoptions.NewKubeletFlags().AddFlags(fs)
	kubeletoptions.AddKubeletConfigFlags(fs, config)
	kubeletoptions.AddGlobalFlags(fs)
	if err := fs.Parse(words); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		return execute(ctx, kubeletapp.NewKubeletCommand(ctx), words)
	}, nil
}

func execute(ctx context.Context, cmd *cobra.Command, words []string) error {
	cmd.SilenceUsage = true
	cmd.SilenceErrors = true // reported once, by main
	cmd.SetArgs(append([]string{}, words...))
	return cmd.ExecuteContext(ctx)
}
