package daemon

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"microk8s/internal/datastore/member"

	"github.com/spf13/cobra"
)

// newReseed makes the command that fetches a member's data from the others again.
func newReseed() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "reseed",
		Short: "Make a stopped member with damaged files fetch all data from the other members again",
		Long: `Make a stopped member with damaged files fetch all data from the other members again.

The member is removed from the cluster and its directory becomes that of a node that joins it:
start the node afterwards (microk8s start). The other members need a leader. The old files are
kept in a hidden folder of the directory. It may be interrupted and run again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			kept, err := member.Reseed(ctx, dir)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "The old files are in %s.\nStart the node now: it joins the cluster and gets all data.\n", kept)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "storage-dir", "", "the member's directory")
	_ = cmd.MarkFlagRequired("storage-dir")
	return cmd
}

// newRecover makes the command for a cluster whose majority is lost.
func newRecover() *cobra.Command {
	var dir, saved string
	var others []string
	var sure bool
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Go on with one member after the majority of the voters was lost for good",
		Long: `Go on with one member after the majority of the voters was lost for good.

Stop the node everywhere. Copy the storage directories of the other members that are left to
this one, and name each with --compare. The command says how far each has come, and refuses if
another one is newer than --storage-dir, or that one has no data, as a spare has none. With --others-are-gone it saves the directory beside
itself and makes this member the only one of the cluster. Start it then, and let the others
leave and join again; never start one of them with its old directory.

Writes that only lost members had are lost.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			real, err := filepath.EvalSymlinks(dir)
			if err != nil {
				return fmt.Errorf("cannot find the storage directory: %w", err)
			}
			copies, err := member.Judge(append([]string{real}, others...)...)
			if err != nil {
				return err
			}
			for _, c := range copies {
				fmt.Fprintf(out, "%s: entry %d of term %d\n", c.Dir, c.Index, c.Term)
			}
			if !sure {
				fmt.Fprintln(out, "Nothing was changed. If the other members are gone for good, add --others-are-gone.")
				return nil
			}
			if saved == "" {
				saved = strings.TrimRight(real, "/") + ".before-recover-" + time.Now().UTC().Format("2006-01-02-15-04-05")
			}
			if err := member.Recover(real, others, saved); err != nil {
				return err
			}
			fmt.Fprintf(out, "The directory as it was is in %s.\nThis member is the only one now: start it, then let the other nodes leave and join again.\n", saved)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "storage-dir", "", "the directory of the member to go on with")
	cmd.Flags().StringSliceVar(&others, "compare", nil, "copies of the directories of other members that are left")
	cmd.Flags().StringVar(&saved, "saved", "", "where the directory as it was is kept; what is there already was saved by an earlier call")
	cmd.Flags().BoolVar(&sure, "others-are-gone", false, "do it; the other members must never start again with their directories")
	_ = cmd.MarkFlagRequired("storage-dir")
	return cmd
}
