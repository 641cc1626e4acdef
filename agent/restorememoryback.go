package agent

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// untilBack takes a restore with memory back, and tries until it works: the VM is
// down meanwhile.
func (r *restore) untilBack(ctx context.Context) error {
	ctx, stop := r.leaving(ctx)
	defer stop()
	return r.untilRecovered(ctx, r.o, r.goBack)
}

// goBack brings the VM back to where it was, from wherever the restore was left.
// It can be done again after it was interrupted.
func (r *restore) goBack(ctx context.Context) error {
	m := r.Memory
	if err := r.unlock(); err != nil {
		return err
	}
	if r.stage == entryLaunch {
		if err := r.endLaunched(ctx, m.New); err != nil {
			return err
		}
	}
	r.run = nil
	if m.Laid && (m.Former == nil || !m.Former.lives()) {
		if happened, err := r.runsRestored(); err != nil {
			return err
		} else if happened && r.stage == entryLaunch {
			// Somebody has started it, by its unchanged command.
			r.adopted = true
			r.warn(warnMemoryLost, "", "the VM was started meanwhile, from the restored disks and without the snapshot's memory")
			return errors.Join(r.settle(ctx), r.commit(ctx))
		}
	}
	if m.Laid && r.stage != entryBack {
		if err := pointBack(r.disks); err != nil {
			return err
		}
		if err := r.unlay(ctx); err != nil {
			return err
		}
	}
	if m.Former == nil || r.stage == "" {
		return nil
	}
	if err := r.bringBack(ctx); err != nil {
		return err
	}
	return r.dropSaved()
}

// dropSaved removes the memory that was saved of the state before.
func (r *restore) dropSaved() error {
	f := r.Memory.Former
	if f.Name == "" {
		return nil
	}
	if r.memory != nil && r.memory.file != nil {
		_ = r.memory.file.Close()
	}
	root, err := openMemoryDir(f.Dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	return r.forgetPlain(memdump.Remove(root, f.Name))
}

// endLaunched ends what was started for the restore, of whose guest nothing has
// run. What somebody else has started stays.
func (r *restore) endLaunched(ctx context.Context, spec launch.Spec) error {
	r.vm.mu.Lock()
	runs := slices.Clone(r.vm.runs)
	r.vm.mu.Unlock()
	var ours []*run
	for _, run := range runs {
		halted, err := r.halted(ctx, run)
		if err != nil && discover.Same(run.proc.PID, run.proc.StartTime) {
			return err
		}
		if (waiting(run.proc.Args) || halted) && (r.Memory.Former == nil || run.proc.PID != r.Memory.Former.PID) {
			ours = append(ours, run)
		}
	}
	err := spec.Stop(ctx, func() error {
		if r.child != nil {
			r.child.Kill()
		}
		for _, run := range ours {
			if err := r.quit(ctx, run); err != nil && discover.Same(run.proc.PID, run.proc.StartTime) {
				// It does not answer: nothing is lost with it.
				if err := kill(run.proc.PID, run.proc.StartTime); err != nil {
					return err
				}
			}
		}
		return nil
	})
	for _, run := range ours {
		err = errors.Join(err, r.awaitGone(ctx, run))
	}
	return errors.Join(err, spec.Clear(ctx))
}

// bringBack has the state before run again: in its own QEMU process, when that
// has not ended, else in a new one.
func (r *restore) bringBack(ctx context.Context) error {
	f := r.Memory.Former
	if f.lives() {
		return r.letGoOn(ctx)
	}
	run, err := r.vm.alone()
	if err != nil {
		return err
	}
	if run != nil {
		done, err := r.foundBack(ctx, run)
		if done || err != nil {
			return err
		}
	}
	if err := r.note(ctx, entryBack); err != nil {
		return err
	}
	if f.Saved == nil {
		if f.Name != "" || f.Ran {
			r.warn(warnMemoryLost, "", "what the guest had in its memory before the restore is lost; it was started from its disks as they were")
		}
		run, err := r.launched(ctx, f.Boots)
		if err != nil {
			return err
		}
		return errors.Join(r.runAgain(ctx, run), f.Boots.Clear(ctx))
	}
	if run, err = r.launched(ctx, f.Waits); err != nil {
		return err
	}
	if err := r.loadInto(ctx, run, filepath.Join(f.Dir, f.Name)); err != nil {
		if errors.Is(err, memdump.ErrLoad) {
			f.Saved = nil // it would fail again
			err = errors.Join(err, r.endLaunched(ctx, f.Waits), r.note(ctx, entryBack))
		}
		return err
	}
	return errors.Join(r.runAgain(ctx, run), f.Waits.Clear(ctx))
}

// foundBack deals with a QEMU that runs before one was started by this attempt:
// that of an earlier one, or somebody else's.
func (r *restore) foundBack(ctx context.Context, run *run) (done bool, err error) {
	f := r.Memory.Former
	if !waiting(run.proc.Args) {
		if f.Saved != nil {
			r.warn(warnMemoryLost, "", "the VM was started meanwhile, from its disks as they were before the restore and without its memory")
		}
		return true, errors.Join(f.Boots.Clear(ctx), f.Waits.Clear(ctx))
	}
	s, err := r.vm.monitorOf(run)
	if err != nil {
		return false, err
	}
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return false, err
	}
	if r.stage == entryBack && st.Status != monitor.RunStateInMigrate {
		return true, errors.Join(r.runAgain(ctx, run), f.Waits.Clear(ctx))
	}
	return false, r.endLaunched(ctx, f.Waits)
}

