// Package addon turns addons of the core repository on and off: manifests with parameters,
// applied by server-side apply, owned through a label, and removed again with everything they
// brought.
//
// What is on is written down in the cluster itself, a ConfigMap in kube-system for each addon
// with its arguments: so it is the same for all nodes, and goes with the datastore. The record
// is written before the first object is applied, notes when all are, and goes after the last
// one is removed; each control-plane node brings the cluster in line with the records when it
// starts ([Set.Reconcile]). Whatever was interrupted is finished then, and a newer version of
// the product brings the newer version of its addons, with the user's arguments. Where nothing
// is newer, nothing is applied: what people have changed in the objects stays.
//
// Which addons there are is in addons.yaml of the repository; which commands a person types is
// internal/cli's business.
package addon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"microk8s/internal/bootstrap"
	"microk8s/internal/snapenv"
)

const (
	// Label is on every object of an addon; its value is the addon's name.
	Label = "microk8s.io/addon"

	// RecordLabel is on the record of each addon; its value is the addon's name.
	RecordLabel = "microk8s.io/addon-record"

	// DefaultsRecord is the ConfigMap in kube-system which says that the addons of a fresh
	// cluster have been enabled once. A reset leaves it, so that what a reset disabled stays
	// disabled.
	DefaultsRecord = "microk8s-default-addons"
)

// defaults are enabled when a cluster is made (the default launch configuration, cli.md 8.5).
var defaults = []string{"dns"}

var (
	configMaps = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	services   = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	nodes      = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}

	definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
)

// part is what an addon does beyond its manifests.
type part struct {
	check  func(args []string) error                                     // nil: it takes no arguments
	values func(ctx context.Context, s *Set, args []string) (any, error) // for its manifests
	usage  string                                                        // how its arguments are given, for --help
	notes  []string                                                      // what a person should know, printed by enable
	title  string                                                        // its name in "X is enabled", where it is not the addon's
	needs  func(args []string) []string                                  // addons that must be on before; nil: none
	admit  func(ctx context.Context, s *Set, args []string) error        // what a person's arguments would get in the way of; nil: nothing
	ask    string                                                        // question for its argument, where it is enabled without one
	asks   func(s *Set) question                                         // what it is to answer besides what its objects promise; nil: nothing
}

// parts are the addons that can be enabled.
var parts = map[string]part{
	"cert-manager": {
		values: none, asks: (*Set).issuerWebhook,
		notes: []string{
			"Certificates come from an Issuer or ClusterIssuer that you make: self-signed, a CA of yours, ACME, Vault. There is none for Venafi.",
		},
	},
	"dashboard": {
		check: check(readDashboard), values: values(readDashboard), needs: dashboardNeeds, title: "Dashboard",
		usage: `dashboard [--host NAME]
                the console, the cluster in a browser; with --host at https://NAME, for which
                ingress is enabled too`,
		notes: []string{
			"Everybody logs in with their own rights: microk8s config --user NAME --role view makes a kubeconfig.",
			"Without --host: microk8s kubectl port-forward -n kube-system service/kubernetes-dashboard 10443:443",
			"With your own rights, at once and without this addon: microk8s dashboard-proxy",
		},
	},
	"dns": {
		check: check(readDNS), values: renderDNS, title: "DNS",
		usage: `dns [SERVERS [ADDRESS [DOMAIN]]]
                names of Services and pods; SERVERS, separated by commas, are asked for all
                other names instead of the host's name servers ("" for those); ADDRESS is
                that of the DNS service, DOMAIN the cluster's instead of cluster.local`,
	},
	"hostpath-storage": {
		check: check(readStorage), values: renderStorage,
		usage: `hostpath-storage [-r|--reclaim-policy Delete|Retain] [-d|--default-class true|false] [--pv-dir DIR]...
                volumes in directories of the nodes; with --pv-dir classes may name DIR, too,
                in their parameter pvDir`,
		notes: []string{
			"WARNING: Hostpath storage is not suitable for production environments.",
			"         A hostpath volume can grow beyond the size limit set in the volume claim manifest.",
			"Storage will be available soon.",
		},
	},
	"host-access": {
		check: check(readHostAccess), values: values(readHostAccess), title: "Host-access",
		usage: `host-access [ip=ADDRESS]
                an address (10.0.1.1) by which pods reach programs of their node`,
	},
	"ingress": {
		check: check(readIngress), values: values(readIngress), title: "Ingress",
		usage: `ingress [--default-ssl-certificate ingress/SECRET] [--keep-client-address[=BALANCERS]] [--traefik-arg ARGUMENT]...
                Traefik on ports 80 and 443 of every node; SECRET has the certificate for
                hosts without one of their own; BALANCERS are addresses or networks, with commas
                between, of load balancers in front that pass on the clients' addresses (PROXY
                protocol, X-Forwarded-For); ARGUMENT is one of Traefik's own, kept over upgrades`,
		notes: []string{
			"The controller is Traefik; the usual annotations of ingress-nginx are translated, and those that are not are answered",
			"with a warning when an Ingress is created.",
		},
	},
	"metallb": {
		check: check(readMetallb), values: renderMetallb, admit: admitMetallb, ask: metallbQuestion, title: "MetalLB",
		usage: `metallb:RANGE[,RANGE...], metallb RANGE[,RANGE...] --bgp
                addresses for Services of type LoadBalancer; RANGE is FIRST-LAST or a prefix, of IPv4
                or IPv6; with --bgp they are announced to peers of yours only, not on the network`,
		notes: []string{"Nodes must reach each other at 7946, TCP and UDP."},
	},
	"metrics-server": {values: none, title: "Metrics-Server"},
	"registry": {
		check: check(readRegistry), values: renderRegistry, needs: registryNeeds, title: "The registry",
		usage: `registry [--size 40Gi] [--storageclass CLASS]
                a registry for images at localhost:32000 of every node; hostpath-storage is
                enabled too, unless CLASS is given`,
	},
}

