// Package dqlitetool is the program `dqlite`: it asks the members of a dqlite cluster, and
// their database, in the forms of upstream's tool, which scripts parse.
//
// It talks to members over their own port and needs the cluster's key pair. Rewriting a
// stopped member's files needs the C library and is passed in.
package dqlitetool

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"microk8s/internal/datastore/peers"

	"github.com/canonical/go-dqlite/v3/client"
	dqdriver "github.com/canonical/go-dqlite/v3/driver"
	"github.com/spf13/cobra"
)

// Reconfigure rewrites the membership in the files of a stopped member.
type Reconfigure func(dir string, members []client.NodeInfo) error

type options struct {
	servers   []string
	cert, key string
	format    string
	timeout   uint // milliseconds
	write     bool

	reconfigure Reconfigure
	out         io.Writer
	store       client.NodeStore
	dial        client.DialFunc
}

// NewCommand returns the program.
func NewCommand(reconfigure Reconfigure) *cobra.Command {
	o := &options{reconfigure: reconfigure}
	cmd := &cobra.Command{
		Use:   "dqlite -s SERVERS [-c CERT -k KEY] DATABASE COMMAND",
		Short: "Ask the members of a dqlite cluster, and their database",
		Long: `Ask the members of a dqlite cluster, and their database. SERVERS is file://PATH of a
cluster.yaml, or addresses with commas between. The database of microk8s is k8s. Commands,
each one argument, several with semicolons between:

  .cluster                      the members
  .leader                       the leader's address
  .describe ADDRESS             failure domain and weight of a member
  .weight ADDRESS N             set the weight of a member
  .remove ADDRESS               remove a member
  .transfer ADDRESS             move leadership to a voter
  .dump ADDRESS [DATABASE]      write the files of the database to the current directory
  .reconfigure DIR CLUSTERYAML  rewrite the membership in the files of a stopped member
  SELECT …                      any statement of SQL that only reads`,
		Args:          cobra.ExactArgs(2),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.out = cmd.OutOrStdout()
			if err := o.prepare(); err != nil {
				return err
			}
			for _, input := range strings.Split(args[1], ";") {
				if input = strings.TrimSpace(input); input == "" {
					continue
				}
				ctx, cancel := context.WithTimeout(cmd.Context(), time.Duration(o.timeout)*time.Millisecond)
				answer, err := o.process(ctx, args[0], input)
				cancel()
				if err != nil {
					return err
				}
				if answer != "" {
					fmt.Fprintln(o.out, answer)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringSliceVarP(&o.servers, "servers", "s", nil, "addresses with commas between, or file://PATH of a cluster.yaml")
	cmd.Flags().StringVarP(&o.cert, "cert", "c", "", "the cluster's certificate")
	cmd.Flags().StringVarP(&o.key, "key", "k", "", "the cluster's key")
	cmd.Flags().StringVarP(&o.format, "format", "f", "tabular", "tabular or json")
	cmd.Flags().UintVar(&o.timeout, "timeout", 2000, "limit of each command, in milliseconds")
	cmd.Flags().BoolVar(&o.write, "write", false, "allow SQL that writes: the datastore does not expect it, and its daemon must be restarted")
	_ = cmd.MarkFlagRequired("servers")
	cmd.CompletionOptions.DisableDefaultCmd = true
	return cmd
}

func (o *options) prepare() error {
	if o.format != "tabular" && o.format != "json" {
		return fmt.Errorf("unknown format %s: it must be tabular or json", o.format)
	}
	if (o.cert == "") != (o.key == "") {
		return errors.New("both the certificate and the key must be given, or neither")
	}
	if len(o.servers) == 0 {
		return errors.New("no servers were given: use -s file://…/cluster.yaml, or addresses")
	}
	if path, ok := strings.CutPrefix(o.servers[0], "file://"); ok {
		if len(o.servers) > 1 {
			return errors.New("a file and addresses cannot both be given")
		}
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("cannot read the list of members: %w", err)
		}
		store, err := client.NewYamlNodeStore(path)
		if err != nil {
			return fmt.Errorf("cannot read the list of members: %w", err)
		}
		o.store = store
	} else {
		var nodes []client.NodeInfo
		for _, a := range o.servers {
			nodes = append(nodes, client.NodeInfo{Address: a})
		}
		store := client.NewInmemNodeStore()
		if err := store.Set(context.Background(), nodes); err != nil {
			return err
		}
		o.store = store
	}
	o.dial = client.DefaultDialFunc
	if o.cert == "" {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(o.cert, o.key)
	if err != nil {
		return fmt.Errorf("cannot read the key pair: %w", err)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return fmt.Errorf("cannot read the certificate: %w", err)
	}
	if len(leaf.DNSNames) == 0 {
		return fmt.Errorf("%s has no DNS name, so members cannot be recognised by it", o.cert)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	o.dial = client.DialFuncWithTLS(client.DefaultDialFunc, &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: leaf.DNSNames[0],
	})
	return nil
}

// process carries out one command and gives what is printed.
func (o *options) process(ctx context.Context, database, input string) (string, error) {
	words := strings.Fields(input)
	args := words[1:]
	usage := func(lowest, highest int, form string) error {
		if len(args) < lowest || len(args) > highest {
			return fmt.Errorf("it must be: %s %s", words[0], form)
		}
		return nil
	}
	switch strings.ToLower(words[0]) {
	case ".cluster":
		return o.cluster(ctx)
	case ".leader":
		return o.leader(ctx)
	case ".remove":
		if err := usage(1, 1, "ADDRESS"); err != nil {
			return "", err
		}
		return "", o.remove(ctx, args[0])
	case ".transfer":
		if err := usage(1, 1, "ADDRESS"); err != nil {
			return "", err
		}
		return "", o.transfer(ctx, args[0])
	case ".describe":
		if err := usage(1, 1, "ADDRESS"); err != nil {
			return "", err
		}
		return o.describe(ctx, args[0])
	case ".weight":
		if err := usage(2, 2, "ADDRESS N"); err != nil {
			return "", err
		}
		return "", o.weight(ctx, args[0], args[1])
	case ".dump":
		if err := usage(1, 2, "ADDRESS [DATABASE]"); err != nil {
			return "", err
		}
		return o.dump(ctx, args[0], append(args[1:], "db.bin")[0])
	case ".reconfigure":
		if err := usage(2, 2, "DIR CLUSTERYAML"); err != nil {
			return "", err
		}
		store, err := client.NewYamlNodeStore(args[1])
		if err != nil {
			return "", fmt.Errorf("cannot read %s: %w", args[1], err)
		}
		members, err := store.Get(ctx)
		if err != nil || len(members) == 0 {
			return "", fmt.Errorf("%s lists no members: %w", args[1], err)
		}
		if err := o.reconfigure(args[0], members); err != nil {
			return "", fmt.Errorf("cannot rewrite the membership in %s: %w", args[0], err)
		}
		return "OK", nil
	}
	if strings.HasPrefix(words[0], ".") {
		return "", fmt.Errorf("there is no command %s; see: dqlite --help", words[0])
	}
	return o.query(ctx, database, input)
}

func (o *options) findLeader(ctx context.Context) (*client.Client, error) {
	c, err := client.FindLeader(ctx, o.store, client.WithDialFunc(o.dial), client.WithLogFunc(quiet))
	if err != nil {
		var tried []string
		nodes, _ := o.store.Get(ctx)
		for _, n := range nodes {
			tried = append(tried, n.Address)
		}
		return nil, fmt.Errorf("no leader was found, asking %s: %w; are a majority of the voters running, and is this their key pair?", strings.Join(tried, ", "), err)
	}
	return c, nil
}

func quiet(client.LogLevel, string, ...any) {}

func (o *options) connect(ctx context.Context, address string) (*client.Client, error) {
	c, err := client.New(ctx, address, client.WithDialFunc(o.dial), client.WithLogFunc(quiet))
	if err != nil {
		return nil, fmt.Errorf("cannot reach %s: %w", address, err)
	}
	return c, nil
}

func indented(v any) (string, error) {
	data, err := json.MarshalIndent(v, "", "\t")
	return string(data), err
}

func (o *options) cluster(ctx context.Context) (string, error) {
	c, err := o.findLeader(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	members, err := c.Cluster(ctx)
	if err != nil {
		return "", fmt.Errorf("cannot list the members: %w", err)
	}
	if o.format == "json" {
		return indented(members)
	}
	var lines []string
	for _, m := range members {
		lines = append(lines, fmt.Sprintf("%x|%s|%s", m.ID, m.Address, m.Role))
	}
	return strings.Join(lines, "\n"), nil
}

func (o *options) leader(ctx context.Context) (string, error) {
	c, err := o.findLeader(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	leader, err := c.Leader(ctx)
	if err != nil || leader == nil {
		return "", fmt.Errorf("the leader is gone: %w", err)
	}
	return leader.Address, nil
}

func (o *options) remove(ctx context.Context, address string) error {
	return peers.RemoveFrom(ctx, o.store, o.dial, address)
}

// transfer moves leadership to the voter with an address.
func (o *options) transfer(ctx context.Context, address string) error {
	c, err := o.findLeader(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	members, err := c.Cluster(ctx)
	if err != nil {
		return fmt.Errorf("cannot list the members: %w", err)
	}
	for _, m := range members {
		if m.Address == address {
			if err := c.Transfer(ctx, m.ID); err != nil {
				return fmt.Errorf("cannot move leadership to %s: %w", address, err)
			}
			return nil
		}
	}
	return fmt.Errorf("no member has the address %q", address)
}

func (o *options) describe(ctx context.Context, address string) (string, error) {
	c, err := o.connect(ctx, address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	m, err := c.Describe(ctx)
	if err != nil {
		return "", fmt.Errorf("cannot ask %s: %w", address, err)
	}
	if o.format == "json" {
		return indented(m)
	}
	return fmt.Sprintf("%s|%d|%d", address, m.FailureDomain, m.Weight), nil
}

func (o *options) weight(ctx context.Context, address, weight string) error {
	n, err := strconv.ParseUint(weight, 10, 63)
	if err != nil {
		return fmt.Errorf("the weight %q is not a whole number", weight)
	}
	c, err := o.connect(ctx, address)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Weight(ctx, n); err != nil {
		return fmt.Errorf("cannot set the weight of %s: %w", address, err)
	}
	return nil
}

func (o *options) dump(ctx context.Context, address, database string) (string, error) {
	c, err := o.connect(ctx, address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	files, err := c.Dump(ctx, database)
	if err != nil {
		return "", fmt.Errorf("cannot dump %s of %s: %w", database, address, err)
	}
	for _, f := range files {
		// The names come from the other side.
		if err := os.WriteFile(filepath.Base(f.Name), f.Data, 0o600); err != nil {
			return "", fmt.Errorf("cannot write the dump: %w", err)
		}
	}
	return "OK", nil
}

func (o *options) query(ctx context.Context, database, sql string) (string, error) {
	d, err := dqdriver.New(o.store, dqdriver.WithDialFunc(o.dial), dqdriver.WithLogFunc(quiet))
	if err != nil {
		return "", err
	}
	connector, err := d.OpenConnector(database)
	if err != nil {
		return "", err
	}
	connected, err := connector.Connect(ctx)
	if err != nil {
		return "", fmt.Errorf("cannot open the database %s: %w", database, err)
	}
	defer connected.Close()
	conn := connected.(*dqdriver.Conn)
	if !o.write {
		if _, err := conn.ExecContext(ctx, "PRAGMA query_only = 1", nil); err != nil {
			return "", fmt.Errorf("cannot make the connection read-only: %w", err)
		}
		if first := strings.ToUpper(strings.Fields(sql)[0]); first != "SELECT" && first != "WITH" && first != "EXPLAIN" && first != "VALUES" {
			return "", fmt.Errorf("%s may write, which the running datastore does not expect; use its etcd API, or --write if you know better", first)
		}
	}
	rows, err := conn.QueryContext(ctx, sql, nil)
	if err != nil {
		return "", fmt.Errorf("query: %w", err)
	}
	defer rows.Close()
	columns := rows.Columns()
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 8, 1, '\t', 0)
	for _, c := range columns {
		fmt.Fprintf(w, "%s\t", c)
	}
	fmt.Fprintln(w)
	objects := []map[string]any{}
	values := make([]driver.Value, len(columns))
	for {
		err := rows.Next(values)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", fmt.Errorf("rows: %w", err)
		}
		object := map[string]any{}
		for i, v := range values {
			fmt.Fprintf(w, "%v\t", v)
			object[columns[i]] = v
		}
		fmt.Fprintln(w)
		objects = append(objects, object)
	}
	if o.format == "json" {
		return indented(objects)
	}
	if err := w.Flush(); err != nil {
		return "", err
	}
	return strings.TrimRight(table.String(), "\n"), nil
}
