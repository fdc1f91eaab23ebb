package console

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Bounds of what is kept of usage: nodes for three hours in steps of 15 seconds, pods for three hours in
// steps of a minute. A node takes 17 KiB, a pod 3 KiB; more pods than maxPods are not kept.
const (
	nodeSteps     = 720
	podSteps      = 180
	maxPods       = 10000
	maxNodes      = 1000
	podEvery      = 4 // steps of nodes
	maxSummary    = 16 << 20
	podsOfNode    = 1000 // that are read; a kubelet takes 110 by default
	maxName       = 253
	maxMetrics    = 64 << 20
	scrapers      = 4 // at the same time
	summaryWait   = 8 * time.Second
	metricsEvery  = 4 // steps of nodes
	namesInAnswer = 200
)

// Names of what is measured, with their units.
const (
	cpuCores      = "cpu"       // cores
	memoryBytes   = "memory"    // bytes, the working set
	receiveBytes  = "receive"   // bytes per second
	transmitBytes = "transmit"  // bytes per second
	diskBytes     = "disk"      // bytes used of the node's file system
	diskLimit     = "disklimit" // bytes that it has
	readMillis    = "read"      // milliseconds of a read of the datastore, as the API server sees it
	writeMillis   = "write"     // milliseconds of a write
	readRate      = "reads"     // reads per second
	writeRate     = "writes"    // writes per second
	requestRate   = "requests"  // calls of the API server per second
)

// series is a ring of values in steps of one clock; what was not measured is NaN.
type series struct {
	values []float32
	last   int64 // step of the newest value
}

func (s *series) put(steps int, step int64, v float64) {
	if s.values == nil {
		s.values = make([]float32, steps)
		for i := range s.values {
			s.values[i] = float32(math.NaN())
		}
		s.last = step
	}
	for ; s.last < step; s.last++ { // steps that were missed
		s.values[(s.last+1)%int64(steps)] = float32(math.NaN())
		if step-s.last > int64(steps) {
			s.last = step - int64(steps)
		}
	}
	s.values[step%int64(steps)] = float32(v)
}

func (s *series) at(step int64) *float32 {
	n := int64(len(s.values))
	if step > s.last || step <= s.last-n {
		return nil
	}
	if v := s.values[step%n]; v == v { // not NaN
		return &v
	}
	return nil
}

// thing is a node, a pod or the cluster, with what is measured of it.
type thing struct {
	series map[string]*series
	seen   int64              // step
	totals map[string]float64 // counters at totalsAt, for rates
	at     time.Time
}

// samples reads usage with somebody's rights while the console runs, and keeps a bounded part of it.
type samples struct {
	who   func(context.Context) *apiClient
	every time.Duration
	now   func() time.Time
	log   *slog.Logger

	mu      sync.Mutex
	things  map[string]*thing // "node/NAME", "pod/NAMESPACE/NAME", "cluster"
	pods    int
	problem string // why nothing is read, "" if it is
}

func newSamples(who func(context.Context) *apiClient, every time.Duration, now func() time.Time, log *slog.Logger) *samples {
	return &samples{who: who, every: every, now: now, log: log, things: map[string]*thing{}}
}

// collector returns the API server with the rights of somebody who may read usage: of the person who started
// the console, or of somebody who is logged in. nil if nobody is logged in.
func (s *Server) collector(ctx context.Context) *apiClient {
	if s.own != nil {
		return s.own
	}
	for _, p := range s.sessions.list() {
		if p.may(ctx, right{verb: "get", resource: "nodes/proxy"}, s.opts.Now()) {
			return p.api
		}
	}
	return nil
}

