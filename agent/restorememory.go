package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// The journal entries of a restore with memory, beside entryLay and entryReset.
// Each but the probe's holds all that is known by then.
const (
	entryProbe  = "probe"  // the VM's unit is about to be changed and put back, to see whether that is allowed
	entryHold   = "hold"   // the guest is about to be stopped, and its memory to be saved
	entryEnd    = "end"    // its QEMU process is about to be ended
	entryLaunch = "launch" // the launch paths lead to the overlays; a QEMU that waits is about to be started
	entryBack   = "back"   // the overlays are gone; a QEMU with the state before is about to be started
)

// memoryRestore is what the journal keeps of a restore with memory.
type memoryRestore struct {
	Path   string      // of the memory file that is loaded
	Anew   Anew        `json:",omitempty"` // instead of loading one
	New    launch.Spec // of the QEMU that loads it, or boots
	Runs   bool        // the guest is to run then
	Frozen bool        // its file systems were frozen at the cut
	Laid   bool        // the overlays have their names
	Former *formerRun  `json:",omitempty"` // nil for a VM that was stopped
}

// formerRun is the QEMU process that was ended for a restore, and how it would
// come back.
type formerRun struct {
	PID       int
	StartTime uint64
	Ran       bool        // the guest ran
	Waits     launch.Spec // of the QEMU that loads what was saved
	Boots     launch.Spec // of one that starts anew, when nothing was saved
	Dir, Name string      // of the file that its memory is saved to; empty when it is not
	Settings  memdump.Settings
	Saved     *catalog.SavedMemory // once it is
}

func (f *formerRun) lives() bool { return discover.Same(f.PID, f.StartTime) }

// withMemory is the recipe of a restore whose guest goes on from the snapshot's
// memory, in a new QEMU process. Until the memory is loaded everything can be
// taken back: the state before comes back with its own memory. From the moment
// that the guest may run there is only the new state.
func (r *restore) withMemory(ctx context.Context, s catalog.Snapshot, p *restorePlan) error {
	r.Memory, r.memory, r.excluded, r.LiftReset = p.load, p.memory, p.excluded, false
	m := r.Memory
	if err := p.specify(r.o.ID()); err != nil {
		return fault.New(fault.Failed, "VM %s: %w", r.vm.name(), err)
	}
	r.o.Plan(r.stepsWithMemory())
	err := r.o.Step(ctx, "verify", func(ctx context.Context) error {
		if err := r.probe(ctx, m.New); err != nil || m.Path == "" {
			return err
		}
		return r.verifySaved(ctx, s, func(done, total uint64) { r.o.Progress(done, total, "bytes") })
	})
	if err != nil {
		return err
	}
	if err := r.describeFormer(ctx); err != nil {
		return err
	}
	r.o.RevertAtLength("take the restore back", r.untilBack)
	if m.Former != nil {
		if err := r.o.Step(ctx, "save", r.saveFormer); err != nil {
			return err
		}
		if err := r.packFormer(ctx); err != nil {
			return err
		}
		if err := r.o.Step(ctx, "end", r.endFormer); err != nil {
			return err
		}
	}
	if err := r.layOffline(ctx); err != nil {
		return err
	}
	if err := r.startAnew(ctx); err != nil {
		return err
	}
	if err := r.o.PointOfNoReturn(); err != nil {
		return err
	}
	whole := context.WithoutCancel(ctx)
	if err := r.note(whole, entryReset); err != nil {
		return err
	}
	r.o.DropReverts()
	return r.goOnRestored(whole)
}

// probe finds out whether the QEMU of a specification may be started.
func (r *restore) probe(ctx context.Context, spec launch.Spec) error {
	if spec.Launcher == launch.Unit {
		if err := r.o.Journal(ctx, entryProbe, spec); err != nil {
			return err
		}
	}
	return spec.Probe(ctx)
}

// startAnew starts the QEMU of the restored state, and has it load its memory. Of
// its guest nothing runs yet.
func (r *restore) startAnew(ctx context.Context) error {
	m := r.Memory
	if m.Anew == AnewStays {
		return nil
	}
	err := r.o.Step(ctx, "launch", func(ctx context.Context) (err error) {
		if err := r.note(ctx, entryLaunch); err != nil {
			return err
		}
		r.run, err = r.launched(ctx, m.New)
		return err
	})
	if err != nil || m.Path == "" {
		return err
	}
	return r.o.Step(ctx, "load", func(ctx context.Context) error { return r.loadInto(ctx, r.run, m.Path) })
}