// runAgain lets the guest of the state before go on.
func (r *restore) runAgain(ctx context.Context, run *run) error {
	if !r.Memory.Former.Ran {
		return nil
	}
	s, err := r.vm.monitorOf(run)
	if err != nil {
		return err
	}
	st, err := s.QueryStatus(ctx)
	if err != nil || st.Status == monitor.RunStateRunning {
		return err
	}
	return s.Cont(ctx)
}

// letGoOn lets the guest go on in the process that was to be ended, and ends the
// saving of its memory.
func (r *restore) letGoOn(ctx context.Context) error {
	f := r.Memory.Former
	_, run := r.runOf(discover.Process{PID: f.PID, StartTime: f.StartTime})
	if run == nil {
		return errors.New("its QEMU process runs and was not found")
	}
	s, err := r.vm.monitorOf(run)
	if err != nil {
		return err
	}
	if f.Settings.FD != "" {
		save, err := memdump.Adopt(ctx, s, f.Settings, memdump.Stopped)
		if err != nil {
			return err
		}
		if err := errors.Join(save.Cancel(ctx, nil), save.Close(ctx)); err != nil {
			return err
		}
	}
	if err := r.runAgain(ctx, run); err != nil {
		return err
	}
	run.setSaving(false)
	return nil
}

// loadMemoryRestore brings a restore with memory back from its journal, and
// reports whether it is one.
func (r *restore) loadMemoryRestore(entries []op.Entry) (bool, error) {
	for _, e := range entries {
		switch e.Kind {
		case entryHold, entryEnd, entryLay, entryLaunch, entryReset, entryBack:
		default:
			continue
		}
		last := restoreEntry{}
		if err := json.Unmarshal(e.Data, &last); err != nil {
			return false, err
		}
		if last.Memory == nil {
			return false, nil
		}
		r.restoreState, r.disks, r.config, r.offline, r.excluded = last.restoreState, last.Disks, last.Config, last.Offline, last.Excluded
		r.stage = e.Kind
		r.keepsAs(last.Name)
	}
	return r.Memory != nil, nil
}

// recoverProbe takes back what was left of a VM's unit that was only tried. What was
// done later is taken back with the rest.
func (r *restore) recoverProbe(ctx context.Context, entries []op.Entry) error {
	for _, e := range entries {
		if e.Kind != entryProbe {
			continue
		}
		var spec launch.Spec
		if err := json.Unmarshal(e.Data, &spec); err != nil {
			return err
		}
		return r.untilRecovered(ctx, r.o, spec.Clear)
	}
	return nil
}

// recoverMemoryRestore brings a restore with memory to its end whose agent is
// gone: once its memory was loaded to the new state, before to the old one.
func (r *restore) recoverMemoryRestore(ctx context.Context) error {
	m := r.Memory
	for _, d := range r.disks {
		if err := r.untilRecovered(ctx, r.o, func(context.Context) error { return d.open() }); err != nil {
			return r.failure(d, err)
		}
	}
	r.o.Cleanup(r.closeDirs)
	if f := m.Former; f != nil && f.Saved != nil {
		r.memory = &memory{Dir: f.Dir, Name: f.Name, Strategy: memdump.Stopped, saved: f.Saved}
	}
	if done, err := r.recorded(ctx); err != nil || done {
		if err == nil && r.NoSafety {
			err = errors.Join(r.removeActive(), r.discardBefore())
		}
		return errors.Join(err, m.New.Clear(ctx))
	}
	if r.stage != entryReset {
		if err := r.o.Step(ctx, "take back", r.untilBack); err != nil || r.adopted {
			return err
		}
		return errInterrupted()
	}
	r.warn(warnAdopted, "", "vmsnapd ended when the memory was loaded; the restore was completed when it came back")
	run, err := r.vm.alone()
	if err != nil {
		return err
	}
	r.run = run
	return r.goOnRestored(ctx)
}