// run reads until ctx ends.
func (s *samples) run(ctx context.Context) {
	ticker := time.NewTicker(s.every)
	defer ticker.Stop()
	for {
		s.read(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (s *samples) step() int64 { return s.now().UnixNano() / int64(s.every) }

func (s *samples) read(ctx context.Context) {
	api := s.who(ctx)
	if api == nil {
		s.says("nobody who may read the nodes' usage is logged in")
		return
	}
	names, err := nodeNames(ctx, api)
	if err != nil {
		s.says("the API server does not answer")
		return
	}
	s.says("")
	step := s.step()
	due := names
	// Of many nodes only a part is read in each step, so that reading stays cheap.
	if share := (len(names) + maxPerStep - 1) / maxPerStep; share > 1 {
		due = nil
		for i, name := range names {
			if int64(i%share) == step%int64(share) {
				due = append(due, name)
			}
		}
	}
	var all sync.WaitGroup
	slots := make(chan struct{}, scrapers)
	for _, name := range due {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			s.readNode(ctx, api, name, step)
		})
	}
	all.Wait()
	if step%metricsEvery == 0 || s.thing("cluster") == nil {
		s.readServer(ctx, api, step)
	}
	s.forget(step)
}

// maxPerStep is how many nodes are read in a step.
const maxPerStep = 50

func (s *samples) says(problem string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.problem != problem && problem != "" {
		s.log.Debug("usage is not read", "why", problem)
	}
	s.problem = problem
}

func (s *samples) thing(key string) *thing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.things[key]
}

// fetch asks the API server, and returns the body, which must be closed.
func fetch(ctx context.Context, api *apiClient, path, accept string) (io.ReadCloser, error) {
	base, transport, err := api.transport(false)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(base.String(), "/")+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", accept)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("the API server answers %s to %s", resp.Status, path)
	}
	return resp.Body, nil
}

func nodeNames(ctx context.Context, api *apiClient) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, summaryWait)
	defer cancel()
	body, err := fetch(ctx, api, "/api/v1/nodes?resourceVersion=0&limit="+strconv.Itoa(maxNodes), "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var list struct {
		Items []struct {
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
		} `json:"items"`
	}
	if err := json.NewDecoder(io.LimitReader(body, maxSummary)).Decode(&list); err != nil {
		return nil, err
	}
	var names []string
	for _, item := range list.Items {
		names = append(names, item.Metadata.Name)
	}
	return names, nil
}

// Parts of the kubelet's summary (k8s.io/kubelet/pkg/apis/stats/v1alpha1).
type (
	cpuStats struct {
		Nanos *float64 `json:"usageNanoCores"`
	}
	memoryStats struct {
		Bytes *float64 `json:"workingSetBytes"`
	}
	networkStats struct {
		Received    *float64 `json:"rxBytes"`
		Transmitted *float64 `json:"txBytes"`
	}
	usageStats struct {
		CPU     cpuStats     `json:"cpu"`
		Memory  memoryStats  `json:"memory"`
		Network networkStats `json:"network"`
	}
	summary struct {
		Node struct {
			usageStats
			Files struct {
				Used     *float64 `json:"usedBytes"`
				Capacity *float64 `json:"capacityBytes"`
			} `json:"fs"`
		} `json:"node"`
		Pods podList `json:"pods"`
	}
	podStats struct {
		Ref struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
		} `json:"podRef"`
		usageStats
	}
	podList []podStats
)

// UnmarshalJSON implements json.Unmarshaler. It stops at podsOfNode: of a kubelet that is not honest, small
// elements would take a hundred times their size.
func (l *podList) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if first, err := dec.Token(); err != nil || first != json.Delim('[') {
		return err // null is no pods
	}
	for len(*l) < podsOfNode && dec.More() {
		var p podStats
		if err := dec.Decode(&p); err != nil {
			return err
		}
		*l = append(*l, p)
	}
	return nil
}

