package daemon

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"microk8s/internal/datastore/peers"
)

const (
	// The kernel announces nothing when a control group comes near its limit, only when it is there.
	memoryEvery = 5 * time.Second
	memoryLow   = 85 // percent of the limit
)

// memory knows how near this process is to the memory limit of its control group.
type memory struct {
	dir   string // of the group with the lowest limit
	limit int64

	mu   sync.Mutex
	last peers.Memory
}

// findMemory looks for the limit of this process, which may be that of a group above its own (MemoryMax= of
// systemd). nil: there is none. root is the file system's, "/" except in tests.
func findMemory(root string) *memory {
	own, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return nil
	}
	path, ok := "", false
	for line := range strings.Lines(string(own)) {
		if path, ok = strings.CutPrefix(strings.TrimSpace(line), "0::"); ok { // version 2
			break
		}
	}
	if !ok {
		return nil
	}
	var m *memory
	top := filepath.Join(root, "sys/fs/cgroup")
	for dir := filepath.Join(top, path); len(dir) >= len(top); dir = filepath.Dir(dir) {
		if limit, err := readNumber(filepath.Join(dir, "memory.max")); err == nil && (m == nil || limit < m.limit) {
			m = &memory{dir: dir, limit: limit}
		}
	}
	return m
}

// readNumber reads a file with one number. "max" is an error.
func readNumber(path string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(string(bytes.TrimSpace(data)), 10, 64)
}

// read returns how much of the limit is used: without the pages of files, which the kernel takes back first.
func (m *memory) read() (peers.Memory, error) {
	used, err := readNumber(filepath.Join(m.dir, "memory.current"))
	if err != nil {
		return peers.Memory{}, err
	}
	stat, err := os.ReadFile(filepath.Join(m.dir, "memory.stat"))
	if err != nil {
		return peers.Memory{}, err
	}
	for line := range strings.Lines(string(stat)) {
		var n int64
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name != "inactive_file" && name != "active_file" {
			continue
		}
		if n, err = strconv.ParseInt(value, 10, 64); err != nil {
			return peers.Memory{}, fmt.Errorf("%s has %q: %w", filepath.Join(m.dir, "memory.stat"), line, err)
		}
		used -= n
	}
	return peers.Memory{Used: used, Limit: m.limit, Low: used >= m.limit/100*memoryLow}, nil
}

// usage is what was read last; nil without a limit.
func (m *memory) usage() *peers.Memory {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	last := m.last
	return &last
}

// watch logs when the limit comes near, until ctx ends.
func (m *memory) watch(ctx context.Context, log *slog.Logger) {
	if m == nil {
		return
	}
	log.Info("the memory of this member is limited", "limit", m.limit, "group", m.dir)
	t := time.NewTicker(memoryEvery)
	defer t.Stop()
	for {
		now, err := m.read()
		if err != nil {
			log.Warn("how much memory is used cannot be read", "err", err)
			return
		}
		m.mu.Lock()
		was := m.last
		m.last = now
		m.mu.Unlock()
		switch {
		case now.Low && !was.Low:
			log.Error("the memory of this member is nearly used; at the limit the kernel ends it. Raise MemoryMax= of its service, or delete what is not needed", "used", now.Used, "limit", now.Limit)
		case was.Low && !now.Low:
			log.Info("the memory of this member is sufficient again", "used", now.Used, "limit", now.Limit)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
