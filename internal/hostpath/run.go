package hostpath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/pflag"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

// A failed attempt is made again after these pauses, growing.
const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

// Run is the program: it reads its flags and provisions until ctx ends.
func Run(ctx context.Context, args []string, out io.Writer) error {
	p := &Provisioner{Log: slog.New(slog.NewTextHandler(out, nil))}
	flags := pflag.NewFlagSet("hostpath-provisioner", pflag.ContinueOnError)
	flags.SetOutput(out)
	flags.StringVar(&p.Node, "node", "", "name of this node")
	flags.StringArrayVar(&p.Dirs, "dir", nil, "directory that may hold volumes; the first is the default")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := p.validate(); err != nil {
		return err
	}
	if err := p.Prepare(); err != nil {
		return err
	}
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("cannot reach the cluster: %w", err)
	}
	logger := logr.FromSlogHandler(p.Log.Handler())
	klog.SetLogger(logger)
	var workers sync.WaitGroup
	c := controller.NewProvisionController(klog.NewContext(ctx, logger), client, Name, p,
		controller.LeaderElection(false), // each instance has volumes of its own
		controller.Threadiness(2),
		controller.FailedProvisionThreshold(0), // retry for ever
		controller.FailedDeleteThreshold(0),
		controller.RateLimiter(workqueue.NewTypedItemExponentialFailureRateLimiter[string](firstRetry, lastRetry)),
	)
	c.ControllerWaitGroup(&workers)
	c.Run(ctx)
	workers.Wait()
	return nil
}

func (p *Provisioner) validate() error {
	if p.Node == "" || len(p.Dirs) == 0 {
		return errors.New("--node and --dir are needed")
	}
	for i, dir := range p.Dirs {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("--dir=%s is no absolute path", dir)
		}
		p.Dirs[i] = filepath.Clean(dir)
	}
	return nil
}
