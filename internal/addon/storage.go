package addon

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// storageValues fill the manifest of hostpath-storage.
type storageValues struct {
	ReclaimPolicy string
	DefaultClass  bool
	Dirs          []string // that may hold volumes; the first is the default
}

// plainPath is what goes into a manifest and a command line as it is.
var plainPath = regexp.MustCompile(`^(/[A-Za-z0-9._+@-]+)+$`)

// readStorage reads the arguments of `enable hostpath-storage`.
func readStorage(words []string) (storageValues, error) {
	v := storageValues{}
	flags := pflag.NewFlagSet("hostpath-storage", pflag.ContinueOnError)
	flags.Usage = func() {}
	flags.StringVarP(&v.ReclaimPolicy, "reclaim-policy", "r", "Delete", "")
	flags.BoolVarP(&v.DefaultClass, "default-class", "d", true, "")
	flags.StringArrayVar(&v.Dirs, "pv-dir", nil, "")
	if err := flags.Parse(joinBool(words, "--default-class", "-d")); err != nil {
		return v, &ArgumentError{err.Error()}
	}
	if flags.NArg() > 0 {
		return v, &ArgumentError{fmt.Sprintf("unexpected argument %q", flags.Arg(0))}
	}
	if v.ReclaimPolicy != "Delete" && v.ReclaimPolicy != "Retain" {
		return v, &ArgumentError{fmt.Sprintf("--reclaim-policy is Delete or Retain, and not %q", v.ReclaimPolicy)}
	}
	for _, dir := range v.Dirs {
		switch {
		case !plainPath.MatchString(dir) || filepath.Clean(dir) != dir:
			return v, &ArgumentError{fmt.Sprintf("--pv-dir wants the whole path of a directory, without spaces or .., and got %q", dir)}
		case slices.ContainsFunc(noVolumes, func(top string) bool { return dir == top || strings.HasPrefix(dir, top+"/") }):
			return v, &ArgumentError{fmt.Sprintf("volumes do not belong in %s: the system is there", dir)}
		}
	}
	return v, nil
}

// noVolumes are directories that belong to the system.
var noVolumes = []string{"/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/usr"}

// joinBool makes --flag=value of --flag value where value is true or false, which pflag would
// take for an argument. Upstream's option parser takes both.
func joinBool(words []string, flags ...string) []string {
	var out []string
	for i := 0; i < len(words); i++ {
		if slices.Contains(flags, words[i]) && i+1 < len(words) && (words[i+1] == "true" || words[i+1] == "false") {
			out = append(out, words[i]+"="+words[i+1])
			i++
			continue
		}
		out = append(out, words[i])
	}
	return out
}

func renderStorage(_ context.Context, s *Set, words []string) (any, error) {
	v, err := readStorage(words)
	v.Dirs = append([]string{s.Env.DefaultStorage()}, v.Dirs...)
	return v, err
}

var volumes = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumes"}

// VolumesElsewhere counts the volumes that the addon has made on nodes other than here.
func (s *Set) VolumesElsewhere(ctx context.Context, here string) (map[string]int, error) {
	list, err := s.client.Resource(volumes).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("cannot list the volumes: %w", err)
	}
	count := map[string]int{}
	for _, o := range list.Items {
		var pv corev1.PersistentVolume
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &pv); err != nil {
			return nil, fmt.Errorf("cannot read volume %s: %w", o.GetName(), err)
		}
		if pv.Annotations[provisionedBy] != storageProvisioner || pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
			continue
		}
		for _, term := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
			for _, e := range term.MatchExpressions {
				if e.Key == corev1.LabelHostname && len(e.Values) == 1 && e.Values[0] != here {
					count[e.Values[0]]++
				}
			}
		}
	}
	return count, nil
}

const (
	provisionedBy      = "pv.kubernetes.io/provisioned-by" // annotation of volumes that a provisioner made
	storageProvisioner = "microk8s.io/hostpath"            // see internal/hostpath
)
