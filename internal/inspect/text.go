package inspect

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxLine is how many bytes of a line the report has. A longer one is no log: journald cuts lines
// at 48 KiB, and container runtimes at 16.
const maxLine = 64 << 10

// style is how a text is to be read.
type style int

const (
	logText   style = iota // free text: a value without quotes ends with its word, after a colon with its line
	fileText               // a configuration: a value without quotes takes the rest of its line, and may go on below it
	wholeText              // assignments of variables: only those of keepVariables keep their value
)

var (
	tableHead = regexp.MustCompile(`^\s*\[+([^\]]*)\]+\s*(#.*)?$`)
	blockSign = regexp.MustCompile(`^[|>][-+0-9]*\s*(#.*)?$`)
	// variable is a line of an -env file.
	variable = regexp.MustCompile(`^(\s*#?\s*(?:export\s+)?)([A-Za-z_]\w*)=`)

	privateKey = regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)`)
	pemBase64  = regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/=_-]{8,}`)
	jwt        = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*`)
	authHeader = regexp.MustCompile(`(?i)\b(bearer|basic)(\s+)[^\s"'\\\]},]{4,}`)
	userInfo   = regexp.MustCompile(`://([^\s/@"'<>?#:]*)(:[^\s"'<>@]*(?:@[^\s"'<>@/]*)*)?@`)
	joinToken  = regexp.MustCompile(`\b[0-9a-f]{32}\b(/[0-9a-f]{12,64})?`)
	// query is one parameter of a URL.
	query = regexp.MustCompile(`([?&]|\\u0026)([\w.%\[\]-]+)=([^&\s"'<>\\]+)`)
	// shortOption is how programs take a password without saying so.
	shortOption = regexp.MustCompile(`((?:mysql\w*|mariadb[\w-]*|mongo\w*|sshpass|smbclient|rabbitmqadmin)\b[^\n|;&]*?\s-p\s*|redis-cli\b[^\n|;&]*?\s-a\s+|curl\b[^\n|;&]*?\s-u\s+|openssl\b[^\n|;&]*?\s-k\s+)(\\?["']?)([^\s"'\\]+)`)
)

var shortOptionPrograms = []string{"mysql", "mariadb", "mongo", "sshpass", "smbclient", "rabbitmqadmin", "redis-cli", "curl", "openssl"}

// keepQuery are parameters of the API's URLs.
var keepQuery = words(`limit continue watch resourceVersion resourceVersionMatch sendInitialEvents allowWatchBookmarks
	timeout timeoutSeconds labelSelector fieldSelector fieldManager fieldValidation force dryRun pretty follow container
	tailLines previous ns namespace verbose exclude stdin stdout stderr tty version`)

// keepVariables are variables whose values are paths, numbers and lists of hosts. What else an
// -env file sets is the user's.
var keepVariables = words(`PATH HOME TMPDIR LANG KATA_PATH KUBECONFIG SNAP SNAP_DATA SNAP_COMMON NO_PROXY no_proxy
	HTTP_PROXY HTTPS_PROXY http_proxy https_proxy ALL_PROXY all_proxy GOGC GOMEMLIMIT GOMAXPROCS GODEBUG GOTRACEBACK GOFIPS
	IPv4_SUPPORT IPv4_CLUSTER_CIDR IPv4_SERVICE_CIDR IPv6_SUPPORT IPv6_CLUSTER_CIDR IPv6_SERVICE_CIDR
	LD_LIBRARY_PATH DISABLE_RAFT_IO_URING LIBDQLITE_TRACE LIBRAFT_TRACE`)

// ourFlags are options of our programs whose names have words of secrets and whose values are
// switches, times, numbers and paths.
var ourFlags = words(`authentication-token-webhook authentication-token-webhook-cache-ttl
	authentication-token-webhook-version enable-bootstrap-token-auth
	service-account-extend-token-expiration service-account-max-token-expiration
	use-service-account-credentials concurrent-serviceaccount-token-syncs legacy-service-account-token-clean-up-period
	image-credential-provider-bin-dir image-credential-provider-config anonymous-auth authorization-mode
	authorization-config authorization-webhook-version
	authorization-webhook-cache-authorized-ttl authorization-webhook-cache-unauthorized-ttl
	token-ttl`)

