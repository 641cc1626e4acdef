package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// Budgets of a snapshot with memory.
const (
	// maxPauseRatio is the pause beside libvirt's, at the highest dirty rate.
	maxPauseRatio = 1.0 / 20
	// maxPause is the median pause of a guest of 2 GiB.
	maxPause = 60 * time.Millisecond
	// maxLaterPause is the pause of the last saves of a process beside its first.
	maxLaterPause = 1.5
	// minRateRatio is the rate beside the lesser of what QEMU can give and what
	// the disk takes, and beside what QEMU does with a file that nobody follows.
	minRateRatio = 0.9
)

// save is one snapshot with memory, by whomever.
type save struct {
	pause time.Duration // of the guest, as its heartbeat shows it
	gap   time.Duration // the longest in its heartbeat, from the request to the end
	alone time.Duration // the longest in its heartbeat shortly before, with no save
	took  time.Duration // the whole snapshot, for who asked for it
	size  int64         // of the memory's file, in bytes

	cpu  time.Duration // of who saves: vmsnapd, libvirtd
	qemu time.Duration // CPU time of QEMU, without the guest's CPUs

	// Of vmsnap's only.
	stream time.Duration // from the cut until the memory is durable
	told   time.Duration // the pause, as the snapshot has it
	steps  []step
}

// memoryRuns is what was measured on one QEMU at one dirty rate.
type memoryRuns struct {
	qemu      string
	memoryMiB int
	rate      int // MB/s
	highest   bool
	ours      []save // in the order of one process's life
	libvirt   []save
	null      []rate // QEMU, saving the same way to the null device
	reader    []rate // QEMU, saving the same way to who reads it and throws it away
	plain     []rate // QEMU, migrating to the null device with no write tracking
	file      []rate // QEMU, saving the same way to a file, with nobody beside it
	fileCPU   []time.Duration
	disk      []rate // the file system
}

// rate is how fast so many bytes went.
type rate struct {
	bytes int64
	took  time.Duration
}

// perSecond returns the rate in bytes a second.
func (r rate) perSecond() float64 { return float64(r.bytes) / r.took.Seconds() }

// measureMemory measures snapshots with memory on one QEMU. At each rate a guest
// of vmsnapd's is followed by an equal one of libvirt's; both are fresh, since a
// save changes how QEMU's memory is mapped.
func measureMemory(ctx context.Context, c config, r *report, q testvm.QEMU) (err error) {
	plans, err := planMemory(c)
	if err != nil {
		return err
	}
	lv, err := startLibvirt(ctx, q)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lv.end()) }()
	for _, plan := range plans {
		if err := plan.measure(ctx, r, q, lv); err != nil {
			return fmt.Errorf("memory of %d MiB: %w", plan.memoryMiB, err)
		}
	}
	return nil
}

func (plan memoryPlan) measure(ctx context.Context, r *report, q testvm.QEMU, lv *libvirt) error {
	for i, mbs := range plan.rates {
		runs := memoryRuns{qemu: q.Name, memoryMiB: plan.memoryMiB, rate: mbs, highest: i == len(plan.rates)-1}
		progress("QEMU %s: memory of %d MiB, %d MB/s dirtied", q.Name, plan.memoryMiB, mbs)
		if err := runs.measureOurs(ctx, r, q, plan); err != nil {
			return err
		}
		progress("QEMU %s: memory of %d MiB, %d MB/s dirtied, libvirt", q.Name, plan.memoryMiB, mbs)
		if err := runs.measureLibvirt(ctx, lv, q, plan); err != nil {
			return fmt.Errorf("libvirt: %w", err)
		}
		r.addMemory(runs)
	}
	if plan.loads == 0 {
		return nil
	}
	progress("QEMU %s: loading memory of %d MiB", q.Name, plan.memoryMiB)
	return measureLoads(ctx, r, q, plan)
}

func (runs *memoryRuns) measureOurs(ctx context.Context, r *report, q testvm.QEMU, plan memoryPlan) (err error) {
	s, err := newScene(ctx, q, plan.memoryMiB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end()) }()
	r.host.saw(s.version)
	if err := plan.use(ctx, s.guest, runs.rate); err != nil {
		return err
	}
	threads, err := s.cpuThreads(ctx)
	if err != nil {
		return err
	}
	w := watcher{s.guest, s.writers, spender{agent: s.daemon.PID(), qemu: s.guest.PID(), guest: threads}}
	huge, err := hugePages(s.guest.PID())
	if err != nil {
		return err
	}
	for range plan.saves {
		one, err := w.watch(ctx, s.saveAndDrop)
		if err != nil {
			return err
		}
		runs.ours = append(runs.ours, one)
		if err := awaitHugePages(ctx, s.guest.PID(), huge); err != nil {
			return err
		}
	}
	return runs.measureFloors(ctx, s, plan, w.spender)
}

