package service

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"microk8s/internal/snapenv"
)

// The control API of the supervisor, JSON over HTTP on its unix socket:
//
//	GET  /v1/services                       -> apiAnswer
//	POST /v1/{start,stop,restart}  apiAsk   -> apiAnswer
//
// Status 400 is an unknown service, 503 a supervisor on its way out, 500 a start that failed; apiAnswer.Error then says why.
type apiAsk struct {
	Services []string `json:"services"` // none: all
}

type apiAnswer struct {
	Services []State `json:"services,omitempty"`
	Error    string  `json:"error,omitempty"`
}

func (s *Supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/services", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, s.states(), nil)
	})
	for verb, do := range map[string]func([]string) ([]State, error){
		"start": s.start, "stop": s.stop, "restart": s.restart,
	} {
		mux.HandleFunc("POST /v1/"+verb, func(w http.ResponseWriter, r *http.Request) {
			var ask apiAsk
			if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&ask); err != nil {
				w.WriteHeader(http.StatusBadRequest)
				_ = json.NewEncoder(w).Encode(apiAnswer{Error: "cannot read the request: " + err.Error()})
				return
			}
			s.Log.Info("asked to "+verb, "services", strings.Join(ask.Services, " "))
			states, err := do(ask.Services)
			answer(w, states, err)
		})
	}
	return mux
}

func answer(w http.ResponseWriter, states []State, err error) {
	w.Header().Set("Content-Type", "application/json")
	a := apiAnswer{Services: states}
	if err != nil {
		a.Error = err.Error()
		switch {
		case errors.Is(err, ErrUnknown):
			w.WriteHeader(http.StatusBadRequest)
		case errors.Is(err, errEnding):
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			w.WriteHeader(http.StatusInternalServerError)
		}
	}
	_ = json.NewEncoder(w).Encode(a)
}

// Client is a [Manager] that talks to the supervisor of this installation, and starts one
// when there is none and one is needed.
type Client struct {
	env  snapenv.Env
	http *http.Client

	// Spawn starts a supervisor that outlives this process and returns when it answers.
	Spawn func(ctx context.Context) error

	// Silence is how long the supervisor may say nothing; 0 means 10 seconds. A call that takes
	// longer goes on as long as the supervisor answers other questions.
	Silence time.Duration
}

const (
	silence    = 10 * time.Second
	spawnLimit = time.Minute // of a new supervisor, until it answers
)

// SilentError is the error of a call that the supervisor did not answer. A process that stands
// still has its connections accepted by the kernel.
type SilentError struct {
	PID  int // 0 when not known
	Wait time.Duration
	// State is the process's state as in /proc/PID/stat: T is stopped by a signal, D waits for a
	// disk or a network file system; "" when not known.
	State string
}

func (e *SilentError) Error() string {
	who := "the supervisor of the services"
	if e.PID > 0 {
		who += fmt.Sprintf(" (pid %d)", e.PID)
	}
	switch e.State {
	case "T", "t":
		return fmt.Sprintf("%s was stopped by a signal and did not answer within %s; let it go on with: kill -CONT %d", who, e.Wait, e.PID)
	case "D":
		return fmt.Sprintf("%s waits for a disk or a network file system and did not answer within %s; see: dmesg", who, e.Wait)
	case "":
		return fmt.Sprintf("%s did not answer within %s; see: microk8s logs supervisor", who, e.Wait)
	}
	return fmt.Sprintf("%s did not answer within %s; see: microk8s logs supervisor, and if it stays so: kill -KILL %d, then microk8s start", who, e.Wait, e.PID)
}

// silent finds out whom nobody hears.
func (c *Client) silent(wait time.Duration) error {
	e := &SilentError{Wait: wait}
	conn, err := net.DialTimeout("unix", c.env.SupervisorSocket(), time.Second)
	if err != nil {
		return e
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return e
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			e.PID = int(cred.Pid)
		}
	})
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", e.PID)); err == nil && e.PID > 0 {
		if fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])); len(fields) > 0 {
			e.State = fields[0]
		}
	}
	return e
}

// watched calls do, whose context ends with a [SilentError] when the supervisor answers nothing
// for as long as it may.
func (c *Client) watched(ctx context.Context, do func(context.Context) ([]State, error)) ([]State, error) {
	wait := cmp.Or(c.Silence, silence)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	defer group.Wait()
	over := make(chan struct{})
	defer close(over)
	group.Go(func() {
		for {
			asked, end := context.WithTimeout(ctx, wait)
			_, err := c.ask(asked, http.MethodGet, "/v1/services", nil)
			late := asked.Err() != nil
			end()
			if ctx.Err() != nil {
				return
			}
			if err != nil && late {
				cancel(c.silent(wait))
				return
			}
			select {
			case <-over:
				return
			case <-time.After(wait):
			}
		}
	})
	states, err := do(ctx)
	var silent *SilentError
	if err != nil && errors.As(context.Cause(ctx), &silent) {
		return nil, silent
	}
	cancel(nil) // so that the question that is under way ends
	return states, err
}

var _ Manager = (*Client)(nil)

// NewClient makes a client for the supervisor of env.
func NewClient(env snapenv.Env) *Client {
	c := &Client{env: env}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", env.SupervisorSocket())
		},
		DisableKeepAlives: true,
	}}
	c.Spawn = c.spawn
	return c
}