// secretWords end or make the name of a secret.
var secretWords = words(`password passwd passphrase passcode passwort pass pwd pw secret secrets token tokens
	credential credentials creds auth authorization auths apikey api sig signature cookie bearer dsn sas otp pin jwt
	identitytoken registrytoken accesstoken secretkey privatekey accesskey clientsecret connectionstring`)

// pathWords end the name of what tells where a secret is.
var pathWords = words(`file files dir directory path`)

// keyKinds make a secret of a name that ends in "key".
var keyKinds = words(`api access private secret encryption account shared master signing license ssh subscription
	storage crypt hmac aes symmetric webhook service deploy`)

// secretEnds make a secret of a word that ends in them.
var secretEnds = []string{"password", "passwd", "passphrase", "secret", "token", "apikey", "pwd", "pass", "credential", "credentials"}

// notSecrets end in a word of secretEnds and are none.
var notSecrets = words(`bypass compass trespass encompass surpass underpass overpass`)

// secretName reports whether a name is that of a secret. Names are split at signs and at capitals.
func secretName(name string) bool {
	name = strings.TrimLeft(name, "-")
	if ourFlags[name] {
		return false
	}
	parts := nameParts(name)
	if n := len(parts); n > 1 && pathWords[parts[n-1]] || strings.HasSuffix(strings.Join(parts, ""), "connectionstring") {
		return !pathWords[parts[n-1]]
	}
	for i, p := range parts {
		if secretWords[p] {
			// "api" and "auth" are part of many harmless names, and secrets at their end only.
			if (p == "api" || p == "pin" || p == "pass") && (i < len(parts)-1 || len(parts) == 1 && p == "api") {
				continue
			}
			return true
		}
		if p == "key" && i > 0 && keyKinds[parts[i-1]] || p == "data" && i > 0 && parts[i-1] == "key" {
			return true
		}
		if !notSecrets[p] && slices.ContainsFunc(secretEnds, func(end string) bool { return len(p) > len(end) && strings.HasSuffix(p, end) }) {
			return true
		}
	}
	return false
}

// nameParts splits a name: clientSecret, client-secret and CLIENT_SECRET are client and secret.
func nameParts(name string) (parts []string) {
	var b strings.Builder
	end := func() {
		if b.Len() > 0 {
			parts = append(parts, strings.ToLower(b.String()))
			b.Reset()
		}
	}
	var last rune
	for _, c := range name {
		switch {
		case strings.ContainsRune("-_. /", c):
			end()
		case unicode.IsUpper(c) && unicode.IsLower(last):
			end()
			b.WriteRune(c)
		default:
			b.WriteRune(c)
		}
		last = c
	}
	end()
	return parts
}

// Redact returns text, such as a log, without secrets.
func (r *Redactor) Redact(text string) string { return r.redact(text, logText) }

// RedactFile returns a configuration file without secrets. Its name decides how it is read.
func (r *Redactor) RedactFile(name, text string) string {
	if strings.HasSuffix(name, "-env") {
		return r.redact(text, wholeText)
	}
	return r.redact(text, fileText)
}

func (r *Redactor) redact(text string, how style) string {
	// Each expression is tried on texts that can match only: logs have megabytes.
	replace := func(sign string, e *regexp.Regexp, by string) {
		if strings.Contains(text, sign) {
			text = e.ReplaceAllString(text, by)
		}
	}
	replace("PRIVATE KEY-----", privateKey, "-----PRIVATE KEY "+removed+"-----")
	text = r.known.Replace(text)
	replace("LS0tLS1CRUdJTi", pemBase64, removed)
	replace("eyJ", jwt, removed)
	replace("://", userInfo, "://"+removed+"@")
	s := scanner{how: how, block: -1, secret: map[string]bool{}}
	for line := range strings.Lines(text) {
		start := s.out.Len()
		s.line(byShape(line))
		cutLine(&s.out, start)
	}
	return s.out.String()
}