// watcher watches the heartbeat of a guest, and what CPU time is spent for it.
type watcher struct {
	guest   *testvm.Guest
	writers *testvm.Writers
	spender spender
}

const (
	// aloneTime is how long a guest is watched that nobody saves.
	aloneTime = 1500 * time.Millisecond
	// saveDeadline is for a save that hangs: libvirt's takes most of a minute.
	saveDeadline = 5 * time.Minute
)

// watch takes one snapshot and watches the guest, before and meanwhile. The
// pause is the longest gap of the heartbeat around the cut, if take tells when
// that was, else the longest of all.
func (w watcher) watch(ctx context.Context, take func(context.Context) (save, *span, error)) (save, error) {
	ctx, cancel := context.WithTimeout(ctx, saveDeadline)
	defer cancel()
	if err := w.writers.AwaitWrites(ctx, settledWrites); err != nil {
		return save{}, err
	}
	w.writers.Reset()
	select {
	case <-time.After(aloneTime):
	case <-ctx.Done():
		return save{}, ctx.Err()
	}
	alone := w.writers.Gaps().Heartbeat.Length()
	w.writers.Reset()
	before, err := w.spender.spent()
	if err != nil {
		return save{}, err
	}
	began := time.Now()
	one, cut, err := take(ctx)
	if err != nil {
		return save{}, err
	}
	one.alone, one.took = alone, time.Since(began)
	after, err := w.spender.spent()
	if err != nil {
		return save{}, err
	}
	one.cpu, one.qemu = after.agent-before.agent, after.qemu-before.qemu
	if err := w.writers.AwaitWrites(ctx, 1); err != nil { // the guest runs
		return save{}, err
	}
	one.gap = w.writers.Gaps().Heartbeat.Length()
	one.pause = one.gap
	if cut != nil {
		one.pause = longestIn(w.writers.Missed(), *cut)
	}
	return one, nil
}

// span is a time in which something happened.
type span struct{ from, to time.Time }

// longestIn returns the longest of the gaps that lie in a span, be it in part.
func longestIn(gaps []testvm.Gap, s span) time.Duration {
	var longest time.Duration
	for _, g := range gaps {
		if g.From.Before(s.to) && s.from.Before(g.To) {
			longest = max(longest, g.Length())
		}
	}
	return longest
}

// saveAndDrop has vmsnap take a snapshot with memory. The memory's file is
// removed at once: ten would be much for a small disk.
func (s *scene) saveAndDrop(ctx context.Context) (save, *span, error) {
	snapshot, operation, err := s.saveMemory(ctx)
	if err != nil {
		return save{}, nil, err
	}
	memory := snapshot.GetMemory()
	one := save{
		size: int64(memory.GetSize()), stream: memory.GetDuration().AsDuration(), told: memory.GetPause().AsDuration(),
	}
	var cut *span
	for _, st := range operation.GetSteps() {
		from, to := st.GetStarted().AsTime(), st.GetEnded().AsTime()
		one.steps = append(one.steps, step{st.GetName(), to.Sub(from)})
		if st.GetName() == "cut" {
			cut = &span{from, to}
		}
	}
	return one, cut, os.Remove(memory.GetPath())
}

// saveMemory has vmsnap take a snapshot with memory.
func (s *scene) saveMemory(ctx context.Context) (*vmsnapv1.Snapshot, *vmsnapv1.Operation, error) {
	created, err := s.daemon.Snapshots().CreateSnapshot(ctx, connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{Vm: vmName, Memory: true}))
	if err != nil {
		return nil, nil, err
	}
	operation, err := s.daemon.Wait(ctx, created.Msg.GetOperation().GetId())
	if err != nil {
		return nil, nil, err
	}
	taken, err := s.daemon.Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: operation.GetSnapshotId()}))
	if err != nil {
		return nil, nil, err
	}
	snapshot := taken.Msg.GetSnapshot()
	if snapshot.GetConsistency() != vmsnapv1.Consistency_CONSISTENCY_MEMORY ||
		snapshot.GetMemory().GetStrategy() != vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_BACKGROUND {
		return nil, nil, fmt.Errorf("snapshot %s is not what was asked for: %v", snapshot.GetName(), snapshot)
	}
	return snapshot, operation, nil
}
