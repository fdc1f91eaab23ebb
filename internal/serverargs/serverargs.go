// Package serverargs is about the arguments of kube-apiserver in which all control-plane nodes of a
// cluster must agree, and the files that they name: reading them on one node, writing them on a
// node that joins, and comparing nodes. Where two API servers encrypt with different keys, issue
// tokens under different names or admit different things, a request succeeds or fails by which one
// it reaches.
//
// What depends on the machine (addresses, certificates, the datastore) is not in it.
package serverargs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"microk8s/internal/args"
	"microk8s/internal/encryption"
	"microk8s/internal/fileaccess"
	"microk8s/internal/nodeconfig"
	"microk8s/internal/snapenv"
)

// service is the name of the argument file.
const service = "kube-apiserver"

// values are flags whose value must be the same.
var values = []string{
	"service-account-issuer", "service-account-jwks-uri", "service-account-max-token-expiration", "service-account-extend-token-expiration", "service-account-lookup", "api-audiences",
	"oidc-issuer-url", "oidc-client-id", "oidc-username-claim", "oidc-username-prefix", "oidc-groups-claim", "oidc-groups-prefix", "oidc-required-claim", "oidc-signing-algs",
	"anonymous-auth", "feature-gates", "runtime-config", "emulated-version", "min-compatibility-version", "storage-media-type",
	"enable-admission-plugins", "disable-admission-plugins", "admission-control", "allow-privileged",
	"authorization-mode", "authorization-webhook-version", "authorization-webhook-cache-authorized-ttl", "authorization-webhook-cache-unauthorized-ttl", "authentication-token-webhook-version", "authentication-token-webhook-cache-ttl",
	"requestheader-allowed-names", "requestheader-extra-headers-prefix", "requestheader-group-headers", "requestheader-username-headers", "requestheader-uid-headers",
	"audit-log-path", "audit-log-maxage", "audit-log-maxbackup", "audit-log-maxsize", "audit-log-compress", "audit-log-format", "audit-log-mode", "audit-webhook-mode",
	"default-not-ready-toleration-seconds", "default-unreachable-toleration-seconds", "event-ttl", "encryption-provider-config-automatic-reload",
}

// files are flags that name a file, whose content must be the same.
var files = []string{
	encryption.Flag, "audit-policy-file", "audit-webhook-config-file", "authentication-config", "authorization-config", "admission-control-config-file",
	"authentication-token-webhook-config-file", "authorization-webhook-config-file", "oidc-ca-file", "egress-selector-config-file", "tracing-config-file",
	"service-account-key-file", "service-account-signing-key-file", "token-auth-file",
}

// Limits of what another node sends.
const (
	maxFile  = 512 << 10
	maxFiles = 32
)

// File is a file that an argument names.
type File struct {
	Flag string `json:"flag"`
	// Name is where it is on every node: as the argument says it, with ${SNAP_DATA} in front. A
	// file elsewhere is carried into [Folder] under its last element.
	Name    string `json:"name"`
	Content string `json:"content"`
	// Beside: named by another file (an admission plugin's configuration), not by the argument.
	Beside bool `json:"beside,omitempty"`
}

// Set is the arguments of one API server.
type Set struct {
	Flags map[string][]string `json:"flags"` // as they are written, variables unexpanded
	Files []File              `json:"files,omitempty"`
	// Keep are flags that the joining node has the same already, and that cannot be carried.
	Keep []string `json:"keep,omitempty"`
}

// Folder is where carried files are that were in no folder of the product.
const Folder = "${SNAP_DATA}/args/cluster/"

// Problem is an argument that a join cannot carry.
type Problem struct {
	Flag, Why string
}

func (p Problem) String() string { return "--" + p.Flag + ": " + p.Why }

// Read returns the arguments of this node that must agree, and those that cannot be carried to
// another one. The error is that of the argument file.
func Read(env snapenv.Env) (*Set, []Problem, error) {
	f, err := args.Load(env.Args(service), args.GrammarFor(service))
	if err != nil {
		return nil, nil, err
	}
	s := &Set{Flags: map[string][]string{}}
	var problems []Problem
	for _, flag := range values {
		if v := raw(f, flag); len(v) > 0 {
			s.Flags[flag] = v
		}
	}
	for _, flag := range files {
		written := raw(f, flag)
		if len(written) == 0 {
			continue
		}
		if ownKey(written) {
			continue // carried with the certificates
		}
		if len(written) > 1 {
			problems = append(problems, Problem{flag, "it is set more than once"})
			continue
		}
		path, _ := f.Value(flag, env.Lookup)
		path = strings.Trim(path, `"'`)
		if path == "" {
			continue
		}
		content, err := readFile(path)
		if err != nil {
			problems = append(problems, Problem{flag, err.Error()})
			continue
		}
		name := carriedName(written[0], path)
		s.Flags[flag] = []string{name}
		more, text, problem := referred(flag, name, path, content)
		if problem != "" {
			problems = append(problems, Problem{flag, problem})
		}
		s.Files = append(s.Files, File{Flag: flag, Name: name, Content: text})
		s.Files = append(s.Files, more...)
	}
	return s, problems, nil
}

