package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// maxSwap is how long a guest may stand still from its stop to its reset, while
// its disks are swapped.
const maxSwap = 300 * time.Millisecond

// How often a guest is restored: each time it boots.
const (
	restores      = 10
	shortRestores = 2
)

// restored is one restore in place.
type restored struct {
	swap  time.Duration // from before the stop until the reset is asked for
	still time.Duration // from before the stop until the guest runs again, reset
	took  time.Duration // the whole restore, for who asked for it
	steps []step
}

// measureRestores has vmsnap restore a booted guest's two disks, in turns with a
// bare script that stops, resets and resumes it and changes no disk.
func measureRestores(ctx context.Context, c config, r *report, q testvm.QEMU) (err error) {
	s, err := newScene(ctx, q, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end()) }()
	r.host.saw(s.version)
	progress("QEMU %s: restores", s.version)
	b, err := newBare(ctx, s)
	if err != nil {
		return err
	}
	defer b.close()
	rounds := restores
	if c.short {
		rounds = shortRestores
	}
	goal, err := s.pointToRestore(ctx)
	if err != nil {
		return err
	}
	var ours []restored
	var bares []time.Duration
	for i := range rounds {
		one, err := s.restore(ctx, goal, 2*i+2)
		if err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		took, err := b.reset(ctx, 2*i+3)
		if err != nil {
			return fmt.Errorf("bare reset: %w", err)
		}
		ours, bares = append(ours, one), append(bares, took)
	}
	r.addRestores(s.qemu.Name, ours, bares)
	return nil
}

// pointToRestore takes the snapshot that the guest is restored to, and returns
// its id.
func (s *scene) pointToRestore(ctx context.Context) (string, error) {
	created, err := s.daemon.Snapshots().CreateSnapshot(ctx, connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{
		Vm: vmName, Quiesce: vmsnapv1.Quiesce_QUIESCE_REQUIRE,
	}))
	if err != nil {
		return "", err
	}
	operation, err := s.daemon.Wait(ctx, created.Msg.GetOperation().GetId())
	return operation.GetSnapshotId(), err
}

// restore restores the guest, and returns when it has booted, for the n-th time.
func (s *scene) restore(ctx context.Context, snapshot string, n int) (restored, error) {
	ctx, cancel := context.WithTimeout(ctx, roundDeadline)
	defer cancel()
	began := time.Now()
	asked, err := s.daemon.Snapshots().RestoreSnapshot(ctx, connect.NewRequest(&vmsnapv1.RestoreSnapshotRequest{
		Snapshot: snapshot, NoSafetySnapshot: true,
	}))
	if err != nil {
		return restored{}, err
	}
	operation, err := s.daemon.Wait(ctx, asked.Msg.GetOperation().GetId())
	if err != nil {
		return restored{}, err
	}
	one := restored{took: time.Since(began)}
	var stopped time.Time
	for _, st := range operation.GetSteps() {
		from, to := st.GetStarted().AsTime(), st.GetEnded().AsTime()
		switch one.steps = append(one.steps, step{st.GetName(), to.Sub(from)}); st.GetName() {
		case "swap":
			stopped = from
		case "reset":
			one.swap, one.still = from.Sub(stopped), to.Sub(stopped)
		}
	}
	if stopped.IsZero() || one.still <= 0 {
		return restored{}, fmt.Errorf("operation %s has not swapped the disks and reset the guest: %v", operation.GetId(), operation.GetSteps())
	}
	return one, s.guest.AwaitBoot(ctx, n)
}

// reset stops the guest, resets it and lets it run, and returns how long that
// took, when it has booted for the n-th time.
func (b *bare) reset(ctx context.Context, n int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, roundDeadline)
	defer cancel()
	if err := b.qmp.limit(ctx); err != nil {
		return 0, err
	}
	began := time.Now()
	for _, command := range []string{"stop", "system_reset", "cont"} {
		if err := b.qmp.call(command, object{}, nil); err != nil {
			return 0, err
		}
	}
	return time.Since(began), b.scene.guest.AwaitBoot(ctx, n)
}

func (r *report) addRestores(qemu string, ours []restored, bares []time.Duration) {
	swaps := each(ours, func(one restored) time.Duration { return one.swap })
	still := each(ours, func(one restored) time.Duration { return one.still })
	r.rows = append(r.rows,
		row{
			measure: "restore in place, stop to reset", qemu: qemu, ours: spread(swaps), rival: short(maxSwap) + " allowed",
			ratio: float64(median(swaps)) / float64(maxSwap), budget: 1,
		},
		row{
			measure: "restore in place, stop until it runs, reset", qemu: qemu, ours: spread(still), rival: "a bare reset " + spread(bares),
			ratio: float64(median(still)) / float64(median(bares)),
		},
		row{
			measure: "snapshot restore", qemu: qemu,
			ours: spread(each(ours, func(one restored) time.Duration { return one.took })),
		})
	for _, one := range ours {
		var extra []measurement
		for _, st := range one.steps {
			extra = append(extra, measurement{st.name + "-ns", int64(st.took)})
		}
		r.run(fmt.Sprintf("Restore/qemu=%s/by=vmsnap", qemu), one.still, extra...)
	}
	for _, took := range bares {
		r.run(fmt.Sprintf("Restore/qemu=%s/by=bare", qemu), took)
	}
}
