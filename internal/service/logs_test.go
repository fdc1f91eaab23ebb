package service

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLastLine(t *testing.T) {
	const (
		began  = "-- microk8s: 2026-01-02T03:04:05Z kubelite started, pid 7\n"
		ended  = "-- microk8s: 2026-01-02T03:04:05Z kubelite ended: exit status 1\n"
		reason = `time=2026-01-02T03:04:05Z level=ERROR msg="a daemon ended" error=why`
		klog   = `E0102 03:04:05.678901      41 x.go:1] "leaderelection lost"`
	)
	for _, tc := range []struct{ name, log, want string }{
		{"empty", "", ""},
		{"notes only", began + ended, ""},
		{"plain", began + klog + "\nmicrok8s: bad\n" + ended, "microk8s: bad"},
		{"reason last", began + klog + "\n" + reason + "\n" + ended, reason},
		{"chatter after the reason", began + reason + "\n" + klog + "\n" + klog + "\n" + ended, reason},
		{"reason of another run", reason + "\n" + began + klog + "\n" + ended, klog},
	} {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, []byte(tc.log), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := LastLine(path); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}
