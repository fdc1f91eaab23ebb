package daemons

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// loggingFlags are the flags that set up logging (k8s.io/component-base/logs/api/v1). Logging
// belongs to the process, and Kubernetes refuses to set it up twice in different ways.
var loggingFlags = []string{
	"v", "vmodule", "logging-format", "log-flush-frequency",
	"log-text-split-stream", "log-text-info-buffer-size", "log-json-split-stream", "log-json-info-buffer-size",
}

// shareLogging gives every daemon the same logging flags: the highest --v that any of them has,
// and of each other flag the value of the first that has it.
func shareLogging(words map[string][]string) map[string][]string {
	out := make(map[string][]string, len(words))
	shared := map[string]string{}
	for _, name := range daemonOrder {
		w, ok := words[name]
		if !ok {
			continue
		}
		rest, own := splitLogging(w)
		out[name] = rest
		for flag, value := range own {
			old, set := shared[flag]
			if !set || flag == "v" && higher(value, old) {
				shared[flag] = value
			}
		}
	}
	var flags []string
	for _, flag := range slices.Sorted(maps.Keys(shared)) {
		flags = append(flags, "--"+flag+"="+shared[flag])
	}
	for name := range out {
		out[name] = append(out[name], flags...)
	}
	return out
}

// higher compares two values of --v; what is no number wins, so that it is complained about.
func higher(a, b string) bool {
	x, err := strconv.Atoi(a)
	if err != nil {
		return true
	}
	y, err := strconv.Atoi(b)
	return err == nil && x > y
}

// splitLogging takes the logging flags out of words; of one that is repeated the last counts.
func splitLogging(words []string) (rest []string, own map[string]string) {
	own = map[string]string{}
	for i := 0; i < len(words); i++ {
		name, value, hasValue := strings.Cut(words[i], "=")
		flag, isFlag := strings.CutPrefix(name, "--")
		if !isFlag {
			// -v is the only short one: -v=4, -v 4, -v4.
			if flag, isFlag = strings.CutPrefix(name, "-"); isFlag && len(flag) > 1 && flag[0] == 'v' && !hasValue {
				if _, err := strconv.Atoi(flag[1:]); err == nil {
					flag, value, hasValue = "v", flag[1:], true
				}
			}
		}
		flag = strings.ReplaceAll(flag, "_", "-") // as the daemons do
		if !isFlag || !slices.Contains(loggingFlags, flag) {
			rest = append(rest, words[i])
			continue
		}
		switch {
		case hasValue:
		case strings.HasSuffix(flag, "-split-stream"):
			value = "true"
		case i+1 < len(words):
			i++
			value = words[i]
		default: // its value is missing: the daemon says so
			rest = append(rest, words[i])
			continue
		}
		own[flag] = value
	}
	return rest, own
}
