package setup

import (
	"fmt"
	"runtime"

	"microk8s/internal/args"
)

// Bounds of what is kept from pods. The programs of an idle control-plane node take some 600 MB
// on a machine of 4 GB and more, and less where there is less; a machine of 1 GB must still run
// the pods of a small node.
const (
	kubeShare, systemShare = 12, 4 // percent of the memory
	maxKubeMiB             = 1024
	maxSystemMiB           = 256
	cpuShare, maxCPU       = 5, 500 // thousandths of a core for each core, in all
	reservedPIDs           = 1000   // for the host, and as many for Kubernetes
)

// reservations returns the values of the kubelet's --kube-reserved and --system-reserved for a
// machine with that many cores and that much memory in KiB. The kubelet keeps the sum from
// pods: they run in a cgroup that is smaller than the machine by it.
func reservations(cores int, memory uint64) (kube, system string) {
	mib := memory / 1024
	kubeMem, systemMem := min(mib*kubeShare/100, maxKubeMiB), min(mib*systemShare/100, maxSystemMiB)
	kubeCPU := min(cores*cpuShare*10, maxCPU)
	return fmt.Sprintf("cpu=%dm,memory=%dMi,pid=%d", kubeCPU, kubeMem, reservedPIDs),
		fmt.Sprintf("cpu=%dm,memory=%dMi,pid=%d", max(kubeCPU/2, 10), systemMem, reservedPIDs)
}

// reserve adds to the shipped arguments of the kubelet what pods cannot take from this machine. A
// node in use keeps the file that it has.
func (in *Installer) reserve(shipped []byte) ([]byte, error) {
	f, err := args.Parse(shipped, args.GrammarFor("kubelet"))
	if err != nil {
		return nil, err
	}
	memory, err := memTotal(in.Env.HostPath("proc/meminfo"))
	if err != nil {
		in.Log.Warn("cannot find out how much memory there is; nothing is reserved for the node itself", "err", err)
		return shipped, nil
	}
	kube, system := reservations(runtime.NumCPU(), memory)
	if err := f.Set("kube-reserved", kube); err != nil {
		return nil, err
	}
	if err := f.Set("system-reserved", system); err != nil {
		return nil, err
	}
	return f.Bytes(), nil
}
