package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"microk8s/cluster-agent/api"
	"microk8s/cluster-agent/fanout"
	"microk8s/internal/args"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/service"
)

// serviceWait is how long `node-config wait` waits for a service.
const serviceWait = 30 * time.Second

// newNodeConfig makes the command behind actions/common/utils.sh, which the hooks of addon
// repositories source: arguments and services of this node, and, in the forms that end in -all,
// of the cluster's others too.
func (a *App) newNodeConfig() *cobra.Command {
	root := &cobra.Command{
		Use:    "node-config get|set|unset|restart|wait|arch|enable|disable",
		Short:  "Change arguments and restart services, for hooks of addons",
		Hidden: true,
		Args:   noArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	add := func(use string, run func(ctx context.Context, words []string) error) {
		root.AddCommand(&cobra.Command{
			Use:                use,
			Short:              "See actions/common/utils.sh",
			Args:               exactly(strings.Fields(use)[1:]...),
			DisableFlagParsing: true, // the words may begin with dashes
			RunE:               func(cmd *cobra.Command, words []string) error { return run(cmd.Context(), words) },
		})
	}
	// change adds the command that changes this node, and the one that then asks the others.
	change := func(verb, arguments string, local func(context.Context, []string) error, said string, service func([]string) api.ConfigureService) {
		add(verb+" "+arguments, local)
		add(verb+"-all "+arguments, func(ctx context.Context, w []string) error {
			if err := local(ctx, w); err != nil {
				return err
			}
			s := service(w)
			s.Name = w[0]
			return a.configureOthers(ctx, strings.ReplaceAll(said, "FLAG", strings.Join(w[1:min(2, len(w))], "")), api.ConfigureRequest{Services: []api.ConfigureService{s}})
		})
	}
	add("get FILE FLAG", func(_ context.Context, w []string) error {
		f, err := a.argumentFile(w[0])
		if err != nil {
			return err
		}
		v, _ := f.Get(flagName(w[1]))
		_, err = fmt.Fprintln(a.Out, v)
		return err
	})
	change("set", "FILE FLAG VALUE", func(_ context.Context, w []string) error {
		return a.changeArguments(w[0], func(f *args.File) error { return f.Set(flagName(w[1]), w[2]) })
	}, "Adding argument FLAG to nodes.", func(w []string) api.ConfigureService {
		return api.ConfigureService{Update: []map[string]string{{"--" + flagName(w[1]): w[2]}}}
	})
	change("unset", "FILE FLAG", func(_ context.Context, w []string) error {
		return a.changeArguments(w[0], func(f *args.File) error {
			f.Unset(flagName(w[1]))
			return nil
		})
	}, "Removing argument FLAG from nodes.", func(w []string) api.ConfigureService {
		return api.ConfigureService{Remove: []string{"--" + flagName(w[1])}}
	})
	change("restart", "SERVICE", func(ctx context.Context, w []string) error {
		return a.Services.Restart(ctx, w[0])
	}, "Restarting nodes.", func([]string) api.ConfigureService { return api.ConfigureService{Restart: true} })
	add("wait SERVICE", a.waitService)
	add("arch", func(context.Context, []string) error {
		_, err := fmt.Fprintln(a.Out, runtime.GOARCH)
		return err
	})
	for _, verb := range []string{"enable", "disable"} {
		add(verb+"-all ADDON", func(ctx context.Context, w []string) error {
			x := api.ConfigureAddon{Name: w[0], Enable: verb == "enable", Disable: verb == "disable"}
			return a.configureOthers(ctx, "Setting add-on "+w[0]+" to "+verb+" on nodes.", api.ConfigureRequest{Addons: []api.ConfigureAddon{x}})
		})
	}
	return root
}

func flagName(word string) string { return strings.TrimLeft(word, "-") }

// argumentFile reads a file of args/ by its plain name; one that is not there is empty.
func (a *App) argumentFile(name string) (*args.File, error) {
	if name != filepath.Base(name) || strings.HasPrefix(name, ".") {
		return nil, fmt.Errorf("%q is not the name of a file in %s", name, a.Env.ArgsDir())
	}
	return nodeconfig.File(a.Env, name)
}

func (a *App) changeArguments(name string, change func(*args.File) error) error {
	if _, err := a.argumentFile(name); err != nil {
		return err
	}
	if _, err := nodeconfig.Edit(a.Env, name, change); err != nil {
		return explain("cannot change the arguments in "+a.Env.Args(name), err)
	}
	return nil
}

// configureOthers asks the other nodes of the cluster, where there are any, for the same. It
// goes on after one that cannot be reached, and says which.
func (a *App) configureOthers(ctx context.Context, action string, req api.ConfigureRequest) error {
	cluster := fanout.Cluster{Env: a.Env}
	targets, err := cluster.Targets(ctx)
	if err != nil {
		return err
	}
	config := nodeconfig.Load(a.Env)
	if err := config.Err(nodeconfig.PartName); err != nil {
		return err
	}
	var names []string
	for _, t := range targets {
		if t.Name != config.NodeName {
			names = append(names, t.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	fmt.Fprintln(a.Out, action)
	results, err := cluster.Configure(ctx, req, names...)
	for _, r := range results {
		if r.Err != nil {
			fmt.Fprintf(a.Err, "Failed to reach node %s: %v\n", r.Name, r.Err)
		}
		if r.Later {
			fmt.Fprintf(a.Err, "The change will be applied when the node is reachable again.\n")
		}
	}
	return err
}

// waitService waits until a service of this node runs.
func (a *App) waitService(ctx context.Context, words []string) error {
	name, err := service.Resolve(words[0])
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, serviceWait)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		states, err := a.Services.Status(ctx)
		var silent *service.SilentError
		if errors.As(err, &silent) {
			return err
		}
		for _, s := range states {
			if err == nil && s.Name == name && s.Phase == service.Running {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return failf("see microk8s logs "+name, "%s does not run after %s", name, serviceWait)
		}
	}
}
