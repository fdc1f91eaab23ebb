package service

import (
	"bytes"
	"io"
	"os"
	"strings"
)

// lastLineWindow is how much of the end of a log is searched for its last line.
const lastLineWindow = 16 << 10

// LastLine gives the last line that a service itself wrote to a log file, "" where there is
// none.
func LastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > lastLineWindow {
		_, _ = f.Seek(-lastLineWindow, io.SeekEnd)
	}
	data, _ := io.ReadAll(io.LimitReader(f, lastLineWindow))
	lines := bytes.Split(bytes.TrimRight(data, "\n"), []byte("\n"))
	for i := len(lines) - 1; i >= 0; i-- {
		line := strings.TrimSpace(string(lines[i]))
		if line != "" && !strings.HasPrefix(line, NotePrefix) {
			return line
		}
	}
	return ""
}