// stepsWithMemory returns the number of steps that the restore will take.
func (r *restore) stepsWithMemory() int {
	n := 9 // preflight, verify, overlays, point, launch, load, resume, settle, commit
	if r.Memory.Former != nil {
		n += 2 // save, end
	}
	if r.memory != nil && r.memory.Recipient != "" {
		n++ // encrypt
	}
	switch r.Memory.Anew {
	case AnewBoots:
		n-- // load
	case AnewStays:
		n -= 3 // launch, load, resume
	}
	return n
}

// note journals where the restore stands.
func (r *restore) note(ctx context.Context, kind string) error {
	r.stage = kind
	return r.o.Journal(ctx, kind, r.entry())
}

// describeFormer keeps the configuration of the state before, for the safety
// snapshot.
func (r *restore) describeFormer(ctx context.Context) (err error) {
	if r.run == nil {
		r.vm.mu.Lock()
		rec := r.vm.rec
		r.vm.mu.Unlock()
		r.offline = rec.Stopped == endedByShutdown
		r.config, err = storedConfiguration(rec)
		return err
	}
	if r.session, err = r.vm.monitorOf(r.run); err != nil {
		return err
	}
	if r.captured, err = r.run.configuration(ctx, r.session); err != nil {
		return err
	}
	r.config, err = r.captured.encode()
	return err
}

// saveFormer stops the guest and saves its memory: with the disks as they are
// from then on it is the state before.
func (r *restore) saveFormer(ctx context.Context) (err error) {
	f, m := r.Memory.Former, r.memory
	if m != nil {
		m.Name = r.o.ID() + memorySuffix
		f.Dir, f.Name = m.Dir, m.Name
		if err := m.open(); err != nil {
			return r.memoryFailed(err)
		}
		r.o.Cleanup(func() { _ = m.root.Close() })
	}
	if err := r.note(ctx, entryHold); err != nil {
		return err
	}
	if m != nil {
		if m.file, err = memdump.Create(m.root, m.Name, r.memoryHeader(), m.reserve); err != nil {
			return r.memoryFailed(err)
		}
	}
	// What QEMU becomes by it is not how the VM ends.
	r.run.setSaving(true)
	if f.Ran {
		if err := r.session.Stop(context.WithoutCancel(ctx)); err != nil {
			return err
		}
	}
	r.cutAt = time.Now()
	if m == nil {
		return nil
	}
	if err := r.prepareFormer(ctx); err != nil {
		return r.memoryFailed(err)
	}
	if m.Pause, err = m.save.Cut(ctx, func(context.Context) error { return nil }, r.memoryProgress); err != nil {
		return r.memoryFailed(err)
	}
	return r.saveMemory(ctx)
}

// packFormer encrypts what was saved of the state before, if it is to be. Until then
// the guest can go on where it is.
func (r *restore) packFormer(ctx context.Context) error {
	m := r.memory
	if m == nil {
		return nil
	}
	if err := r.packMemory(ctx); err != nil {
		return err
	}
	r.Memory.Former.Saved = m.saved
	return nil
}

// prepareFormer sets QEMU up for saving a guest that stands still.
func (r *restore) prepareFormer(ctx context.Context) error {
	f, m := r.Memory.Former, r.memory
	facts, err := memdump.Probe(ctx, r.session, f.PID)
	if err != nil {
		return err
	}
	if _, err := memdump.Choose(facts, memdump.Stopped); err != nil {
		return err
	}
	m.save, err = memdump.Prepare(ctx, memdump.Config{
		Session: r.session, Strategy: memdump.Stopped, Facts: facts, ID: r.o.ID(), Target: m.file.Target(), PID: f.PID,
		Note: func(s memdump.Settings) error {
			f.Settings = s
			return r.note(ctx, entryHold)
		},
	})
	return err
}

// endFormer ends the QEMU process of the state before. Its images are written out
// by then.
func (r *restore) endFormer(ctx context.Context) error {
	if err := r.note(ctx, entryEnd); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	f := r.Memory.Former
	err := f.Boots.Stop(ctx, func() error { return r.quit(ctx, r.run) })
	if err != nil && f.lives() {
		return fault.New(kindOf(err), "VM %s: its QEMU process %d does not end: %w", r.vm.name(), f.PID, err)
	}
	r.session = nil
	return r.awaitGone(ctx, r.run)
}

// layOffline lays the disks on the restore points and makes the launch paths lead
// there, under the image locks, which nobody holds when it returns.
func (r *restore) layOffline(ctx context.Context) (err error) {
	if err := r.o.Step(ctx, "overlays", r.lockAndLay); err != nil {
		return err
	}
	return r.o.Step(ctx, "point", func(ctx context.Context) error {
		if other, err := r.vm.alone(); err != nil || other != nil {
			return errors.Join(fault.New(fault.Busy, "VM %s was started meanwhile", r.vm.name()), err)
		}
		return errors.Join(pointAll(r.disks), r.unlock())
	})
}

