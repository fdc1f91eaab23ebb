package diskspace

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	var small Need
	small.Add(1)
	small.Add(block + 1)
	if small != (Need{Bytes: 3 * block, Files: 2}) {
		t.Errorf("%+v", small)
	}
	if err := Check(dir, small); err != nil {
		t.Error(err)
	}
	var full *Error
	if err := Check(dir, Need{Bytes: math.MaxUint64 / 2}); !errors.As(err, &full) || !strings.Contains(err.Error(), "MiB free") {
		t.Errorf("%v", err)
	}
	if err := (&Error{Dir: "/x", Need: Need{Files: 10}, Free: Need{Files: 3}}).Error(); !strings.Contains(err, "room for 3 more files") {
		t.Error(err)
	}
	if err := Check(dir+"/nonesuch", small); err == nil {
		t.Error("a directory that is not there has space")
	}
}
