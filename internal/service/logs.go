package service

import (
	"bytes"
	"io"
	"os"
	"regexp"
	"strings"
)

// lastLineWindow is how much of the end of a log is searched for its last line.
const lastLineWindow = 64 << 10

// klogLine is how a line of Kubernetes' own logging begins.
var klogLine = regexp.MustCompile(`^[IWEF]\d{4} \d{2}:`)

// LastLine returns the last line that a service itself wrote to a log file, "" where there is
// none. Where those are what Kubernetes says while it goes down, the error before that made
// it do so counts more.
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
	return lastLine(data)
}

func lastLine(data []byte) string {
	lines := bytes.Split(bytes.TrimRight(data, "\n"), []byte("\n"))
	last := ""
	for i := len(lines) - 1; i >= 0; i-- {
		line := strings.TrimSpace(string(lines[i]))
		switch {
		case line == "":
		case strings.HasPrefix(line, NotePrefix):
			if last != "" { // here this run of the process began
				return last
			}
		case strings.Contains(line, " level=ERROR "):
			return line
		case last == "":
			if last = line; !klogLine.MatchString(line) {
				return line
			}
		}
	}
	return last
}
