package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	membership "microk8s/internal/cluster"
	"microk8s/internal/datastore/storedir"
	"microk8s/internal/journal"
	"microk8s/internal/longtest"
)

// TestMany grows a cluster to five control-plane nodes under bad circumstances. It takes several
// minutes, so the gate leaves it out (scripts/test).
func TestMany(t *testing.T) {
	longtest.Only(t)
	all := []string{"n1", "n2", "n3", "n4", "n5"}
	c := newCluster(t, all...)
	step := steps(t)
	var line []string
	step("start", func(t *testing.T) {
		c.start(t, "n1")
		c.start(t, "n2")
		c.mark(t, "n2", "single")
		line = c.line(t, "n1")
	})
	step("tokens that were good once, or elsewhere", func(t *testing.T) {
		foreign := c.line(t, "n2")[2]
		_, rest, _ := strings.Cut(foreign, ":")
		if r := c.try(t, "n2", "microk8s", "join", c.ip(t, "n1")+":"+rest); r.code != 4 || !strings.Contains(r.err, "does not know this token") {
			t.Errorf("another cluster's token: %s", r)
		}
		short := c.line(t, "n1", "--token-ttl", "1")[2]
		made := time.Now()
		eventually(t, time.Minute, func() error { // it takes a second to expire
			if time.Since(made) < 2*time.Second {
				return errors.New("not expired yet")
			}
			return nil
		})
		if r := c.try(t, "n3", "microk8s", "join", short, "--worker"); r.code != 6 || !strings.Contains(r.err, "expired") {
			t.Errorf("an expired token: %s", r)
		}
		c.wantMark(t, "n2", "single")
	})
	step("the contacted node dies during a join", func(t *testing.T) {
		done := make(chan result)
		go func() { done <- c.try(t, "n2", line...) }()
		eventually(t, time.Minute, func() error {
			r, err := journal.Read(c.lab.Root("n2") + "/var/snap/microk8s/common/var/cluster/journal")
			if err != nil || r == nil || !slices.Contains(membership.Steps()["join"][5:], r.Step) {
				return errors.New("not that far yet")
			}
			return nil
		})
		if err := c.lab.Kill(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
		died := time.Now()
		if r := <-done; r.code == 0 || !strings.Contains(r.err, "the node was rolled back") {
			t.Fatalf("join: %s", r)
		}
		t.Logf("the join was taken back %s after the other node died", time.Since(died).Round(100*time.Millisecond))
		c.waitReady(t, "n2", "n2")
		c.wantMark(t, "n2", "single")
		if err := c.lab.Start(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
		c.waitReady(t, "n1", "n1")
		// Nobody could be told that the member is not one.
		c.try(t, "n1", "microk8s", "remove-node", c.ip(t, "n2"), "--force")
		c.run(t, "n2", line...)
	})
	step("two at the same moment", func(t *testing.T) {
		var both sync.WaitGroup
		for i, n := range []string{"n3", "n4"} {
			l := c.line(t, []string{"n1", "n2"}[i])
			both.Add(1)
			go func() {
				defer both.Done()
				if r := c.try(t, n, l...); r.code != 0 {
					t.Errorf("%s: %s", n, r)
				}
			}()
		}
		both.Wait()
		c.wantRoles(t, "n1", 3, 1, 0)
	})
	step("one line for two machines", func(t *testing.T) {
		once := c.line(t, "n1")
		c.run(t, "n5", once...)
		if r := c.try(t, "n5", "microk8s", "leave"); r.code != 0 {
			t.Fatal(r)
		}
		c.run(t, "n1", "microk8s", "remove-node", "n5")
		if r := c.try(t, "n5", once...); r.code != 6 || !strings.Contains(r.err, "used") {
			t.Errorf("the second time: %s", r)
		}
	})
	step("while a member is down", func(t *testing.T) {
		victim := "n3"
		if c.leader(t, all[:4]) == victim {
			victim = "n2"
		}
		if err := c.lab.Kill(t.Context(), victim); err != nil {
			t.Fatal(err)
		}
		at := "n1"
		c.wantLiveVoters(t, at, victim) // a stand-by has taken the dead one's place
		c.join(t, at, "n5")
		c.waitReady(t, at, "n5")
		c.wantHA(t, at, "yes", 5)
		if err := c.lab.Start(t.Context(), victim); err != nil {
			t.Fatal(err)
		}
		c.wantRoles(t, victim, 3, 2, 0)
	})
	step("the leader dies", func(t *testing.T) {
		leader := c.leader(t, all)
		others := slices.DeleteFunc(slices.Clone(all), func(n string) bool { return n == leader })
		if err := c.lab.Kill(t.Context(), leader); err != nil {
			t.Fatal(err)
		}
		c.wantLiveVoters(t, others[0], leader)
		c.run(t, others[0], "microk8s", "remove-node", leader, "--force")
		c.wantNodes(t, others[0], others...)
		c.wantHA(t, others[1], "yes", 4)
		all = others
	})
	step("the majority dies during a removal", func(t *testing.T) {
		at, gone, rest := all[0], all[3], all[1:3]
		if err := c.lab.Kill(t.Context(), gone); err != nil {
			t.Fatal(err)
		}
		c.wantLiveVoters(t, at, gone)
		points := c.allPoints(t, "remove-node")
		c.wantKilled(t, at, points[c.rand.IntN(len(points)-2)], "microk8s", "remove-node", gone, "--force")
		for _, host := range rest {
			if err := c.lab.Kill(t.Context(), host); err != nil {
				t.Fatal(err)
			}
		}
		if r := c.try(t, at, "microk8s", "remove-node", gone, "--force"); r.code == 0 {
			t.Errorf("without a majority: %s", r)
		} else {
			t.Logf("without a majority: %s", r)
		}
		for _, host := range rest {
			if err := c.lab.Start(t.Context(), host); err != nil {
				t.Fatal(err)
			}
		}
		c.waitReady(t, at, at)
		c.run(t, at, "microk8s", "remove-node", gone, "--force")
		c.wantNodes(t, at, all[:3]...)
		c.wantHA(t, at, "yes", 3)
	})
}

// wantRoles waits until a node sees so many members of each role.
func (c *cluster) wantRoles(t *testing.T, host string, voters, standBys, spares int) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		list, err := c.members(t, host)
		if err != nil {
			return err
		}
		count := map[storedir.Role]int{}
		for _, m := range list {
			count[m.Role]++
		}
		if count[storedir.Voter] != voters || count[storedir.StandBy] != standBys || count[storedir.Spare] != spares {
			return fmt.Errorf("members: %v", list)
		}
		return nil
	})
}

// wantLiveVoters waits until there are three voters that answer, without a dead one, which its peers
// take to be alive for some seconds.
func (c *cluster) wantLiveVoters(t *testing.T, host, dead string) {
	t.Helper()
	began := time.Now()
	eventually(t, 2*time.Minute, func() error {
		list, err := c.members(t, host)
		if err != nil {
			return err
		}
		n := 0
		for _, m := range list {
			if m.Role == storedir.Voter && m.Online && m.Address != c.ip(t, dead)+":19001" {
				n++
			}
		}
		if n != 3 {
			return fmt.Errorf("%d voters answer: %v", n, list)
		}
		return nil
	})
	t.Logf("three voters answer %s after %s died", time.Since(began).Round(100*time.Millisecond), dead)
}
