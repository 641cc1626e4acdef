package agent

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
)

// The journal entries of a clone's start.
const (
	entryCloneStart = "clone-start" // its QEMU is about to be started
	entryCloneBack  = "clone-back"  // it is about to be taken back, with all files
)

// start starts the clone, whose files have their names. If that fails nothing is
// left of it.
func (c *vmCloning) start(ctx context.Context) error {
	c.o.LetCancel()
	err := c.o.Step(ctx, "launch", func(ctx context.Context) error {
		if err := c.o.Journal(ctx, entryCloneStart, c.def.Spec); err != nil {
			return err
		}
		c.o.Revert("end the clone", c.end)
		return c.launch(ctx)
	})
	if err != nil {
		return err
	}
	if err := c.o.PointOfNoReturn(); err != nil {
		return err
	}
	c.o.DropReverts()
	return c.def.Clear(context.WithoutCancel(ctx))
}

// launch starts QEMU, or has it started, and returns when its monitor answers.
func (c *vmCloning) launch(ctx context.Context) error {
	within := launchWithin
	if c.def.Launcher == launch.External {
		within = externalWithin
		text, err := json.Marshal(c.def.Spec)
		if err != nil {
			return err
		}
		c.o.Output(string(text))
		c.o.Warn(op.Warning{Code: warnAwaitsLauncher, Message: "QEMU is to be started as the output of this step says (vmsnap operation show " + c.o.ID() + " -o json)"})
	}
	ctx, stop := context.WithTimeoutCause(ctx, within, fault.New(fault.Failed, "VM %s: no QEMU of it answers after %s", c.req.Name, within))
	defer stop()
	l, err := c.def.Start(ctx)
	if err != nil {
		return err
	}
	c.launched = l
	if l.Warning != "" {
		c.o.Warn(op.Warning{Code: warnLauncher, Message: l.Warning})
	}
	asked := time.Now()
	for !c.answers(ctx, c.def.UUID) {
		if time.Since(asked) > launchAsk {
			if err := l.Failed(ctx); err != nil {
				return err
			}
			asked = time.Now()
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(launchPoll): // its process and its monitor are not announced to recipes
		}
	}
	return nil
}

// answers reports whether a VM has a QEMU process whose monitor answers.
func (a *Agent) answers(ctx context.Context, uuid string) bool {
	v, err := a.find(uuid)
	if err != nil {
		return false
	}
	r, err := v.alone()
	if err != nil || r == nil {
		return false
	}
	s, err := v.monitorOf(r)
	if err != nil {
		return false
	}
	_, err = s.QueryStatus(ctx)
	return err == nil
}

// end takes the start back: no QEMU runs on the files any more when they go.
func (c *vmCloning) end(ctx context.Context) error {
	if err := c.o.Journal(ctx, entryCloneBack, nil); err != nil {
		return err
	}
	return c.endClone(ctx, c.def.Spec, c.launched)
}

// endClone ends a QEMU of a specification, whoever has started it.
func (a *Agent) endClone(ctx context.Context, spec launch.Spec, l *launch.Launched) error {
	var errs []error
	if l != nil {
		l.Kill()
	}
	if spec.Launcher == launch.Systemd {
		errs = append(errs, spec.Stop(ctx, func() error { return nil }))
	}
	errs = append(errs, a.endVM(ctx, spec.UUID))
	return errors.Join(append(errs, spec.Clear(ctx))...)
}

// endVM kills the QEMU processes of a VM, if it was seen at all, and forgets it.
func (a *Agent) endVM(ctx context.Context, uuid string) error {
	v, err := a.find(uuid)
	if err != nil {
		return nil //nolint:nilerr // it has not come so far
	}
	ctx, stop := context.WithTimeoutCause(ctx, endWithin, fault.New(fault.Unresponsive, "VM %s: its QEMU does not end", v.name()))
	defer stop()
	for {
		left := v.processes()
		if len(left) == 0 {
			_, err := a.Forget(ctx, v.id, true)
			return err
		}
		for _, p := range left {
			if err := kill(p.PID, p.StartTime); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(launchPoll): // the agent takes note of its end
		}
	}
}

// processes returns the QEMU processes of a VM.
func (v *vm) processes() []discover.Process {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := make([]discover.Process, len(v.runs))
	for i, r := range v.runs {
		all[i] = r.proc
	}
	return all
}

// recoverStart sees to the start of a clone whose agent is gone. It returns the
// entries without those that make the files stay, if they are to go.
func (a *Agent) recoverStart(ctx context.Context, o *op.Op, entries []op.Entry) ([]op.Entry, error) {
	var spec launch.Spec
	started, back := false, false
	for _, e := range entries {
		switch e.Kind {
		case entryCloneStart:
			started = true
			if err := json.Unmarshal(e.Data, &spec); err != nil {
				return nil, err
			}
		case entryCloneBack:
			back = true
		}
	}
	if !back {
		return entries, nil
	}
	if started {
		if err := a.endClone(ctx, spec, nil); err != nil {
			o.Warn(op.Warning{Code: warnLauncher, Message: "what was started for the clone may be left: " + err.Error()})
		}
	}
	var rest []op.Entry
	for _, e := range entries {
		if e.Kind != entryComplete {
			rest = append(rest, e)
		}
	}
	return rest, nil
}

// tellNotStarted warns when a clone that was to be started does not run: whoever
// asked for it starts it by its definition.
func (a *Agent) tellNotStarted(o *op.Op, rec op.Record) {
	var req CloneVMRequest
	if err := json.Unmarshal(rec.Request, &req); err != nil || !req.Start {
		return
	}
	if v, err := a.find(req.Name); err == nil && len(v.processes()) > 0 {
		return
	}
	o.Warn(op.Warning{Code: warnNotStarted, Message: "VM " + req.Name + " is made, and vmsnapd ended before it was seen to run: start it by its definition"})
}
