package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/hook"
	"github.com/vmsnap/vmsnap/agent/op"
)

// HookConfig says which hooks are run, and how.
type HookConfig struct {
	Dir      string                       // of the phases' directories; empty: there are no hooks
	Timeouts map[hook.Phase]time.Duration // of one hook; hook.DefaultTimeout where none is given
	Closed   []hook.Phase                 // of which a failure fails the operation
	Socket   string                       // of the API, for hooks that call it
}

// The journal entries of hooks.
const (
	entryHooks    = "hooks"     // those of a phase are about to run, and owe those of its counterpart
	entryHooksRan = "hooks-ran" // those of a phase have run
)

// hooksEntry is what the journal keeps of hooks.
type hooksEntry struct {
	Phase hook.Phase // that is owed, or has run
	Dir   string
	Input hook.Input
}

// hooks are the host's hooks around one operation on one VM. None of them runs
// while the guest is frozen.
type hooks struct {
	*Agent
	o    *op.Op
	dir  string // empty: none are run
	in   hook.Input
	owed hook.Phase         // that must follow, whatever happens
	warn func(w op.Warning) // where failures are told
	// snapshot tells what is known of the snapshot by now; nil when it is about none.
	snapshot func(context.Context) *hook.Snapshot
}

// hooksOf returns the hooks of an operation. v is nil when it is about no VM.
func (a *Agent) hooksOf(o *op.Op, v *vm, kind op.Kind, uid uint32) *hooks {
	h := &hooks{Agent: a, o: o, dir: a.cfg.Hooks.Dir, warn: o.Warn}
	h.in.Operation = hook.Operation{ID: o.ID(), Kind: string(kind), UID: uid}
	if v == nil {
		return h
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	h.in.VM = &hook.VM{ID: v.id, Name: v.rec.Name, UUID: v.rec.UUID}
	if len(v.runs) == 1 {
		h.in.VM.PID = v.runs[0].proc.PID
	}
	return h
}

// before runs the hooks of a phase that has a counterpart, which is owed from
// then on: by after, or when the operation fails by its reverts, or when the
// agent dies by recovery.
func (h *hooks) before(ctx context.Context, phase, counterpart hook.Phase) error {
	list, err := h.list(phase)
	if err != nil {
		return h.refused(ctx, phase, err)
	}
	if then, err := h.list(counterpart); err == nil && len(list)+len(then) == 0 {
		return nil
	}
	if err := h.o.Journal(ctx, entryHooks, hooksEntry{counterpart, h.dir, h.input(ctx, counterpart, nil)}); err != nil {
		return err
	}
	h.owed = counterpart
	h.o.RevertAtLength("run the hooks "+string(counterpart), func(ctx context.Context) error {
		h.after(ctx)
		return nil
	})
	return h.each(ctx, phase, list, nil)
}

// after runs the hooks that are owed, once. What has been done stays done: a
// hook that fails is told of, and makes the operation partial if its phase is
// fail-closed.
func (h *hooks) after(ctx context.Context) {
	phase := h.owed
	if phase == "" {
		return
	}
	h.owed = ""
	h.last(ctx, phase, nil)
}

// last runs the hooks of a phase that nothing depends on any more.
func (h *hooks) last(ctx context.Context, phase hook.Phase, failure *hook.Failure) {
	ctx = context.WithoutCancel(ctx)
	list, err := h.list(phase)
	if err != nil {
		err = h.refused(ctx, phase, err)
	} else if err = h.each(ctx, phase, list, failure); len(list) > 0 {
		if journal := h.o.Journal(ctx, entryHooksRan, hooksEntry{Phase: phase}); journal != nil {
			h.o.Logger().Warn("the hooks may be run again", "phase", phase, "error", journal)
		}
	}
	if err != nil {
		h.o.SetPartial()
	}
}

// failed runs what is still owed, and the hooks of an operation that failed or was cancelled.
func (h *hooks) failed(ctx context.Context, why op.Failure) {
	h.after(ctx)
	h.last(ctx, hook.OnFailure, &hook.Failure{Kind: string(why.Kind), Message: why.Message})
}

// count returns the number of hooks that some phases have now.
func (h *hooks) count(phases ...hook.Phase) int {
	n := 0
	for _, p := range phases {
		if list, err := h.list(p); err == nil { // what is wrong shows when they are to run
			n += len(list)
		}
	}
	return n
}

func (h *hooks) list(phase hook.Phase) ([]hook.Hook, error) {
	if h.dir == "" {
		return nil, nil
	}
	return hook.List(h.dir, phase)
}

// input is what the hooks of a phase are told.
func (h *hooks) input(ctx context.Context, phase hook.Phase, failure *hook.Failure) hook.Input {
	in := h.in
	in.Phase, in.Failure = phase, failure
	if h.snapshot != nil {
		in.Snapshot = h.snapshot(ctx)
	}
	return in
}

// closed reports whether a failure of a phase counts.
func (h *hooks) closed(phase hook.Phase) bool { return slices.Contains(h.cfg.Hooks.Closed, phase) }

// refused is what becomes of a phase whose hooks must not, or cannot, be run.
func (h *hooks) refused(ctx context.Context, phase hook.Phase, err error) error {
	_ = h.o.StepInAnyCase(ctx, "hooks "+string(phase), func(context.Context) error { return err })
	return h.trouble(phase, "the hooks "+string(phase)+" were not run", err)
}

// trouble records that something went wrong with hooks, and returns it as an
// error if it counts.
func (h *hooks) trouble(phase hook.Phase, what string, err error) error {
	h.warn(op.Warning{Code: warnHook, Message: what + ": " + err.Error()})
	if !h.closed(phase) {
		return nil
	}
	failure := fault.New(fault.Failed, "%s: %w", what, err)
	if h.in.VM != nil {
		failure = fault.New(fault.Failed, "VM %s: %s: %w", h.in.VM.Name, what, err)
	}
	return failure.WithHint("hooks-fail-closed says which phases count; see the hook's output: vmsnap operation show %s", h.o.ID())
}

// each runs hooks one after the other. In a phase that goes before something the
// first failure that counts keeps the others from running.
func (h *hooks) each(ctx context.Context, phase hook.Phase, list []hook.Hook, failure *hook.Failure) error {
	if len(list) == 0 {
		return nil
	}
	in := h.input(ctx, phase, failure)
	stdin, err := in.JSON()
	if err != nil {
		return fmt.Errorf("hooks %s: %w", phase, err)
	}
	first := phase == hook.PreFreeze || phase == hook.PreRestore
	step := h.o.StepInAnyCase
	if first {
		step = h.o.Step
	}
	var errs []error
	for _, one := range list {
		err := step(ctx, "hook "+one.String(), func(ctx context.Context) error {
			return h.runOne(ctx, one, in.Env(h.cfg.Hooks.Socket), stdin)
		})
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx) // the operation was cancelled, and the hook with it
		}
		if err != nil {
			err = h.trouble(phase, "the hook "+one.String()+" failed", err)
		}
		if errs = append(errs, err); err != nil && first {
			break
		}
	}
	return errors.Join(errs...)
}

