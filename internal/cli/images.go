package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"

	"microk8s/cluster-agent/fanout"
	"microk8s/internal/diskspace"
	"microk8s/internal/images"
	"microk8s/internal/kube"
)

func (a *App) newImages() *cobra.Command {
	root := &cobra.Command{
		Use:   "images",
		Short: "Import, export and list container images",
		Long: `Bring container images to the nodes of the cluster without a registry, take them from a
node, and see which there are.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	stall := stdinStall
	var imported, listed *output
	importer := &cobra.Command{
		Use:   "import [IMAGE] [--stall DURATION] [-o json|yaml]",
		Short: "Import an OCI or docker archive on all nodes; - or nothing reads standard input",
		Long: `Import the images of an archive, as docker save, skopeo copy or nerdctl save write it, on all
nodes. It may be compressed with gzip or zstd. Without a name, or with -, it is read from
standard input.

    docker save app:1 | microk8s images import
    microk8s images import app.tar.gz

Images need a name. Short ones are completed as docker does it: busybox:1 becomes
docker.io/library/busybox:1, under which pods find it. For each node the images are printed that
it has imported; one that cannot use any of them is an error.

An import ends when standard input brings nothing for five minutes (--stall), when the disk
would be full, and on a node whose cluster agent or containerd stops to answer for half a
minute: run it again then, what is there already is not written twice.`,
		Args: atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if stall <= 0 {
				return &usageError{cmd, fmt.Errorf("invalid value of --stall: %s (such as 90s or 10m)", stall)}
			}
			return a.importImages(cmd.Context(), append(args, "-")[0], stall, imported)
		},
	}
	importer.Flags().DurationVar(&stall, "stall", stall, "how long standard input may bring nothing")
	imported = addOutput(importer, "text")
	list := &cobra.Command{
		Use:   "list [-o json|yaml]",
		Short: "List the images on this node, and how many pods of the cluster use each",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return a.listImages(cmd.Context(), listed) },
	}
	listed = addOutput(list, "table")
	root.AddCommand(importer, list,
		&cobra.Command{
			Use:   "export-local [OUTPUT] [IMAGE...]",
			Short: "Write images of this node, or all, as an archive; - or nothing writes standard output",
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.exportImages(cmd.Context(), append(args, "-")[0], args[min(1, len(args)):])
			},
			ValidArgsFunction: a.exportArguments,
		},
	)
	return root
}

// atMost takes no more arguments than n.
func atMost(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > n {
			return &usageError{cmd, fmt.Errorf("unexpected argument: %s", args[n])}
		}
		return nil
	}
}

// importImages checks an archive and sends it to every node. It goes on after a node that
// failed, and then fails.
func (a *App) importImages(ctx context.Context, file string, stall time.Duration, out *output) error {
	path, done, err := a.spool(ctx, file, stall)
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return explain("cannot store standard input", err)
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		fmt.Fprintf(a.Err, "Error: failed to read %s: %v\n  make an archive with: docker save NAME:TAG -o app.tar; microk8s images import app.tar\n", file, err)
		return exitError(ExitError)
	}
	defer done()
	if fi, err := os.Stat(path); err == nil && fi.IsDir() {
		return failf(fmt.Sprintf("pack it first, if it is an OCI layout: tar -C %s -cf - . | microk8s images import", file), "cannot import %s: it is a directory, not an archive", file)
	}
	if err := checkArchive(path, stall); err != nil {
		fmt.Fprintf(a.Err, "Error: failed to read %s: %v\n  make an archive with: docker save NAME:TAG -o app.tar; microk8s images import app.tar\n", file, err)
		return exitError(ExitError)
	}
	cluster := fanout.Cluster{Env: a.Env}
	targets, err := cluster.Targets(ctx)
	if err != nil {
		return err
	}
	say := a.Out
	if out.document() {
		say = a.Err
	}
	for _, t := range targets {
		fmt.Fprintf(say, "Pushing OCI images to %s\n", t.Address)
	}
	results, err := cluster.ImportImage(ctx, func() (io.ReadCloser, error) { return os.Open(path) })
	if err != nil {
		return err
	}
	return a.sayImported(results, say, imageImport{documentMeta: documentOf("ImageImport")}, out)
}

// sayImported reports what the nodes have imported, and fails if one has not.
func (a *App) sayImported(results []fanout.Result, say io.Writer, doc imageImport, out *output) error {
	failed := 0
	doc.Nodes = []nodeImport{}
	for _, r := range results {
		doc.Nodes = append(doc.Nodes, importOn(r))
		if r.Err != nil {
			failed++
			fmt.Fprintf(a.Err, "Failed to import images on %s (%s): %v\n", r.Address, r.Name, r.Err)
			continue
		}
		for _, name := range r.Imported.Images {
			fmt.Fprintf(say, "Imported %s on %s\n", name, r.Name)
		}
		for _, why := range r.Imported.Skipped {
			fmt.Fprintf(a.Err, "Not imported on %s: %s\n", r.Name, why)
		}
	}
	if out.document() {
		if err := a.print(out, doc); err != nil {
			return err
		}
	}
	if failed > 0 {
		return failf("run the same command again when that is fixed", "%d of %d nodes have not imported the images", failed, len(results))
	}
	return nil
}

// imageImport is the kind ImageImport, and with Pack the kind AddonImport.
type imageImport struct {
	documentMeta
	Pack  string       `json:"pack,omitempty"` // the name under which nodes keep a pack of addons
	Nodes []nodeImport `json:"nodes"`
}

// nodeImport is what one node has imported.
type nodeImport struct {
	Name    string   `json:"name"`
	Address string   `json:"address"`
	Images  []string `json:"images"`
	Skipped []string `json:"skipped,omitempty"` // why parts of the archive were not imported
	Error   string   `json:"error,omitempty"`
}

func importOn(r fanout.Result) nodeImport {
	n := nodeImport{Name: r.Name, Address: r.Address, Images: append([]string{}, r.Imported.Images...), Skipped: r.Imported.Skipped}
	if r.Err != nil {
		n.Error = r.Err.Error()
	}
	return n
}

// checkArchive is images.Check of a file whose disk, or network file system, may stop to answer.
func checkArchive(path string, stall time.Duration) error {
	return attendFile(path, stall, images.Check)
}

// counted counts what is read.
type counted struct {
	r io.Reader
	n *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// spool returns a file that can be read several times; what comes from standard input is put
// into one of our own first. It ends when nothing came for the time of stall, and before the disk
// is full: containerd needs as much again.
func (a *App) spool(ctx context.Context, file string, stall time.Duration) (path string, done func(), err error) {
	if file != "-" {
		return file, func() {}, nil
	}
	if f, ok := a.In.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return "", nil, errors.New("it is a terminal: name a file, or pipe an archive in, such as docker save app:1 | microk8s images import")
	}
	f, err := os.CreateTemp(filepath.Join(a.Env.Data, "tmp"), "images-*.tar")
	if err != nil {
		return "", nil, err
	}
	done = func() { _ = os.Remove(f.Name()) }
	room := func(size int64) error {
		return diskspace.Check(filepath.Dir(f.Name()), diskspace.Need{Bytes: uint64(size), Files: 1})
	}
	if err = errors.Join(a.copyInput(ctx, f, stall, room), f.Close()); err != nil {
		done()
		return "", nil, err
	}
	return f.Name(), done, nil
}

const (
	// stdinStall is how long standard input may bring nothing.
	stdinStall = 5 * time.Minute
	// roomEvery is after how many bytes the disk is looked at again.
	roomEvery = 16 << 20
	// importShow is how often the progress of a copy is shown on a terminal.
	importShow = 2 * time.Second
)

// copyInput copies standard input to a file; room reports from time to time whether as many bytes as
// have come fit once more. A read that still waits when copyInput returns ends with the process.
func (a *App) copyInput(ctx context.Context, f io.Writer, stall time.Duration, room func(size int64) error) error {
	type part struct {
		data []byte
		err  error
	}
	parts, free := make(chan part), make(chan []byte, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	free <- make([]byte, 256<<10)
	in := a.In
	go func() {
		for {
			var buffer []byte
			select {
			case buffer = <-free:
			case <-ctx.Done():
				return
			}
			n, err := in.Read(buffer)
			select {
			case parts <- part{buffer[:n], err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	silent := time.NewTimer(stall)
	defer silent.Stop()
	show := time.NewTicker(importShow)
	defer show.Stop()
	var size, checked int64
	for {
		select {
		case p := <-parts:
			silent.Reset(stall)
			if _, err := f.Write(p.data); err != nil {
				return err
			}
			size += int64(len(p.data))
			if size-checked >= roomEvery {
				checked = size
				if err := room(size); err != nil {
					return fmt.Errorf("%d MiB came so far, and the import needs as much again: %w", size>>20, err)
				}
			}
			if errors.Is(p.err, io.EOF) {
				return nil
			}
			if p.err != nil {
				return p.err
			}
			free <- p.data[:cap(p.data)]
		case <-silent.C:
			return fmt.Errorf("standard input brought nothing for %s, after %d bytes: see what the program before the | waits for, or wait longer with --stall", stall, size)
		case <-show.C:
			if a.Term {
				fmt.Fprintf(a.Err, "%d MiB read\n", size>>20)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// exportImages writes an archive; a file is there only when it is complete.
func (a *App) exportImages(ctx context.Context, output string, names []string) error {
	say := func(name string) { fmt.Fprintf(a.Err, "Checking %s\n", name) }
	if output == "-" {
		return images.Export(ctx, a.Env, a.Out, names, say)
	}
	f, err := os.CreateTemp(filepath.Dir(output), "."+filepath.Base(output)+".*")
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", output, err)
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	err = images.Export(ctx, a.Env, f, names, say)
	if written := errors.Join(f.Chmod(0o644), f.Sync(), f.Close()); written != nil || errors.Is(err, syscall.ENOSPC) {
		return explain("cannot write "+output, errors.Join(err, written))
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), output)
}

// listImages shows what this node has, and what pods of the cluster want.
func (a *App) listImages(ctx context.Context, out *output) error {
	have, err := images.List(ctx, a.Env)
	if err != nil {
		return err
	}
	uses, err := a.imageUses(ctx)
	if err != nil {
		fmt.Fprintf(a.Err, "cannot find out which images pods use: %v\n", err)
	}
	if out.document() {
		return a.print(out, listOf("ImageList", imageItems(have, uses, err == nil)))
	}
	fmt.Fprintf(a.Out, "%-60s %-19s %10s %-8s %s\n", "IMAGE", "DIGEST", "SIZE", "SOURCE", "PODS")
	for _, img := range have {
		source := "-"
		if img.Shipped {
			source = "product"
		}
		pods := "?"
		if err == nil {
			pods = fmt.Sprint(uses[img.Name])
			delete(uses, img.Name)
		}
		fmt.Fprintf(a.Out, "%-60s %-19.19s %10s %-8s %s\n", img.Name, img.Digest, mebibytes(img.Size), source, pods)
	}
	var missing []string
	for name := range uses {
		missing = append(missing, name)
	}
	slices.Sort(missing)
	for _, name := range missing {
		fmt.Fprintf(a.Out, "%-60s %-19s %10s %-8s %d\n", name, "not on this node", "-", "-", uses[name])
	}
	return nil
}

// listedImage is one item of the kind ImageList.
type listedImage struct {
	Name    string `json:"name"`
	Present bool   `json:"present"` // on this node; pods name it otherwise
	Digest  string `json:"digest,omitempty"`
	Bytes   int64  `json:"bytes,omitempty"`
	Shipped bool   `json:"shipped,omitempty"` // it came with the product
	Pods    *int   `json:"pods,omitempty"`    // of the cluster that name it; not there where the API server did not say
}

func imageItems(have []images.Image, uses map[string]int, known bool) []listedImage {
	pods := func(name string) *int {
		if !known {
			return nil
		}
		n := uses[name]
		return &n
	}
	var out []listedImage
	there := map[string]bool{}
	for _, img := range have {
		there[img.Name] = true
		out = append(out, listedImage{Name: img.Name, Present: true, Digest: fmt.Sprint(img.Digest), Bytes: img.Size, Shipped: img.Shipped, Pods: pods(img.Name)})
	}
	for _, name := range slices.Sorted(maps.Keys(uses)) {
		if !there[name] {
			out = append(out, listedImage{Name: name, Pods: pods(name)})
		}
	}
	return out
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// imageUses counts the pods of the cluster by the images of their containers.
func (a *App) imageUses(ctx context.Context) (map[string]int, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", a.Env.AdminKubeconfig())
	if err != nil {
		return nil, err
	}
	kube.Bound(cfg)
	client, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	pods, err := client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "pods"}).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	uses := map[string]int{}
	for _, p := range pods.Items {
		names := map[string]bool{}
		for _, list := range []string{"initContainers", "containers"} {
			containers, _, _ := unstructured.NestedSlice(p.Object, "spec", list)
			for _, c := range containers {
				if m, ok := c.(map[string]any); ok {
					names[fullName(fmt.Sprint(m["image"]))] = true
				}
			}
		}
		for name := range names {
			uses[name]++
		}
	}
	return uses, nil
}

// fullName is how containerd calls an image that people call shorter.
func fullName(name string) string {
	first, _, slash := strings.Cut(name, "/")
	switch {
	case !slash:
		name = "docker.io/library/" + name
	case !strings.ContainsAny(first, ".:") && first != "localhost":
		name = "docker.io/" + name
	}
	if !strings.ContainsAny(name[strings.LastIndex(name, "/")+1:], ":@") {
		name += ":latest"
	}
	return name
}
