package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// How a VM ended, as catalog.VM.Stopped records it.
const (
	endedByShutdown  = "shutdown" // the guest shut down, and QEMU said so
	endedByKill      = "killed"
	endedByMigration = "migrated"
)

// run is one QEMU process of a VM, and the monitor session to it.
type run struct {
	proc   discover.Process
	cancel context.CancelFunc
	ended  chan struct{} // closed when follow has returned
	met    chan struct{} // closed once it is known whether the monitor answers
	meet   sync.Once     // closes met
	huge   hugePages

	mu       sync.Mutex
	session  *monitor.Session // nil while there is none
	socket   string           // the QMP socket in use
	problem  *Problem         // why there is no session
	status   string           // QEMU's run state
	version  string
	presence Presence
	disks    []liveDisk
	how      string               // how it ended, as far as QEMU told
	saving   bool                 // an operation of ours saves its memory
	saved    bool                 // one has, and the guest has not run since: postmigrate is no migration
	tight    map[string]tightness // disks that may run out of space soon, by device
	quiet    time.Time            // until when QEMU is asked for nothing that can wait
	stuck    string               // why QEMU has stopped the guest for want of space; empty while it has not

	roomNews chan struct{} // holds one token when something was heard that concerns the room of the disks
}

func newRun(p discover.Process) *run {
	r := &run{proc: p, ended: make(chan struct{}), met: make(chan struct{}), presence: NoChannel, roomNews: make(chan struct{}, 1)}
	if p.GuestAgent.Path != "" {
		r.presence = Disconnected
	}
	return r
}

