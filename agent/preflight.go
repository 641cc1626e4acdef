package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/qga"
)

// The codes of preflight's warnings.
const (
	warnNoAgent            = "no-guest-agent"
	warnAgentSilent        = "guest-agent-not-responding"
	warnNoDisk             = "no-disk-selected"
	warnExcluded           = "disk-excluded"
	warnPaused             = "vm-paused"
	warnLaunchRaw          = "launch-format-raw"
	warnSettlesStopped     = "settles-when-stopped"
	warnDropped            = "disk-dropped"
	warnNotQuiesced        = "not-quiesced"
	warnNoImmutable        = "immutable-flag-unavailable"
	warnNotSettled         = "not-settled"
	warnFirmware           = "firmware-state-not-captured"
	warnThawUnresolved     = "thaw-unresolved"
	warnManifest           = "manifest-not-written"
	warnBackingNotReopened = "backing-not-reopened"
	warnAdopted            = "adopted"
	warnRecoveryWaits      = "recovery-waits"
	warnNotRestorable      = "memory-not-restorable"
	warnNeedsLauncher      = "needs-external-launcher"
	warnPauseExceeded      = "pause-exceeded"
	warnLayersKept         = "layers-kept"
	warnMergeWaits         = "merge-waits"
	warnNoSpace            = "no-space"
	warnEnded              = "vm-ended"
	warnResets             = "reset-does-not-end"
	warnClock              = "clock-not-set"
	warnNotAnnounced       = "network-not-announced"
	warnMemoryLost         = "memory-lost"
	warnPlainOnDisk        = "plain-on-disk"
	warnAwaitsLauncher     = "awaits-external-launcher"
	warnLauncher           = "launcher"
	warnNotStarted         = "clone-not-started"
	warnHook               = "hook-failed"
	warnLeftBehind         = "left-behind"
	warnAttached           = "attached-until-end"
	warnMember             = "vm-dropped"
	warnSkew               = "skew-exceeded"
)

// overlayReserve is what must be free where an overlay is made: its metadata
// and the first minutes of a quiet guest.
const overlayReserve = 16 << 20

// preflight is what is known before anything is changed.
type preflight struct {
	plan   Plan
	live   bool // a QEMU process runs
	run    *run
	disks  []*cutDisk // those to be cut
	cannot string     // why the guest cannot be frozen; empty when it can, or need not
	unfit  []*cutDisk // disks that dropped out
	memory *memory    // nil when memory is not saved

	excluded []catalog.SnapshotDisk
	partial  bool // a disk that was asked for dropped out
	maxChain int  // layers that a disk may have on each other; 0: any number
}

// refuse adds a reason why the snapshot would fail.
func (p *preflight) refuse(e *fault.Error) { p.plan.Blockers = append(p.plan.Blockers, e) }

func (p *preflight) warn(code, disk, format string, args ...any) {
	p.plan.Warnings = append(p.plan.Warnings, op.Warning{Code: code, Disk: disk, Message: fmt.Sprintf(format, args...)})
}

// blocker returns the first reason to refuse, warnings included when they are
// to be strict about.
func (p *preflight) blocker(strict bool) error {
	if len(p.plan.Blockers) > 0 {
		return p.plan.Blockers[0]
	}
	for _, w := range p.plan.Warnings {
		if !strict || w.Code == warnExcluded {
			continue // to exclude a disk was asked for
		}
		return fault.New(fault.Failed, "VM %s: %s: %s", p.plan.VM, w.Code, w.Message).
			WithHint("without --strict this is a warning")
	}
	return nil
}

// PlanSnapshot runs the preflight of CreateSnapshot and changes nothing.
func (a *Agent) PlanSnapshot(ctx context.Context, req SnapshotRequest) (Plan, error) {
	v, err := a.find(req.VM)
	if err != nil {
		return Plan{}, err
	}
	if err := a.checkRequest(&req); err != nil {
		return Plan{}, err
	}
	register := v.changing.TryRLock()
	if register {
		defer v.changing.RUnlock()
	}
	p, err := a.preflight(ctx, v, req, register)
	if err != nil {
		return Plan{}, err
	}
	defer p.close()
	if err := a.predictMemory(ctx, v, req, p); err != nil {
		return Plan{}, err
	}
	if id, busy := a.ops.Running(v.id); busy {
		busy := fault.New(fault.Busy, "VM %s: operation %s is running", v.name(), id)
		p.plan.Blockers = slices.Insert(p.plan.Blockers, 0, busy) // it is why disks are not known
	}
	if err := p.blocker(req.Strict); err != nil && len(p.plan.Blockers) == 0 {
		p.refuse(fault.New(fault.Of(err), "%w", err))
	}
	return p.plan, nil
}