// check makes the check of arguments from the function that reads them.
func check[T any](read func([]string) (T, error)) func([]string) error {
	return func(words []string) error {
		_, err := read(words)
		return err
	}
}

// none are the values of an addon whose manifests have no parameters.
func none(context.Context, *Set, []string) (any, error) { return nil, nil }

// Usages says how the arguments of the addons that take any are given.
func Usages() []string {
	out := []string{`community [URL|PATH] [--reference BRANCH]
                adds the repository of the community's addons, or a clone of it`}
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		if u := parts[name].usage; u != "" {
			out = append(out, u)
		}
	}
	return out
}

// Notes is what a person who enables the addon should know.
func (a Addon) Notes() []string { return a.part().notes }

// Keeps reports whether the addon brings kinds, which stay with all their objects when it is disabled.
func (a Addon) Keeps() bool { return a.Repository == CoreRepository && slices.Contains(kinds, a.Name) }

// kinds are the addons with kinds of their own.
var kinds = []string{"cert-manager", "ingress", "metallb"}

// Question is what to ask a person who enables the addon without arguments, "" for nothing.
func (a Addon) Question() string { return a.part().ask }

// Title is the addon's name in messages.
func (a Addon) Title() string {
	if t := a.part().title; t != "" {
		return t
	}
	return a.Name
}

// Needs returns the core addons that must be on before this one.
func (a Addon) Needs(args []string) []string {
	if needs := a.part().needs; needs != nil {
		return needs(args)
	}
	return nil
}

func (a Addon) part() part {
	if a.Repository != CoreRepository {
		return part{}
	}
	return parts[a.Name]
}

// ArgumentError is an argument that an addon cannot use.
type ArgumentError struct{ what string }

func (e *ArgumentError) Error() string { return e.what }

// Lacking is the error of an addon that is enabled without the arguments which it needs, where nobody can be asked.
func Lacking(a Addon) error {
	return &ArgumentError{"it needs arguments: " + strings.Join(strings.Fields(a.part().usage), " ")}
}

// Set is the addons of one cluster.
type Set struct {
	Env snapenv.Env
	Log *slog.Logger
	// Adopt takes over objects of an addon that others made. Otherwise they are refused with a
	// *bootstrap.ForeignError before anything is applied.
	Adopt bool
	// Online has nodes pull the images of an addon that is in a pack from registries.
	Online bool
	// Everything has Disable delete what stays otherwise, too: kinds with all objects of these, and namespaces.
	Everything bool
	// Declare: what is recorded is also what a person wants, whatever the addon's object asks for.
	Declare bool
	// Left is called for objects that Disable leaves because others made them; nil logs them.
	Left func(bootstrap.Foreign)

	config  *rest.Config
	client  dynamic.Interface
	catalog []Addon
}

