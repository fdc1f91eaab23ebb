package main

import (
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"microk8s/internal/snapenv"
)

func TestHooksAreTied(t *testing.T) {
	r := reflect.ValueOf(hooks(snapenv.Under(t.TempDir()), slog.New(slog.DiscardHandler))).Elem()
	for i := range r.NumField() {
		if r.Field(i).IsZero() {
			t.Errorf("%s is not set", r.Type().Field(i).Name)
		}
	}
}

func TestCheckConfig(t *testing.T) {
	const text = "version: 0.1.0\nextraKubletArgs: {}\n"
	env := snapenv.Under(t.TempDir())
	var log strings.Builder
	if err := checkConfig(env, []byte(text), false, slog.New(slog.NewTextHandler(&log, nil))); err != nil || !strings.Contains(log.String(), "extraKubletArgs") {
		t.Errorf("in a file a key that is not known is told: %v, %s", err, &log)
	}
	if err := checkConfig(env, []byte(text), true, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "extraKubletArgs") {
		t.Errorf("at a prompt it is refused: %v", err)
	}
	const ranges = "version: 0.1.0\nextraCNIEnv: {IPv4_SUPPORT: true, IPv4_CLUSTER_CIDR: 10.1.0.0/30}\n"
	if err := checkConfig(env, []byte(ranges), false, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("ranges that cannot be used: %v", err)
	}
}
