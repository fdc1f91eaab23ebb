package args

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"mvdan.cc/sh/v3/expand"
	"mvdan.cc/sh/v3/syntax"
)

// tokensB reads shell words with the shell's own lexer and refuses what would run something.
func tokensB(data []byte) ([]token, error) {
	var tokens []token
	parser := syntax.NewParser(syntax.Variant(syntax.LangPOSIX))
	for w, err := range parser.WordsSeq(bytes.NewReader(data)) {
		if err != nil {
			return tokens, shellError(err)
		}
		if err := checkWord(w); err != nil {
			return tokens, err
		}
		t := token{
			start: int(w.Pos().Offset()), end: int(w.End().Offset()), line: int(w.Pos().Line()),
			plain: plainWord(data, w.Parts),
		}
		t.expand = func(lookup func(string) (string, bool)) []string {
			words, err := expand.Fields(wordConfig(lookup), w)
			if err != nil {
				return nil // checkWord left nothing that can fail
			}
			return words
		}
		tokens = append(tokens, t) // "" too: it is a value
	}
	return tokens, nil
}

func wordConfig(lookup func(string) (string, bool)) *expand.Config {
	return &expand.Config{Env: expand.FuncEnviron(func(name string) string {
		if name == "IFS" {
			return " \t\n"
		}
		v, _ := lookup(name)
		return v
	})}
}

// shellError converts the lexer's error to ours.
func shellError(err error) error {
	if err == nil {
		return nil
	}
	var parse syntax.ParseError
	if errors.As(err, &parse) {
		return &SyntaxError{Line: int(parse.Pos.Line()), Msg: parse.Text + "; put quotes around values with special characters, or " + restore}
	}
	var lang syntax.LangError
	if errors.As(err, &lang) {
		return &SyntaxError{Line: int(lang.Pos.Line()), Msg: lang.Feature + " is not supported here; write the value itself"}
	}
	return &SyntaxError{Line: 1, Msg: err.Error()}
}

// checkWord allows text, quotes, $NAME, ${NAME} and ${NAME:-text}.
func checkWord(w *syntax.Word) error {
	var bad error
	syntax.Walk(w, func(n syntax.Node) bool {
		if bad != nil || n == nil {
			return false
		}
		refuse := func(what string) {
			bad = &SyntaxError{Line: int(n.Pos().Line()), Msg: what + " is not supported; write the value itself"}
		}
		switch n := n.(type) {
		case *syntax.Word, *syntax.Lit, *syntax.SglQuoted, *syntax.DblQuoted:
		case *syntax.ParamExp:
			simple := n.Param != nil && syntax.ValidName(n.Param.Value) && !n.Excl && !n.Length && !n.Width &&
				n.NestedParam == nil && n.Index == nil && n.Slice == nil && n.Repl == nil && n.Names == 0
			if simple && n.Exp != nil {
				switch n.Exp.Op {
				case syntax.DefaultUnset, syntax.DefaultUnsetOrNull, syntax.AlternateUnset, syntax.AlternateUnsetOrNull:
				default:
					simple = false
				}
			}
			if !simple {
				refuse("this form of variable")
			}
		case *syntax.CmdSubst:
			refuse("running a command for a value")
		default:
			refuse(fmt.Sprintf("shell syntax (%T)", n))
		}
		return true
	})
	return bad
}

// plainWord removes quotes and escapes and keeps variables as they are written.
func plainWord(data []byte, parts []syntax.WordPart) string {
	var b strings.Builder
	for _, part := range parts {
		switch p := part.(type) {
		case *syntax.Lit:
			b.WriteString(unescape(p.Value, ""))
		case *syntax.SglQuoted:
			b.WriteString(p.Value)
		case *syntax.DblQuoted:
			for _, inner := range p.Parts {
				if lit, ok := inner.(*syntax.Lit); ok {
					b.WriteString(unescape(lit.Value, "$`\"\\"))
				} else {
					b.WriteString(plainWord(data, []syntax.WordPart{inner}))
				}
			}
		default:
			b.Write(data[p.Pos().Offset():p.End().Offset()])
		}
	}
	return b.String()
}

