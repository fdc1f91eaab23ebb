// Command web is the one program inside the image of the node tests: a web server, and the
// few tools that a test runs with `kubectl exec` in a container that has no shell.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const usage = `usage: web [COMMAND]
  serve [PORT]      answer HTTP (default, port 8080): / host name, /client the caller's address,
                    /env/NAME a variable, /file/PATH a file
  hostname          print the host name
  wget URL [SECS]   print the answer of URL; exit 1 unless it is 2xx (default 5 seconds)
  lookup NAME       print the addresses of NAME
  cat FILE...       print files
  write FILE [TEXT] write TEXT, or what comes from stdin, to FILE and sync it
  append FILE TEXT  add a line to FILE and sync it
  sleep DURATION    wait (30, 30s, 5m, forever)
  burn DURATION     use one core
  exit CODE         exit with this code
  sink [PORT]       the far side of load and probe (default port 8090)
  load stream|echo|connect ADDRESS DURATION
                    print bytes a second, two latencies in µs (p50, p99), or new connections a second
  probe ADDRESS     print when answers over UDP begin and end
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	code, err := run(ctx, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "web:", err)
		code = 1
	}
	os.Exit(code)
}

func run(ctx context.Context, args []string) (int, error) {
	command := "serve"
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	arg := func(i int, def string) string {
		if i < len(args) {
			return args[i]
		}
		return def
	}
	switch command {
	case "serve":
		return 0, serve(ctx, arg(0, "8080"))
	case "hostname":
		name, err := os.Hostname()
		fmt.Println(name)
		return 0, err
	case "wget":
		return 0, wget(ctx, arg(0, ""), arg(1, "5"))
	case "lookup":
		addrs, err := net.DefaultResolver.LookupHost(ctx, arg(0, ""))
		if err == nil {
			fmt.Println(strings.Join(addrs, "\n"))
		}
		return 0, err
	case "cat":
		for _, name := range args {
			f, err := os.Open(name)
			if err != nil {
				return 1, err
			}
			_, err = io.Copy(os.Stdout, f)
			f.Close()
			if err != nil {
				return 1, err
			}
		}
		return 0, nil
	case "write", "append":
		return 0, write(command == "append", arg(0, ""), args)
	case "sleep", "burn":
		d, err := duration(arg(0, "forever"))
		if err != nil {
			return 1, err
		}
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		for command == "burn" && ctx.Err() == nil {
		}
		<-ctx.Done()
		return 0, nil
	case "sink":
		return 0, sink(ctx, arg(0, "8090"))
	case "load":
		return 0, load(ctx, arg(0, ""), arg(1, ""), arg(2, "5"))
	case "probe":
		return 0, probe(ctx, arg(0, ""))
	case "exit":
		return strconv.Atoi(arg(0, "0"))
	}
	return 1, fmt.Errorf("unknown command %q\n%s", command, usage)
}

func serve(ctx context.Context, port string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, name) })
	mux.HandleFunc("/client", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.RemoteAddr) })
	mux.HandleFunc("/env/{name}", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, os.Getenv(r.PathValue("name"))) })
	mux.HandleFunc("/file/", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, strings.TrimPrefix(r.URL.Path, "/file"))
	})
	server := &http.Server{Addr: ":" + port, Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		<-ctx.Done()
		server.Close()
	}()
	fmt.Printf("%s serves on %s\n", name, server.Addr)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func wget(ctx context.Context, url, limit string) error {
	d, err := duration(limit)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s answered %s", url, resp.Status)
	}
	return nil
}

// write replaces or extends the file named by args[0] with args[1], or with stdin.
func write(add bool, path string, args []string) error {
	mode := os.O_CREATE | os.O_WRONLY | os.O_TRUNC
	if add {
		mode = os.O_CREATE | os.O_WRONLY | os.O_APPEND
	}
	f, err := os.OpenFile(path, mode, 0o644)
	if err != nil {
		return err
	}
	var from io.Reader = os.Stdin
	if len(args) > 1 {
		from = strings.NewReader(args[1] + "\n")
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Sync(), f.Close())
}

// duration reads seconds, a Go duration, or "forever".
func duration(s string) (time.Duration, error) {
	if s == "forever" || s == "infinity" {
		return 1 << 62, nil
	}
	if n, err := strconv.ParseFloat(s, 64); err == nil {
		return time.Duration(n * float64(time.Second)), nil
	}
	return time.ParseDuration(s)
}