// awaitEnd waits until the session has read everything that QEMU wrote, and
// says how the VM ended.
func (r *run) awaitEnd(ctx context.Context) string {
	r.mu.Lock()
	s := r.session
	r.mu.Unlock()
	if s != nil {
		select {
		case <-r.ended:
		case <-ctx.Done():
		case <-time.After(endOfSession):
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.how == "" {
		return endedByKill
	}
	return r.how
}

// endOfSession bounds the wait for a session whose process has exited: the
// kernel closes its socket at exit, so what is left to read is in the buffer.
const endOfSession = 2 * time.Second

// follow keeps a session to the process until it ends.
func (a *Agent) follow(ctx context.Context, v *vm, r *run) {
	defer close(r.ended)
	wait := dialFirst
	for ctx.Err() == nil && discover.Same(r.proc.PID, r.proc.StartTime) {
		s, socket, err := dialFree(ctx, r.proc)
		if err != nil {
			r.setProblem(a.dialProblem(r, err))
		} else {
			if a.attend(ctx, v, r, s, socket) {
				wait = dialFirst
			}
			_ = s.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, dialLast)
	}
}

// How often a socket that does not answer is tried: a QEMU that starts opens
// its sockets within milliseconds, one that is busy stays so for long.
const (
	dialFirst = 20 * time.Millisecond
	dialLast  = 5 * time.Second
)

// socketGrace is how long a QEMU may take to make its sockets.
const socketGrace = 5 * time.Second

// dialFree returns a session on the first QMP socket that is free.
func dialFree(ctx context.Context, p discover.Process) (*monitor.Session, string, error) {
	if len(p.QMP) == 0 {
		return nil, "", errNoSocket
	}
	var errs []error
	for _, socket := range p.QMP {
		addr, err := p.Address(socket)
		if err == nil {
			var s *monitor.Session
			if s, err = monitor.Dial(ctx, addr); err == nil {
				return s, socket.Path, nil
			}
		}
		errs = append(errs, err)
		if !errors.Is(err, monitor.ErrBusy) && time.Since(p.Started) < socketGrace {
			break // QEMU is still making its sockets: the next one may be another's
		}
	}
	return nil, "", errors.Join(errs...)
}

var errNoSocket = errors.New("no QMP socket")

func (a *Agent) dialProblem(r *run, err error) *Problem {
	switch {
	case r.proc.Libvirt:
		return &Problem{"libvirt-managed", "managed by libvirt (" + r.proc.LibvirtEvidence + "), which holds the monitor",
			"take its snapshots with libvirt, since its command line fixes the layers of its disks; or start it without libvirt and with -qmp unix:…,server=on,wait=off"}
	case errors.Is(err, errNoSocket):
		return &Problem{"no-qmp-socket", "the launch command gives no QMP socket",
			"add -qmp unix:/run/vmsnap/" + displayName(r.proc) + ".qmp,server=on,wait=off to it"}
	case errors.Is(err, monitor.ErrBusy):
		return &Problem{"monitor-busy", "another client holds every QMP socket, or QEMU is stopped: " + err.Error(),
			"end the other client, or give QEMU a second -qmp socket"}
	default:
		return &Problem{"monitor-unreachable", err.Error(), "check that the socket exists and that vmsnapd may open it"}
	}
}

func (r *run) setProblem(p *Problem) {
	r.mu.Lock()
	r.problem = p
	r.mu.Unlock()
	r.meet.Do(func() { close(r.met) })
}

// attend serves one session: it learns what QEMU tells and follows its events
// until the session ends. It reports whether QEMU told what is needed.
func (a *Agent) attend(ctx context.Context, v *vm, r *run, s *monitor.Session, socket string) bool {
	sub := s.Subscribe(64, "STOP", "RESUME", "SHUTDOWN", "RESET", "SUSPEND", "WAKEUP", "GUEST_PANICKED", "MIGRATION",
		"VSERPORT_CHANGE", "DEVICE_DELETED", "BLOCK_IO_ERROR", "BLOCK_WRITE_THRESHOLD")
	defer sub.Close()
	unhook := context.AfterFunc(ctx, func() { _ = s.Close() }) // which ends the loop below
	defer unhook()
	registered, err := a.learn(ctx, v, r, s)
	if err != nil {
		a.log.Warn("a VM's monitor does not tell what is needed", "vm", v.name(), "socket", socket, "error", err)
		r.setProblem(&Problem{"monitor-unresponsive", err.Error(), "check whether QEMU is stopped or hung"})
		return false
	}
	a.isolateAgain(ctx, v, s)
	r.mu.Lock()
	r.session, r.socket, r.problem = s, socket, nil
	r.mu.Unlock()
	r.meet.Do(func() { close(r.met) })
	if !registered {
		a.group.Go(func() { a.registerLater(ctx, v, r, s) })
	}
	unwatch := a.watchRoom(ctx, v, r, s)
	a.followEvents(ctx, v, r, s, sub)
	unwatch()
	r.mu.Lock()
	r.session = nil
	r.problem = &Problem{"monitor-lost", "the monitor session ended", "vmsnapd connects again by itself"}
	r.mu.Unlock()
	return true
}

// registerLater looks at the disks again, once the operation that changes them has
// ended. The VM may have another process then, which ended and is about to be
// missed: this one is looked at all the same.
func (a *Agent) registerLater(ctx context.Context, v *vm, r *run, s *monitor.Session) {
	for registered := false; !registered; {
		v.changing.RLock()
		v.changing.RUnlock() //nolint:staticcheck // only its end is awaited
		err := a.reload(ctx, v)
		if err == nil {
			registered, err = a.refreshDisks(ctx, v, r, s)
		}
		if err != nil {
			a.log.Debug("disks unknown", "vm", v.name(), "error", err)
			return
		}
	}
	r.lookAtRoom()
}

const (
	// hushWindow is for a freeze window or a pause of the guest. What is shown of the
	// VM meanwhile is not the newest, which one that takes longer is not worth.
	hushWindow = 2 * time.Second
	// hushAfter is for a guest that runs again and catches up: its CPUs and whoever
	// answers a question wait for the same lock of QEMU's.
	hushAfter = 300 * time.Millisecond
)

// hush has QEMU asked for nothing that can wait, for so long from now. It takes
// microseconds for each byte that it is sent, and does nothing else meanwhile.
func (r *run) hush(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.quiet = time.Now().Add(d)
}

func (r *run) hushed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Before(r.quiet)
}

// passing is how often a run state is asked for that QEMU leaves without an
// event, such as finish-migrate.
const passing = 100 * time.Millisecond

// followEvents takes in QEMU's events until the session ends.
func (a *Agent) followEvents(ctx context.Context, v *vm, r *run, s *monitor.Session, sub *monitor.Subscription) {
	var again, freed <-chan time.Time
	var lost uint64
	for {
		status := false
		select {
		case <-again:
			status = true
		case <-freed:
			a.lookAtDisks(ctx, v, r, s)
		case e, ok := <-sub.C:
			if !ok {
				return
			}
			r.mu.Lock()
			r.event(e)
			r.mu.Unlock()
			if n := sub.Lost(); n != lost {
				lost = n
				a.makeUp(ctx, v, r, s)
			}
			switch e.Name {
			case "RESET":
			case "DEVICE_DELETED":
				a.lookAtDisks(ctx, v, r, s)
				freed = time.After(freeing)
			case "BLOCK_WRITE_THRESHOLD":
				r.lookAtRoom()
			case "BLOCK_IO_ERROR":
				r.lookAtRoom() // that it stops the guest is told by another
				status = true
			case "VSERPORT_CHANGE":
				if r.proc.GuestAgent.Chardev != "" {
					continue // the event has said it
				}
				if err := r.refreshPresence(ctx, s); err != nil {
					a.log.Debug("guest agent unknown", "vm", v.name(), "error", err)
				}
			default:
				status = true
			}
		}
		if !status {
			continue
		}
		if r.hushed() {
			again = time.After(passing)
			continue
		}
		if err := r.refreshStatus(ctx, s); err != nil {
			a.log.Debug("run state unknown", "vm", v.name(), "error", err)
		}
		if r.concernsRoom() {
			r.lookAtRoom()
		}
		again = nil
		if r.inPassing() {
			again = time.After(passing)
		}
	}
}

// freeing is how long QEMU takes to free a device that it has said is deleted:
// until then its disk is still there.
const freeing = 500 * time.Millisecond

// lookAtDisks brings what is shown of the disks up to date.
func (a *Agent) lookAtDisks(ctx context.Context, v *vm, r *run, s *monitor.Session) {
	if _, err := a.refreshDisks(ctx, v, r, s); err != nil {
		a.log.Debug("disks unknown", "vm", v.name(), "error", err)
	}
	r.lookAtRoom()
}

// makeUp asks QEMU what events that were lost may have said. How the VM is going
// to end is not known any more.
func (a *Agent) makeUp(ctx context.Context, v *vm, r *run, s *monitor.Session) {
	a.log.Warn("events of a VM were lost", "vm", v.name())
	defer r.lookAtRoom()
	r.mu.Lock()
	r.how = ""
	r.mu.Unlock()
	if _, err := a.learn(ctx, v, r, s); err != nil {
		a.log.Warn("a VM's monitor does not tell what is needed", "vm", v.name(), "error", err)
	}
}

// setSaving tells that the migration that is seen is a save of ours, which is not
// how the VM ends.
func (r *run) setSaving(saving bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.saving, r.saved = saving, !saving && r.status != string(monitor.RunStateRunning)
	if !saving && r.how == endedByMigration {
		r.how = ""
	}
}

// inPassing reports whether the run state is one that ends by itself.
func (r *run) inPassing() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch monitor.RunState(r.status) {
	case monitor.RunStateFinishMigrate, monitor.RunStateSaveVM, monitor.RunStateRestoreVM, monitor.RunStateInMigrate:
		return true
	default:
		return false
	}
}

