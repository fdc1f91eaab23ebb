package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/pflag"

	"microk8s/cluster-agent/launchconf"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// InitCommand is the first argument that asks for Init instead of the service.
const InitCommand = "init"

const initUsage = `Apply a launch configuration to this node, and wait until it is done.

Usage:
  cluster-agent init --config-file FILE|-

The file is YAML or JSON; - reads standard input. It is checked as a whole before anything
changes. A step that fails ends the command; the same command goes on there. The fields are
in docs/launch.md. Run it as root.

Example:
  echo 'version: 0.2.0
  addons:
    - name: dns' | sudo /snap/microk8s/current/bin/cluster-agent init --config-file -

Flags:
`

// Init is the sub-command that automation written for MicroK8s calls: it applies the launch
// configuration that the arguments name. With --pre-init only what is a file is done, and
// nothing is restarted, enabled or joined: for a node that was not started yet. The same
// configuration may be applied any number of times; each time every step is done.
//
// Help goes to out and returns pflag.ErrHelp. Errors about the file begin with upstream's words.
func Init(ctx context.Context, env snapenv.Env, argv []string, in io.Reader, out io.Writer, log *slog.Logger) error {
	var path string
	var preInit bool
	set := pflag.NewFlagSet("cluster-agent init", pflag.ContinueOnError)
	set.SetOutput(out)
	set.SortFlags = false
	set.StringVarP(&path, "config-file", "c", "", "the launch configuration, or - for standard input")
	set.BoolVarP(&preInit, "pre-init", "p", false, "do only what can be done before the first start")
	set.Usage = func() { fmt.Fprint(out, initUsage+set.FlagUsages()) }
	if err := set.Parse(argv); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return err
		}
		return fmt.Errorf("%w; see cluster-agent init --help", err)
	}
	switch {
	case set.NArg() > 0:
		return fmt.Errorf("unknown argument %q; see cluster-agent init --help", set.Arg(0))
	case path == "":
		return errors.New("no config file specified; name one with --config-file FILE, or - for standard input")
	}
	text, err := readConfig(path, in)
	if err != nil {
		return err
	}
	if _, _, err := launchconf.Parse(text); err != nil {
		return fmt.Errorf("failed to parse config file: %w", err)
	}
	if !nodeconfig.ReadState(env).Installed {
		return fmt.Errorf("failed to apply configuration: this node is not set up yet; put the file at %s, then run: microk8s start", env.UserLaunchFile())
	}
	a := &launchconf.Applier{Env: env, PreInit: preInit, Log: log}
	if err := a.Apply(ctx, text); err != nil {
		return err
	}
	return launchconf.Forget(env, text)
}

// readConfig reads a file, or standard input, up to the size that a configuration may have.
func readConfig(path string, in io.Reader) ([]byte, error) {
	name, source := "file "+path, in
	if path == "-" {
		name = "from stdin"
	} else {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("failed to read config file %s: %w; name one with --config-file FILE", path, err)
		}
		defer f.Close()
		source = f
	}
	text, err := io.ReadAll(io.LimitReader(source, launchconf.MaxSize+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("failed to read config %s: %w; name one with --config-file FILE", name, err)
	case len(text) == 0:
		return nil, fmt.Errorf("failed to read config %s: it is empty; what a launch configuration may say is in docs/launch.md", name)
	}
	return text, nil
}
