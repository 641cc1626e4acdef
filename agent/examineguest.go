package agent

import (
	"context"
	"fmt"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/qga"
)

// What is found out about a VM that runs.
const (
	findGraphDiffers = "graph-differs"
	findIOError      = "guest-stopped-by-io-error"
	findPaused       = "guest-paused"
	findFrozen       = "guest-frozen"
)

// lookAtGraph compares the layers that QEMU has open with those of the catalog. A
// disk whose active layer is another one is among the VM's problems already.
func (x *examination) lookAtGraph(ctx context.Context) error {
	if x.run == nil {
		return nil
	}
	s, err := x.vm.monitorOf(x.run)
	if err != nil {
		return nil //nolint:nilerr // a monitor that does not answer is among the problems
	}
	g, err := blockdev.ReadGraph(ctx, s)
	if err != nil {
		return err
	}
	for _, live := range x.liveDisks(ctx, x.vm, x.run, g, false) {
		for _, d := range x.disks {
			if d.Device == live.drive.Device && !d.Removed {
				x.compareChains(ctx, live, d)
			}
		}
	}
	return nil
}

// compareChains compares one disk's layers, the active one first.
func (x *examination) compareChains(ctx context.Context, live liveDisk, d catalog.Disk) {
	chain := x.chainOf(d)
	differ := func(format string, args ...any) {
		x.found(ctx, Finding{
			Code: findGraphDiffers, Message: fmt.Sprintf("disk %s: QEMU ", live.drive.Device) + fmt.Sprintf(format, args...),
			Hint: "something else has changed the layers: shut the VM down, so that nothing more is written, and compare its files",
		}, nil)
	}
	if len(live.chain) == 0 {
		return
	}
	if len(live.chain) != len(chain) {
		differ("has %d layers, and %d are known", len(live.chain), len(chain))
		return
	}
	for i, l := range live.chain {
		path := absolute(x.run.proc, l.Filename)
		if i > 0 && path == d.LaunchPath {
			continue // a node that has the old name still (backing-not-reopened)
		}
		host, err := x.run.proc.HostPath(path)
		if err == nil {
			var f file
			if f, err = fileAt(host); err == nil && !f.is(chain[i]) {
				differ("has %s open where the layer %s is known", path, chain[i].Path)
			}
		}
		if err != nil {
			differ("has %s open, which cannot be looked at: %v", path, err)
		}
	}
}

// lookAtGuest looks whether something keeps the guest from running.
func (x *examination) lookAtGuest(ctx context.Context) error {
	if x.run == nil {
		return nil
	}
	s, err := x.vm.monitorOf(x.run)
	if err != nil {
		return nil //nolint:nilerr // a monitor that does not answer is among the problems
	}
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return err
	}
	switch st.Status {
	case monitor.RunStateIOError:
		x.found(ctx, Finding{
			Code: findIOError, Message: "the guest stands still, since one of its disks could not be written to; mostly the host's file system is full",
			Repair: "let it go on, which it does not when the disk fails again",
		}, s.Cont)
	case monitor.RunStatePaused:
		x.found(ctx, Finding{
			Code: findPaused, Message: "the guest's CPUs stand still: whoever owns the VM has paused it, or a program that has ended since",
			Hint: "let it go on by the QMP command cont, if nobody wants it to stand still",
		}, nil)
	case monitor.RunStateRunning:
		return x.lookAtFreeze(ctx)
	}
	return nil
}

// lookAtFreeze asks the guest whether it is frozen, when nobody says that it
// should be.
func (x *examination) lookAtFreeze(ctx context.Context) error {
	x.vm.mu.Lock()
	held := x.vm.freeze != nil
	x.vm.mu.Unlock()
	if held || x.run.proc.GuestAgent.Path == "" {
		return nil
	}
	addr, err := x.run.proc.Address(x.run.proc.GuestAgent)
	if err != nil {
		return err
	}
	asked, cancel := context.WithTimeout(ctx, pingDeadline)
	defer cancel()
	c, err := qga.Dial(asked, addr, qga.DefaultLimits)
	if err != nil {
		return nil //nolint:nilerr // a guest without an agent that answers is nothing that is wrong
	}
	status, err := c.FreezeStatus(asked)
	_ = c.Close()
	if err != nil || status == qga.Thawed {
		return nil //nolint:nilerr // as above
	}
	x.found(ctx, Finding{
		Code: findFrozen, Message: "the guest's file systems are frozen, and no operation holds them so", Repair: "thaw them",
	}, func(ctx context.Context) error {
		_, err := x.thawForeign(ctx, x.vm)
		return err
	})
	return nil
}
