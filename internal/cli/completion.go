package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"microk8s/internal/addon"
	"microk8s/internal/images"
	"microk8s/internal/kube"
	"microk8s/internal/nodeconfig"
)

func (a *App) newCompletion() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print the script that completes commands in a shell",
		Long: `Print the script that completes the commands of microk8s in a shell, including those of
kubectl and helm. For this session:

    source <(microk8s completion bash)

For every session put that line into ~/.bashrc (zsh: ~/.zshrc), or for fish:

    microk8s completion fish > ~/.config/fish/completions/microk8s.fish`,
		ValidArgs: shells,
		Args:      one("SHELL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.Out, true)
			case "zsh":
				return root.GenZshCompletion(a.Out)
			case "fish":
				return root.GenFishCompletion(a.Out, true)
			}
			return &usageError{cmd, fmt.Errorf("no completion for %q, there is %s", args[0], strings.Join(shells, ", "))}
		},
	}
}

// completionWait bounds a delegated completion: a person waits for it with a finger on a key.
const completionWait = 5 * time.Second

// delegateCompletion asks the program behind a raw command, itself made with cobra, for its
// completions. It answers nothing where that program does not.
func (a *App) delegateCompletion(command func() (string, []string, error)) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
		path, argv, err := command()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		ctx, cancel := context.WithTimeout(context.Background(), completionWait)
		defer cancel()
		words := append([]string{cobra.ShellCompRequestCmd}, argv[1:]...)
		c := exec.CommandContext(ctx, path, append(append(words, args...), toComplete)...)
		c.Args[0] = argv[0]
		if c.Env, err = a.kubectlEnviron(); err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		out, err := c.Output()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return parseCompletions(out)
	}
}

// parseCompletions reads cobra's answer: one completion per line, last a colon and the
// directive.
func parseCompletions(out []byte) ([]cobra.Completion, cobra.ShellCompDirective) {
	lines := strings.Split(string(bytes.TrimRight(out, "\n")), "\n")
	last, ok := strings.CutPrefix(lines[len(lines)-1], ":")
	n, err := strconv.Atoi(last)
	if !ok || err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return lines[:len(lines)-1], cobra.ShellCompDirective(n)
}

// completeFlag completes the values of a flag.
func completeFlag(cmd *cobra.Command, flag string, values ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// namesWait bounds what completions ask the API server.
const namesWait = 2 * time.Second

// first completes the first argument only.
func first(names cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return names(cmd, args, toComplete)
	}
}

// nodeNames completes the names of the cluster's other nodes, with their addresses beside them.
func (a *App) nodeNames(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), namesWait)
	defer cancel()
	core, err := kube.FromFile(a.Env.AdminKubeconfig())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	nodes, err := core.Nodes(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	self := nodeconfig.Load(a.Env).NodeName
	var out []cobra.Completion
	for i := range nodes {
		if nodes[i].Name == self {
			continue
		}
		var addresses []string
		for _, address := range nodes[i].Status.Addresses {
			if address.Type == corev1.NodeInternalIP {
				addresses = append(addresses, address.Address)
			}
		}
		out = append(out, cobra.CompletionWithDesc(nodes[i].Name, strings.Join(addresses, " ")))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// addonNames completes the names of addons that can be switched.
func (a *App) addonNames(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	all, _, _ := addon.Catalogue(a.Env)
	var out []cobra.Completion
	for _, x := range all {
		if x.Builtin == "" {
			out = append(out, cobra.CompletionWithDesc(x.Name, x.Description))
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// repositoryNames completes the names of addon repositories.
func (a *App) repositoryNames(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), namesWait)
	defer cancel()
	all, _ := (&addon.Repositories{Env: a.Env, Out: io.Discard, Err: io.Discard}).List(ctx)
	var out []cobra.Completion
	for _, r := range all {
		out = append(out, cobra.CompletionWithDesc(r.Name, r.Source))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// tokenIDs completes the ids of join tokens that are still good.
func (a *App) tokenIDs(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), namesWait)
	defer cancel()
	records, err := a.tokens().List(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, r := range records {
		if l := listed(r, a.Now()); r.Over(a.Now()) == nil {
			out = append(out, cobra.CompletionWithDesc(l.ID, strings.TrimSpace(l.Role+" "+l.Node)))
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// exportArguments completes a file, then the images of this node.
func (a *App) exportArguments(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	ctx, cancel := context.WithTimeout(context.Background(), namesWait)
	defer cancel()
	have, err := images.List(ctx, a.Env)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, img := range have {
		if !slices.Contains(args, img.Name) {
			out = append(out, img.Name)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
