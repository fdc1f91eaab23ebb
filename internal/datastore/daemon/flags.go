package daemon

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"microk8s/internal/datastore/engine"
	"microk8s/internal/datastore/migrator"
	"microk8s/internal/datastore/server"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Config is what the flags say.
type Config struct {
	StorageDir string
	Listen     string

	EnableTLS     bool
	MinTLSVersion uint16
	TLSCache      int

	Level slog.Level

	Metrics         bool
	MetricsListen   string
	Profiling       bool
	ProfilingListen string
	ProfilingDir    string

	StorageInterval time.Duration // of the check for free space, 0: none
	StorageMin      uint64        // bytes
	StorageAction   string        // none, handover, terminate

	ScrubInterval time.Duration // of the check of closed files, 0: none

	ProgressInterval time.Duration

	Quota int64 // bytes, 0 or less: none

	// For tests, which cannot be reached from outside: see member.Options, and what stands between the etcd API
	// and the datastore.
	fromOwn bool
	backend func(server.Backend) server.Backend

	marker, snapRevision string // see member.Options

	// Warnings are about flags that are accepted and have no effect.
	Warnings []string
}

// accepted flags that mean nothing here: the engine has neither a connection pool nor event
// queries, and sends no traces anywhere.
var inert = map[string]string{
	"datastore-max-idle-connections":     "the datastore has no connection pool",
	"datastore-max-open-connections":     "the datastore has no connection pool",
	"datastore-connection-max-lifetime":  "the datastore has no connection pool",
	"datastore-connection-max-idle-time": "the datastore has no connection pool",
	"watch-query-timeout":                "watches make no queries",
	"otel":                               "there are metrics instead, see --metrics",
	"otel-listen":                        "there are metrics instead, see --metrics",
	"otel-dir":                           "there are metrics instead, see --metrics",
	"otel-span-name-filter":              "there are metrics instead, see --metrics",
	"otel-span-min-duration-filter":      "there are metrics instead, see --metrics",
}

type rawFlags struct {
	minTLS, level   string
	debug, diskMode bool
}

func addFlags(fs *pflag.FlagSet, c *Config, raw *rawFlags) {
	fs.StringVar(&c.StorageDir, "storage-dir", "/var/tmp/k8s-dqlite", "directory of the data")
	fs.StringVar(&c.Listen, "listen", "tcp://127.0.0.1:12379", "where the etcd API is served: unix://PATH or tcp://HOST:PORT")
	fs.BoolVar(&c.EnableTLS, "enable-tls", true, "use TLS between members")
	fs.StringVar(&raw.minTLS, "min-tls-version", "tls12", "lowest TLS version between members: tls10, tls11, tls12, tls13")
	fs.IntVar(&c.TLSCache, "tls-client-session-cache-size", 0, "entries of the TLS session cache for dialling; 0: none")
	fs.StringVar(&raw.level, "log-level", "info", "debug, info, warn, error or fatal")
	fs.BoolVar(&raw.debug, "debug", false, "log everything")
	fs.BoolVar(&c.Metrics, "metrics", false, "serve Prometheus metrics")
	fs.StringVar(&c.MetricsListen, "metrics-listen", "127.0.0.1:9042", "address of the metrics")
	fs.BoolVar(&c.Profiling, "profiling", false, "serve Go profiles")
	fs.StringVar(&c.ProfilingListen, "profiling-listen", "127.0.0.1:4000", "address of the profiles")
	fs.StringVar(&c.ProfilingDir, "profiling-dir", "", "directory for cpu_profile.raw, written over the whole run")
	fs.BoolVar(&raw.diskMode, "disk-mode", false, "no longer supported")
	fs.DurationVar(&c.StorageInterval, "watch-storage-available-size-interval", 5*time.Second, "how often free space is checked; 0: never")
	fs.Uint64Var(&c.StorageMin, "watch-storage-available-size-min-bytes", 10<<20, "free space below which the action is taken, in bytes")
	fs.StringVar(&c.StorageAction, "low-available-storage-action", "none", "none (log), handover or terminate")
	fs.DurationVar(&c.ScrubInterval, "check-files-interval", 24*time.Hour, "how often the files that are written no more are read and compared with their checksums; 0: at starts only")
	fs.Int64Var(&c.Quota, "quota-backend-bytes", engine.DefaultQuota, "bytes of data (all versions that can be read) beyond which writes that grow it are refused until room is made and the alarm is ended; 0: etcd's default, below 0: no limit")
	fs.DurationVar(&c.ProgressInterval, "watch-progress-notify-interval", 5*time.Second, "period of progress notifications of idle watches")

	fs.Int("datastore-max-idle-connections", 5, "no effect")
	fs.Int("datastore-max-open-connections", 5, "no effect")
	fs.Duration("datastore-connection-max-lifetime", time.Minute, "no effect")
	fs.Duration("datastore-connection-max-idle-time", 0, "no effect")
	fs.Duration("watch-query-timeout", 20*time.Second, "no effect")
	fs.Bool("otel", false, "no effect")
	fs.String("otel-listen", "127.0.0.1:4317", "no effect")
	fs.String("otel-dir", "", "no effect")
	fs.String("otel-span-name-filter", "", "no effect")
	fs.Duration("otel-span-min-duration-filter", 0, "no effect")
	for name := range inert {
		_ = fs.MarkHidden(name)
	}
	_ = fs.MarkHidden("disk-mode")
}