// cutLine shortens a line that is longer than maxLine, from start to the end of out, and says so in it.
// It has been gone through to its end: no secret is in two parts, and what it opens is known.
func cutLine(out *bytes.Buffer, start int) {
	line := out.Bytes()[start:]
	body := bytes.TrimRight(line, "\r\n")
	if len(body) <= maxLine {
		return
	}
	keep := maxLine
	for keep > 0 && !utf8.RuneStart(body[keep]) {
		keep--
	}
	mark := fmt.Sprintf(" [left out: the last %d of %d bytes of this line]%s", len(body)-keep, len(body), line[len(body):])
	out.Truncate(start + keep)
	out.WriteString(mark)
}

// byShape removes what is a secret by its form, whatever it is called. Each expression is tried on
// lines that can match only: logs have megabytes.
func byShape(line string) string {
	if len(line) >= 32 && hexRun(line) >= 32 {
		line = joinToken.ReplaceAllString(line, removed)
	}
	if lower := strings.ToLower(line); strings.Contains(lower, "bearer") || strings.Contains(lower, "basic") {
		line = authHeader.ReplaceAllString(line, "$1$2"+removed)
	}
	if strings.Contains(line, "=") && strings.ContainsAny(line, `?&\`) {
		line = query.ReplaceAllStringFunc(line, func(m string) string {
			part := query.FindStringSubmatch(m)
			if keepQuery[part[2]] {
				return m
			}
			return part[1] + part[2] + "=" + removed
		})
	}
	if slices.ContainsFunc(shortOptionPrograms, func(p string) bool { return strings.Contains(line, p) }) {
		line = shortOption.ReplaceAllString(line, "$1$2"+removed)
	}
	return line
}

// hexRun returns the length of the longest run of small hexadecimal digits.
func hexRun(line string) (longest int) {
	run := 0
	for i := range len(line) {
		if c := line[i]; c >= '0' && c <= '9' || c >= 'a' && c <= 'f' {
			run++
			longest = max(longest, run)
		} else {
			run = 0
		}
	}
	return longest
}

// scanner goes through a text line by line and knows what a line belongs to.
type scanner struct {
	how    style
	out    bytes.Buffer
	block  int             // indentation of a name whose value is the deeper lines below it; -1 without one
	closer string          // what ends a value that goes over several lines
	table  bool            // in a TOML table in which every value is a secret
	secret map[string]bool // what secretName reported
}

// isSecret is secretName for names that come again and again.
func (s *scanner) isSecret(name string) bool {
	secret, ok := s.secret[name]
	if !ok {
		secret = secretName(name)
		if len(s.secret) < 1<<14 {
			s.secret[name] = secret
		}
	}
	return secret
}

func (s *scanner) line(line string) {
	body := strings.TrimRight(line, "\r\n")
	end := line[len(body):]
	if s.closer != "" {
		i := strings.Index(body, s.closer)
		if i < 0 {
			return
		}
		body = body[i+len(s.closer):]
		s.closer = ""
		s.out.WriteString(removed)
		s.write(body, end)
		return
	}
	indent := len(body) - len(strings.TrimLeft(body, " \t"))
	if s.block >= 0 {
		if body[indent:] == "" || indent > s.block {
			return
		}
		s.block = -1
	}
	if s.how == wholeText {
		if m := variable.FindStringSubmatchIndex(body); m != nil && !keepVariables[body[m[4]:m[5]]] && len(body) > m[1] {
			value := body[m[1]:]
			s.out.WriteString(body[:m[1]] + removed + end)
			s.open(value, fileText)
			return
		}
	}
	if head := tableHead.FindStringSubmatch(body); head != nil && s.how == fileText {
		name := strings.ToLower(head[1])
		name = strings.Trim(name[strings.LastIndexByte(name, '.')+1:], `"' `)
		s.table = name == "header" || name == "headers" || secretName(name)
		s.out.WriteString(line)
		return
	}
	if s.table {
		if i := strings.IndexByte(body, '='); i >= 0 {
			s.out.WriteString(body[:i+1] + " " + removed + end)
			s.open(strings.TrimSpace(body[i+1:]), fileText)
			return
		}
	}
	s.write(body, end)
}

