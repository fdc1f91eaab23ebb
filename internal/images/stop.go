package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"microk8s/internal/snapenv"
)

const (
	// grace is how long the programs in containers have to end by themselves. Their data is
	// as safe as in a power cut anyway; this spares most of them the recovery.
	grace = 3 * time.Second

	// limit is the longest StopAll takes when its context has no deadline.
	limit = 45 * time.Second

	// atOnce is how many pods are stopped at the same time: each starts a few processes.
	atOnce = 16
)

// StopAll ends and removes every pod and container of the node, paused ones too. Through the
// CRI, so that their networks are taken down and their addresses given back, and what is left
// then by force. The kubelet must have been stopped before, or it starts them again; containerd
// should still run. Without it the processes are killed all the same, and what containerd has
// noted of them it clears up at its next start. StopAll is idempotent; it takes at most the
// time of ctx, or 45 seconds.
func StopAll(ctx context.Context, env snapenv.Env) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	err := stopThroughContainerd(ctx, env)
	if left := killShims(env); left != nil {
		return errors.Join(err, left)
	}
	return ctx.Err() // all is down, whatever containerd had to say
}

func stopThroughContainerd(ctx context.Context, env snapenv.Env) error {
	if _, err := os.Stat(env.ContainerdSocket()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	defer c.Close()
	// A socket without a containerd behind it is usual after a crash.
	probe, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := c.Version(probe); err != nil {
		return fmt.Errorf("containerd does not answer: %w", err)
	}
	err = errors.Join(thaw(ctx, c), stopPods(ctx, env))
	if left := removeContainers(ctx, c); left != nil {
		return errors.Join(err, left)
	}
	return nil // what went wrong before has been made good
}

// thaw resumes paused containers: nothing but that reaches them.
func thaw(ctx context.Context, c *client.Client) error {
	return eachContainer(ctx, c, func(ctx context.Context, container client.Container) error {
		task, err := container.Task(ctx, nil)
		if err != nil {
			return ignoreGone(err)
		}
		if status, err := task.Status(ctx); err != nil || status.Status != client.Paused {
			return ignoreGone(err)
		}
		return ignoreGone(task.Resume(ctx))
	})
}

// stopPods stops and removes all sandboxes the way the kubelet does.
func stopPods(ctx context.Context, env snapenv.Env) error {
	conn, err := grpc.NewClient("unix://"+env.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("cannot connect to containerd: %w", err)
	}
	defer conn.Close()
	cri := runtimev1.NewRuntimeServiceClient(conn)
	containers, err := cri.ListContainers(ctx, &runtimev1.ListContainersRequest{
		Filter: &runtimev1.ContainerFilter{State: &runtimev1.ContainerStateValue{State: runtimev1.ContainerState_CONTAINER_RUNNING}},
	})
	if err != nil {
		return fmt.Errorf("cannot list containers: %w", err)
	}
	group := errgroup.Group{}
	group.SetLimit(4 * atOnce) // these only wait
	for _, container := range containers.Containers {
		group.Go(func() error {
			_, err := cri.StopContainer(ctx, &runtimev1.StopContainerRequest{ContainerId: container.Id, Timeout: int64(grace / time.Second)})
			return err
		})
	}
	err = group.Wait()
	pods, listErr := cri.ListPodSandbox(ctx, &runtimev1.ListPodSandboxRequest{})
	if listErr != nil {
		return errors.Join(err, fmt.Errorf("cannot list pods: %w", listErr))
	}
	group = errgroup.Group{}
	group.SetLimit(atOnce)
	for _, pod := range pods.Items {
		group.Go(func() error {
			if _, err := cri.StopPodSandbox(ctx, &runtimev1.StopPodSandboxRequest{PodSandboxId: pod.Id}); err != nil {
				return fmt.Errorf("cannot stop pod %s: %w", pod.Metadata.GetName(), err)
			}
			_, err := cri.RemovePodSandbox(ctx, &runtimev1.RemovePodSandboxRequest{PodSandboxId: pod.Id})
			return err
		})
	}
	return errors.Join(err, group.Wait())
}

// EndSandbox stops a pod's sandbox, after its containers, and leaves both to the kubelet, which starts the pod in
// another sandbox. One that is not there any more is no error. It waits for containerd as long as ctx allows.
func EndSandbox(ctx context.Context, env snapenv.Env, id string) error {
	conn, err := grpc.NewClient("unix://"+env.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return fmt.Errorf("cannot connect to containerd: %w", err)
	}
	defer conn.Close()
	cri := runtimev1.NewRuntimeServiceClient(conn)
	containers, err := cri.ListContainers(ctx, &runtimev1.ListContainersRequest{Filter: &runtimev1.ContainerFilter{
		PodSandboxId: id, State: &runtimev1.ContainerStateValue{State: runtimev1.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		return fmt.Errorf("cannot list the containers of sandbox %s: %w", id, err)
	}
	group := errgroup.Group{}
	for _, container := range containers.Containers {
		group.Go(func() error {
			_, err := cri.StopContainer(ctx, &runtimev1.StopContainerRequest{ContainerId: container.Id, Timeout: int64(grace / time.Second)})
			return err
		})
	}
	_ = group.Wait() // stopping the sandbox ends what is left
	if _, err := cri.StopPodSandbox(ctx, &runtimev1.StopPodSandboxRequest{PodSandboxId: id}); status.Code(err) != codes.NotFound && err != nil {
		return fmt.Errorf("cannot stop sandbox %s: %w", id, err)
	}
	return nil
}

// removeContainers kills and removes what is still there.
func removeContainers(ctx context.Context, c *client.Client) error {
	return eachContainer(ctx, c, func(ctx context.Context, container client.Container) error {
		task, err := container.Task(ctx, nil)
		if err == nil {
			_ = task.Kill(ctx, syscall.SIGKILL, client.WithKillAll) // Delete tells if it did not work
			_, err = task.Delete(ctx, client.WithProcessKill)
		}
		if ignoreGone(err) != nil {
			return fmt.Errorf("cannot stop container %s: %w", container.ID(), err)
		}
		if err := container.Delete(ctx, client.WithSnapshotCleanup); ignoreGone(err) != nil {
			return fmt.Errorf("cannot remove container %s: %w", container.ID(), err)
		}
		return nil
	})
}

func eachContainer(ctx context.Context, c *client.Client, do func(context.Context, client.Container) error) error {
	containers, err := c.Containers(ctx)
	if err != nil {
		return fmt.Errorf("cannot list containers: %w", err)
	}
	errs := make([]error, len(containers))
	group := errgroup.Group{}
	group.SetLimit(atOnce)
	for i, container := range containers {
		group.Go(func() error {
			errs[i] = do(ctx, container)
			return nil // go on with the others
		})
	}
	_ = group.Wait() // the errors are collected above
	return errors.Join(errs...)
}

func ignoreGone(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// taskDir is where containerd keeps the running containers of the namespace.
func taskDir(env snapenv.Env) string {
	return filepath.Join(env.ContainerdState(), "io.containerd.runtime.v2.task", Namespace)
}

// killShims ends what runs without containerd: the containers whose state is on disk, and the
// shims that serve this installation's socket. Other containerds on the machine are not
// touched.
func killShims(env snapenv.Env) error {
	var errs []error
	entries, err := os.ReadDir(taskDir(env))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		dir := filepath.Join(taskDir(env), e.Name())
		if data, err := os.ReadFile(filepath.Join(dir, "init.pid")); err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil {
				killContainer(pid, e.Name())
			}
		}
	}
	for _, pid := range shims(env) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			errs = append(errs, fmt.Errorf("cannot stop containerd-shim %d: %w", pid, err))
		}
	}
	// A shim that was killed leaves this behind, and a containerd that starts clears up the rest only: afterwards
	// nothing would tell whose it was.
	for _, e := range entries {
		errs = append(errs, Forget(env, e.Name()))
	}
	return errors.Join(errs...)
}

// Forget removes what a container's shim and runc have in /run/containerd, which all products with a containerd
// share: its sockets, whose names follow from this installation's socket and the container's ID (containerd's
// pkg/shim, SocketAddress), and runc's state.
func Forget(env snapenv.Env, id string) error {
	dir := env.HostPath("run/containerd")
	errs := []error{os.RemoveAll(filepath.Join(dir, "runc", Namespace, id))}
	path := filepath.Join(env.ContainerdSocket(), Namespace, id)
	for _, p := range []string{path, filepath.Join(path, "debug")} {
		sum := sha256.Sum256([]byte(p))
		if err := os.Remove(filepath.Join(dir, "s", hex.EncodeToString(sum[:]))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Discard forgets all containers without asking containerd, after [StopAll] and with
// containerd stopped: it unmounts their file systems, removes their cgroups and what runc
// noted of them. For reset and remove, which delete containerd's directories next; before a
// mere restart it is not needed, containerd clears up by itself.
func Discard(env snapenv.Env) error {
	entries, _ := os.ReadDir(taskDir(env))
	for _, e := range entries {
		var spec struct {
			Linux struct{ CgroupsPath string }
		}
		data, err := os.ReadFile(filepath.Join(taskDir(env), e.Name(), "config.json"))
		if err == nil && json.Unmarshal(data, &spec) == nil && strings.HasSuffix(spec.Linux.CgroupsPath, "/"+e.Name()) {
			dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + spec.Linux.CgroupsPath)
			for _, dir := range append(dirs, "/sys/fs/cgroup"+spec.Linux.CgroupsPath) {
				os.Remove(dir) // only an empty one goes
			}
		}
		os.RemoveAll(env.HostPath(filepath.Join("run/containerd/runc", Namespace, e.Name())))
	}
	return errors.Join(unmountBelow(env.ContainerdState()), unmountBelow(env.ContainerdRoot()))
}

// unmountBelow unmounts everything mounted below dir, the last mounted first.
func unmountBelow(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("cannot list mounts: %w", err)
	}
	slices.Reverse(mounts)
	var errs []error
	for _, m := range mounts {
		if m.Mountpoint == dir {
			continue // the directory itself may be a file system of the user's choice
		}
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			errs = append(errs, fmt.Errorf("cannot unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

// killContainer ends a container by its first process, and by its cgroup when that is known
// to be the container's own: with a shared process namespace the others would live on. The
// number may be that of another process by now, so nothing happens unless a cgroup of it has
// the container's id in its name.
func killContainer(pid int, id string) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return
	}
	own := false
	for line := range strings.SplitSeq(strings.TrimSpace(string(data)), "\n") {
		parts := strings.SplitN(line, ":", 3)
		if len(parts) != 3 || !strings.Contains(parts[2], id) {
			continue
		}
		own = true
		for _, dir := range cgroupDirs(parts[1], parts[2]) {
			_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("THAWED"), 0) // v1
			_ = os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0)      // v2
			_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)        // v2
			procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for field := range strings.FieldsSeq(string(procs)) {
				if p, err := strconv.Atoi(field); err == nil && p > 1 {
					_ = unix.Kill(p, unix.SIGKILL)
				}
			}
		}
	}
	if own {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// cgroupDirs are the directories that a line of /proc/PID/cgroup may stand for.
func cgroupDirs(controllers, path string) []string {
	if controllers == "" {
		return []string{filepath.Join("/sys/fs/cgroup", path), filepath.Join("/sys/fs/cgroup/unified", path)}
	}
	return []string{filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(controllers, "name="), path)}
}

// shims lists the processes that are shims of this installation's containerd, by their
// command line. Only those of this process namespace can be seen.
func shims(env snapenv.Env) []int {
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var pids []int
	for _, path := range entries {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if isShim(bytes.Split(bytes.TrimRight(data, "\x00"), []byte{0}), env.ContainerdSocket()) {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func isShim(argv [][]byte, socket string) bool {
	if len(argv) == 0 || !strings.HasPrefix(filepath.Base(string(argv[0])), "containerd-shim-") {
		return false
	}
	value := func(flag string) string {
		if i := slices.IndexFunc(argv, func(a []byte) bool { return string(a) == flag }); i >= 0 && i+1 < len(argv) {
			return string(argv[i+1])
		}
		return ""
	}
	return value("-namespace") == Namespace && value("-address") == socket
}
