package main

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// maxWindowRatio is how much longer than the bare script's the freeze window
// may be.
const maxWindowRatio = 1.15

// settledWrites is how many writes of each disk show that the guest is back to
// normal, before a round and after it.
const settledWrites = 10

// cut is one snapshot, by whomever.
type cut struct {
	window time.Duration // freeze request to thaw reply
	stall  time.Duration // the longest time in which the guest completed no write on a disk
	took   time.Duration // the whole snapshot, for who asked for it
	steps  []step        // of vmsnap's
}

type step struct {
	name string
	took time.Duration
}

// measureWindows has vmsnap and the bare script take snapshots in turns. Who
// goes first changes with each round, since each leaves the guest a little
// different for the other.
func (s *scene) measureWindows(ctx context.Context, c config, r *report) error {
	b, err := newBare(ctx, s)
	if err != nil {
		return err
	}
	defer b.close()
	ours, theirs := s.snapshot, b.snapshot
	var mine, bares []cut
	for i := range c.rounds + 1 {
		first, second := ours, theirs
		if i%2 == 1 {
			first, second = theirs, ours
		}
		one, err := s.round(ctx, first)
		if err != nil {
			return err
		}
		two, err := s.round(ctx, second)
		if err != nil {
			return err
		}
		if i%2 == 1 {
			one, two = two, one
		}
		if i == 0 {
			continue // to warm up
		}
		mine, bares = append(mine, one), append(bares, two)
	}
	r.addWindows(s.qemu.Name, mine, bares)
	return nil
}

// round takes one snapshot and watches the guest.
func (s *scene) round(ctx context.Context, take func(context.Context) (cut, error)) (cut, error) {
	ctx, cancel := context.WithTimeout(ctx, roundDeadline)
	defer cancel()
	if err := s.writers.AwaitWrites(ctx, settledWrites); err != nil {
		return cut{}, err
	}
	return take(ctx)
}

// roundDeadline is for a guest or a daemon that hangs: a round takes a second.
const roundDeadline = time.Minute

// stall returns the longest stall since the writers were reset, once the guest
// writes on.
func (s *scene) stall(ctx context.Context) (time.Duration, error) {
	if err := s.writers.AwaitWrites(ctx, 1); err != nil {
		return 0, err
	}
	var longest time.Duration
	for _, gap := range s.writers.Gaps().Writes {
		longest = max(longest, gap.Length())
	}
	return longest, nil
}

// snapshot has vmsnap take a snapshot.
func (s *scene) snapshot(ctx context.Context) (cut, error) {
	s.writers.Reset()
	began := time.Now()
	created, err := s.daemon.Snapshots().CreateSnapshot(ctx, connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{
		Vm: vmName, Quiesce: vmsnapv1.Quiesce_QUIESCE_REQUIRE,
	}))
	if err != nil {
		return cut{}, err
	}
	operation, err := s.daemon.Wait(ctx, created.Msg.GetOperation().GetId())
	if err != nil {
		return cut{}, err
	}
	c := cut{took: time.Since(began)}
	if c.stall, err = s.stall(ctx); err != nil {
		return cut{}, err
	}
	taken, err := s.daemon.Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: operation.GetSnapshotId()}))
	if err != nil {
		return cut{}, err
	}
	snapshot := taken.Msg.GetSnapshot()
	if q := snapshot.GetQuiesce(); snapshot.GetConsistency() != vmsnapv1.Consistency_CONSISTENCY_FILESYSTEM || q.GetFrozen() != 2 {
		return cut{}, fmt.Errorf("snapshot %s is not what was asked for: %v", snapshot.GetName(), snapshot)
	}
	c.window = snapshot.GetQuiesce().GetFreezeWindow().AsDuration()
	for _, st := range operation.GetSteps() {
		c.steps = append(c.steps, step{st.GetName(), st.GetEnded().AsTime().Sub(st.GetStarted().AsTime())})
	}
	return c, nil
}
