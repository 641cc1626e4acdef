package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

const (
	// roomLook is how often the room of the disks is looked at. QEMU tells of layers
	// that grow: this is for others that write to the same file systems.
	roomLook = 30 * time.Second
	// roomLookSoon is the same while there is little, or the guest stands still.
	roomLookSoon = time.Second
	// roomPause lies between two looks, however much QEMU tells.
	roomPause = 100 * time.Millisecond
	// resumeLast is how long a guest at most stays alone that ran out of space each
	// time it was let run, although there seemed to be some: a quota may be full.
	resumeLast = time.Minute
	// resumeRoom is the least that is free for a guest that is let run.
	resumeRoom = 1 << 20
)

// roomWatch follows, for one session with a QEMU, whether its disks can grow.
type roomWatch struct {
	*Agent
	vm       *vm
	run      *run
	session  *monitor.Session
	outdated bool // disks are
	disks    []growing
	resumed  time.Time     // when the guest was last let run
	wait     time.Duration // after that
}

// watchRoom tells of disks that run out of space, and of guests that QEMU stopped
// for that, and lets these run again where that is wanted. The write thresholds that
// announce it belong to the nodes: they are set anew for each new active layer, and
// when a new agent finds others than it would have set.
func (a *Agent) watchRoom(ctx context.Context, v *vm, r *run, s *monitor.Session) (end func()) {
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	w := &roomWatch{Agent: a, vm: v, run: r, session: s, outdated: true}
	go func() { defer close(ended); w.follow(ctx) }()
	return func() { stop(); <-ended }
}

func (w *roomWatch) follow(ctx context.Context) {
	for {
		next := w.look(ctx)
		select {
		case <-ctx.Done():
			return
		case <-time.After(roomPause):
		}
		select {
		case <-ctx.Done():
			return
		case <-w.run.roomNews:
			w.outdated = true
		case <-time.After(next - roomPause):
		}
	}
}

// look looks at the disks once, and returns when it is to be looked again. While an
// operation runs that may put a new layer on a disk, QEMU is asked each time.
func (w *roomWatch) look(ctx context.Context) time.Duration {
	if w.run.hushed() {
		return roomLookSoon
	}
	_, busy := w.ops.Running(w.vm.id)
	stuck := w.run.isStuck()
	if w.outdated || busy || stuck {
		g, err := blockdev.ReadGraph(ctx, w.session)
		if err != nil {
			w.log.Debug("the room of a VM's disks is unknown", "vm", w.vm.name(), "error", err)
			return roomLook
		}
		w.disks, w.outdated = w.run.growing(w.vm, g), false
	}
	w.measure(ctx)
	tight := w.tellTight()
	w.arm(ctx)
	if w.tellStuck() {
		w.resume(ctx)
		return roomLookSoon
	}
	if tight {
		return roomLookSoon
	}
	return roomLook
}

// measure looks at the file systems. One that hangs is taken as it was.
func (w *roomWatch) measure(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, statPatience)
	defer cancel()
	var paths []string
	for _, d := range w.disks {
		if d.path != "" {
			paths = append(paths, d.path)
		}
	}
	rooms := w.vm.rooms.look(ctx, paths)
	for i := range w.disks {
		d := &w.disks[i]
		d.room, d.seen = rooms[d.path]
	}
}

// tellTight tells of disks that have become tight, or are not any more.
func (w *roomWatch) tellTight() bool {
	limit := w.cfg.LowSpace
	now := map[string]tightness{}
	w.run.mu.Lock()
	before := w.run.tight
	for i := range w.disks {
		d := &w.disks[i]
		if _, was := before[d.device]; d.tight(limit, was) {
			now[d.device] = d.tightness(limit)
		}
	}
	w.run.tight = now
	w.run.mu.Unlock()
	for _, device := range sortedKeys(now) {
		if _, was := before[device]; !was {
			w.tell(event.DiskSpaceLow, event.Warning, device, "little space is left for the disk: "+now[device].String())
		}
	}
	for i := range w.disks {
		d := &w.disks[i]
		_, was := before[d.device]
		if _, is := now[d.device]; was && !is {
			w.tell(event.DiskSpaceBack, event.Info, d.device, fmt.Sprintf("there is space for the disk again: %d bytes are free in %s", d.room.free, filepath.Dir(d.path)))
		}
	}
	return len(now) > 0
}

