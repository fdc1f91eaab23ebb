package status

import (
	"regexp"
	"strconv"
	"strings"
)

// Forms of log lines whose decoration is left out of a problem: our services' and containerd's (key=value), and those of Kubernetes.
var (
	slogError  = regexp.MustCompile(`^time=\S+ level=[A-Z]+ .*? err(?:or)?=("(?:[^"\\]|\\.)*"|\S+)`)
	klogHeader = regexp.MustCompile(`^[IWEF]\d{4} \d{2}:\d{2}:\d{2}\.\d+ +\d+ [^ \]]+\] `)
)

// words returns what a log line says, in one line and without what only concerns the log.
func words(line string) string {
	if m := slogError.FindStringSubmatch(line); m != nil {
		line = m[1]
		if text, err := strconv.Unquote(line); err == nil {
			line = text
		}
	}
	line = strings.TrimPrefix(klogHeader.ReplaceAllString(line, ""), "microk8s: ")
	return shorten(strings.ReplaceAll(strings.TrimSpace(line), "\n", "; "))
}
