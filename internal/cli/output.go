package cli

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

// Documents are what commands print with -o json and -o yaml: objects that begin with apiVersion
// and kind (docs/output.md). Within a version fields are only added. What --format prints is
// upstream's and has no version.

// documentVersion is the apiVersion of all documents.
const documentVersion = "microk8s.io/v1"

// documentMeta begins a document.
type documentMeta struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

func documentOf(kind string) documentMeta { return documentMeta{documentVersion, kind} }

// listDocument is a document with nothing but items.
type listDocument[T any] struct {
	documentMeta
	Items []T `json:"items"`
}

func listOf[T any](kind string, items []T) listDocument[T] {
	if items == nil {
		items = []T{} // [] and not null
	}
	return listDocument[T]{documentOf(kind), items}
}

// output is the flag -o. Its zero value is the layout for people.
type output struct {
	plain string // what that layout is called
	value string // "", json or yaml
}

const outputFlag = "output"

// addOutput adds -o to a command that prints a table or a list. plain is what its layout for people
// is called.
func addOutput(cmd *cobra.Command, plain string) *output {
	o := &output{plain: plain}
	cmd.Flags().VarP(o, outputFlag, "o", o.plain+", or a document for programs: json, yaml")
	_ = cmd.RegisterFlagCompletionFunc(outputFlag, cobra.FixedCompletions(o.choices(), cobra.ShellCompDirectiveNoFileComp))
	return o
}

func (o *output) choices() []string { return []string{o.plain, "json", "yaml"} }

// String implements pflag.Value.
func (o *output) String() string { return o.value }

// Type implements pflag.Value.
func (o *output) Type() string { return "format" }

// Set implements pflag.Value.
func (o *output) Set(v string) error {
	if !slices.Contains(o.choices(), v) {
		return fmt.Errorf("choose from %s", strings.Join(o.choices(), ", "))
	}
	if o.value = v; v == o.plain {
		o.value = ""
	}
	return nil
}

// document reports whether a document is wanted instead of the layout for people.
func (o *output) document() bool { return o.value != "" }

// print writes a document, whose first fields are a documentMeta.
func (a *App) print(o *output, document any) error {
	data, err := json.MarshalIndent(document, "", "  ")
	if err != nil {
		return err
	}
	if o.value == "yaml" {
		if data, err = yaml.JSONToYAML(data); err != nil {
			return err
		}
	} else {
		data = append(data, '\n')
	}
	_, err = a.Out.Write(data)
	return err
}

// asksDocument reports whether a command line asks for a document, before it is parsed.
func asksDocument(args []string) (format string, asks bool) {
	for i, w := range args {
		name, value, joined := strings.Cut(w, "=")
		switch {
		case w == "--":
			return "", false
		case name == "-o" || name == "--"+outputFlag:
			if !joined && i+1 < len(args) {
				value = args[i+1]
			}
		case strings.HasPrefix(w, "-o"):
			value = w[len("-o"):]
		default:
			continue
		}
		if value == "json" || value == "yaml" {
			return value, true
		}
	}
	return "", false
}
