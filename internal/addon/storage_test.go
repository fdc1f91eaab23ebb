package addon

import (
	"slices"
	"strings"
	"testing"
)

func TestReadStorage(t *testing.T) {
	for _, tc := range []struct {
		args, policy, dirs string
		class              bool
		err                string
	}{
		{args: "", policy: "Delete", class: true},
		{args: "--reclaim-policy=Retain", policy: "Retain", class: true},
		{args: "-r Retain -d false", policy: "Retain"},
		{args: "--default-class true", policy: "Delete", class: true},
		{args: "--default-class=false --pv-dir /mnt/ssd --pv-dir=/data", policy: "Delete", dirs: "/mnt/ssd,/data"},
		{args: "-r Recycle", err: `and not "Recycle"`},
		{args: "Retain", err: `unexpected argument "Retain"`},
		{args: "--size 3", err: "unknown flag: --size"},
		{args: "--pv-dir mnt", err: "whole path"},
		{args: "--pv-dir /mnt/../etc", err: "whole path"},
		{args: "--pv-dir /mnt/{{.}}", err: "whole path"},
		{args: "--pv-dir /", err: "whole path"},
		{args: "--pv-dir /etc", err: "volumes do not belong in /etc"},
		{args: "--pv-dir /usr/share/x", err: "volumes do not belong in"},
		{args: "--pv-dir /usrx", policy: "Delete", class: true, dirs: "/usrx"},
	} {
		v, err := readStorage(strings.Fields(tc.args))
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: error %v, want %q", tc.args, err, tc.err)
			}
			continue
		}
		var dirs []string
		if tc.dirs != "" {
			dirs = strings.Split(tc.dirs, ",")
		}
		if err != nil || v.ReclaimPolicy != tc.policy || v.DefaultClass != tc.class || !slices.Equal(v.Dirs, dirs) {
			t.Errorf("%q: %+v, %v", tc.args, v, err)
		}
	}
}