// finish checks what the flag parser could not.
func (c *Config) finish(fs *pflag.FlagSet, raw rawFlags) error {
	if raw.diskMode {
		return fmt.Errorf("--disk-mode is not supported: dqlite has dropped it; remove the flag from the argument file")
	}
	versions := map[string]uint16{"tls10": tls.VersionTLS10, "tls11": tls.VersionTLS11, "tls12": tls.VersionTLS12, "tls13": tls.VersionTLS13}
	v, ok := versions[raw.minTLS]
	if !ok {
		return fmt.Errorf("--min-tls-version is %q; it must be tls10, tls11, tls12 or tls13", raw.minTLS)
	}
	c.MinTLSVersion = v
	levels := map[string]slog.Level{"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "warning": slog.LevelWarn, "error": slog.LevelError, "fatal": slog.LevelError + 4}
	level, ok := levels[raw.level]
	if !ok {
		c.warn("--log-level is %q, which is none of debug, info, warn, error, fatal; info is used", raw.level)
	}
	c.Level = level
	if raw.debug {
		c.Level = slog.LevelDebug
	}
	switch c.StorageAction {
	case "none", "handover", "terminate":
	default:
		return fmt.Errorf("--low-available-storage-action is %q; it must be none, handover or terminate", c.StorageAction)
	}
	if c.Quota == 0 {
		c.Quota = engine.DefaultQuota
	}
	if c.Listen == "" {
		c.Listen = "unix://kine.sock"
	}
	if _, _, err := splitListen(c.Listen); err != nil {
		return err
	}
	var names []string
	fs.Visit(func(f *pflag.Flag) {
		if _, ok := inert[f.Name]; ok {
			names = append(names, "--"+f.Name)
		}
	})
	if len(names) > 0 {
		c.warn("without effect, and kept only for old argument files: %s", strings.Join(names, " "))
	}
	return nil
}

func (c *Config) warn(format string, args ...any) {
	c.Warnings = append(c.Warnings, fmt.Sprintf(format, args...))
}

// splitListen gives network and address of --listen. In unix:///…/kine.sock:12379 the file
// name includes the ":12379".
func splitListen(s string) (network, address string, err error) {
	network, address, ok := strings.Cut(s, "://")
	if !ok || address == "" || network != "unix" && network != "tcp" {
		return "", "", fmt.Errorf("--listen is %q; it must be unix://PATH or tcp://HOST:PORT", s)
	}
	return network, address, nil
}

// dropRemoved takes flags away that upstream has removed and old argument files still have.
func dropRemoved(args []string) (kept, removed []string) {
	for i := 0; i < len(args); i++ {
		if !strings.HasPrefix(args[i], "--admission-control-policy") {
			kept = append(kept, args[i])
			continue
		}
		removed = append(removed, args[i])
		if !strings.Contains(args[i], "=") && i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
			i++ // its value
		}
	}
	return kept, removed
}

// NewCommand makes the program's command line. run is called with the finished configuration.
func NewCommand(args []string, run func(*cobra.Command, *Config) error, versions func() []string) *cobra.Command {
	c := &Config{}
	raw := rawFlags{}
	kept, removed := dropRemoved(args)
	if len(removed) > 0 {
		c.warn("removed flags are ignored: %s", strings.Join(removed, " "))
	}
	root := &cobra.Command{
		Use:           "k8s-dqlite",
		Short:         "The datastore of microk8s: the etcd API on dqlite",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.finish(cmd.Flags(), raw); err != nil {
				return err
			}
			return run(cmd, c)
		},
	}
	addFlags(root.Flags(), c, &raw)
	root.SetArgs(kept)
	root.AddCommand(&cobra.Command{
		Use: "version", Short: "Print the versions of Go and of the C libraries", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, line := range versions() {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), line); err != nil {
					return err
				}
			}
			return nil
		},
	})
	root.AddCommand(migrator.NewCommand(), newReseed(), newRecover(), newProve(), newExamine(), newAlarm())
	root.CompletionOptions.DisableDefaultCmd = true
	return root
}
