package daemon

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"microk8s/internal/datastore/storedir"
)

// TestStrangersOnThePort: whoever reaches a member's port without the key pair holds a bounded number
// of connections, of one source and in all, and does not keep members from each other.
func TestStrangersOnThePort(t *testing.T) {
	t.Parallel()
	const perSource, total = 128, 512 // of package member
	c := newCluster(t, 2)
	first, second := c.members[0], c.members[1]
	// strangers connects so often from each of some sources, says nothing, and returns those whose
	// connections are still open.
	strangers := func(sources, each int) []net.Conn {
		var mu sync.Mutex
		var group sync.WaitGroup
		var open []net.Conn
		for s := range sources {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 250, byte(s/250), byte(s%250+1))}, Timeout: 5 * time.Second}
			group.Go(func() {
				for range each {
					conn, err := d.DialContext(t.Context(), "tcp", first.address)
					if err != nil {
						continue
					}
					mu.Lock()
					open = append(open, conn)
					mu.Unlock()
				}
			})
		}
		group.Wait()
		t.Cleanup(func() {
			for _, conn := range open {
				conn.Close()
			}
		})
		var left []net.Conn
		for _, conn := range open {
			group.Go(func() { // a refused one ends within that time
				_ = conn.SetReadDeadline(time.Now().Add(time.Second))
				_, err := conn.Read(make([]byte, 1))
				var waited net.Error
				if errors.As(err, &waited) && waited.Timeout() {
					mu.Lock()
					left = append(left, conn)
					mu.Unlock()
				}
			})
		}
		group.Wait()
		return left
	}
	honest := func(when string) {
		second.kill(t) // its connections are made again
		c.start(second)
		for _, m := range c.members {
			m.put(t, fmt.Sprintf("/r/%s/%s", when, m.address), "x")
		}
	}
	if n := len(strangers(1, 3*perSource)); n == 0 || n > perSource {
		t.Errorf("one source has %d connections, want at most %d", n, perSource)
	}
	honest("one source")
	if n := len(strangers(40, 30)); n == 0 || n > total {
		t.Errorf("strangers have %d connections, want at most %d", n, total)
	}
	honest("many sources")
	if list, err := storedir.Dir(first.dir).Members(); err != nil || len(list) != 2 {
		t.Errorf("members: %v, %v", list, err)
	}
}
