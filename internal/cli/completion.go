package cli

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
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