func (s *samples) readNode(ctx context.Context, api *apiClient, name string, step int64) {
	ctx, cancel := context.WithTimeout(ctx, summaryWait)
	defer cancel()
	body, err := fetch(ctx, api, "/api/v1/nodes/"+url.PathEscape(name)+"/proxy/stats/summary", "application/json")
	if err != nil {
		return // the line in the chart has a gap
	}
	defer body.Close()
	var got summary
	if err := json.NewDecoder(io.LimitReader(body, maxSummary)).Decode(&got); err != nil {
		s.log.Debug("a kubelet's summary cannot be read", "node", name, "err", err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.open("node/"+name, step)
	s.usage(n, got.Node.usageStats, nodeSteps, step)
	n.put(diskBytes, got.Node.Files.Used, 1, nodeSteps, step)
	n.put(diskLimit, got.Node.Files.Capacity, 1, nodeSteps, step)
	if step%podEvery != 0 {
		return
	}
	for _, pod := range got.Pods {
		if len(pod.Ref.Name) > maxName || len(pod.Ref.Namespace) > maxName {
			continue // names are kept for hours
		}
		key := "pod/" + pod.Ref.Namespace + "/" + pod.Ref.Name
		if s.things[key] == nil {
			if s.pods >= maxPods {
				continue
			}
			s.pods++
		}
		s.usage(s.open(key, step), pod.usageStats, podSteps, step/podEvery)
	}
}

// open returns a thing, made if need be. The caller holds the lock.
func (s *samples) open(key string, step int64) *thing {
	t := s.things[key]
	if t == nil {
		t = &thing{series: map[string]*series{}, totals: map[string]float64{}}
		s.things[key] = t
	}
	t.seen = step
	return t
}

func (s *samples) usage(t *thing, u usageStats, steps int, step int64) {
	t.put(cpuCores, u.CPU.Nanos, 1e-9, steps, step)
	t.put(memoryBytes, u.Memory.Bytes, 1, steps, step)
	now := s.now()
	t.rate(receiveBytes, u.Network.Received, now, steps, step)
	t.rate(transmitBytes, u.Network.Transmitted, now, steps, step)
	t.at = now
}

func (t *thing) put(name string, v *float64, factor float64, steps int, step int64) {
	if v == nil || math.Abs(*v*factor) > math.MaxFloat32 { // infinite: there is no such JSON
		return
	}
	if t.series[name] == nil {
		t.series[name] = &series{}
	}
	t.series[name].put(steps, step, *v*factor)
}

// rate keeps by how much a counter grew in a second since it was read last; t.at is that time.
func (t *thing) rate(name string, total *float64, now time.Time, steps int, step int64) {
	if total == nil {
		return
	}
	before, known := t.totals[name]
	t.totals[name] = *total
	if seconds := now.Sub(t.at).Seconds(); known && seconds > 0 && *total >= before {
		grown := (*total - before) / seconds
		t.put(name, &grown, 1, steps, step)
	}
}

// readServer reads the API server's metrics: its calls, and how long the datastore takes for them.
func (s *samples) readServer(ctx context.Context, api *apiClient, step int64) {
	ctx, cancel := context.WithTimeout(ctx, summaryWait)
	defer cancel()
	body, err := fetch(ctx, api, "/metrics", "text/plain")
	if err != nil {
		return
	}
	defer body.Close()
	var requests, reads, readSeconds, writes, writeSeconds float64
	lines := bufio.NewScanner(io.LimitReader(body, maxMetrics))
	lines.Buffer(make([]byte, 64<<10), 1<<20)
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "apiserver_request_total{"):
			requests += number(line)
		case strings.HasPrefix(line, "etcd_request_duration_seconds_sum{"), strings.HasPrefix(line, "etcd_request_duration_seconds_count{"):
			sum := strings.HasPrefix(line, "etcd_request_duration_seconds_sum")
			reading := strings.Contains(line, `operation="get"`) || strings.Contains(line, `operation="list"`)
			switch {
			case reading && sum:
				readSeconds += number(line)
			case reading:
				reads += number(line)
			case sum:
				writeSeconds += number(line)
			default:
				writes += number(line)
			}
		}
	}
	if lines.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t, now := s.open("cluster", step), s.now()
	mean := func(name, rate string, count, seconds float64) {
		if before, known := t.totals[rate]; known && count > before && seconds >= t.totals[name] {
			ms := (seconds - t.totals[name]) / (count - before) * 1000
			t.put(name, &ms, 1, podSteps, step/podEvery)
		}
		t.totals[name] = seconds
		t.rate(rate, &count, now, podSteps, step/podEvery)
	}
	mean(readMillis, readRate, reads, readSeconds)
	mean(writeMillis, writeRate, writes, writeSeconds)
	t.rate(requestRate, &requests, now, podSteps, step/podEvery)
	t.at = now
}

// number is the value at the end of a line of metrics.
func number(line string) float64 {
	v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
	if err != nil {
		return 0
	}
	return v
}