// raw returns the values of a flag as they are written, without quotes.
func raw(f *args.File, flag string) []string {
	same := func(name string) (string, bool) { return "${" + name + "}", true }
	out := f.Values(flag, same)
	for i := range out {
		out[i] = strings.Trim(out[i], `"'`)
	}
	return out
}

// ownKey reports whether all the files are among the node's certificates, which a join writes.
func ownKey(written []string) bool {
	return !slices.ContainsFunc(written, func(w string) bool {
		return w != "${SNAP_DATA}/certs/serviceaccount.key"
	})
}

func readFile(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("%s does not exist", path)
		}
		return "", err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFile {
		return "", fmt.Errorf("%s is not a file of at most %d bytes", path, maxFile)
	}
	data, err := os.ReadFile(path)
	return string(data), err
}

// carriedName is where a file of another node is on this one.
func carriedName(written, path string) string {
	if rest, ok := strings.CutPrefix(written, "${SNAP_DATA}/"); ok && filepath.IsLocal(rest) && carriedPlace(rest) {
		return written
	}
	return Folder + filepath.Base(path)
}

// referred finds the files that a file names in turn. The plugins' files of an admission
// configuration are carried beside it; what else is named cannot be.
func referred(flag, name, path, content string) (more []File, text, problem string) {
	switch flag {
	case "admission-control-config-file":
		var c struct {
			Plugins []struct {
				Path string `json:"path"`
			} `json:"plugins"`
		}
		if err := yaml.Unmarshal([]byte(content), &c); err != nil {
			return nil, content, "it cannot be read: " + err.Error()
		}
		for _, p := range c.Plugins {
			if p.Path == "" {
				continue
			}
			from := p.Path
			if !filepath.IsAbs(from) {
				from = filepath.Join(filepath.Dir(path), from)
			}
			data, err := readFile(from)
			if err != nil {
				return nil, content, err.Error()
			}
			beside := p.Path
			if beside != filepath.Base(beside) {
				beside = filepath.Base(p.Path)
				content = strings.ReplaceAll(content, p.Path, beside)
			}
			more = append(more, File{Flag: flag, Name: filepath.Dir(name) + "/" + beside, Content: data, Beside: true})
		}
		return more, content, ""
	case encryption.Flag:
		if strings.Contains(content, "kms:") {
			return nil, content, "it names a KMS plugin, which must run on the joining machine; start it there, then set the same argument and file by hand"
		}
	case "audit-webhook-config-file", "authentication-token-webhook-config-file", "authorization-webhook-config-file", "egress-selector-config-file", "authorization-config":
		for _, key := range []string{"certificate-authority:", "client-certificate:", "client-key:", "tokenFile:", "caBundle:", "clientKey:", "clientCert:", "kubeConfigFile:"} {
			if strings.Contains(content, key) {
				return nil, content, "the file names others (" + strings.TrimSuffix(key, ":") + "); write their content into it (" + strings.TrimSuffix(key, ":") + "-data), or put them on the joining machine by hand"
			}
		}
	}
	return nil, content, ""
}

// Check refuses what no control-plane node would send.
func (s *Set) Check() error {
	known := slices.Concat(values, files)
	for flag, list := range s.Flags {
		if !slices.Contains(known, flag) {
			return fmt.Errorf("the argument --%s is not one that is carried", flag)
		}
		for _, v := range list {
			if strings.ContainsAny(v, "`\x00\n\r") || strings.Contains(v, "$(") {
				return fmt.Errorf("the value of --%s has characters that no argument has", flag)
			}
		}
	}
	if len(s.Files) > maxFiles {
		return fmt.Errorf("%d files are more than any API server has", len(s.Files))
	}
	for _, f := range s.Files {
		rest, ok := strings.CutPrefix(f.Name, "${SNAP_DATA}/")
		if !ok || !filepath.IsLocal(rest) || !slices.Contains(files, f.Flag) || len(f.Content) > maxFile || !carriedPlace(rest) {
			return fmt.Errorf("%q is not a place for a file of --%s", f.Name, f.Flag)
		}
	}
	return nil
}