// Open reaches the addons of the cluster of cfg. It makes no request.
func Open(env snapenv.Env, cfg *rest.Config, log *slog.Logger) (*Set, error) {
	catalog, _, err := Catalogue(env)
	if err != nil {
		return nil, err
	}
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = 100, 200 // an addon is a few dozen requests to our own machine
	client, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	return &Set{Env: env, Log: log, config: cfg, client: client, catalog: catalog}, nil
}

// Record is what is written down about an addon that is on.
type Record struct {
	Name    string
	Version string
	Args    []string
	// Online: nodes pull its images from registries.
	Online bool

	removing bool
	// everything: when it was disabled, what stays otherwise was to go too.
	everything bool
	applied    string                    // sum of the objects that are in the cluster completely, or ""
	kinds      []schema.GroupVersionKind // of the objects it may have
	// UIDs of the objects that were made for the addon, and of those that were taken over.
	owned, adopted []types.UID
}

// Check says what is wrong with the arguments of an addon, without asking the cluster.
func Check(a Addon, args []string) error {
	p := parts[a.Name]
	if p.check != nil {
		return p.check(args)
	}
	if len(args) > 0 {
		return &ArgumentError{fmt.Sprintf("it takes no arguments, and got %q", args)}
	}
	return nil
}

// Records lists the addons that are on.
func (s *Set) Records(ctx context.Context) ([]Record, error) {
	list, err := s.records().List(ctx, metav1.ListOptions{LabelSelector: RecordLabel})
	if err != nil {
		return nil, fmt.Errorf("cannot find out which addons are enabled: %w", err)
	}
	var out []Record
	for i := range list.Items {
		r, err := readRecord(&list.Items[i])
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// Find returns a core addon by its name.
func (s *Set) Find(name string) (Addon, error) { return s.FindFull(CoreRepository + "/" + name) }

// FindFull returns an addon by repository/name.
func (s *Set) FindFull(name string) (Addon, error) {
	a, _, err := Find(s.catalog, name)
	return a, err
}

// ForeignOn reports whether an addon with hooks is on.
func (s *Set) ForeignOn(ctx context.Context, a Addon) (bool, error) {
	client, err := rest.HTTPClientFor(s.config)
	if err != nil {
		return false, fmt.Errorf("cannot reach the cluster: %w", err)
	}
	get := func(ctx context.Context, path string, into *metav1.PartialObjectMetadataList) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(s.config.Host, "/")+path, nil)
		if err != nil {
			return err
		}
		req.Header.Set("Accept", MetadataOnly)
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", path, resp.Status)
		}
		return json.NewDecoder(resp.Body).Decode(into)
	}
	on, err := CheckForeign(ctx, s.Env, get, []Addon{a})
	if err != nil {
		return false, fmt.Errorf("cannot find out whether %s is enabled: %w", a.FullName(), err)
	}
	return on[a.FullName()], nil
}

// Complete reports whether all objects of the addon have reached the cluster: an enable that was
// interrupted, or refused by the API server, leaves a record without them.
func (r Record) Complete() bool { return r.applied != "" }

// Enabled reports whether an addon is on, and what is written down about it.
func (s *Set) Enabled(ctx context.Context, name string) (r Record, on bool, err error) {
	o, err := s.records().Get(ctx, recordName(name), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return Record{}, false, nil
	}
	if err != nil {
		return Record{}, false, fmt.Errorf("cannot find out whether %s is enabled: %w", name, err)
	}
	r, err = readRecord(o)
	return r, !r.removing, err
}

// Applied is what Enable brought into the cluster.
type Applied struct {
	Objects []*unstructured.Unstructured
	Values  any

	asks func(s *Set) question
}

// Enable turns an addon on, or brings one that is on in line with args and with this version.
func (s *Set) Enable(ctx context.Context, a Addon, args []string) (Applied, error) {
	if admit := a.part().admit; admit != nil {
		if err := admit(ctx, s, args); err != nil {
			return Applied{}, err
		}
	}
	return s.enable(ctx, a, args, s.Online && len(a.Images) > 0, "")
}