// forget drops what has not been seen for as long as its ring is.
func (s *samples) forget(step int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, t := range s.things {
		if step-t.seen > nodeSteps {
			delete(s.things, key)
			if strings.HasPrefix(key, "pod/") {
				s.pods--
			}
		}
	}
}

// samplesAnswer is series with one axis of time. Lines have a value for each time, null where there is
// none.
type samplesAnswer struct {
	Times   []int64                          `json:"times"` // seconds since 1970
	Lines   map[string]map[string][]*float32 `json:"lines"` // by name of a thing, then by what is measured
	Problem string                           `json:"problem,omitempty"`
}

// answer returns the series of things whose keys have a prefix, at most so many of them.
func (s *samples) answer(prefix string, exact bool, most int) samplesAnswer {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := samplesAnswer{Times: []int64{}, Lines: map[string]map[string][]*float32{}, Problem: s.problem}
	steps, each := int64(nodeSteps), s.every
	if !strings.HasPrefix(prefix, "node/") {
		steps, each = podSteps, s.every*podEvery
	}
	var keys []string
	for key := range s.things {
		if key == prefix || !exact && strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	if len(keys) > most {
		keys = keys[:most]
	}
	last := s.now().UnixNano() / int64(each)
	first := last
	for _, key := range keys {
		for _, line := range s.things[key].series {
			for step := max(last-steps+1, line.last-int64(len(line.values))+1); step < first; step++ {
				if line.at(step) != nil {
					first = step
				}
			}
		}
	}
	for step := first; step <= last && len(keys) > 0; step++ {
		out.Times = append(out.Times, step*int64(each)/int64(time.Second))
	}
	for _, key := range keys {
		name := key[strings.LastIndexByte(key, '/')+1:]
		out.Lines[name] = map[string][]*float32{}
		for what, line := range s.things[key].series {
			values := make([]*float32, 0, len(out.Times))
			for i := range out.Times {
				values = append(values, line.at(first+int64(i)))
			}
			out.Lines[name][what] = values
		}
	}
	return out
}

// sum adds the pods of a namespace up.
func (a *samplesAnswer) sum(name string) {
	total := map[string][]*float32{}
	for _, lines := range a.Lines {
		for what, values := range lines {
			if total[what] == nil {
				total[what] = make([]*float32, len(a.Times))
			}
			for i, v := range values {
				if v != nil {
					both := *v + *cmp.Or(total[what][i], new(float32))
					total[what][i] = &both
				}
			}
		}
	}
	a.Lines = map[string]map[string][]*float32{name: total}
}

// serveSamples answers ?node=NAME, ?nodes, ?pod=NAMESPACE/NAME, ?namespace=NAME or ?cluster. What was read with
// somebody else's rights is for people who may read the thing itself.
func (s *Server) serveSamples(w http.ResponseWriter, r *http.Request, p *person) {
	q := r.URL.Query()
	ask := right{verb: "get", resource: "nodes"}
	prefix, exact, sum := "node/", false, ""
	switch {
	case q.Has("node"):
		prefix, exact = "node/"+q.Get("node"), true
	case q.Has("pod"):
		namespace, name, _ := strings.Cut(q.Get("pod"), "/")
		ask = right{verb: "get", resource: "pods", namespace: namespace}
		prefix, exact = "pod/"+namespace+"/"+name, true
		if namespace == "" {
			prefix = ""
		}
	case q.Has("namespace"):
		sum = q.Get("namespace")
		ask = right{verb: "list", resource: "pods", namespace: sum}
		prefix = "pod/" + sum + "/"
		if sum == "" {
			prefix = ""
		}
	case q.Has("cluster"):
		prefix, exact = "cluster", true
	}
	if prefix == "" {
		fail(w, http.StatusBadRequest, "", "a namespace is missing")
		return
	}
	if !p.may(r.Context(), ask, s.opts.Now()) {
		fail(w, http.StatusForbidden, "Forbidden", "you may not read usage: that needs the right to read %s", ask.resource)
		return
	}
	most := namesInAnswer
	if sum != "" {
		most = maxPods
	}
	out := s.samples.answer(prefix, exact, most)
	if sum != "" {
		out.sum(sum)
	}
	answer(w, http.StatusOK, out)
}
