package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// What a connection to sink is for, as its first byte.
const (
	forStream  = 's' // everything is thrown away
	forEcho    = 'e' // everything comes back
	forConnect = 'c' // a byte comes back, and the connection ends
)

// sink is the far side of load and probe, on TCP and UDP.
func sink(ctx context.Context, port string) error {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", ":"+port)
	if err != nil {
		return err
	}
	udp, err := config.ListenPacket(ctx, "udp", ":"+port)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { l.Close(); udp.Close() })
	go func() {
		buffer := make([]byte, 2048)
		for {
			n, from, err := udp.ReadFrom(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = udp.WriteTo(buffer[:n], from)
			}
		}
	}()
	fmt.Println("ready")
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			kind := make([]byte, 1)
			if _, err := io.ReadFull(conn, kind); err != nil {
				return
			}
			switch kind[0] {
			case forStream:
				buffer := make([]byte, 256<<10)
				for err == nil {
					_, err = conn.Read(buffer)
				}
			case forEcho:
				buffer := make([]byte, 2048)
				for n := 0; err == nil; {
					if n, err = conn.Read(buffer); err == nil {
						_, err = conn.Write(buffer[:n])
					}
				}
			case forConnect:
				_, _ = conn.Write(kind)
			}
		}()
	}
}

// load asks a sink for a time, after a fifth of that to warm up, and prints: bytes a second of one stream; the median and the
// 99th percentile of the answers to one caller, in microseconds; new connections a second of four callers.
func load(ctx context.Context, what, address, during string) error {
	d, err := duration(during)
	if err != nil {
		return err
	}
	var dialer net.Dialer
	begin := func(kind byte) (net.Conn, error) {
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err == nil {
			_, err = conn.Write([]byte{kind})
		}
		return conn, err
	}
	from := time.Now().Add(d / 5)
	until := from.Add(d)
	switch what {
	case "stream":
		conn, err := begin(forStream)
		if err != nil {
			return err
		}
		defer conn.Close()
		buffer := make([]byte, 256<<10)
		sum, began := 0, time.Time{}
		for now := time.Now(); now.Before(until); now = time.Now() {
			n, err := conn.Write(buffer)
			if err != nil {
				return err
			}
			if now.Before(from) {
				continue
			}
			if began.IsZero() {
				began = now
			}
			sum += n
		}
		fmt.Printf("%.0f\n", float64(sum)/time.Since(began).Seconds())
	case "echo":
		conn, err := begin(forEcho)
		if err != nil {
			return err
		}
		defer conn.Close()
		buffer := make([]byte, 100)
		var took []time.Duration
		for now := time.Now(); now.Before(until); now = time.Now() {
			if _, err := conn.Write(buffer); err != nil {
				return err
			}
			if _, err := io.ReadFull(conn, buffer); err != nil {
				return err
			}
			if now.After(from) {
				took = append(took, time.Since(now))
			}
		}
		if len(took) == 0 {
			return errors.New("no answer in time")
		}
		slices.Sort(took)
		us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
		fmt.Printf("%.1f %.1f\n", us(took[len(took)/2]), us(took[len(took)*99/100]))
	case "connect":
		var count atomic.Int64
		var group sync.WaitGroup
		failures := make(chan error, 1)
		for range 4 {
			group.Go(func() {
				for now := time.Now(); now.Before(until); now = time.Now() {
					conn, err := begin(forConnect)
					if err == nil {
						_, err = io.ReadFull(conn, make([]byte, 1))
						_ = conn.(*net.TCPConn).SetLinger(0) // leaves no port in TIME_WAIT
						conn.Close()
					}
					if err != nil {
						select {
						case failures <- err:
						default:
						}
						return
					}
					if now.After(from) {
						count.Add(1)
					}
				}
			})
		}
		group.Wait()
		select {
		case err := <-failures:
			return err
		default:
		}
		fmt.Printf("%.0f\n", float64(count.Load())/d.Seconds())
	default:
		return fmt.Errorf("load has stream, echo and connect, not %q", what)
	}
	return nil
}

// probe asks a sink over UDP, with another port each time, and prints when answers begin and end: a line with the time in
// nanoseconds and "open" or "closed", first of all "begin". A question without an answer takes 20 ms; the time that is printed
// is when the first question of its kind was asked.
func probe(ctx context.Context, address string) error {
	say := func(at time.Time, what string) { fmt.Println(at.UnixNano(), what) }
	say(time.Now(), "begin")
	const unknown, open, closed = "", "open", "closed"
	last := unknown
	buffer := make([]byte, 1)
	var dialer net.Dialer
	for ctx.Err() == nil {
		now, state := time.Now(), closed
		conn, err := dialer.DialContext(ctx, "udp", address)
		if err == nil {
			_ = conn.SetDeadline(now.Add(20 * time.Millisecond))
			if _, err = conn.Write([]byte{forEcho}); err == nil {
				_, err = conn.Read(buffer)
			}
			conn.Close()
		}
		if err == nil {
			state = open
		}
		if state != last {
			say(now, state)
			last = state
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}
