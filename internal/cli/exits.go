package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// Exit codes. Those of all commands are the constants in app.go; a command's own are in exits of the
// table of commands. The help of every command lists them, and docs/output.md has all of them.

// exitCode is one exit code of a command, and when it ends with it.
type exitCode struct {
	code int
	when string
}

// own are the exit codes of single commands.
var (
	exitsStatus  = []exitCode{{ExitOK, "the node can be used; also: it is stopped, or a worker"}, {ExitError, "it cannot be used, or nobody knows"}}
	exitsInspect = []exitCode{{ExitError, "a service that should run does not; with --security: a control failed"}}
	exitsDbctl   = []exitCode{
		{exitDumpFailed, "the datastore could not be read"}, {exitArchiveFailed, "the archive could not be made, or wrong options or arguments"},
		{exitRestoreFailed, "the datastore could not be written"}, {exitArchiveBad, "the archive could not be read"}, {exitNoDatastore, "there is no datastore on this node"},
	}
	exitsBackup  = []exitCode{{exitNotProven, "the archive could not be made, read or proven"}}
	exitsRecover = []exitCode{{exitNotRecovered, "refused: a majority may come back, or another copy is newer"}}
	exitsJoin    = []exitCode{
		{ExitError, "nothing was changed, or everything was rolled back"}, {exitVerify, "the server could not prove that it made the token"},
		{exitConnect, "no connection"}, {exitRefused, "the cluster refused"},
	}
	exitsLeave = []exitCode{
		{exitContacting, "the datastore's other members did not answer, or wrong options or arguments"}, {exitOnlyCopy, "this node has the only copy of the data"},
	}
	exitsNetwork = []exitCode{{ExitError, "failed, or refused; why: the connection is stopped; check: something does not get through"}}
	exitsRemove  = []exitCode{{exitContacting, "the datastore's members did not answer, or wrong options or arguments"}}
	exitsRefresh = []exitCode{
		{exitNothingChosen, "nothing was chosen"}, {exitCertInfo, "a certificate cannot be read, or the undo failed"}, {exitBackup, "the backup failed"},
		{exitReissue, "issuing failed and was undone"}, {exitCAMissing, "CA_DIR lacks ca.crt or ca.key"}, {exitCAKey, "the key is not usable"}, {exitCACert, "the certificate is not usable"},
	}
	exitsRoot   = []exitCode{{ExitRoot, "it needs root"}}
	exitsPassed = []exitCode{{ExitError, "failed; other codes are the program's own"}}
)

// exitCodes returns what a command may end with, sorted by code.
func (c command) exitCodes() []exitCode {
	all := slices.Clone(c.exits)
	add := func(code int, when string) {
		if !slices.ContainsFunc(all, func(e exitCode) bool { return e.code == code }) {
			all = append(all, exitCode{code, when})
		}
	}
	add(ExitOK, "done")
	add(ExitError, "failed, or refused")
	if c.usage == ExitUsage {
		add(ExitUsage, "wrong options or arguments")
	}
	add(exitInterrupted, "interrupted")
	slices.SortFunc(all, func(a, b exitCode) int { return cmp.Compare(a.code, b.code) })
	return all
}

// ungrouped are the commands without sudo that anybody may use, or root alone.
var ungrouped = []string{"completion", "version", "reset", "refresh-certs"}

// exitHelp is the end of the help: whom the command is for, and its exit codes.
func (a *App) exitHelp(cmd *cobra.Command) string {
	for cmd.HasParent() && cmd.Parent().HasParent() {
		cmd = cmd.Parent()
	}
	for _, c := range a.commands() {
		if c.name != cmd.Name() {
			continue
		}
		var b strings.Builder
		if c.group != "" && !c.sudo && !slices.Contains(ungrouped, c.name) {
			fmt.Fprintf(&b, "\nIt is for root and members of the group %[1]s. The group %[1]s is root on this machine;\nfor everybody else there is: microk8s config --user NAME\n", a.Group)
		}
		b.WriteString("\nExit codes:\n")
		for _, e := range c.exitCodes() {
			fmt.Fprintf(&b, "  %3d  %s\n", e.code, e.when)
		}
		return b.String()
	}
	return ""
}