// Start implements [Manager].
func (c *Client) Start(ctx context.Context, names ...string) error {
	if _, err := resolveAll(names); err != nil {
		return err
	}
	_, err := c.call(ctx, http.MethodPost, "/v1/start", names)
	if absent(err) {
		return c.callNew(ctx, "/v1/start", names)
	}
	return err
}

// callNew starts a supervisor and calls it. Another one may have been on its way up, at boot for
// instance: then the new one gives up, and the other answers.
func (c *Client) callNew(ctx context.Context, path string, names []string) error {
	spawnErr := c.Spawn(ctx)
	_, err := c.call(ctx, http.MethodPost, path, names)
	if spawnErr != nil && absent(err) {
		return fmt.Errorf("cannot start their supervisor: %w", spawnErr)
	}
	return err
}

// Stop implements [Manager]. Where no supervisor runs everything is stopped already, except
// what a killed one may have left: then a new one is started to clear that up.
func (c *Client) Stop(ctx context.Context, names ...string) error {
	if _, err := resolveAll(names); err != nil {
		return err
	}
	_, err := c.call(ctx, http.MethodPost, "/v1/stop", names)
	if absent(err) {
		if !c.leftovers() {
			return nil
		}
		if err = c.callNew(ctx, "/v1/stop", names); err != nil {
			return fmt.Errorf("cannot stop what a previous supervisor left: %w", err)
		}
	}
	return err
}

// leftovers reports whether a supervisor that was killed left something to clear up.
func (c *Client) leftovers() bool {
	if len(Enabled(c.env)) > 0 {
		return true
	}
	for _, n := range Names() {
		if _, err := os.Lstat(recordFile(c.env, n)); err == nil {
			return true
		}
	}
	return false
}

// Restart implements [Manager]. Where no supervisor runs there is nothing to restart.
func (c *Client) Restart(ctx context.Context, names ...string) error {
	if _, err := resolveAll(names); err != nil {
		return err
	}
	_, err := c.call(ctx, http.MethodPost, "/v1/restart", names)
	if absent(err) {
		return nil
	}
	return err
}

// Status implements [Manager]. Without a supervisor every service is stopped.
func (c *Client) Status(ctx context.Context) ([]State, error) {
	states, err := c.call(ctx, http.MethodGet, "/v1/services", nil)
	if absent(err) {
		states = nil
		for _, n := range Names() {
			states = append(states, State{Name: n, Phase: Stopped})
		}
		return states, nil
	}
	return states, err
}

// absent reports whether err means that no supervisor listens, or not for long any more. One
// that was killed still takes connections for a moment and closes them without an answer;
// asking a new one again is right, since every request may be repeated.
func absent(err error) bool {
	for _, sign := range []error{errEnding, syscall.ENOENT, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, sign) {
			return true
		}
	}
	return false
}

// call asks the supervisor, as long as it answers anything.
func (c *Client) call(ctx context.Context, method, path string, names []string) ([]State, error) {
	if method == http.MethodPost {
		return c.watched(ctx, func(ctx context.Context) ([]State, error) { return c.ask(ctx, method, path, names) })
	}
	wait := cmp.Or(c.Silence, silence)
	asked, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	states, err := c.ask(asked, method, path, names)
	if err != nil && asked.Err() != nil && ctx.Err() == nil {
		return nil, c.silent(wait)
	}
	return states, err
}

func (c *Client) ask(ctx context.Context, method, path string, names []string) ([]State, error) {
	var body io.Reader
	if method == http.MethodPost {
		data, err := json.Marshal(apiAsk{Services: names})
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("cannot reach the supervisor of the services: %w", ctx.Err())
		}
		return nil, fmt.Errorf("cannot reach the supervisor of the services: %w", err)
	}
	defer resp.Body.Close()
	var a apiAnswer
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		return nil, fmt.Errorf("cannot read the supervisor's answer: %w", err)
	}
	switch {
	case resp.StatusCode == http.StatusServiceUnavailable:
		return nil, errEnding
	case a.Error != "":
		return nil, errors.New(a.Error)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("the supervisor answers %s", resp.Status)
	}
	return a.Services, nil
}

// spawn starts `microk8s supervise` in a session of its own with no tie to this terminal. Its
// log goes to ServiceLog("supervisor"); it writes to a pipe when it is ready.
func (c *Client) spawn(ctx context.Context) error {
	path := c.env.ServiceLog("supervisor")
	if err := os.MkdirAll(c.env.LogDir(), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(c.env.Bin("microk8s"), "supervise", "--ready-fd", "3")
	cmd.Dir = "/"
	cmd.Env = c.env.Environ(os.Environ())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	_ = r.SetReadDeadline(time.Now().Add(spawnLimit))
	stop := context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Now()) })
	defer stop()
	got, err := io.ReadAll(r)
	if string(got) == readyWord {
		return cmd.Process.Release()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the supervisor (pid %d) was started and did not answer within %s; see: microk8s logs supervisor", cmd.Process.Pid, spawnLimit)
	}
	err = cmd.Wait() // it closed the pipe without being ready: it has ended
	return fmt.Errorf("the supervisor ended at once: %w: %s", err, LastLine(path))
}
