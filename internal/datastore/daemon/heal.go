package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"microk8s/internal/datastore/member"
	"microk8s/internal/datastore/peers"
	"microk8s/internal/datastore/replica"
	"microk8s/internal/datastore/storedir"

	"golang.org/x/sys/unix"
)

// A member whose files are damaged heals itself (ADR 55): what it does not need is set aside; otherwise it leaves
// the others, keeps its old files, and joins them again, if they have a leader. It never goes on with less than
// it had.

// How the others are asked.
const (
	healTry    = 20 * time.Second
	healPause  = 2 * time.Second
	healReport = 30 * time.Second
	scrubAgain = 10 * time.Minute // after damage that is not healed
)

// live is [Run]. When the member's files are damaged it heals them, and the process begins again: a node of
// libdqlite that could not start leaves things behind.
func live(ctx context.Context, c *Config, snapInstance string, log *slog.Logger, ready func()) error {
	err := Run(ctx, c, snapInstance, log, ready)
	var d *member.Damage
	if !errors.As(err, &d) || ctx.Err() != nil {
		return err
	}
	log.Error("the datastore's files are damaged", "file", d.File, "err", err)
	if err := heal(ctx, c.StorageDir, d, log); err != nil {
		return err
	}
	return fmt.Errorf("cannot start again: %w", unix.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// heal returns when the directory can be started again. An error says why it cannot.
func heal(ctx context.Context, path string, d *member.Damage, log *slog.Logger) error {
	dir := storedir.Dir(path)
	x := storedir.Damage{File: d.File, What: d.What, Found: time.Now().UTC()}
	note := func(state string) {
		x.State = state
		if err := dir.NoteDamage(x); err != nil {
			log.Warn("cannot write down what is damaged", "err", err)
		}
	}
	kept, names, err := member.SetAside(path)
	if err != nil {
		return errors.Join(d, err)
	}
	if kept != "" {
		log.Warn("damaged files were set aside; what is in them is in others as well", "files", strings.Join(names, " "), "kept", kept)
		x.Kept = kept
		note(storedir.DamageJoining)
		return nil
	}
	var reported time.Time
	x.Why = "they are being asked"
	note(storedir.DamageWaiting)
	for {
		try, cancel := context.WithTimeout(ctx, healTry)
		kept, err := member.Reseed(try, path)
		cancel()
		switch {
		case err == nil:
			log.Warn("the damaged files were moved away; this member joins the others again and gets its data from them", "kept", kept)
			x.Kept, x.Why = kept, ""
			note(storedir.DamageJoining)
			return nil
		case ctx.Err() != nil:
			return errors.Join(d, ctx.Err())
		case errors.Is(err, member.ErrAlone):
			note(storedir.DamageAlone)
			return fmt.Errorf("%w; microk8s status says which archive is the newest", d)
		case errors.Is(err, member.ErrNotOurs):
			x.Why = err.Error()
			note(storedir.DamageWaiting)
			return errors.Join(d, err)
		}
		x.Why = err.Error()
		note(storedir.DamageWaiting)
		if time.Since(reported) >= healReport {
			reported = time.Now()
			log.Warn("the data cannot be fetched from the other members yet, trying again", "err", err)
		}
		select {
		case <-ctx.Done():
			return errors.Join(d, ctx.Err())
		case <-time.After(healPause):
		}
	}
}

// scrub reads the files that nobody writes to, once in every interval. It returns damage when the others can go
// on without this member meanwhile.
func scrub(ctx context.Context, c *Config, log *slog.Logger, r *replica.Replica) error {
	wait := c.ScrubInterval
	dir := storedir.Dir(c.StorageDir)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = c.ScrubInterval
		err := member.Scrub(ctx, c.StorageDir)
		var d *member.Damage
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			if err := dir.SettleDamage(time.Now().UTC()); err != nil {
				log.Warn("cannot write down that the files are in order", "err", err)
			}
			continue
		case !errors.As(err, &d):
			log.Warn("cannot check the datastore's files", "err", err)
			continue
		case othersSuffice(r.Members()):
			return err
		}
		wait = min(wait, scrubAgain)
		log.Error("the datastore's files are damaged; it goes on with what it has in memory", "file", d.File, "err", err)
		x := storedir.Damage{State: storedir.DamageRunning, File: d.File, What: d.What, Found: time.Now().UTC()}
		if err := dir.NoteDamage(x); err != nil {
			log.Warn("cannot write down what is damaged", "err", err)
		}
	}
}

// othersSuffice reports whether the voters that answer are a majority without this member.
func othersSuffice(members []peers.Member) bool {
	voters, others := 0, 0
	for _, m := range members {
		if m.Role != storedir.Voter {
			continue
		}
		voters++
		if m.Online && !m.Self {
			others++
		}
	}
	return others > voters/2
}