func (h *hooks) runOne(ctx context.Context, one hook.Hook, env []string, stdin []byte) error {
	limit := h.cfg.Hooks.Timeouts[one.Phase]
	if limit == 0 {
		limit = hook.DefaultTimeout
	}
	r := one.Run(ctx, limit, env, stdin)
	h.o.Output(r.Output)
	h.o.Logger().Info("hook", "hook", one.String(), "took", r.Took, "error", r.Err, "output", r.Output)
	if line := lastLine(r.Output); r.Err != nil && line != "" {
		return fmt.Errorf("%w: %s", r.Err, line)
	}
	return r.Err
}

// lastLine returns what a hook said last, which is most often why it failed.
func lastLine(output string) string {
	const most = 200
	line := output[strings.LastIndexByte(output, '\n')+1:]
	if len(line) > most {
		line = strings.ToValidUTF8(line[:most], "") + " …"
	}
	return line
}

// owedHooks are the hooks that a journal owes, by phase, and whether those of a
// phase have run.
func owedHooks(o *op.Op, entries []op.Entry) (owed map[hook.Phase]hooksEntry, ran map[hook.Phase]bool) {
	owed, ran = map[hook.Phase]hooksEntry{}, map[hook.Phase]bool{}
	for _, e := range entries {
		if e.Kind != entryHooks && e.Kind != entryHooksRan {
			continue
		}
		var h hooksEntry
		if err := json.Unmarshal(e.Data, &h); err != nil {
			o.Logger().Error("what is journalled of hooks cannot be read", "error", err)
			continue
		}
		if e.Kind == entryHooks {
			owed[h.Phase] = h
			continue
		}
		delete(owed, h.Phase)
		ran[h.Phase] = true
	}
	return owed, ran
}

// recoverHooks runs what an agent that is gone has begun to owe: a program that
// waits for the thaw must not wait for ever.
func (a *Agent) recoverHooks(ctx context.Context, o *op.Op, entries []op.Entry) {
	owed, _ := owedHooks(o, entries)
	for phase, entry := range owed {
		h := &hooks{Agent: a, o: o, dir: entry.Dir, in: entry.Input, warn: o.Warn}
		h.in.Recovered = true
		h.last(ctx, phase, nil)
	}
}

// recoverEnded lets the hooks follow a snapshot that an earlier agent recorded,
// unless they have.
func (a *Agent) recoverEnded(ctx context.Context, o *op.Op, v *vm, rec op.Record, entries []op.Entry, snapshot string) {
	if _, ran := owedHooks(o, entries); ran[hook.PostSnapshot] {
		return
	}
	taken, err := a.catalog.Snapshot(ctx, snapshot)
	if err != nil {
		o.Logger().Error("the hooks of a recovered snapshot are not run", "error", err)
		return
	}
	h := a.hooksOf(o, v, rec.Kind, rec.UID)
	h.in.Recovered = true
	var req SnapshotRequest
	if err := json.Unmarshal(rec.Request, &req); err == nil { // else by the usual directory
		h.choose(req)
	}
	h.snapshot = func(ctx context.Context) *hook.Snapshot { return a.toldOf(ctx, taken) }
	h.last(ctx, hook.PostSnapshot, nil)
}
