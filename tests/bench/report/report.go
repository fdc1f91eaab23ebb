// Package report prints what a bench has measured, as a table for a terminal or as a page of
// docs/figures with the same table in it.
package report

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"microk8s/internal/atomicfile"
)

// Table is one run of a bench.
type Table struct {
	Title string // of the page
	About string // what the columns mean, as one paragraph; "" for none
	// Command repeats the run. "" stands for what this process was called with by scripts/bench.
	Command string
	Part    string // the bench's name in scripts/bench
	Head    []string
	Rows    [][]string // each as long as Head
	Notes   string     // lines below the table; "" for none
	Now     time.Time
}

// Flag adds -page to the flags of a bench. Its value is what to give to [Table.Write].
func Flag() *string {
	return flag.String("page", "", "also write the table as a page, such as docs/figures/node.md")
}

// Write prints the table to w and, if page is not "", writes it to the file of that name.
func (r *Table) Write(w io.Writer, page string) error {
	if err := r.Print(w); err != nil || page == "" {
		return err
	}
	var b bytes.Buffer
	if err := r.Page(&b); err != nil {
		return err
	}
	return atomicfile.Write(page, b.Bytes(), 0o644, nil)
}

// Print writes the table as text: where it was measured, what it means, the table.
func (r *Table) Print(w io.Writer) error {
	for _, line := range []string{r.machine(), r.About} {
		if line == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%s\n\n", line); err != nil {
			return err
		}
	}
	if err := r.table(w); err != nil || r.Notes == "" {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s\n", r.Notes)
	return err
}

// Page writes the table in Markdown.
func (r *Table) Page(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# %s\n\n`%s`, on %s.\n", r.Title, r.command(), r.machine())
	if r.About != "" {
		fmt.Fprintf(&b, "\n%s\n", r.About)
	}
	b.WriteString("\n```text\n")
	if err := r.table(&b); err != nil {
		return err
	}
	b.WriteString("```\n")
	if r.Notes != "" {
		fmt.Fprintf(&b, "\n%s\n", r.Notes)
	}
	_, err := w.Write(b.Bytes())
	return err
}

func (r *Table) command() string {
	if r.Command != "" {
		return r.Command
	}
	args := []string{"scripts/bench", r.Part}
	for i := 1; i < len(os.Args); i++ {
		name := strings.TrimLeft(os.Args[i], "-")
		switch {
		case name == "page":
			i++ // and its value
		case !strings.HasPrefix(name, "page="):
			args = append(args, os.Args[i])
		}
	}
	return strings.Join(args, " ")
}

func (r *Table) table(w io.Writer) error {
	var b bytes.Buffer
	t := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	for _, row := range slices.Concat([][]string{r.Head}, r.Rows) {
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// machine says on what was measured, when, and how much else ran.
func (r *Table) machine() string {
	now := r.Now
	if now.IsZero() {
		now = time.Now()
	}
	return fmt.Sprintf("%s, %d cores, %s, %s, load average %s", processor(), runtime.NumCPU(), runtime.Version(), now.UTC().Format("2006-01-02"), load())
}

// load returns the average of the last fifteen minutes, what was measured included; "unknown" where
// the kernel does not tell it.
func load() string {
	data, _ := os.ReadFile("/proc/loadavg")
	if f := strings.Fields(string(data)); len(f) > 2 {
		return f[2]
	}
	return "unknown"
}

// processor returns its name as the kernel has it, or the architecture.
func processor() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(data)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				return strings.TrimSpace(v)
			}
		}
	}
	return runtime.GOARCH
}