func (r *restore) lockAndLay(ctx context.Context) error {
	r.o.Cleanup(func() { _ = r.unlock() })
	for i, d := range r.disks {
		l, err := r.lockAll(ctx, d)
		r.locks = append(r.locks, l...)
		if err != nil {
			return r.failure(d, err)
		}
		if r.Undo != nil {
			err = d.goesBack()
		} else {
			d.name(r.o.ID(), i)
		}
		if err != nil {
			return r.failure(d, err)
		}
	}
	if r.cutAt.IsZero() {
		r.cutAt = time.Now()
	}
	r.Memory.Laid = true
	if err := r.note(ctx, entryLay); err != nil {
		return err
	}
	if r.Undo != nil {
		return r.uncoverFormer()
	}
	return r.makeStopped(ctx)
}

// unlock lets go of the image locks.
func (r *restore) unlock() error {
	locks := r.locks
	r.locks = nil
	return closeAll(locks)
}

// loadInto has a QEMU that waits load a memory file.
func (r *restore) loadInto(ctx context.Context, run *run, path string) error {
	s, err := r.vm.monitorOf(run)
	if err != nil {
		return err
	}
	dir, name := filepath.Split(path)
	root, err := openMemoryDir(dir)
	if err != nil {
		return fault.New(kindOf(err), "VM %s: memory file %s: %w", r.vm.name(), path, err)
	}
	defer func() { _ = root.Close() }()
	key, err := r.keyFor(root, path)
	if err != nil {
		return fault.New(kindOf(err), "VM %s: %w", r.vm.name(), err)
	}
	err = memdump.Load(ctx, memdump.LoadConfig{
		Session: s, Dir: root, Name: name, Key: key, ID: r.o.ID(), Progress: func(done, total uint64) { r.o.Progress(done, total, "bytes") },
	})
	if errors.Is(err, memdump.ErrLoad) {
		said := ""
		if r.child != nil {
			said = r.child.Said()
		}
		return fault.New(fault.Failed, "VM %s: %w%s", r.vm.name(), err, said).
			WithHint("the new QEMU must be the same machine as the one that was saved: its version, -cpu, -m and devices")
	}
	if err != nil {
		return fault.New(kindOf(err), "VM %s: %w", r.vm.name(), err)
	}
	return nil
}

// goOnRestored lets the restored guest run, and enters what is new into the
// catalog.
func (r *restore) goOnRestored(ctx context.Context) error {
	m := r.Memory
	if m.Anew == AnewStays {
		r.run, r.session = nil, nil
		return r.finish(ctx)
	}
	err := r.o.Step(ctx, "resume", r.untilDone(func(ctx context.Context) error {
		return errors.Join(r.resumeRestored(ctx), m.New.Clear(ctx))
	}))
	if err != nil {
		return err
	}
	r.session = nil // the QEMU of the layers that were active is gone
	return r.finish(ctx)
}

// resumeRestored lets the guest go on from where its memory was saved: as its
// clock, its peers and its file systems should find it.
func (r *restore) resumeRestored(ctx context.Context) error {
	m := r.Memory
	if r.run == nil || !discover.Same(r.run.proc.PID, r.run.proc.StartTime) {
		r.warn(warnEnded, "", "QEMU ended before the guest went on; its disks are restored, and its next start finds them as a power cut would leave them")
		return nil
	}
	s, err := r.vm.monitorOf(r.run)
	if err != nil {
		return err
	}
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return err
	}
	if err := r.isolate(ctx, s); err != nil {
		return err
	}
	if !m.Runs {
		r.warn(warnPaused, "", "the VM is paused, as it was when the snapshot was taken")
		return nil
	}
	if st.Status != monitor.RunStateRunning {
		if err := s.Cont(ctx); err != nil {
			return err
		}
	}
	if m.Anew == AnewBoots {
		return nil
	}
	if r.Preview != nil && r.Preview.Isolated {
		return r.wakeGuest(ctx)
	}
	if err := announce(ctx, s); err != nil {
		r.warn(warnNotAnnounced, "", "the network was not told where the guest is: "+err.Error())
	}
	return r.wakeGuest(ctx)
}

// announce has QEMU tell the network's switches where the guest's addresses are.
func announce(ctx context.Context, s *monitor.Session) error {
	// The times of QEMU's own announcement after a migration (net/announce.c).
	args := map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 100}
	err := s.Execute(ctx, "announce-self", args, nil)
	if err != nil {
		return fmt.Errorf("announce-self: %w", err)
	}
	return nil
}
