package freeze

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/internal/outlive"
	"github.com/vmsnap/vmsnap/qga"
)

// keeper is the guard seen from inside its process.
type keeper struct {
	hello
	agent *pipe
	log   hclog.Logger

	freezeAsked chan struct{} // closed by the order
	thawAsked   chan struct{} // closed by the order
	endAsked    chan struct{} // closed by the order

	guest     *qga.Client // nil while there is no connection
	lease     Lease
	leased    bool // the lease file exists
	total     int  // file systems that the guest could freeze
	requested time.Time
	alarmed   bool
}

func newKeeper(h hello, agent *pipe, log hclog.Logger) *keeper {
	return &keeper{
		hello: h, agent: agent, log: log,
		freezeAsked: make(chan struct{}),
		thawAsked:   make(chan struct{}),
		endAsked:    make(chan struct{}),
	}
}

// listen turns orders into events until the pipe closes, and then cancels.
func (k *keeper) listen(cancel context.CancelFunc) {
	defer cancel()
	var freeze, thaw, end sync.Once
	for {
		var o order
		if err := k.agent.read(&o); err != nil {
			return
		}
		switch o {
		case orderFreeze:
			freeze.Do(func() { close(k.freezeAsked) })
		case orderThaw:
			thaw.Do(func() { close(k.thawAsked) })
		case orderEnd:
			end.Do(func() { close(k.endAsked) })
		}
	}
}

// run is the guard's life. The context ends with the pipe to the agent.
func (k *keeper) run(ctx context.Context) int {
	outcome := k.live(ctx)
	if k.guest != nil {
		_ = k.guest.Close() // only read from
	}
	k.log.Info("guard ends", "end", outcome.End, "reason", outcome.Reason, "window", outcome.Window)
	k.tell(report{Kind: reportEnded, Outcome: &outcome})
	return 0
}

func (k *keeper) live(ctx context.Context) Outcome {
	if k.Recover != nil {
		return k.recover(ctx)
	}
	ready, err := k.prepare(ctx)
	if err != nil {
		k.tell(report{Kind: reportReady, Err: toRemote(err)})
		return Outcome{End: Unused, Reason: err.Error()}
	}
	k.log.Debug("guard is ready", "filesystems", k.total, "scope", ready.Scope, "no_scope", ready.NoScope)
	k.tell(report{Kind: reportReady, Ready: &ready})
	select {
	case <-k.freezeAsked:
		return k.freeze(ctx)
	case <-k.thawAsked:
		k.tell(report{Kind: reportThaw, Thawed: &Thawed{Reason: "nothing was frozen"}})
		return Outcome{End: Unused, Reason: "a thaw was asked for before the freeze"}
	case <-ctx.Done():
		return Outcome{End: Unused, Reason: "the agent closed its pipe"}
	}
}

// prepare does everything that can be done before the freeze.
func (k *keeper) prepare(ctx context.Context) (readiness, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ready := k.moveOut(ctx)
	var err error
	if k.guest, err = qga.Dial(ctx, k.Request.AgentSocket, qga.DefaultLimits); err != nil {
		return ready, err
	}
	if err := k.sync(ctx, syncTimeout); err != nil {
		return ready, err
	}
	// Asked first: while it is frozen the guest refuses the other questions.
	state, err := k.guest.FreezeStatus(ctx)
	var refused *qga.CommandError
	switch {
	case errors.As(err, &refused):
		return ready, fmt.Errorf("%w: %w", ErrUnsupported, err)
	case err != nil:
		return ready, err
	case state == qga.Frozen:
		return ready, ErrAlreadyFrozen
	}
	if err := k.checkCommands(ctx); err != nil {
		return ready, err
	}
	ready.Filesystems, err = k.filesystems(ctx)
	return ready, err
}

func (k *keeper) sync(ctx context.Context, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return k.guest.Sync(ctx)
}

func (k *keeper) moveOut(ctx context.Context) readiness {
	scope, err := outlive.EnterScope(ctx, "vmsnap-guard", k.ID, "vmsnap freeze guard of VM "+k.Request.VMID+", operation "+k.Request.Operation)
	if err != nil {
		return readiness{NoScope: err.Error()}
	}
	return readiness{Scope: scope}
}

// checkCommands refuses a guest agent that is configured not to freeze. One
// that does not tell its commands is tried.
func (k *keeper) checkCommands(ctx context.Context) error {
	info, err := k.guest.Info(ctx)
	var refused *qga.CommandError
	switch {
	case errors.As(err, &refused):
		return nil
	case err != nil:
		return err
	case !info.CanFreeze():
		return fmt.Errorf("%w: it does not serve the freeze commands", ErrUnsupported)
	case len(k.Request.Mountpoints) > 0 && !info.CanFreezeList():
		return fmt.Errorf("%w: it cannot freeze chosen mount points", ErrUnsupported)
	}
	return nil
}

// filesystems asks what there is to freeze. A guest agent may refuse to tell.
func (k *keeper) filesystems(ctx context.Context) ([]Filesystem, error) {
	mounts, err := k.guest.Filesystems(ctx)
	var refused *qga.CommandError
	if err != nil && !errors.As(err, &refused) {
		return nil, err
	}
	list, total := freezable(mounts)
	k.total = total
	return list, nil
}

// unfreezable are the types whose drivers in Linux have no freeze operation,
// so that FIFREEZE fails and qemu-ga passes over them (QEMU,
// qga/commands-linux.c). All but one cannot be written to anyway.
var unfreezable = map[string]bool{
	"vfat": true, "msdos": true, "exfat": true, "iso9660": true, "udf": true,
	"squashfs": true, "erofs": true, "cramfs": true, "romfs": true,
	"CDFS": true, "UDF": true, // what Windows calls optical media
}

// freezable marks what can be frozen, and counts the devices that hold it: a
// file system that is mounted twice is frozen once.
func freezable(mounts []qga.Filesystem) (list []Filesystem, total int) {
	devices := map[string]bool{}
	for _, m := range mounts {
		fs := Filesystem{Name: m.Name, Mountpoint: m.Mountpoint, Type: m.Type, Freezable: !unfreezable[m.Type]}
		list = append(list, fs)
		if fs.Freezable {
			devices[fs.Name] = true
		}
	}
	return list, len(devices)
}

// announce makes the lease durable before the freeze is sent.
func (k *keeper) announce() error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	self, err := ProcessOf(os.Getpid())
	if err != nil {
		return err
	}
	now := time.Now()
	k.lease = Lease{
		ID: k.ID, Request: k.Request, Boot: boot, Owner: k.Owner, Guard: self,
		State: LeaseHeld, Since: now, Deadline: now.Add(k.Request.FreezeTimeout + k.Request.Lease),
	}
	// Even a write that failed may have left the file.
	k.leased = true
	return k.lease.write(k.Dir)
}

// forget removes the lease file: the guest is known not to be frozen by us.
func (k *keeper) forget() {
	if !k.leased {
		return
	}
	if err := k.lease.remove(k.Dir); err != nil {
		// Recovery will find the guest thawed and try again.
		k.log.Error("lease file cannot be removed", "error", err)
	}
	k.leased = false
}

// tell sends a report. An agent that does not take it is dead or stopped, and
// finds out by other means.
func (k *keeper) tell(r report) {
	if err := k.agent.write(r, sendTimeout); err != nil {
		k.log.Debug("agent does not take a report", "report", r.Kind, "error", err)
	}
}