// checkRequest refuses what is wrong with a request by itself, and fills in
// the defaults.
func checkRequest(req *SnapshotRequest) error {
	if req.Name != "" {
		if err := checkName(req.Name); err != nil {
			return err
		}
	}
	if err := checkTexts(req.Description, req.Labels); err != nil {
		return err
	}
	if req.Quiesce == "" {
		req.Quiesce = QuiescePrefer
		if req.Memory {
			req.Quiesce = QuiesceNone // memory holds what the file systems have not written yet
		}
	}
	switch req.Quiesce {
	case QuiescePrefer, QuiesceRequire:
	case QuiesceNone:
		if len(req.Mountpoints) > 0 {
			return fault.New(fault.Usage, "mount points are given, but nothing is to be frozen").
				WithHint("leave out --mountpoint or --quiesce=none")
		}
	default:
		return fault.New(fault.Usage, "quiesce %q is not require, prefer or none", req.Quiesce)
	}
	for _, d := range req.Disks {
		if slices.Contains(req.Exclude, d) {
			return fault.New(fault.Usage, "disk %s is both selected and excluded", d)
		}
	}
	if err := checkMemory(*req); err != nil {
		return err
	}
	return checkFreezeTimes(&req.FreezeTimeout, &req.Lease)
}

// checkMemory refuses what makes no sense about the memory.
func checkMemory(req SnapshotRequest) error {
	switch {
	case !req.Memory && (req.Strategy != "" || req.MaxPause != 0 || req.Compress):
		return fault.New(fault.Usage, "a strategy, a longest pause or compression is given, but no memory is to be saved").
			WithHint("add --memory")
	case req.ExpireAfter < 0:
		return fault.New(fault.Usage, "a snapshot that expires after %s: it must be more than zero", req.ExpireAfter)
	case req.MaxPause < 0:
		return fault.New(fault.Usage, "a longest pause of %s: it must be more than zero", req.MaxPause)
	}
	return nil
}

// checkFreezeTimes fills in and bounds the times of a freeze.
func checkFreezeTimes(timeout, lease *time.Duration) error {
	if *timeout == 0 {
		*timeout = DefaultFreezeTimeout
	}
	if *lease == 0 {
		*lease = DefaultLease
	}
	if *timeout < 0 || *timeout > maxFreeze || *lease < 0 || *lease > maxFreeze {
		return fault.New(fault.Usage, "a freeze timeout of %s and a lease of %s: both must be above 0 and at most %s", *timeout, *lease, maxFreeze)
	}
	return nil
}

// maxFreeze bounds what an operator may ask for: beyond it guests report hung
// tasks and clusters fence them.
const maxFreeze = 10 * time.Minute

// preflight looks at everything that a snapshot depends on. The error is for
// what makes looking impossible; reasons to refuse are in the plan. register
// allows to record disks that are seen for the first time (see liveDisks).
func (a *Agent) preflight(ctx context.Context, v *vm, req SnapshotRequest, register bool) (*preflight, error) {
	r, err := v.known(ctx)
	if err != nil {
		return nil, err
	}
	p := &preflight{live: r != nil, run: r, maxChain: a.cfg.MaxChain}
	p.plan = Plan{VM: v.name(), Name: req.Name, Live: p.live, Consistency: catalog.Crash}
	if req.Name != "" {
		if _, err := a.catalog.SnapshotByName(ctx, v.id, req.Name); err == nil {
			p.refuse(fault.New(fault.Exists, "VM %s has a snapshot %s already", v.name(), req.Name).
				WithHint("choose another name, or none and one is made up"))
		} else if fault.Of(err) != fault.NotFound {
			return nil, err
		}
	}
	if p.live {
		err = a.preflightLive(ctx, v, req, p, register)
	} else {
		err = a.preflightStopped(v, req, p)
		if req.Memory {
			p.refuse(fault.New(fault.Unsupported, "VM %s is stopped: there is no memory to save", v.name()).WithHint("leave out --memory"))
		}
	}
	if err != nil {
		p.close()
		return nil, err
	}
	if len(p.disks) == 0 && len(p.plan.Blockers) == 0 {
		p.warn(warnNoDisk, "", "no disk is selected")
		p.refuse(fault.New(fault.Usage, "VM %s: no disk is left to snapshot", v.name()).
			WithHint("vmsnap vm show %s lists its disks", v.name()))
	}
	return p, nil
}

// close releases the directories.
func (p *preflight) close() {
	for _, d := range append(p.disks, p.unfit...) {
		_ = d.close()
	}
}

