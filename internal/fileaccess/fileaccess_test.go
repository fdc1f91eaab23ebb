package fileaccess

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"microk8s/internal/snapenv"
)

func TestModesAndGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: only root gives files to a group")
		}
		t.Skip("needs root: only root gives files to a group")
	}
	for _, tc := range []struct {
		name                string
		hardened            bool
		file, secret, dir   os.FileMode
		shell, plain        os.FileMode
		sharedGID, plainGID uint32
	}{
		{"usual", false, 0o660, 0o600, 0o770, 0o770, 0o660, 777, 777},
		{"hardened", true, 0o600, 0o600, 0o700, 0o700, 0o600, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := snapenv.Under(t.TempDir())
			for path, text := range map[string]string{
				env.HostPath("etc/group"):               "root:x:0:\nmicrok8s-x:x:5:\nmicrok8s:x:777:ann,bob\n",
				filepath.Join(env.PluginsDir(), "tool"): "#!/bin/sh\n",
				filepath.Join(env.PluginsDir(), "data"): "x",
			} {
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(filepath.Join(env.PluginsDir(), "tool"), 0o755); err != nil {
				t.Fatal(err)
			}
			if tc.hardened {
				if err := os.MkdirAll(env.LocksDir(), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(env.Lock(snapenv.LockCIS), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			a := For(env)
			if a.RootOnly() != tc.hardened {
				t.Errorf("RootOnly() = %v", a.RootOnly())
			}
			if err := a.SharedDir(env.ArgsDir()); err != nil {
				t.Fatal(err)
			}
			if err := a.WriteShared(env.Args("kubelet"), []byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := a.WriteSecret(env.Args("secret"), []byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := a.ShareTree(env.PluginsDir()); err != nil {
				t.Fatal(err)
			}
			if err := a.ShareTree(filepath.Join(env.Data, "none")); err != nil {
				t.Errorf("a missing directory: %v", err)
			}
			for path, want := range map[string]struct {
				mode os.FileMode
				gid  uint32
			}{
				env.ArgsDir():                           {tc.dir, tc.sharedGID},
				env.Args("kubelet"):                     {tc.file, tc.sharedGID},
				env.Args("secret"):                      {tc.secret, 0},
				filepath.Join(env.PluginsDir(), "tool"): {tc.shell, tc.plainGID},
				filepath.Join(env.PluginsDir(), "data"): {tc.plain, tc.plainGID},
			} {
				st, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				if gid := st.Sys().(*syscall.Stat_t).Gid; st.Mode().Perm() != want.mode || gid != want.gid {
					t.Errorf("%s: %v of group %d, want %v of %d", path, st.Mode(), gid, want.mode, want.gid)
				}
			}
		})
	}
}

func TestGroupID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "group")
	if _, found, err := GroupID(path, "g"); found || err != nil {
		t.Errorf("without the file: %v, %v", found, err)
	}
	if err := os.WriteFile(path, []byte("a:x:1:\nbad:x:one:\nshort\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if gid, found, err := GroupID(path, "a"); gid != 1 || !found || err != nil {
		t.Errorf("a: %d, %v, %v", gid, found, err)
	}
	if _, _, err := GroupID(path, "bad"); err == nil {
		t.Error("a number that is none was accepted")
	}
	if _, found, err := GroupID(path, "short"); found || err != nil {
		t.Errorf("a line without a number: %v, %v", found, err)
	}
}
