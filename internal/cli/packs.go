package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"microk8s/cluster-agent/fanout"
	"microk8s/internal/addon"
	"microk8s/internal/images"
	"microk8s/internal/pack"
)

func (a *App) newAddonsImport() *cobra.Command {
	stall := stdinStall
	var out *output
	cmd := &cobra.Command{
		Use:   "import FILE [--stall DURATION] [-o json|yaml]",
		Short: "Import a pack of addons on all nodes, and on those that join later; - reads standard input",
		Long: `Import a pack, the file in which images of addons travel, on all nodes of the cluster. Each node
keeps it in /var/snap/microk8s/common/packs; nodes that join later get it from the control plane.

    microk8s addons import microk8s-addons_v1.37.1_amd64.tar
    microk8s enable metallb

The whole file is checked before any node gets it: one that is damaged or cut off changes nothing. A
pack is for one architecture; nodes of another one are named, and need the pack of theirs.`,
		Args: exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if stall <= 0 {
				return &usageError{cmd, fmt.Errorf("invalid value of --stall: %s (such as 90s or 10m)", stall)}
			}
			return a.importAddons(cmd.Context(), args[0], stall, out)
		},
	}
	cmd.Flags().DurationVar(&stall, "stall", stall, "how long standard input may bring nothing")
	out = addOutput(cmd, "text")
	return cmd
}

// importAddons checks a pack and sends it to every node of its architecture.
func (a *App) importAddons(ctx context.Context, file string, stall time.Duration, out *output) error {
	path, done, err := a.spool(ctx, file, stall)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return explain("cannot import "+file, err)
	}
	defer done()
	m, err := verifyPack(path, stall)
	if err != nil {
		return failf("nothing was changed; get the file again, or make it again with: microk8s addons bundle", "cannot import %s: %w", file, err)
	}
	cluster := fanout.Cluster{Env: a.Env}
	fit, others, err := cluster.PackNodes(ctx, m)
	if err != nil {
		return err
	}
	if len(fit) == 0 {
		return failf("nothing was changed; get the file for "+runtime.GOARCH, "cannot import %s: it is for %s, and no node of the cluster is", file, m.Architecture)
	}
	say := a.Out
	if out.document() {
		say = a.Err
	}
	for _, name := range fit {
		fmt.Fprintf(say, "Pushing %s (%s) to %s\n", m.File(), mebibytes(m.Size()), name)
	}
	results, err := cluster.ImportPack(ctx, m, func() (io.ReadCloser, error) { return os.Open(path) }, fit...)
	if err != nil {
		return err
	}
	for i, r := range results {
		if r.Err == nil && r.Imported.Pack == "" {
			results[i].Err = errors.New("it is of an earlier version, which loads the images and keeps no packs: upgrade it")
		}
	}
	if len(others) > 0 {
		fmt.Fprintf(a.Err, "Not for %s: the pack is for %s; import the one of their architecture too\n", strings.Join(others, ", "), m.Architecture)
	}
	return a.sayImported(results, say, imageImport{documentMeta: documentOf("AddonImport"), Pack: m.File()}, out)
}

// verifyPack is pack.Verify of a file whose disk may stop to answer.
func verifyPack(path string, stall time.Duration) (m pack.Manifest, err error) {
	err = attendFile(path, stall, func(r io.Reader) error {
		m, err = pack.Verify(r, "")
		return err
	})
	return m, err
}

// attendFile calls read with a file, and returns before it ends when the file's disk, or network file system,
// brings nothing for the time of stall.
func attendFile(path string, stall time.Duration, read func(io.Reader) error) error {
	var n atomic.Int64
	ended := make(chan error, 1)
	go func() {
		f, err := os.Open(path)
		if err == nil {
			err = errors.Join(read(counted{f, &n}), f.Close())
		}
		ended <- err
	}()
	for before := int64(0); ; {
		select {
		case err := <-ended:
			return err
		case <-time.After(stall):
		}
		now := n.Load()
		if now == before {
			return fmt.Errorf("its disk or network file system brought nothing for %s, after %d bytes; see: dmesg", stall, now)
		}
		before = now
	}
}

