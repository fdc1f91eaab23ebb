package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"microk8s/internal/nodeconfig"
	"microk8s/internal/status"
)

// gate refuses a command: it prints the refusal and gives the exit code as an error, or nil
// where the command may go on (cli.md 0.6).
type gate func() error

// errNotSetUp is said of a machine on which the node was never started.
func errNotSetUp() error {
	return failf("set it up and start it with: sudo microk8s start", "this machine has no node yet")
}

// state is what the locks say about this node now.
func (a *App) state() nodeconfig.State { return nodeconfig.ReadState(a.Env) }

// perm rejects callers who cannot read the administrator's kubeconfig.
func (a *App) perm(w io.Writer) gate {
	return func() error {
		f, err := os.Open(a.Env.AdminKubeconfig())
		switch {
		case err == nil:
			return f.Close()
		case errors.Is(err, fs.ErrNotExist):
			return errNotSetUp()
		case errors.Is(err, fs.ErrPermission):
			return a.refusePerm(w)
		}
		return fmt.Errorf("cannot read the administrator's kubeconfig: %w", err)
	}
}

func (a *App) refusePerm(w io.Writer) error {
	user := a.getenv("SUDO_USER")
	if user == "" {
		user = a.getenv("USER")
	}
	fmt.Fprintf(w, `Insufficient permissions to access MicroK8s.
You can either try again with sudo or add the user %[1]s to the '%[2]s' group:

    sudo usermod -a -G %[2]s %[1]s
    sudo chown -R %[1]s ~/.kube

After this, reload the user groups either via a reboot or by running 'newgrp %[2]s'.

Members of the group '%[2]s' are as good as root on this machine, as those of the group
docker are: add only users that may use sudo for everything. For everybody else an
administrator makes a kubeconfig with fewer rights and an end:

    sudo microk8s config --user %[1]s --role view > %[1]s.kubeconfig
`, user, a.Group)
	return exitError(ExitError)
}

// permUnlessNew is perm for what may be done before the node was ever started.
func (a *App) permUnlessNew() error {
	if _, err := os.Stat(a.Env.AdminKubeconfig()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return a.perm(a.Err)()
}

// rootOnly rejects callers other than root.
func (a *App) rootOnly() error {
	if a.UID == 0 {
		return nil
	}
	fmt.Fprintln(a.Out, "Elevated permissions is needed for this operation. Please run this command with sudo.")
	return exitError(ExitRoot)
}

// stopped refuses while the node is stopped.
func (a *App) stopped() error {
	if !a.state().Stopped {
		return nil
	}
	fmt.Fprintln(a.Err, stoppedText)
	return exitError(ExitError)
}

const stoppedText = "microk8s is not running, try microk8s start"

// stoppedStatus says so on standard output, where scripts look, with exit code 0.
func (a *App) stoppedStatus() error {
	if !a.state().Stopped {
		return nil
	}
	fmt.Fprintln(a.Out, stoppedText)
	return exitError(ExitOK)
}

const workerText = "This MicroK8s deployment is acting as a node in a cluster."

// workerStatus is what status advises on a worker.
const workerStatus = "\nPlease use the control plane node."

// worker refuses on a worker. advice follows on the same line, or on the next where it begins
// with a line break.
func (a *App) worker(advice string, code int) gate {
	return func() error {
		if !a.state().Worker {
			return nil
		}
		sep := " "
		if strings.HasPrefix(advice, "\n") {
			sep = ""
		}
		fmt.Fprintln(a.Out, workerText+sep+advice)
		for _, why := range status.Local(a.Env, a.Now()) {
			fmt.Fprintln(a.Out, why)
		}
		if advice != workerStatus {
			fmt.Fprintln(a.Err, "  for this node there are: microk8s status, microk8s inspect, microk8s logs and microk8s leave")
		}
		return exitError(code)
	}
}

// workerSnap sends start and stop on a worker to snap's own commands. Without snapd there is
// no other way to start a worker, so there they go on.
func (a *App) workerSnap(verb string) gate {
	refuse := a.worker(fmt.Sprintf("\nUse 'snap %s microk8s' to %[1]s services on this node.", verb), ExitOK)
	return func() error {
		if !a.Env.Snapd {
			return nil
		}
		return refuse()
	}
}

// workerRefresh tells where the certificates of a worker come from.
func (a *App) workerRefresh() error {
	if !a.state().Worker {
		return nil
	}
	fmt.Fprintln(a.Out, workerText+" Please run refresh-certs on the master.")
	fmt.Fprintln(a.Out, "Then leave the cluster on this node with 'microk8s leave' and join it again.")
	return exitError(ExitOK)
}

// lowMemory refuses on machines that are too small for a control plane.
func (a *App) lowMemory() error {
	if !a.state().LowMemory {
		return nil
	}
	fmt.Fprint(a.Out, `
This node does not have enough RAM to host the Kubernetes control plane services
and join the database quorum. You may consider joining this node as a worker
node to a cluster.

If you would still like to start the control plane services, start MicroK8s with:

    microk8s start --disable-low-memory-guard

`)
	return exitError(ExitError)
}

// asRoot goes on under sudo where the caller is not root: args is the whole command line
// after the program's name. It returns nil for root.
func (a *App) asRoot(args ...string) error {
	if a.UID == 0 {
		return nil
	}
	sudo, err := exec.LookPath("sudo")
	if err != nil {
		return failf("run it again as root", "microk8s %s needs root, and there is no sudo on this machine", args[0])
	}
	self := a.Env.Bin("microk8s")
	argv := append([]string{"sudo", "-E", self}, args...)
	if err := a.Exec(sudo, argv, a.Environ); err != nil {
		return fmt.Errorf("cannot run sudo: %w", err)
	}
	return nil
}
