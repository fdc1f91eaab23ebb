package member

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

/*
#include <dqlite.h>
#include <malloc.h>
#include <sqlite3.h>
#include <uv.h>

static int multiThread(void) { return sqlite3_config(SQLITE_CONFIG_MULTITHREAD); }
*/
import "C"

// Since 1.18 dqlite runs statements on the threads of libuv's pool, several at a time, each on
// a connection of its own (https://github.com/canonical/go-dqlite/pull/408). The setting must come before
// SQLite's first use. Without the tag nosqlite3 go-dqlite asks for a single thread, which is wrong.
func init() {
	if code := C.multiThread(); code != 0 {
		panic(fmt.Sprintf("SQLite cannot be set to several threads: code %d", code))
	}
}

// Trim returns memory to the system that dqlite has freed: malloc keeps it between other things that are in
// use. Threads that allocate meanwhile wait for some milliseconds.
func Trim() { C.malloc_trim(0) }

// socketPair gives two connected Unix stream sockets.
func socketPair() (net.Conn, net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a socket pair: %w", err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			for _, c := range conns {
				if c != nil {
					c.Close()
				}
			}
			if i == 0 {
				unix.Close(fds[1])
			}
			return nil, nil, fmt.Errorf("cannot use a socket pair: %w", err)
		}
	}
	return conns[0], conns[1], nil
}

func libraryVersions() string {
	v := int(C.dqlite_version_number())
	return fmt.Sprintf("%s %d.%d.%d %s", C.GoString(C.sqlite3_libversion()), v/10000, v/100%100, v%100, C.GoString(C.uv_version_string()))
}
