package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"microk8s/internal/cluster"
)

// yesFlag is the flag that answers the question of a command that asks.
const yesFlag = "yes"

func addYes(f *pflag.FlagSet, yes *bool) {
	f.BoolVarP(yes, yesFlag, "y", false, "do it without asking")
}

// confirm asks before something that cannot be taken back. On a terminal it shows what would happen
// and waits for y or yes; elsewhere it refuses, with exit code 2, and names the flag that answers
// ("" for --yes). With yes it asks nothing.
func (a *App) confirm(what string, yes bool, flag string) error {
	if yes {
		return nil
	}
	if flag == "" {
		flag = "--" + yesFlag
	}
	if !a.asks() {
		return &Failure{Err: fmt.Errorf("%s: %w", strings.TrimSuffix(what, "."), cluster.ErrUnconfirmed),
			Hints: []string{"nothing was changed; to do it all the same, run the same command with " + flag}, Code: ExitUsage}
	}
	fmt.Fprintf(a.Err, "%s\nGo on? [y/N] ", what)
	line, err := bufio.NewReader(a.In).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("cannot read the answer: %w", err)
	}
	if errors.Is(err, io.EOF) {
		fmt.Fprintln(a.Err)
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return &Failure{Err: cluster.ErrUnconfirmed, Hints: []string{"nothing was changed"}, Code: ExitUsage}
}

// asks reports whether a person can be asked: both the questions and the answers go over a terminal.
func (a *App) asks() bool {
	f, file := a.In.(*os.File)
	return a.Term && a.In != nil && (!file || term.IsTerminal(int(f.Fd())))
}