func (a *Agent) preflightLive(ctx context.Context, v *vm, req SnapshotRequest, p *preflight, register bool) error {
	s, err := v.monitorOf(p.run)
	if err != nil {
		return err
	}
	g, err := blockdev.ReadGraph(ctx, s)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if err := notMigrating(ctx, v, s); err != nil {
		return err
	}
	disks := a.liveDisks(ctx, v, p.run, g, register)
	names := make([]string, len(disks))
	for i := range disks {
		names[i] = disks[i].drive.Device
	}
	chosen, err := choose(v.name(), names, req, p)
	if err != nil {
		return err
	}
	for i := range disks {
		d := &disks[i]
		if !chosen[d.drive.Device] {
			p.leaveOut(d.rec.ID, d.drive.Device, d.virtualSize())
			continue
		}
		a.preflightDisk(v, d, g, req, p)
	}
	if len(disks) > 0 {
		p.firmware(p.run)
	}
	if err := a.preflightGuest(ctx, v, s, req, p); err != nil || !req.Memory {
		return err
	}
	return a.preflightMemory(ctx, v, s, req, p)
}

// notMigrating refuses a VM whose disks are, or are about to be, another
// host's.
func notMigrating(ctx context.Context, v *vm, s *monitor.Session) error {
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	switch st.Status {
	case monitor.RunStatePostMigrate, monitor.RunStateInMigrate, monitor.RunStateFinishMigrate:
		return fault.New(fault.Unsupported, "VM %s is in state %s: its disks may be in use by another host", v.name(), st.Status)
	}
	m, err := s.QueryMigrate(ctx)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	switch m.Status {
	case monitor.MigrationSetup, monitor.MigrationActive, monitor.MigrationDevice, monitor.MigrationPreSwitch, monitor.MigrationCancelling:
		return fault.New(fault.Busy, "VM %s is being migrated or saved (%s)", v.name(), m.Status).
			WithHint("wait for the migration's end")
	}
	return nil
}

// choose resolves --disk and --exclude. Names that fit no disk are refused.
func choose(vm string, names []string, req SnapshotRequest, p *preflight) (map[string]bool, error) {
	for _, n := range slices.Concat(req.Disks, req.Exclude) {
		if !slices.Contains(names, n) {
			return nil, fault.New(fault.NotFound, "VM %s has no disk %q; its disks are %s", vm, n, strings.Join(names, ", "))
		}
	}
	chosen := map[string]bool{}
	for _, n := range names {
		takes, excluded := req.takesDisk(n)
		if excluded {
			p.warn(warnExcluded, n, "disk %s is excluded and carried forward unchanged", n)
		}
		if takes {
			chosen[n] = true
		}
	}
	return chosen, nil
}

// leaveOut lists a disk that the snapshot leaves alone.
func (p *preflight) leaveOut(id, device string, size uint64) {
	p.plan.Disks = append(p.plan.Disks, PlanDisk{Device: device, Excluded: true, VirtualSize: size})
	p.excluded = append(p.excluded, catalog.SnapshotDisk{DiskID: id, Device: device, Size: size, Excluded: true})
}

// preflightDisk decides whether and how one disk is cut.
func (a *Agent) preflightDisk(v *vm, d *liveDisk, g *blockdev.Graph, req SnapshotRequest, p *preflight) {
	refuse := func(kind fault.Kind, format string, args ...any) {
		p.drop(v, catalog.SnapshotDisk{DiskID: d.rec.ID, Device: d.drive.Device, Size: d.virtualSize()}, req.AllowPartial, fault.New(kind, "VM %s: disk %s: %s", v.name(), d.drive.Device, fmt.Sprintf(format, args...)))
	}
	if d.reason != "" {
		refuse(fault.Unsupported, "%s", d.reason)
		return
	}
	if job := g.Job(d.drive); job != "" {
		refuse(fault.Busy, "QEMU's block job %s is working on it", job)
		return
	}
	c, err := newCutDisk(p.run, d, a.overlayDir(p.run.proc, d.rec.Device))
	if err != nil {
		refuse(fault.Failed, "%v", err)
		return
	}
	if err := c.settles(d.rec.SettleNeeded, v.layersOf(d.active), p); err != nil {
		p.unfit = append(p.unfit, c)
		refuse(kindOf(err), "%v", err)
		return
	}
	p.admit(v, c, req.AllowPartial)
}

