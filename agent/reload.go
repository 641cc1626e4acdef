package agent

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/vmsnap/vmsnap/agent/discover"
)

// ErrStopping is returned for what comes after Run was told to end.
var ErrStopping = errors.New("the agent stops")

// Reload reads the files of Config.OverridesDir again. They describe VMs that
// start from now on, those that are stopped, and running ones that were left
// alone so far. What they change for a VM that runs and is managed is logged: it
// comes with the VM's or the agent's next start, so that no session is cut off
// in the middle of a recipe. When a file has a mistake nothing changes.
func (a *Agent) Reload(ctx context.Context) error {
	overrides, err := discover.LoadOverrides(a.cfg.OverridesDir)
	if err != nil {
		return err
	}
	reload := reloading{overrides, make(chan error, 1)}
	select {
	case a.reloads <- reload:
	case <-a.stopping:
		return ErrStopping
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return <-reload.done
}

// reloading is a Reload on its way to Run, which alone takes VMs in.
type reloading struct {
	overrides []discover.Override
	done      chan error
}

// followHost takes in what happens on the host until the watch ends.
func (a *Agent) followHost(ctx, sessions context.Context, w *discover.Watcher, listed func()) {
	all := false
	var first []discover.Process // those that ran already and are not taken in yet, until all are listed
	takeIn := func() {
		a.started(sessions, slices.DeleteFunc(first, a.isKnown)...)
		first = nil
	}
	for {
		select {
		case e, ok := <-w.Events():
			if !ok {
				return
			}
			switch e.Kind {
			case discover.Started:
				if first = append(first, e.Process); all {
					takeIn()
				}
			case discover.Exited:
				takeIn() // it may be one of them
				a.exited(ctx, e.Process)
			case discover.Listed:
				takeIn()
				all = true
				listed()
			}
		case reload := <-a.reloads:
			a.mu.Lock()
			a.overrides = reload.overrides
			a.mu.Unlock()
			reload.done <- a.describeAgain(ctx, sessions)
		case r := <-a.rebuilds:
			r.done <- a.rebuild(r.ctx, sessions, r.dirs)
		}
	}
}

// isKnown reports whether a process was taken in: a reload may have been the first
// to see it.
func (a *Agent) isKnown(p discover.Process) bool {
	_, r := a.runOf(p)
	return r != nil
}

// describeAgain looks at the QEMU processes with overrides that are new.
func (a *Agent) describeAgain(ctx, sessions context.Context) error {
	processes, err := discover.Scan(ctx)
	for _, p := range processes {
		v, r := a.runOf(p)
		if r == nil {
			a.started(sessions, p)
			continue
		}
		described, managed := a.describe(p)
		if !managed || !sameDescription(r.proc, described) {
			a.log.Warn("a VM file takes effect when the VM or vmsnapd is started again", "vm", v.name(), "files", described.Overrides)
		}
	}
	return err
}

// describe returns a process as the overrides describe it, and whether it is to
// be managed.
func (a *Agent) describe(found discover.Process) (discover.Process, bool) {
	a.mu.RLock()
	overrides := a.overrides
	a.mu.RUnlock()
	p, managed := discover.Apply(overrides, found)
	return p, managed && (!a.cfg.ListedOnly || len(p.Overrides) > 0)
}

// sameDescription compares what overrides can change.
func sameDescription(a, b discover.Process) bool {
	return a.Name == b.Name && slices.Equal(a.QMP, b.QMP) && a.GuestAgent == b.GuestAgent &&
		a.Cgroup.Unit == b.Cgroup.Unit && a.OverlayDir == b.OverlayDir && maps.Equal(a.OverlayDirs, b.OverlayDirs)
}