// enable does nothing where the objects are those with the sum done.
func (s *Set) enable(ctx context.Context, a Addon, args []string, online bool, done string) (Applied, error) {
	p, ok := parts[a.Name]
	if !ok {
		return Applied{}, fmt.Errorf("cannot enable %s: it is not an addon with manifests", a.FullName())
	}
	values, err := p.values(ctx, s, args)
	if err != nil {
		return Applied{}, err
	}
	objects, err := render(a.dir, values)
	if err != nil {
		return Applied{}, err
	}
	if online {
		if err := pull(a, objects); err != nil {
			return Applied{}, err
		}
	}
	sum, err := sumOf(objects)
	if err != nil {
		return Applied{}, err
	}
	if sum == done {
		return Applied{objects, values, p.asks}, nil
	}
	record := Record{Name: a.Name, Version: a.Version, Args: args, Online: online}
	for _, o := range objects {
		record.add(o.GroupVersionKind())
	}
	old, err := s.records().Get(ctx, recordName(a.Name), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return Applied{}, fmt.Errorf("cannot find out whether %s is enabled: %w", a.Name, err)
	}
	if err == nil {
		before, err := readRecord(old)
		if err != nil {
			return Applied{}, err
		}
		for _, k := range before.kinds {
			record.add(k)
		}
		record.owned, record.adopted = before.owned, before.adopted
	}
	set := bootstrap.Set{Label: Label, Value: a.Name, Objects: objects, Kinds: record.kinds, Owned: record.owned, Adopted: record.adopted, Adopt: s.Adopt}
	stay, err := bootstrap.Check(ctx, s.config, set, s.Log)
	if err != nil {
		return Applied{}, err
	}
	record.adopted = union(record.adopted, stay)
	set.Adopted = record.adopted
	if err := s.write(ctx, record); err != nil {
		return Applied{}, err
	}
	result, err := bootstrap.Sync(ctx, s.config, set, s.Log)
	if err != nil {
		// What was taken over must be known as others' before the next attempt.
		record.owned, record.adopted = union(record.owned, result.Owned), union(record.adopted, result.Adopted)
		return Applied{}, errors.Join(err, s.write(context.WithoutCancel(ctx), record))
	}
	s.left(result.Left)
	record.applied, record.owned, record.adopted = sum, result.Owned, result.Adopted
	return Applied{objects, values, p.asks}, s.write(ctx, record)
}

func union(a, b []types.UID) []types.UID {
	out := slices.Clone(a)
	for _, uid := range b {
		if !slices.Contains(out, uid) {
			out = append(out, uid)
		}
	}
	return out
}

func (s *Set) left(objects []bootstrap.Foreign) {
	for _, o := range objects {
		if s.Left != nil {
			s.Left(o)
			continue
		}
		s.Log.Warn("an object of an addon was left, because others made it", "object", o.Object, "owner", o.Owner)
	}
}

// Disable turns an addon off and removes the objects that were made for it. One that is off stays so.
func (s *Set) Disable(ctx context.Context, name string) error {
	o, err := s.records().Get(ctx, recordName(name), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		s.Show(ctx, name)
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot find out whether %s is enabled: %w", name, err)
	}
	record, err := readRecord(o)
	if err != nil {
		return err
	}
	record.removing, record.applied, record.everything = true, "", record.everything || s.Everything
	if err := s.write(ctx, record); err != nil {
		return err
	}
	set := bootstrap.Set{Label: Label, Value: name, Kinds: record.kinds, Owned: record.owned, Adopted: record.adopted, Everything: record.everything}
	if record.everything {
		if err := s.deleteKinds(ctx, set); err != nil {
			return err
		}
	}
	result, err := bootstrap.Sync(ctx, s.config, set, s.Log)
	if err != nil {
		return err
	}
	s.left(result.Left)
	err = s.records().Delete(ctx, recordName(name), metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("cannot record that %s is disabled: %w", name, err)
	}
	s.Show(ctx, name)
	return nil
}

// kindsGone bounds the wait for the end of kinds, whose objects may have to be finished by the addon's own pods.
const kindsGone = time.Minute

// deleteKinds deletes the kinds that an addon brought, and waits until they are gone: as long as there are objects of theirs, the
// addon's pods must run, which finish these.
func (s *Set) deleteKinds(ctx context.Context, set bootstrap.Set) error {
	set.Kinds = []schema.GroupVersionKind{definitions.GroupVersion().WithKind("CustomResourceDefinition")}
	if _, err := bootstrap.Sync(ctx, s.config, set, s.Log); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, kindsGone)
	defer cancel()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		list, err := s.client.Resource(definitions).List(ctx, metav1.ListOptions{LabelSelector: Label + "=" + set.Value})
		var ending []string
		if err == nil {
			for i := range list.Items {
				if list.Items[i].GetDeletionTimestamp() != nil {
					ending = append(ending, list.Items[i].GetName())
				}
			}
			if len(ending) == 0 {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("kinds that are deleted are not gone, because objects of theirs have finalizers: %s", strings.Join(ending, ", "))
		}
	}
}