func (w *roomWatch) tell(kind event.Kind, severity event.Severity, disk, message string) {
	name := w.vm.name()
	log := w.log.Warn
	if severity == event.Info {
		log = w.log.Info
	}
	log(message, "vm", name, "disk", disk)
	w.news.tell(event.Event{Kind: kind, Severity: severity, VMID: w.vm.id, VMName: name, Disk: disk, Message: message})
}

// arm has QEMU tell when layers have grown. It belongs to libvirt where that is
// there: its own users are told by the same thresholds.
func (w *roomWatch) arm(ctx context.Context) {
	if w.cfg.LowSpace == 0 || w.run.proc.Libvirt {
		return
	}
	for i := range w.disks {
		d := &w.disks[i]
		at := d.rearm(w.cfg.LowSpace)
		if at == 0 {
			continue
		}
		if err := blockdev.SetWriteThreshold(ctx, w.session, d.node, at); err != nil {
			w.log.Debug("QEMU does not tell when a disk has grown", "vm", w.vm.name(), "disk", d.device, "error", err)
			w.outdated = true // the node may have gone
			continue
		}
		d.threshold = at
	}
}

// concernsRoom reports whether the run state has to do with the room of the disks.
// QEMU is not to be asked for more when an operation pauses the guest.
func (r *run) concernsRoom() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stuck != "" || monitor.RunState(r.status) == monitor.RunStateIOError
}

// isStuck reports whether the guest is known to stand still for want of space.
func (r *run) isStuck() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stuck != ""
}

// tellStuck tells of a guest that QEMU has stopped for want of space, or that it
// runs again. It reports whether it stands still.
func (w *roomWatch) tellStuck() bool {
	r := w.run
	full := outOfSpace(w.disks)
	r.mu.Lock()
	status, was := monitor.RunState(r.status), r.stuck
	r.stuck = ""
	if status == monitor.RunStateIOError && len(full) > 0 {
		r.stuck = "there was no space for what it wrote to disk " + strings.Join(devices(full), ", ")
	}
	is := r.stuck
	r.mu.Unlock()
	switch {
	case was == "" && is != "":
		w.tell(event.GuestOutOfSpace, event.Error, full[0].device, "QEMU has stopped the guest: "+is)
	case was != "" && is == "" && status == monitor.RunStateRunning:
		w.tell(event.GuestResumed, event.Info, "", "the guest runs again that was out of space")
	}
	return is != ""
}

// resume lets the guest run again when there is space, if that is wanted and no
// operation stops or starts it. What stops it in that moment is left as it is: QEMU
// lets nobody but its own error be followed by "io-error".
func (w *roomWatch) resume(ctx context.Context) {
	if time.Since(w.resumed) > 2*resumeLast {
		w.wait = 0
	}
	if !w.cfg.ResumeGuests || time.Since(w.resumed) < w.wait {
		return
	}
	for _, d := range outOfSpace(w.disks) {
		if limit := max(w.cfg.LowSpace, resumeRoom); !d.seen || d.tight(limit, true) {
			return
		}
	}
	release, ok := w.vm.holdCPUs()
	if !ok {
		return // it is tried again when the operation has ended
	}
	defer release()
	st, err := w.session.QueryStatus(ctx)
	if err == nil && st.Status != monitor.RunStateIOError {
		return
	}
	w.resumed, w.wait = time.Now(), min(max(2*w.wait, roomLookSoon), resumeLast)
	if err == nil {
		err = w.session.Cont(ctx)
	}
	if err != nil {
		w.log.Warn("a guest that was out of space cannot be let run", "vm", w.vm.name(), "error", err)
		return
	}
	w.log.Info("a guest that was out of space is let run", "vm", w.vm.name())
}