// layersOf returns the layers that the launch path of a disk may lead to, the
// active one first. One that could not be settled may lead to any that was active
// before.
func (v *vm) layersOf(active catalog.Layer) []catalog.Layer {
	v.mu.Lock()
	defer v.mu.Unlock()
	may := []catalog.Layer{active}
	for _, l := range v.layers {
		if l.DiskID == active.DiskID && l.Covered && !l.Foreign {
			may = append(may, l)
		}
	}
	return may
}

// settles fails if the disk could not be settled after the cut, and warns if
// that has to wait until the VM has stopped. Such a disk may have been cut
// before, since when its launch path leads to a layer further down.
func (c *cutDisk) settles(unsettled bool, chain []catalog.Layer, p *preflight) error {
	switch {
	case !unsettled:
		chain = chain[:1]
	case c.Settle == SettleLive:
		return fault.New(fault.Unsupported, "its launch path is not settled since the last snapshot, which happens when the VM has stopped")
	}
	if err := c.launchPathIsOurs(chain); err != nil {
		return err
	}
	if c.Settle == SettleLive {
		return nil
	}
	if err := c.canFlagBase(); err != nil {
		return fault.New(fault.Unsupported, "its launch path will go on leading to a covered layer until the VM has stopped, and nothing would keep a restarted VM from writing to that: %w", err)
	}
	if c.Settle == SettleConvert {
		p.warn(warnLaunchRaw, c.Device, "its launch command declares format=raw, so after the snapshot it can only be started again once vmsnapd has converted it; that happens when the VM has stopped")
		return nil
	}
	p.warn(warnSettlesStopped, c.Device, "it is a block device, so after the snapshot it can only be started again once vmsnapd has saved the device's content, up to %d MiB, in %s and written the newest state to the device; that happens when the VM has stopped",
		c.Size>>20, c.OverlayDir)
	return nil
}

// firmware warns of state that belongs to the VM and that is in no disk. With the
// memory it is saved and loaded: QEMU migrates what flash and TPM hold.
func (p *preflight) firmware(r *run) {
	for _, d := range r.proc.Drives {
		if d.Interface == "pflash" && !d.ReadOnly {
			p.warn(warnFirmware, "", "firmware variables in %s are not part of the disks; only memory brings them back", filepath.Base(d.File))
		}
	}
	options, err := discover.SplitCommandLine(r.proc.Args)
	if err != nil {
		return // it runs, and has shown all the same what it is
	}
	for _, o := range options {
		if o.Name == "tpmdev" && strings.HasPrefix(o.Arg, "emulator,") {
			p.warn(warnFirmware, "", "the state of the TPM (-tpmdev %s) is not part of the disks; only memory brings it back", o.Arg)
		}
	}
}

// preflightGuest finds out whether the guest can be frozen.
func (a *Agent) preflightGuest(ctx context.Context, v *vm, s *monitor.Session, req SnapshotRequest, p *preflight) error {
	if req.Quiesce == QuiesceNone {
		return nil
	}
	why := ""
	st, err := s.QueryStatus(ctx)
	switch {
	case err != nil:
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	case st.Status != monitor.RunStateRunning:
		p.warn(warnPaused, "", "the VM is %s, so its guest cannot be frozen", st.Status)
		why = "the VM is " + string(st.Status)
	case p.run.proc.GuestAgent.Path == "":
		p.warn(warnNoAgent, "", "the VM has no guest-agent channel (a virtserialport named org.qemu.guest_agent.0)")
		why = "it has no guest agent"
	default:
		if err := a.pingGuest(ctx, p.run); err != nil {
			p.warn(warnAgentSilent, "", "the guest agent does not answer: %v", err)
			why = "its guest agent does not answer"
		}
	}
	if p.cannot = why; why != "" {
		if req.Quiesce == QuiesceRequire {
			p.refuse(fault.New(fault.NotQuiesced, "VM %s cannot be quiesced: %s", v.name(), why).
				WithHint("--quiesce=prefer takes a crash-consistent snapshot instead"))
		}
		return nil
	}
	p.plan.Consistency = catalog.Filesystem
	window, known, err := a.catalog.LastFreezeWindow(ctx, v.id)
	if err == nil && known {
		p.plan.Window = window
	}
	return err
}

// pingDeadline bounds the guest agent's answer before a freeze: a live agent
// answers within milliseconds, one in a guest that hardly gets a CPU within some
// seconds. Nothing is frozen meanwhile, and giving up makes the snapshot worth less.
const pingDeadline = 10 * time.Second

func (a *Agent) pingGuest(ctx context.Context, r *run) error {
	addr, err := r.proc.Address(r.proc.GuestAgent)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, pingDeadline)
	defer cancel()
	c, err := qga.Dial(ctx, addr, qga.DefaultLimits)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	return c.Ping(ctx)
}
