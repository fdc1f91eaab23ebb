package snapenv

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestCommandEnviron(t *testing.T) {
	tests := []struct {
		name    string
		host    []string // folders below the host's root
		base    []string
		want    []string // variables of the result
		without []string // names that are not in it
	}{
		{
			name: "the package's folders come first, the caller's values are kept",
			base: []string{"PATH=/usr/bin:/bin", "PYTHONPATH=/mine", "HOME=/root"},
			want: []string{
				"PATH=ROOT/snap/microk8s/current/bin:/usr/bin:/bin", "REAL_PATH=/usr/bin:/bin", "REAL_PYTHONPATH=/mine",
				"REAL_LD_LIBRARY_PATH=", "PYTHONPATH=/mine", "HOME=/root",
				"SNAP=ROOT/snap/microk8s/current", "XDG_RUNTIME_DIR=ROOT/var/snap/microk8s/common/run",
			},
			without: []string{"LC_ALL", "LANG"},
		},
		{
			name: "a locale that is not UTF-8 is replaced",
			host: []string{"usr/lib/locale/C.utf8", "usr/lib/locale/en_US.utf8"},
			base: []string{"LANG=en_US.UTF-8", "LC_ALL=POSIX"},
			want: []string{"LC_ALL=C.UTF-8", "LANG=C.UTF-8"},
		},
		{
			name: "the second one where there is no other",
			host: []string{"usr/lib/locale/en_US.utf8"},
			want: []string{"LC_ALL=en_US.UTF-8"},
		},
		{
			name:    "a UTF-8 locale stays",
			host:    []string{"usr/lib/locale/C.utf8"},
			base:    []string{"LANG=de_DE.utf8@euro"},
			want:    []string{"LANG=de_DE.utf8@euro"},
			without: []string{"LC_ALL"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			e := Under(root)
			for _, dir := range append(tt.host, "snap/microk8s/current/bin") {
				if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			got := e.CommandEnviron(tt.base)
			for _, w := range tt.want {
				if w = strings.ReplaceAll(w, "ROOT", root); !slices.Contains(got, w) {
					t.Errorf("%q is missing in\n%s", w, strings.Join(got, "\n"))
				}
			}
			names := map[string]int{}
			for _, kv := range got {
				name, _, _ := strings.Cut(kv, "=")
				names[name]++
			}
			for name, n := range names {
				if n > 1 {
					t.Errorf("%s is there %d times", name, n)
				}
			}
			for _, name := range tt.without {
				if names[name] > 0 {
					t.Errorf("%s is set", name)
				}
			}
			again := e.CommandEnviron(got)
			slices.Sort(got)
			if slices.Sort(again); !slices.Equal(got, again) {
				t.Errorf("twice:\n%s\nonce:\n%s", strings.Join(again, "\n"), strings.Join(got, "\n"))
			}
		})
	}
}
