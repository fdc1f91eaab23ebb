package daemon

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The socket of dqlite in the daemon has no file, so that any process in its network namespace
// finds it. It answers nobody but the daemon: not another user, and not another process of root.
func TestOwnSocketAnswersNobodyElse(t *testing.T) { // not beside others: their nodes in this process end
	start(t, newDir(t))
	sockets := ownSockets(t)
	if len(sockets) == 0 {
		t.Fatal("there is no such socket")
	}
	// The binary where everybody can run it.
	dir := t.TempDir()
	program := filepath.Join(dir, "ask")
	data, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(program, data, 0o755), os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, socket := range sockets {
		if err := askNode(socket); err != nil {
			t.Errorf("the daemon's own process: %v", err)
		}
		users := []*syscall.Credential{nil}
		if os.Getuid() == 0 {
			users = append(users, &syscall.Credential{Uid: 65534, Gid: 65534})
		}
		for _, user := range users {
			cmd := exec.Command(program, socket)
			cmd.Env, cmd.SysProcAttr, cmd.Dir = []string{"TEST_K8S_DQLITE=ask"}, &syscall.SysProcAttr{Credential: user}, "/"
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "the connection was closed") {
				t.Errorf("another process, as %v: %v: %s", user, err, out)
			}
		}
	}
}

// ownSockets returns the abstract sockets of dqlite on which this process listens.
func ownSockets(t *testing.T) (names []string) {
	t.Helper()
	list, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	ours := map[string]bool{}
	for _, f := range files {
		to, _ := os.Readlink(f) // some are closed meanwhile
		ours[to] = true
	}
	for line := range strings.Lines(string(list)) {
		const listens = "00010000" // __SO_ACCEPTCON
		f := strings.Fields(line)
		if len(f) == 8 && f[3] == listens && ours["socket:["+f[6]+"]"] && strings.HasPrefix(f[7], "@dqlite-") {
			names = append(names, f[7])
		}
	}
	return names
}

// askNode asks, in dqlite's protocol, who leads. It is nil when there is an answer.
func askNode(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	question := make([]byte, 24) // version 1, one word, type 0: the leader
	question[0], question[8] = 1, 1
	_, err = conn.Write(question)
	if err == nil {
		_, err = io.ReadFull(conn, make([]byte, 16))
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the connection was closed: %w", err)
	}
	return err
}