// Reconcile brings the cluster in line with what is written down; on a cluster that was just
// made it first enables the default addons. It goes on after an addon that failed. All objects of addons are there then.
func (s *Set) Reconcile(ctx context.Context) error {
	defer s.Publish(ctx)
	fresh, err := s.enableDefaults(ctx)
	if err != nil {
		return err
	}
	records, err := s.Records(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range records {
		if r.removing {
			errs = append(errs, s.Disable(ctx, r.Name))
			continue
		}
		a, _, err := Find(s.catalog, CoreRepository+"/"+r.Name)
		if err != nil {
			s.Log.Warn("an enabled addon is not part of this version; its objects are left as they are", "addon", r.Name)
			continue
		}
		if missing := Missing(s.Env, a); len(missing) > 0 && !r.Online && r.Version != a.Version {
			s.Log.Warn("an addon stays at its version, because the pack of the new one is not on this node; import it with: microk8s addons import FILE",
				"addon", a.Name, "version", r.Version, "new_version", a.Version, "images", missing)
			continue
		}
		_, err = s.enable(ctx, a, r.Args, r.Online, r.applied)
		var theirs *bootstrap.ForeignError
		if errors.As(err, &theirs) && slices.Contains(fresh, r.Name) {
			s.Log.Warn("a default addon is not enabled, because its objects are there already; take them over with: microk8s enable "+r.Name+" --adopt", "reason", err)
			err = s.records().Delete(ctx, recordName(r.Name), metav1.DeleteOptions{})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("addon %s: %w", r.Name, err))
		}
	}
	return errors.Join(errs...)
}

// enableDefaults writes the records of the default addons, once in the life of a cluster.
// Reconcile does the rest. It
// returns the names of those that it wrote.
func (s *Set) enableDefaults(ctx context.Context) (fresh []string, err error) {
	_, err = s.records().Get(ctx, DefaultsRecord, metav1.GetOptions{})
	if err == nil {
		return nil, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("cannot find out whether the default addons were enabled: %w", err)
	}
	// A user's own launch configuration says what is to be on; the cluster agent sees to it.
	names := defaults
	for _, file := range []string{s.Env.LaunchFile(snapenv.LaunchInstall), s.Env.LaunchFile(snapenv.LaunchInstall + ".applied")} {
		if _, err := os.Lstat(file); err == nil {
			names = nil
		}
	}
	for _, name := range names {
		a, _, err := Find(s.catalog, CoreRepository+"/"+name)
		if err != nil {
			return nil, err
		}
		if _, on, err := s.Enabled(ctx, name); err != nil {
			return nil, err
		} else if on {
			continue // by a person, whose arguments count
		}
		if err := s.write(ctx, Record{Name: a.Name, Version: a.Version}); err != nil {
			return nil, err
		}
		fresh = append(fresh, name)
	}
	return fresh, s.apply(ctx, configMap(DefaultsRecord, nil, map[string]string{"enabled": "true"}))
}

// render fills the manifests of a folder with values and reads them.
func render(dir string, values any) ([]*unstructured.Unstructured, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no manifests in %s; the installation is damaged, reinstall it", dir)
	}
	var out []*unstructured.Unstructured
	for _, file := range files {
		t, err := template.New(filepath.Base(file)).Option("missingkey=error").ParseFiles(file)
		if err != nil {
			return nil, fmt.Errorf("cannot read the manifest: %w", err)
		}
		var text bytes.Buffer
		if err := t.Execute(&text, values); err != nil {
			return nil, fmt.Errorf("cannot fill the manifest: %w", err)
		}
		objects, err := bootstrap.Decode(&text, file)
		if err != nil {
			return nil, err
		}
		out = append(out, objects...)
	}
	return out, renewPods(out)
}

// configurationAnnotation is on the pods of an addon; its value changes with the addon's
// ConfigMaps, so that pods are renewed when these change.
const configurationAnnotation = "microk8s.io/configuration"