// open notes that a value which begins like this goes on in the next lines.
func (s *scanner) open(value string, how style) {
	if how != fileText {
		return
	}
	for _, quote := range []string{`"""`, `'''`, `"`, `'`} {
		if strings.HasPrefix(value, quote) {
			if closing(value[len(quote):], quote) < 0 {
				s.closer = quote
			}
			return
		}
	}
	for i, bracket := range []string{"[", "{"} {
		if strings.HasPrefix(value, bracket) && !strings.Contains(value, "]}"[i:i+1]) {
			s.closer = "]}"[i : i+1]
		}
	}
}

// closing returns where a quote ends, or -1.
func closing(text, quote string) int {
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && quote[0] == '"' {
			i++
			continue
		}
		if strings.HasPrefix(text[i:], quote) {
			return i
		}
	}
	return -1
}

// write writes the rest of a line without the values of secrets.
func (s *scanner) write(body, end string) {
	indent := len(body) - len(strings.TrimLeft(body, " \t-"))
	at := 0
	for at < len(body) {
		m, ok := nextAssignment(body[at:])
		if !ok {
			break
		}
		name := body[at+m.name : at+m.end]
		dashes, quoted := m.dashes < m.name, m.quoted
		sep := body[at+m.sep : at+m.sepEnd]
		assigns := strings.ContainsAny(sep, ":=")
		next := at + m.end
		if inline := name == "header" || name == "headers" || name == "auths"; !inline && !s.isSecret(name) ||
			inline && s.how == logText || !assigns && !dashes {
			s.out.WriteString(body[at:next])
			at = next
			continue
		}
		s.out.WriteString(body[at : at+m.sepEnd])
		at += m.sepEnd
		value := body[at:]
		switch {
		case blockSign.MatchString(value), assigns && onlySpace(value):
			s.block = indent
			if blockSign.MatchString(value) {
				s.out.WriteString(value)
			}
			s.out.WriteString(" " + removed + end)
			return
		case value == "":
			s.out.WriteString(end)
			return
		}
		n := s.length(value, sep, quoted, dashes)
		if s.how != logText {
			s.open(value, fileText)
			if s.closer != "" {
				n = len(value)
			}
		}
		s.out.WriteString(removed)
		at += n
	}
	s.out.WriteString(body[at:] + end)
}

// onlySpace looks no further than the first character that is none: the end of a line may be far.
func onlySpace(text string) bool {
	return strings.IndexFunc(text, func(c rune) bool { return !unicode.IsSpace(c) }) < 0
}

// length returns how many bytes of text are the value that begins it.
func (s *scanner) length(text, sep string, quoted, dashes bool) int {
	for _, quote := range []string{`\"`, `\'`, `"""`, `'''`, `"`, `'`} {
		if strings.HasPrefix(text, quote) {
			rest := text[len(quote):]
			i := strings.Index(rest, quote)
			if quote[0] != '\\' {
				i = closing(rest, quote)
			}
			if i < 0 {
				return len(text)
			}
			return len(quote) + i + len(quote)
		}
	}
	if strings.HasPrefix(text, "[") || strings.HasPrefix(text, "{") {
		depth := 0
		for i := range len(text) {
			switch text[i] {
			case '[', '{':
				depth++
			case ']', '}':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
		return len(text)
	}
	stop := func(signs string) int {
		if i := strings.IndexAny(text, signs); i >= 0 {
			return i
		}
		return len(text)
	}
	switch {
	case quoted: // of JSON
		return stop(",}]\\\"")
	case dashes && s.how == logText, dashes && !strings.ContainsAny(sep, "="):
		return stop(" \t\"'\\")
	case s.how != logText, strings.ContainsAny(sep, ": \t"):
		return len(text)
	default:
		return stop(" \t\"'\\")
	}
}
