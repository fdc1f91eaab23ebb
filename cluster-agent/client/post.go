package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"

	"microk8s/cluster-agent/api"
)

// maxAnswer bounds the body of an answer in bytes; a join's has some 20 kB.
const maxAnswer = 4 << 20

// ServerError is an answer other than 200.
type ServerError struct {
	Status int
	Code   api.Code // "" from upstream's agents
	Text   string   // the server's own words
}

func (e *ServerError) Error() string { return fmt.Sprintf("%s (%d)", e.Text, e.Status) }

// Post sends one call to the agent at an address (host:port) and returns its answer, at most 4 MiB
// of it. An answer other than 200 is a *ServerError; every other error is one of the connection.
// Whom to trust is up to over; a redirection is an answer like others, never followed.
func Post(ctx context.Context, over http.RoundTripper, address, path string, header http.Header, body io.Reader) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+path, body)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	resp, err := over.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		var e api.Error
		if json.Unmarshal(data, &e) != nil || e.Message == "" {
			e.Message = http.StatusText(resp.StatusCode)
		}
		return nil, &ServerError{Status: resp.StatusCode, Code: e.Code, Text: e.Message}
	}
	return data, nil
}

// Ask posts a request as JSON and decodes the answer. Its errors are those of [Post].
func Ask(ctx context.Context, over http.RoundTripper, address, path string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	data, err := Post(ctx, over, address, path, http.Header{"Content-Type": {"application/json"}}, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("cannot read the answer: %w", err)
	}
	return nil
}