func (a *App) newAddonsBundle() *cobra.Command {
	var names []string
	var list, file string
	cmd := &cobra.Command{
		Use:   "bundle [--addons ADDON,...] [--images LIST] -o FILE",
		Short: "Write one file with addons and images of your own, for a cluster without internet",
		Long: `Write a pack with everything that a cluster without internet needs: the images of addons whose packs
are on this node, and images of your own that are on this node.

    microk8s ctr images pull docker.io/library/app:1
    microk8s addons bundle --addons metallb --images images.txt -o bundle.tar

LIST is a file with one name of an image in each line, where # begins a comment, or names separated
by commas. The file is imported with microk8s addons import FILE, or laid into
/var/snap/microk8s/common/sideload before the package is installed.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return &usageError{cmd, errors.New("missing flag: -o FILE")}
			}
			if len(names) == 0 && list == "" {
				return &usageError{cmd, errors.New("nothing to bundle: name addons with --addons, images with --images, or both")}
			}
			return a.bundle(cmd.Context(), names, list, file)
		},
	}
	cmd.Flags().StringSliceVar(&names, "addons", nil, "addons whose images go into the file")
	cmd.Flags().StringVar(&list, "images", "", "file with the names of images, or names separated by commas")
	cmd.Flags().StringVarP(&file, "output", "o", "", "the file to write")
	completeFlag(cmd, "addons", addon.Packed(a.Env)...)
	return cmd
}

// imageNames reads the names of images from a file, or from the list itself.
func imageNames(list string) ([]string, error) {
	var lines []string
	switch data, err := os.ReadFile(list); {
	case err == nil:
		lines = strings.Split(string(data), "\n")
	case strings.ContainsAny(list, ":,") && !strings.HasPrefix(list, "/") && !strings.HasPrefix(list, "."):
		lines = strings.Split(list, ",")
	case list != "":
		return nil, err
	}
	var names []string
	for _, line := range lines {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if strings.ContainsAny(line, " \t") {
			return nil, fmt.Errorf("%q is not the name of an image", line)
		}
		names = append(names, fullName(line))
	}
	return names, nil
}

// bundle writes a pack of what is on this node. The file is there only when it is complete.
func (a *App) bundle(ctx context.Context, addons []string, list, file string) error {
	catalog, _, err := addon.Catalogue(a.Env)
	if err != nil {
		return failf("the installation is damaged: reinstall it", "%w", err)
	}
	own, err := imageNames(list)
	if err != nil {
		return failf("write one name in each line, such as docker.io/library/app:1", "cannot read the list of images: %w", err)
	}
	version, _ := Version(a.Env)
	m := pack.Manifest{Name: bundleName(file), Version: version, Architecture: runtime.GOARCH}
	content := map[string]v1.Image{}
	for _, name := range addons {
		x, _, err := addon.Find(catalog, name)
		if err != nil {
			return a.refuseAddon(err)
		}
		if x = addon.Target(catalog, x); len(x.Images) == 0 {
			fmt.Fprintf(a.Err, "%s needs no pack: its images are part of the product\n", x.Name)
			continue
		}
		if missing := addon.Missing(a.Env, x); len(missing) > 0 {
			return failf("get that file and run: microk8s addons import FILE", "cannot bundle %s: its pack %s is not on this node", x.Name, pack.File(x.Name, version, runtime.GOARCH))
		}
		m.Addons = append(m.Addons, pack.Addon{Name: x.Name, Version: x.Version, Images: x.Images})
		own = slices.DeleteFunc(own, func(n string) bool { return slices.Contains(x.Images, n) })
	}
	kept, _ := pack.List(a.Env.Packs())
	for _, x := range m.Addons {
		for _, name := range x.Images {
			i := slices.IndexFunc(kept, func(k pack.Kept) bool { return k.Has(name) })
			img, closer, err := packedImage(kept[i].Path, name)
			if err != nil {
				return failf("import that pack again with: microk8s addons import FILE", "cannot read %s: %w", kept[i].Path, err)
			}
			defer closer.Close()
			content[name] = img
		}
	}
	if len(own) > 0 {
		exported, closer, err := a.exportedImages(ctx, own)
		if err != nil {
			return err
		}
		defer closer.Close()
		maps.Copy(content, exported)
	}
	if len(content) == 0 {
		return failf("name addons that have a pack, or images", "there is nothing to bundle")
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return explain("cannot write "+file, err)
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	m, err = pack.Write(stopping{ctx, f}, m, content)
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return explain("cannot write "+file, err)
	}
	if _, err := verifyPack(f.Name(), stdinStall); err != nil {
		return failf("one of the images on this node is damaged: pull it again", "cannot bundle: %w", err)
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return explain("cannot write "+file, err)
	}
	for _, i := range m.Images {
		fmt.Fprintln(a.Out, i.Name)
	}
	fmt.Fprintf(a.Out, "%s: %d images for %s, %s\nimport it with: microk8s addons import %s\n", file, len(m.Images), m.Architecture, mebibytes(m.Size()), filepath.Base(file))
	return nil
}

// stopping is a writer that ends with a context.
type stopping struct {
	ctx context.Context
	w   io.Writer
}

func (s stopping) Write(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	return s.w.Write(p)
}

var notInNames = regexp.MustCompile(`[^a-z0-9.-]+`)

// bundleName makes the name of a pack from that of its file.
func bundleName(file string) string {
	name := strings.ToLower(filepath.Base(file))
	for _, suffix := range []string{filepath.Ext(name), ".tar"} {
		name = strings.TrimSuffix(name, suffix)
	}
	name = strings.Trim(notInNames.ReplaceAllString(name, "-"), "-.")
	return cmp.Or(strings.Trim(name[:min(len(name), 48)], "-."), "bundle")
}

// packedImage returns an image of a pack, which reads from the file until closer is closed.
func packedImage(path, name string) (img v1.Image, closer io.Closer, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err == nil {
		var all map[string]v1.Image
		if all, err = pack.Images(f, fi.Size(), runtime.GOARCH); err == nil {
			if img = all[name]; img == nil {
				err = fmt.Errorf("image %s is not in it", name)
			}
		}
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return img, f, nil
}

// exportedImages returns images of this node's containerd, by way of a file of ours that goes with closer.
func (a *App) exportedImages(ctx context.Context, names []string) (map[string]v1.Image, io.Closer, error) {
	f, err := os.CreateTemp(filepath.Join(a.Env.Data, "tmp"), "bundle-*.tar")
	if err != nil {
		return nil, nil, explain("cannot store the images", err)
	}
	_ = os.Remove(f.Name()) // it lives as long as it is open
	if err := images.Export(ctx, a.Env, f, names, func(name string) { fmt.Fprintf(a.Err, "Checking %s\n", name) }); err != nil {
		f.Close()
		return nil, nil, failf("pull it with microk8s ctr images pull NAME, or import it with microk8s images import FILE", "cannot bundle: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	all, err := pack.Images(f, fi.Size(), runtime.GOARCH)
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("cannot bundle: %w", err)
	}
	return all, f, nil
}
