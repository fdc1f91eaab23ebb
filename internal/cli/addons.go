package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"microk8s/internal/addon"
)

func (a *App) newAddons() *cobra.Command {
	root := &cobra.Command{
		Use:   "addons",
		Short: "Manage packs of addons, and the repositories that addons come from",
		Long: `Bring packs to the cluster, the files in which images of larger addons travel, and manage addon
repositories: git repositories with an addons.yaml and, for each addon, the programs enable and
disable. Addons that come with the product are in the repository core.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	repo := &cobra.Command{
		Use:   "repo",
		Short: "Add, list, update and remove addon repositories",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddCommand(repo, a.newAddonsImport(), a.newAddonsBundle(), a.newAddonsCarryOut())

	var reference string
	var force bool
	add := &cobra.Command{
		Use:   "add NAME REPOSITORY [--reference REF] [--force]",
		Short: "Add the git repository at a URL or a path",
		Args:  exactly("NAME", "REPOSITORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.repositories(cmd.Context(), func(r *addon.Repositories) error {
				return r.Add(cmd.Context(), args[0], args[1], reference, force)
			})
		},
	}
	add.Flags().StringVar(&reference, "reference", "", "branch or tag (default: the repository's default branch)")
	add.Flags().BoolVar(&force, "force", false, "replace a repository of that name")

	remove := &cobra.Command{
		Use:   "remove NAME",
		Short: "Remove a repository; its enabled addons stay in the cluster",
		Args:  exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.repositories(cmd.Context(), func(r *addon.Repositories) error { return r.Remove(args[0]) })
		},
	}

	var skipRoot, noSkipRoot bool
	update := &cobra.Command{
		Use:   "update NAME",
		Short: "Update a repository",
		Args:  exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !skipRoot || noSkipRoot {
				if err := a.rootOnly(); err != nil {
					return err
				}
			}
			return a.repositories(cmd.Context(), func(r *addon.Repositories) error { return r.Update(cmd.Context(), args[0]) })
		},
	}
	update.Flags().BoolVar(&skipRoot, "skip-check-root", false, "do not require root")
	update.Flags().BoolVar(&noSkipRoot, "no-skip-check-root", false, "require root (default)")

	var format string
	var out *output
	list := &cobra.Command{
		Use:   "list [-o json|yaml] [--format table|json|yaml]",
		Short: "List the repositories",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.listRepositories(cmd.Context(), cmd, format, out)
		},
	}
	out = addOutput(list, "table")
	list.Flags().StringVar(&format, "format", "table", "layout: table, or json or yaml as upstream prints it")
	completeFlag(list, "format", "table", "json", "yaml")
	for _, c := range []*cobra.Command{remove, update} {
		c.ValidArgsFunction = first(a.repositoryNames)
	}
	repo.AddCommand(add, remove, update, list)
	return root
}

// exactly wants these arguments and no others.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return &usageError{cmd, fmt.Errorf("Missing argument '%s'.", names[len(args)])} //nolint:staticcheck // upstream's words
		case len(args) > len(names):
			return &usageError{cmd, fmt.Errorf("unexpected argument: %s", args[len(names)])}
		}
		return nil
	}
}

// repositories does something to the addon repositories, while no addon is being changed.
func (a *App) repositories(ctx context.Context, do func(*addon.Repositories) error) error {
	unlock, err := a.lockAddons(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	r := &addon.Repositories{Env: a.Env, Out: a.Out, Err: a.Err, Term: a.Term}
	r.Clean()
	err = do(r)
	var refused *addon.RefusedError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &refused):
		fmt.Fprintln(a.Err, refused.Text)
		if refused.Hint != "" {
			fmt.Fprintln(a.Err, refused.Hint)
		}
		return exitError(ExitError)
	}
	return err
}

func (a *App) listRepositories(ctx context.Context, cmd *cobra.Command, format string, out *output) error {
	r := &addon.Repositories{Env: a.Env, Out: a.Out, Err: a.Err}
	all, broken := r.List(ctx)
	for _, err := range broken {
		fmt.Fprintln(a.Err, err)
	}
	if out.document() {
		return a.print(out, listOf("AddonRepositoryList", all))
	}
	switch format {
	case "table":
		fmt.Fprintf(a.Out, "%-10s %6s %s\n", "REPO", "ADDONS", "SOURCE")
		for _, x := range all {
			fmt.Fprintf(a.Out, "%-10s %6d %s\n", x.Name, x.Addons, x.Source)
		}
		return nil
	case "json":
		enc := json.NewEncoder(a.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(all)
	case "yaml":
		var items []*yaml.Node
		for _, x := range all {
			items = append(items, yamlMap("name", x.Name, "addons", &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: fmt.Sprint(x.Addons)}, "source", x.Source, "description", x.Description))
		}
		return printYAML(a.Out, yamlList(items))
	}
	return &usageError{cmd, fmt.Errorf("argument --format: invalid choice: '%s' (choose from 'table', 'json', 'yaml')", format)}
}
