package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// load is how a new QEMU process got a guest's memory.
type load struct {
	bytes int64
	took  time.Duration // for the memory
	runs  time.Duration // from the start of QEMU until the guest ran
	whole time.Duration // of vmsnap's: for who asked for it
}

// measureLoads has vmsnap restore a guest with its memory, several times, and then
// a bare QEMU load the memory that QEMU alone had saved of the same guest. Both come
// from the disk: vmsnapd has read its file before, to see that it is whole, and
// taken it out of the page cache again.
func measureLoads(ctx context.Context, r *report, q testvm.QEMU, plan memoryPlan) (err error) {
	s, err := newScene(ctx, q, plan.memoryMiB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end()) }()
	if err := plan.use(ctx, s.guest, 0); err != nil {
		return err
	}
	bare := filepath.Join(s.dir, "bare-memory")
	if err := s.saveBare(ctx, bare, plan); err != nil {
		return err
	}
	snapshot, _, err := s.saveMemory(ctx)
	if err != nil {
		return err
	}
	var ours, theirs []load
	for range plan.loads {
		one, err := s.loadMemory(ctx, snapshot)
		if err != nil {
			return fmt.Errorf("restore with memory: %w", err)
		}
		ours = append(ours, one)
	}
	if err := s.stopDaemon(); err != nil {
		return err
	}
	for range plan.loads {
		one, err := s.loadBare(ctx, bare)
		if err != nil {
			return fmt.Errorf("load memory with QEMU alone: %w", err)
		}
		theirs = append(theirs, one)
	}
	r.addLoads(q.Name, plan.memoryMiB, ours, theirs)
	return nil
}

// saveBare has QEMU save the guest's memory to a file that stays.
func (s *scene) saveBare(ctx context.Context, path string, plan memoryPlan) error {
	ctx, cancel := context.WithTimeout(ctx, saveDeadline)
	defer cancel()
	qmp, err := dialQMP(ctx, s.guest.ExtraQMPSockets()[0])
	if err != nil {
		return err
	}
	defer qmp.close()
	_, err = migrateToFile(ctx, qmp, path, int64(plan.memoryMiB)<<20)
	return err
}

// loadMemory has vmsnap restore the guest with its memory.
func (s *scene) loadMemory(ctx context.Context, snapshot *vmsnapv1.Snapshot) (load, error) {
	ctx, cancel := context.WithTimeout(ctx, saveDeadline)
	defer cancel()
	began := time.Now()
	asked, err := s.daemon.Snapshots().RestoreSnapshot(ctx, connect.NewRequest(&vmsnapv1.RestoreSnapshotRequest{
		Snapshot: snapshot.GetId(), Memory: true, NoSafetySnapshot: true,
	}))
	if err != nil {
		return load{}, err
	}
	operation, err := s.daemon.Wait(ctx, asked.Msg.GetOperation().GetId())
	if err != nil {
		return load{}, err
	}
	one := load{bytes: int64(snapshot.GetMemory().GetSize()), whole: time.Since(began)}
	var launched time.Time
	for _, st := range operation.GetSteps() {
		from, to := st.GetStarted().AsTime(), st.GetEnded().AsTime()
		switch st.GetName() {
		case "launch":
			launched = from
		case "load":
			one.took = to.Sub(from)
		case "resume":
			one.runs = to.Sub(launched)
		}
	}
	if launched.IsZero() || one.took <= 0 || one.runs <= 0 {
		return load{}, fmt.Errorf("operation %s has not loaded the memory: %v", operation.GetId(), operation.GetSteps())
	}
	res, err := s.daemon.VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: vmName}))
	if err != nil {
		return load{}, err
	}
	return one, s.guest.Follow(ctx, int(res.Msg.GetVm().GetProcess().GetPid()))
}

// loadBare starts QEMU by the guest's command line and has it load a file. The
// disks are not those of the memory, so that the guest is not let go on for long.
func (s *scene) loadBare(ctx context.Context, path string) (one load, err error) {
	ctx, cancel := context.WithTimeout(ctx, saveDeadline)
	defer cancel()
	f, err := os.Open(path)
	if err != nil {
		return load{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return load{}, err
	}
	one.bytes = info.Size()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return load{}, fmt.Errorf("drop %s from the page cache: %w", path, err)
	}
	s.guest.Kill()
	launched := time.Now()
	err = s.guest.Load(ctx, func(ctx context.Context) error {
		qmp, err := dialQMP(ctx, s.guest.ExtraQMPSockets()[0])
		if err != nil {
			return err
		}
		defer qmp.close()
		began := time.Now()
		if err := loadFile(ctx, qmp, f); err != nil {
			return err
		}
		one.took = time.Since(began)
		if err := qmp.call("cont", object{}, nil); err != nil {
			return err
		}
		one.runs = time.Since(launched)
		return nil
	})
	return one, err
}

// loadFile has a QEMU that waits load its memory from a file.
func loadFile(ctx context.Context, qmp *wire, f *os.File) error {
	if err := qmp.sendFile(f, encode("getfd", object{"fdname": "source"})); err != nil {
		return err
	}
	if err := qmp.call("migrate-incoming", object{"uri": "fd:source"}, nil); err != nil {
		return err
	}
	_, err := awaitMigration(ctx, qmp, time.Now())
	return err
}

func (r *report) addLoads(qemu string, memoryMiB int, ours, theirs []load) {
	add := func(w row, measure string) {
		w.measure, w.qemu = fmt.Sprintf("memory of %d MiB, loaded: %s", memoryMiB, measure), qemu
		r.rows = append(r.rows, w)
	}
	speed := func(loads []load) float64 {
		return middle(each(loads, func(l load) rate { return rate{l.bytes, l.took} }))
	}
	add(row{
		ours: mibPerSecond(speed(ours)), rival: "QEMU alone " + mibPerSecond(speed(theirs)), ratio: speed(ours) / speed(theirs),
	}, "rate")
	runs := func(l load) time.Duration { return l.runs }
	add(row{
		ours: spread(each(ours, runs)), rival: "QEMU alone " + spread(each(theirs, runs)),
		ratio: float64(median(each(ours, runs))) / float64(median(each(theirs, runs))),
	}, "from the start of QEMU until it runs")
	add(row{ours: spread(each(ours, func(l load) time.Duration { return l.whole }))}, "snapshot restore")
	for _, by := range []struct {
		name  string
		loads []load
	}{{"vmsnap", ours}, {"bare", theirs}} {
		for _, l := range by.loads {
			extra := []measurement{{"runs-ns", int64(l.runs)}, {"file-bytes", l.bytes}}
			if l.whole > 0 {
				extra = append(extra, measurement{"total-ns", int64(l.whole)})
			}
			r.run(fmt.Sprintf("MemoryLoad/qemu=%s/memory=%d/by=%s", qemu, memoryMiB, by.name), l.took, extra...)
		}
	}
}