// event takes in what an event says by itself. It runs under r.mu.
func (r *run) event(e monitor.Event) {
	var data struct {
		Guest  bool   `json:"guest"`
		Status string `json:"status"`
		ID     string `json:"id"`
		Open   bool   `json:"open"`
	}
	if err := e.Decode(&data); err != nil {
		return // a hint that cannot be read is no hint
	}
	switch e.Name {
	case "SHUTDOWN":
		if data.Guest {
			r.how = endedByShutdown
		}
	case "RESET":
		r.how = "" // a shutdown that -no-shutdown survived does not count any more
	case "MIGRATION":
		if data.Status == "completed" && !r.saving {
			r.how, r.saved = endedByMigration, false
		}
	case "RESUME":
		r.how, r.saved = "", false
	case "VSERPORT_CHANGE":
		if data.ID != "" && data.ID == r.proc.GuestAgentDevice && r.proc.GuestAgent.Chardev != "" {
			r.presence = presenceOf(data.Open)
		}
	}
}

// learn asks QEMU everything that is kept of it. registered is refreshDisks'.
func (a *Agent) learn(ctx context.Context, v *vm, r *run, s *monitor.Session) (registered bool, err error) {
	ver := s.Version()
	r.mu.Lock()
	r.version = fmt.Sprintf("%d.%d.%d", ver.QEMU.Major, ver.QEMU.Minor, ver.QEMU.Micro)
	r.mu.Unlock()
	if err := r.refreshStatus(ctx, s); err != nil {
		return false, err
	}
	if err := r.refreshPresence(ctx, s); err != nil {
		return false, err
	}
	return a.refreshDisks(ctx, v, r, s)
}

