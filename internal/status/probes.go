package status

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/netcheck"
	"microk8s/internal/nodecheck"
	"microk8s/internal/snapenv"
)

// probeHTTP2 reports whether an HTTP/2 server (gRPC is one) lives behind a unix socket. A
// connection alone proves nothing: the kernel accepts it for a frozen process too. So the
// client's preface is sent, and the server's SETTINGS frame awaited (RFC 9113, 3.4).
func probeHTTP2(ctx context.Context, socket string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	emptySettings := []byte{0, 0, 0, settingsFrame, 0, 0, 0, 0, 0}
	if _, err := conn.Write(append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), emptySettings...)); err != nil {
		return err
	}
	header := make([]byte, len(emptySettings))
	if _, err := io.ReadFull(conn, header); err != nil {
		return err
	}
	if header[3] != settingsFrame {
		return fmt.Errorf("%s is not an HTTP/2 server: it answered %q", socket, bytes.ToValidUTF8(header, nil))
	}
	return nil
}

// settingsFrame is the type of a SETTINGS frame.
const settingsFrame = 4

// networkProblems are those that kubelite found on the ways to other nodes a minute ago at most.
func networkProblems(env snapenv.Env, now time.Time) (out []Problem) {
	for _, r := range netcheck.ReadRecord(env, now).Results {
		for _, p := range r.Problems {
			out = append(out, Problem{ID: "network.paths", What: p.What, Do: p.Do + "; more with: microk8s network check"})
		}
	}
	return out
}

// Free space below which a file system is called full, below which the kubelet evicts pods
// (eviction-hard of the default arguments, nodefs.available), and below which that is near where it is
// less than a tenth too.
const (
	fullBelow  = 100 << 20
	evictBelow = 1 << 30
	lowBelow   = 2 << 30
)

// FullDisk is the problem of a disk of the product without room, nil where there is none.
func FullDisk(env snapenv.Env) *Problem {
	for _, dir := range []string{env.Data, env.Common} {
		var fs unix.Statfs_t
		if unix.Statfs(dir, &fs) != nil {
			continue
		}
		if free := fs.Bavail * uint64(fs.Bsize); free < fullBelow {
			p := fullDisk(dir, free)
			return &p
		}
	}
	return nil
}

func fullDisk(dir string, free uint64) Problem {
	return Problem{
		ID:   "disk.full",
		What: fmt.Sprintf("the disk of %s is full (%d MiB left)", dir, free>>20),
		Do:   "free some space there; the services recover by themselves; find it with: du -xh " + dir + " | sort -h | tail",
	}
}

func diskProblems(env snapenv.Env) []Problem {
	var out []Problem
	seen := map[unix.Fsid]bool{}
	for _, dir := range nodecheck.Storage(env) {
		var fs unix.Statfs_t
		if unix.Statfs(dir, &fs) != nil || seen[fs.Fsid] {
			continue
		}
		seen[fs.Fsid] = true
		free := fs.Bavail * uint64(fs.Bsize)
		switch {
		case free < fullBelow:
			out = append(out, fullDisk(dir, free))
		case dir == env.BackendLive() || dir == env.DefaultStorage():
			// The kubelet does not look at these.
		case free < evictBelow:
			out = append(out, Problem{
				ID:   "disk.full",
				What: fmt.Sprintf("the disk of %s has %d MiB left, pods are evicted below 1 GiB", dir, free>>20),
				Do:   "free some space there; find it with: du -xh " + dir + " | sort -h | tail",
			})
		case free < lowBelow && free < fs.Blocks*uint64(fs.Bsize)/10:
			out = append(out, Problem{
				ID:   "disk.full",
				What: fmt.Sprintf("the disk of %s is nearly full (%d MiB left), pods are evicted below 1 GiB", dir, free>>20),
				Do:   "free some space there; find it with: du -xh " + dir + " | sort -h | tail",
			})
		case fs.Files > 0 && fs.Ffree == 0:
			out = append(out, Problem{ID: "disk.full", What: fmt.Sprintf("the file system of %s has no inodes left", dir),
				Do: "remove some files there; find many with: du --inodes -x " + dir + " | sort -n | tail"})
		}
	}
	return out
}

// ClockProblem reports whether the clock is before the day on which this node's CA was made, so
// that no certificate can be valid; nil where it is not, or where there is no CA yet.
func ClockProblem(env snapenv.Env, now time.Time) *Problem {
	ca := readCert(env.Cert("ca.crt"))
	if ca == nil || !now.Before(ca.NotBefore.Add(-clockSlack)) {
		return nil
	}
	return &Problem{
		ID: "clock.before",
		What: fmt.Sprintf("the clock says %s, which is before this node was made (%s)",
			now.UTC().Format(time.RFC3339), ca.NotBefore.UTC().Format(time.RFC3339)),
		Do: "set the clock, for instance with timedatectl set-ntp true, and run microk8s start",
	}
}

// clockSlack is tolerated between the clocks of machines that made and use a certificate.
const clockSlack = 5 * time.Minute

func certProblems(env snapenv.Env, now time.Time) []Problem {
	if p := ClockProblem(env, now); p != nil {
		return []Problem{*p}
	}
	var out []Problem
	for _, name := range []string{"ca.crt", "server.crt", "front-proxy-ca.crt", "front-proxy-client.crt", "client.crt", "kubelet.crt"} {
		c := readCert(env.Cert(name))
		if c == nil {
			continue
		}
		do := "renew it with sudo microk8s refresh-certs -e " + name
		switch name {
		case "front-proxy-ca.crt", "client.crt", "kubelet.crt":
			do = "renew it with sudo microk8s refresh-certs -e ca.crt"
		}
		switch {
		case now.After(c.NotAfter):
			out = append(out, Problem{ID: "certs.valid", What: fmt.Sprintf("certificate %s expired on %s", name, c.NotAfter.UTC().Format(time.DateOnly)), Do: do})
		case now.Before(c.NotBefore.Add(-clockSlack)):
			out = append(out, Problem{ID: "certs.valid", What: fmt.Sprintf("certificate %s is not valid before %s", name, c.NotBefore.UTC().Format(time.RFC3339)), Do: "check the clock of this machine with: timedatectl"})
		}
	}
	return out
}

func readCert(path string) *x509.Certificate {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return c
}