// carriedPlace reports whether a file may be written there: beside the arguments, or the
// encryption configuration in the datastore's folder. Argument files themselves are not carried.
func carriedPlace(rest string) bool {
	if rest == "var/kubernetes/backend/"+encryption.FileName || strings.HasPrefix(rest, "args/cluster/") {
		return true
	}
	name, ok := strings.CutPrefix(rest, "args/")
	return ok && !strings.Contains(name, "/") && (strings.HasSuffix(name, ".yaml") || strings.HasSuffix(name, ".yml") || strings.HasSuffix(name, ".json") || strings.HasSuffix(name, ".conf") || strings.HasSuffix(name, ".csv"))
}

// Carries reports whether a file of the folder args, by its name, may have come with a join.
func Carries(name string) bool { return carriedPlace("args/" + name) }

// Write makes the arguments of this node the given ones: flags that are not among them are removed.
// It returns the flags that changed. The encryption configuration is not written where elsewhere is
// set: its caller keeps it with the datastore's folder, which is set aside and made new by a join.
func (s *Set) Write(env snapenv.Env, elsewhere string) (changed []string, err error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	access := fileaccess.For(env)
	for _, file := range s.Files {
		path := expand(env, file.Name)
		if slices.Contains(s.Keep, file.Flag) {
			continue
		}
		if file.Flag == encryption.Flag && path == elsewhere {
			continue
		}
		if old, err := os.ReadFile(path); err == nil && string(old) == file.Content {
			continue
		}
		if err := access.SharedDir(filepath.Dir(path)); err != nil {
			return nil, err
		}
		if err := access.WriteSecret(path, []byte(file.Content)); err != nil { // it may have a token or a key in it
			return nil, err
		}
		if !slices.Contains(changed, file.Flag) {
			changed = append(changed, file.Flag)
		}
	}
	_, err = nodeconfig.Edit(env, service, func(f *args.File) error {
		more, err := s.set(f)
		changed = append(changed, more...)
		return err
	})
	slices.Sort(changed)
	return slices.Compact(changed), err
}

// set sets the flags that are not what they should be, and returns their names.
func (s *Set) set(f *args.File) (changed []string, err error) {
	for _, flag := range slices.Concat(values, files) {
		old, want := raw(f, flag), s.Flags[flag]
		if slices.Contains(s.Keep, flag) || slices.Equal(old, want) || len(want) == 0 && ownKey(old) && slices.Contains(files, flag) {
			continue
		}
		if err := f.SetAll(flag, want); err != nil {
			return nil, err
		}
		changed = append(changed, flag)
	}
	return changed, nil
}

func expand(env snapenv.Env, name string) string {
	return filepath.Join(env.Data, strings.TrimPrefix(name, "${SNAP_DATA}/"))
}

// Encryption returns the carried encryption configuration; nil where the cluster has none.
func (s *Set) Encryption() *File {
	for i := range s.Files {
		if s.Files[i].Flag == encryption.Flag {
			return &s.Files[i]
		}
	}
	return nil
}

// Reconcile returns the problems that stand in the way of a node whose arguments have these digests:
// those in which it differs. The others are left on the node as they are.
func (s *Set) Reconcile(problems []Problem, theirs map[string]string) (left []Problem) {
	own := s.Digests()
	for _, p := range problems {
		if d, read := own[p.Flag]; read && theirs[p.Flag] == d {
			s.Keep = append(s.Keep, p.Flag)
			continue
		}
		left = append(left, p)
	}
	return left
}

// Digests returns a digest of each argument with the content of its files: enough to see that two
// nodes differ in it, and nothing else.
func (s *Set) Digests() map[string]string {
	out := map[string]string{}
	for flag, list := range s.Flags {
		var b bytes.Buffer
		if slices.Contains(files, flag) {
			for _, f := range s.Files {
				if f.Flag == flag {
					fmt.Fprintf(&b, "%q\n", f.Content)
				}
			}
		} else {
			sorted := slices.Clone(list)
			for i := range sorted {
				if flag != "service-account-issuer" { // the first one signs
					parts := strings.Split(sorted[i], ",")
					slices.Sort(parts)
					sorted[i] = strings.Join(parts, ",")
				}
			}
			fmt.Fprintf(&b, "%q\n", sorted)
		}
		sum := sha256.Sum256(b.Bytes())
		out[flag] = hex.EncodeToString(sum[:6])
	}
	return out
}
