package log

import (
	"io"
	"net"
	"testing"
)

// What was written goes out in one piece, when an answer is waited for and not before.
func TestTogether(t *testing.T) {
	ours, theirs := net.Pipe() // without a buffer: a write is seen as it was made
	c := Together(ours)
	defer c.Close()
	for _, piece := range []string{"head", "er", "body"} {
		if n, err := c.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
	}
	got := make(chan string, 1)
	go func() {
		b := make([]byte, 100)
		n, _ := theirs.Read(b)
		got <- string(b[:n])
		_, _ = theirs.Write([]byte("answer"))
	}()
	b := make([]byte, 3)
	for _, want := range []string{"ans", "wer"} {
		if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
			t.Fatalf("read %q, %v; want %q", b, err, want)
		}
	}
	if g := <-got; g != "headerbody" {
		t.Errorf("the other side got %q at once", g)
	}
	theirs.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatalf("Write tells an error that is Read's: %v", err)
	}
	if _, err := c.Read(b); err == nil {
		t.Error("nobody was told that sending failed")
	}
}
