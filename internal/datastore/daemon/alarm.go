package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"microk8s/internal/datastore/migrator"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const alarmTimeout = 30 * time.Second

func newAlarm() *cobra.Command {
	var endpoint string
	cmd := &cobra.Command{
		Use:   "alarm list | disarm",
		Short: "List the alarms of the datastore, or end them",
		Long: `List the alarms of a running datastore, or end them.

NOSPACE stands when the data has reached --quota-backend-bytes: what would make it larger is refused until
somebody has deleted what is not needed and ends the alarm. disarm compacts to the current revision first,
because what was deleted takes room until then.`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"list", "disarm"},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := migrator.Connect(cmd.Context(), endpoint)
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), alarmTimeout)
			defer cancel()
			if args[0] == "disarm" {
				return disarm(ctx, c, cmd.OutOrStdout())
			}
			r, err := c.AlarmList(ctx)
			if err != nil {
				return fmt.Errorf("cannot list the alarms: %w", err)
			}
			for _, a := range r.Alarms {
				fmt.Fprintf(cmd.OutOrStdout(), "%s of member %d\n", a.Alarm, a.MemberID)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&endpoint, "endpoint", migrator.DefaultEndpoint, "where the datastore listens")
	return cmd
}

func disarm(ctx context.Context, c *clientv3.Client, out io.Writer) error {
	now, err := c.Get(ctx, HealthKey, clientv3.WithCountOnly())
	if err == nil {
		if _, err = c.Compact(ctx, now.Header.Revision); errors.Is(err, rpctypes.ErrCompacted) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("cannot compact the datastore: %w", err)
	}
	r, err := c.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	if err != nil {
		return fmt.Errorf("cannot end the alarms: %w", err)
	}
	for _, a := range r.Alarms {
		fmt.Fprintf(out, "%s of member %d is ended\n", a.Alarm, a.MemberID)
	}
	if len(r.Alarms) == 0 {
		fmt.Fprintln(out, "there is no alarm")
	}
	return nil
}
