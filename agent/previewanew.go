package agent

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/monitor"
)

// Memory loads only into a QEMU process that was started for it. So a preview that
// is to come back with the memory of the state before, or that runs a snapshot's
// memory, ends the VM's process, as a restore with memory does; and so does its
// end. The end lays no overlays: the layers that were active become active again,
// and nothing is written to them before the operation cannot be taken back.

// trial says what a preview starts from, and how.
func (a *Agent) trial(ctx context.Context, v *vm, s catalog.Snapshot, req PreviewRequest) (catalog.Snapshot, RestoreRequest, error) {
	how := req.RestoreRequest
	how.Trial, how.NoSafety = true, req.DiscardRunning
	r, err := v.known(ctx)
	if err != nil || r == nil || req.Memory {
		return s, how, err
	}
	m, err := v.monitorOf(r)
	if err != nil {
		return s, how, err
	}
	st, err := m.QueryStatus(ctx)
	if err != nil {
		return s, how, fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if req.DiscardRunning || st.Status == monitor.RunStatePrelaunch {
		return s, how, nil // nothing in memory is wanted
	}
	c, err := r.configuration(ctx, m)
	if err != nil {
		return s, how, fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	how.Anew = AnewBoots
	s.Quiesce.Frozen = 0 // its guest boots
	s.Config, err = c.encode()
	return s, how, err
}

// wayBack says how the state before a preview comes back, and adds to what it
// comes back from.
func (a *Agent) wayBack(ctx context.Context, v *vm, p catalog.Preview, s *catalog.Snapshot) (RestoreRequest, error) {
	how := RestoreRequest{Trial: true, NoSafety: true}
	f := p.Former
	if f == nil {
		return how, nil
	}
	r, err := v.known(ctx)
	if err != nil {
		return how, err
	}
	how.Launcher, s.Config, s.Memory = launch.Kind(f.Launcher), p.Config, f.Memory
	switch {
	case f.Memory != nil:
		how.Memory = true
	case r == nil: // it stays stopped
	case f.Ran:
		how.Anew = AnewBoots
	default:
		how.Anew = AnewStays
	}
	return how, nil
}

// goesBack makes the disk one that is laid on the layer itself that it lay on
// before the preview.
func (c *cutDisk) goesBack() error {
	if err := c.close(); err != nil {
		return err
	}
	was := c.On[0]
	c.Overlay, c.OverlayID, c.OverlayDir, c.Inodes[2] = filepath.Base(was.Path), was.ID, filepath.Dir(was.Path), 0
	return c.open()
}

// former is the layer that was active before the preview, as one that may be
// covered and exposed.
func (c *cutDisk) former() *cutDisk {
	return &cutDisk{Prefix: c.Prefix, Base: c.Overlay, baseDir: c.overlayDir}
}

// uncoverFormer lets the layers be written to again that were active before the
// preview.
func (r *restore) uncoverFormer() error {
	for _, d := range r.disks {
		if err := d.former().expose(); err != nil {
			return r.failure(d, err)
		}
	}
	return nil
}

// unlay takes back what was laid, when the launch paths lead elsewhere again: the
// overlays go, and layers that were uncovered are protected.
func (r *restore) unlay(ctx context.Context) error {
	for _, d := range r.disks {
		var err error
		if r.Undo == nil {
			err = r.unbuild(ctx, d)
		} else if unflagged := d.former().protect(); unflagged != nil {
			r.warn(warnNoImmutable, d.Device, unflagged.Error())
		}
		if err != nil {
			return r.failure(d, err)
		}
	}
	return nil
}

// halted reports whether a process is the one that was started for this restore,
// and was not told to boot. One that has just been started cannot be asked yet.
func (r *restore) halted(ctx context.Context, run *run) (bool, error) {
	if r.Memory.Anew != AnewBoots || !slices.Equal(run.proc.Args, r.Memory.New.Command) {
		return false, nil
	}
	s, err := r.vm.monitorOf(run)
	if err != nil {
		return false, err
	}
	st, err := s.QueryStatus(ctx)
	return st.Status == monitor.RunStatePrelaunch, err
}

// isolate takes the network links down of a guest that goes on in an isolated
// preview, or up again of one that comes back from it.
func (r *restore) isolate(ctx context.Context, s *monitor.Session) error {
	if r.Preview != nil && r.Preview.Isolated || r.Undo != nil && r.Undo.Isolated {
		return setLinks(ctx, s, nil, r.Undo != nil)
	}
	return nil
}

// entryForget announces, in the journal of a commit, that the memory of the state
// before will not be needed any more once the preview is kept.
const entryForget = "forget"

type discard struct {
	Path string // of the memory file
}

// discardOf removes what the commit of a preview has announced, which has come
// about.
func (a *Agent) discardOf(entries []op.Entry) error {
	for _, e := range entries {
		if e.Kind != entryForget {
			continue
		}
		var d discard
		if err := json.Unmarshal(e.Data, &d); err != nil {
			return err
		}
		if err := removeMemory(d.Path); err != nil {
			return err
		}
	}
	return nil
}

// discardBefore removes the memory of the state before a preview, which has come
// back.
func (r *restore) discardBefore() error {
	if r.Undo == nil || r.Undo.Memory == "" {
		return nil
	}
	return removeMemory(r.Undo.Memory)
}