// unescape removes backslashes before the characters of only (before any, if only is ""), and
// those that continue a line.
func unescape(s, only string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) && (only == "" || s[i+1] == '\n' || strings.IndexByte(only, s[i+1]) >= 0) {
			i++
			if s[i] == '\n' {
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// quoteB writes a value as one shell word in which only variables are special.
func quoteB(value string) string {
	if value != "" && !strings.ContainsAny(value, " \t\"'`\\$;&|<>()*?[]#~!{}") {
		return value
	}
	var b strings.Builder
	b.WriteByte('"')
	for i := 0; i < len(value); i++ {
		switch c := value[i]; {
		case c == '"', c == '\\', c == '`', c == '$' && !startsVariable(value[i+1:]):
			b.WriteByte('\\')
			b.WriteByte(c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func startsVariable(rest string) bool {
	name := rest
	if strings.HasPrefix(rest, "{") {
		inner, _, ok := strings.Cut(rest[1:], "}")
		if !ok {
			return false
		}
		name = inner
		return syntax.ValidName(name)
	}
	return name != "" && (name[0] == '_' || name[0] >= 'a' && name[0] <= 'z' || name[0] >= 'A' && name[0] <= 'Z')
}

// EnvFile is what a `-env` file asks for.
type EnvFile struct {
	Vars   []string          // KEY=value in the order of the file, expanded
	Values map[string]string // the same by name
	NoFile uint64            // open files (ulimit -n); 0 when not asked for
	// MemLock is locked memory in bytes (ulimit -l counts in KiB); 0 when not asked for.
	MemLock uint64
}

// LoadEnv reads the `-env` file at path; a missing one is an empty one.
func LoadEnv(path string, lookup func(string) (string, bool)) (*EnvFile, error) {
	data, err := readFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return &EnvFile{Values: map[string]string{}}, nil
	}
	if err != nil {
		return nil, err
	}
	env, err := ParseEnv(data, lookup)
	var bad *SyntaxError
	if errors.As(err, &bad) {
		bad.Path = path
	}
	return env, err
}

// ParseEnv reads assignments (`KEY=value`, `export KEY=value`) and `ulimit -n` and `ulimit -l`
// calls, one or more on a line, with `|| true` behind them if wanted. Variables are those set
// further up, then those of lookup. Anything else is a [*SyntaxError].
func ParseEnv(data []byte, lookup func(string) (string, bool)) (*EnvFile, error) {
	if err := checkText(data); err != nil {
		return nil, err
	}
	file, err := syntax.NewParser().Parse(bytes.NewReader(data), "")
	if err != nil {
		return nil, shellError(err)
	}
	env := &EnvFile{Values: map[string]string{}}
	get := func(name string) (string, bool) {
		if v, ok := env.Values[name]; ok {
			return v, true
		}
		return lookup(name)
	}
	for _, stmt := range file.Stmts {
		if err := env.read(stmt, get); err != nil {
			return nil, err
		}
	}
	return env, nil
}

func (e *EnvFile) read(stmt *syntax.Stmt, get func(string) (string, bool)) error {
	unsupported := &SyntaxError{Line: int(stmt.Pos().Line()), Msg: "only KEY=value, export KEY=value, ulimit -n N and ulimit -l N are supported here"}
	if stmt.Negated || stmt.Background || len(stmt.Redirs) > 0 {
		return unsupported
	}
	switch cmd := stmt.Cmd.(type) {
	case *syntax.CallExpr:
		if len(cmd.Args) > 0 && len(cmd.Assigns) > 0 {
			return unsupported
		}
		if len(cmd.Args) > 0 {
			return e.limit(cmd.Args, get, unsupported)
		}
		return e.assign(cmd.Assigns, get, unsupported)
	case *syntax.DeclClause:
		if cmd.Variant.Value != "export" {
			return unsupported
		}
		return e.assign(cmd.Args, get, unsupported)
	case *syntax.BinaryCmd:
		right, ok := cmd.Y.Cmd.(*syntax.CallExpr)
		if cmd.Op != syntax.OrStmt || !ok || len(right.Args) != 1 || len(right.Assigns) > 0 ||
			(right.Args[0].Lit() != "true" && right.Args[0].Lit() != ":") {
			return unsupported
		}
		return e.read(cmd.X, get)
	}
	return unsupported
}

func (e *EnvFile) assign(assigns []*syntax.Assign, get func(string) (string, bool), unsupported error) error {
	for _, a := range assigns {
		if a.Name == nil || a.Append || a.Index != nil || a.Array != nil {
			return unsupported
		}
		if a.Naked {
			if _, known := e.Values[a.Name.Value]; !known && a.Value != nil {
				return unsupported
			}
			continue // export NAME of something set above: all are exported
		}
		value := ""
		if a.Value != nil {
			if err := checkWord(a.Value); err != nil {
				return err
			}
			v, err := expand.Literal(wordConfig(get), a.Value)
			if err != nil {
				return &SyntaxError{Line: int(a.Pos().Line()), Msg: err.Error()}
			}
			value = v
		}
		if old, known := e.Values[a.Name.Value]; known {
			for i, kv := range e.Vars {
				if kv == a.Name.Value+"="+old {
					e.Vars = append(e.Vars[:i], e.Vars[i+1:]...)
					break
				}
			}
		}
		e.Values[a.Name.Value] = value
		e.Vars = append(e.Vars, a.Name.Value+"="+value)
	}
	return nil
}

func (e *EnvFile) limit(words []*syntax.Word, get func(string) (string, bool), unsupported error) error {
	for _, w := range words {
		if err := checkWord(w); err != nil {
			return err
		}
	}
	argv, err := expand.Fields(wordConfig(get), words...)
	if err != nil || len(argv) == 0 {
		return unsupported
	}
	if argv[0] == "true" || argv[0] == ":" {
		return nil
	}
	var n uint64
	if argv[0] != "ulimit" || len(argv) != 3 {
		return unsupported
	}
	if _, err := fmt.Sscanf(argv[2], "%d", &n); err != nil || fmt.Sprint(n) != argv[2] || n == 0 || n > 1<<40 {
		return unsupported
	}
	switch argv[1] {
	case "-n":
		e.NoFile = n
	case "-l":
		e.MemLock = n * 1024
	default:
		return unsupported
	}
	return nil
}