// sumOf changes with anything in the objects.
func sumOf(objects []*unstructured.Unstructured) (string, error) {
	sum := sha256.New()
	for _, o := range objects {
		data, err := o.MarshalJSON()
		if err != nil {
			return "", err
		}
		sum.Write(data)
	}
	return hex.EncodeToString(sum.Sum(nil)[:16]), nil
}

func renewPods(objects []*unstructured.Unstructured) error {
	sum := sha256.New()
	found := false
	for _, o := range objects {
		if o.GetKind() == "ConfigMap" {
			data, err := json.Marshal(o.Object["data"])
			if err != nil {
				return err
			}
			sum.Write(data)
			found = true
		}
	}
	if !found {
		return nil
	}
	for _, o := range objects {
		if _, ok := workloads[o.GetKind()]; !ok {
			continue
		}
		err := unstructured.SetNestedField(o.Object, hex.EncodeToString(sum.Sum(nil)[:8]),
			"spec", "template", "metadata", "annotations", configurationAnnotation)
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) records() dynamic.ResourceInterface {
	return s.client.Resource(configMaps).Namespace(metav1.NamespaceSystem)
}

func recordName(addon string) string { return "microk8s-addon-" + addon }

func (r *Record) add(k schema.GroupVersionKind) {
	if !slices.Contains(r.kinds, k) {
		r.kinds = append(r.kinds, k)
	}
}

// form is a record as JSON, in the ConfigMap's key "record".
type form struct {
	Version    string   `json:"version"`
	Args       []string `json:"arguments"`
	Online     bool     `json:"online,omitempty"`
	Removing   bool     `json:"removing,omitempty"`
	Everything bool     `json:"everything,omitempty"`
	Applied    string   `json:"applied,omitempty"`
	Kinds      []kind   `json:"kinds"`

	Owned   []types.UID `json:"owned,omitempty"`
	Adopted []types.UID `json:"adopted,omitempty"`
}

type kind struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

func (s *Set) write(ctx context.Context, r Record) error {
	f := form{Version: r.Version, Args: r.Args, Online: r.Online, Removing: r.removing, Everything: r.everything, Applied: r.applied, Owned: r.owned, Adopted: r.adopted}
	for _, k := range r.kinds {
		version, name := k.ToAPIVersionAndKind()
		f.Kinds = append(f.Kinds, kind{version, name})
	}
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	err = s.apply(ctx, configMap(recordName(r.Name), map[string]string{RecordLabel: r.Name}, map[string]string{"record": string(data)}))
	if err == nil {
		s.Show(ctx, r.Name)
	}
	return err
}

func readRecord(o *unstructured.Unstructured) (Record, error) {
	text, _, _ := unstructured.NestedString(o.Object, "data", "record")
	return parseRecord(o.GetName(), o.GetLabels()[RecordLabel], text)
}

// RecordOf reads what a ConfigMap with RecordLabel says about an addon.
func RecordOf(cm *corev1.ConfigMap) (Record, error) {
	return parseRecord(cm.Name, cm.Labels[RecordLabel], cm.Data["record"])
}

func parseRecord(object, name, text string) (Record, error) {
	var f form
	if err := json.Unmarshal([]byte(text), &f); err != nil {
		return Record{}, fmt.Errorf("cannot read the record of an addon, ConfigMap kube-system/%s: %w; delete it and enable the addon again", object, err)
	}
	r := Record{Name: name, Version: f.Version, Args: f.Args, Online: f.Online, removing: f.Removing, everything: f.Everything, applied: f.Applied, owned: f.Owned, adopted: f.Adopted}
	for _, k := range f.Kinds {
		r.add(schema.FromAPIVersionAndKind(k.APIVersion, k.Kind))
	}
	return r, nil
}

func configMap(name string, labels, data map[string]string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{}
	o.SetAPIVersion("v1")
	o.SetKind("ConfigMap")
	o.SetNamespace(metav1.NamespaceSystem)
	o.SetName(name)
	o.SetLabels(labels)
	_ = unstructured.SetNestedStringMap(o.Object, data, "data")
	return o
}

func (s *Set) apply(ctx context.Context, o *unstructured.Unstructured) error {
	_, err := s.records().Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: bootstrap.FieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("cannot write ConfigMap kube-system/%s: %w", o.GetName(), err)
	}
	return nil
}