func (r *run) refreshStatus(ctx context.Context, s *monitor.Session) error {
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.status = string(st.Status)
	switch st.Status {
	case monitor.RunStateRunning:
		r.saved = false
	case monitor.RunStatePostMigrate, monitor.RunStateFinishMigrate:
		if !r.saving && !r.saved {
			r.how = endedByMigration
		}
	}
	r.mu.Unlock()
	return nil
}

func presenceOf(open bool) Presence {
	if open {
		return Connected
	}
	return Disconnected
}

// refreshPresence reads whether something in the guest has the agent's port
// open: query-chardev's frontend-open. A socket that the configuration names is
// found by its path.
func (r *run) refreshPresence(ctx context.Context, s *monitor.Session) error {
	agent := r.proc.GuestAgent
	if agent.Path == "" {
		return nil
	}
	devs, err := s.QueryChardev(ctx)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range devs {
		if d.Label == agent.Chardev || agent.Chardev == "" && strings.Contains(d.Filename, "unix:"+agent.Path+",") {
			r.presence = presenceOf(d.FrontendOpen)
		}
	}
	return nil
}

// lookAgain brings what is shown of a VM up to date after its disks changed.
func (a *Agent) lookAgain(ctx context.Context, v *vm) {
	if err := a.reload(ctx, v); err != nil {
		a.log.Error("the catalog cannot be read", "vm", v.name(), "error", err)
	}
	r, err := v.alone()
	if err != nil || r == nil {
		return
	}
	r.lookAtRoom()
	s, err := v.monitorOf(r)
	if err == nil {
		_, err = a.refreshDisks(ctx, v, r, s)
	}
	if err != nil {
		a.log.Debug("disks unknown", "vm", v.name(), "error", err)
	}
}

// refreshDisks reads the block graph. registered is false when an operation is
// changing the VM's layers, so that disks seen for the first time had to wait.
func (a *Agent) refreshDisks(ctx context.Context, v *vm, r *run, s *monitor.Session) (registered bool, err error) {
	registered = v.changing.TryRLock()
	if registered {
		defer v.changing.RUnlock()
	}
	g, err := blockdev.ReadGraph(ctx, s)
	if err != nil {
		return registered, err
	}
	disks := a.liveDisks(ctx, v, r, g, registered)
	if registered {
		a.dropDetached(ctx, v, disks)
	}
	r.mu.Lock()
	r.disks = disks
	r.mu.Unlock()
	return registered, nil
}

// monitorOf returns the session to a running VM's QEMU, after checking that
// the process is still the one that was found.
func (v *vm) monitorOf(r *run) (*monitor.Session, error) {
	name := v.name()
	if !discover.Same(r.proc.PID, r.proc.StartTime) {
		return nil, fault.New(fault.Unresponsive, "VM %s: its QEMU process %d is gone", name, r.proc.PID)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.session != nil {
		return r.session, nil
	}
	kind := fault.Unresponsive
	if r.problem == nil {
		return nil, fault.New(kind, "VM %s: its monitor has not answered yet", name)
	}
	if r.problem.Code == "no-qmp-socket" || r.problem.Code == "libvirt-managed" {
		kind = fault.Unsupported
	}
	return nil, fault.New(kind, "VM %s: %s", name, r.problem.Message).WithHint("%s", r.problem.Hint)
}
