package op

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/fault"
)

var errFull = fault.New(fault.NoSpace, "the disk is full")

// twoEffects is a recipe of two steps, each of an intent and an effect.
func twoEffects(w *world) Recipe {
	return func(ctx context.Context, o *Op) error {
		for _, what := range []string{"overlay", "node"} {
			if err := o.Step(ctx, what, func(ctx context.Context) error {
				if err := o.Journal(ctx, "intent", what); err != nil {
					return err
				}
				w.do(o, what)
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	}
}

// TestStoreFailsAtEveryCall lets the n-th call to the store fail, once or from
// then on, for every n until nothing fails any more.
func TestStoreFailsAtEveryCall(t *testing.T) {
	for _, forGood := range []bool{false, true} {
		for n, failed := 1, true; failed; n++ {
			failed = false
			t.Run(fmt.Sprintf("%d,forGood=%v", n, forGood), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { failed = storeFailsAt(t, n, forGood) })
			})
		}
	}
}

// storeFailsAt runs one operation and reports whether a call failed.
func storeFailsAt(t *testing.T, n int, forGood bool) (failed bool) {
	var w world
	healed, unannounced := false, false
	store := &memStore{before: func(call int, method string, _ Record) error {
		// By "operation" the test asks for the end, when the runner has forgotten it.
		if !healed && method != "operation" && (call == n || forGood && call > n) {
			failed = true
			unannounced = unannounced || method == "journal"
			return errFull
		}
		return nil
	}}
	r := newTestRunner(store)
	spec := web
	spec.RequestID = "key"
	rec, err := r.Start(t.Context(), spec, twoEffects(&w))
	if err != nil {
		wantKind(t, "start", err, fault.NoSpace)
		if len(store.ops) > 0 {
			t.Errorf("start failed, and the store has %+v", store.ops)
		}
	} else {
		ended := wait(t, r, rec.ID)
		wantWhole(t, &w, ended)
		if unannounced && ended.State != Failed {
			t.Errorf("an effect was not announced, and the operation %s", ended.State)
		}
	}
	if holder, held := r.Running("vm1"); held {
		t.Errorf("the VM is held by %s", holder)
	}

	// Once the store works again, everything is as if it always had.
	synctest.Wait()
	healed = true
	next := mustStart(t, r, web, func(context.Context, *Op) error { return nil })
	wantEnd(t, wait(t, r, next.ID), Succeeded, "")
	if rec.ID != "" {
		if d := cmp.Diff(wait(t, r, rec.ID), store.stored(t, rec.ID)); d != "" {
			t.Errorf("the store has another end: %s", d)
		}
	}
	if len(store.journal) > 0 {
		t.Errorf("left in the journal: %+v", store.journal)
	}
	if err := r.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	return failed
}

// wantWhole fails the test unless an operation did all or nothing.
func wantWhole(t *testing.T, w *world, ended Record) {
	t.Helper()
	effects, _ := w.seen()
	switch ended.State {
	case Succeeded:
		if len(effects) != 2 {
			t.Errorf("succeeded, and did %v", effects)
		}
	case Failed:
		wantEnd(t, ended, Failed, fault.NoSpace)
		if len(effects) != 0 {
			t.Errorf("failed, and left %v", effects)
		}
	default:
		t.Errorf("ended %s", ended.State)
	}
}

func TestCreateWhoseOutcomeIsInDoubt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &doubtful{memStore: &memStore{}}
		r := newTestRunner(store)
		rec := mustStart(t, r, web, func(context.Context, *Op) error { return nil })
		wantEnd(t, wait(t, r, rec.ID), Succeeded, "")
	})
}

// doubtful records operations and says that it did not.
type doubtful struct{ *memStore }

func (d *doubtful) CreateOperation(ctx context.Context, rec Record) error {
	return errors.Join(d.memStore.CreateOperation(ctx, rec), errFull)
}

func TestEndThatCannotBeRecorded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := true
		store := &memStore{before: func(_ int, method string, rec Record) error {
			if full && method == "update" && rec.State.Final() {
				return errFull
			}
			return nil
		}}
		r := newTestRunner(store)
		rec := mustStart(t, r, web, func(context.Context, *Op) error { return nil })
		ended := wait(t, r, rec.ID)
		wantEnd(t, ended, Succeeded, "")
		if len(ended.Warnings) != 1 || ended.Warnings[0].Code != "end-not-recorded" {
			t.Errorf("warnings %+v", ended.Warnings)
		}
		// It is shown as ended everywhere, and nothing else starts.
		if active, err := r.Operations(t.Context(), Filter{Active: true}); err != nil || len(active) > 0 {
			t.Errorf("active %+v, %v", active, err)
		}
		_, err := r.Cancel(t.Context(), rec.ID)
		wantKind(t, "cancel", err, fault.TooLate)
		_, err = r.Start(t.Context(), web, nil)
		wantKind(t, "start", err, fault.NoSpace)
		if err == nil || !strings.HasPrefix(err.Error(), "record the end of an earlier operation: operation "+rec.ID) {
			t.Errorf("%v does not tell what is wrong", err)
		}
		wantKind(t, "shutdown", r.Shutdown(t.Context()), fault.NoSpace)

		full = false
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if s := store.stored(t, rec.ID); s.State != Succeeded {
			t.Errorf("the store has %s", s.State)
		}
		if r.live(rec.ID) != nil {
			t.Error("it is kept in memory though the store has it")
		}
	})
}

func TestBackgroundWritesAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var broken atomic.Bool
		store := &memStore{before: func(_ int, method string, _ Record) error {
			if broken.Load() && method == "update" {
				return errFull
			}
			return nil
		}}
		r := newTestRunner(store)
		rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			for i := range 1000 { // ten seconds
				if err := o.Step(ctx, "step", func(context.Context) error {
					time.Sleep(10 * time.Millisecond) // by the bubble's clock
					return nil
				}); err != nil {
					return err
				}
				broken.Store(i > 500 && i < 800)
			}
			return nil
		})
		time.Sleep(1500 * time.Millisecond) // by the bubble's clock
		if s := store.stored(t, rec.ID); len(s.Steps) < 90 || len(s.Steps) > 110 {
			t.Errorf("after a second and a half the store has %d steps", len(s.Steps))
		}
		ended := wait(t, r, rec.ID)
		wantEnd(t, ended, Succeeded, "")
		if n := store.count("update"); n < 10 || n > 12 {
			t.Errorf("%d updates in ten seconds", n)
		}
		if s := store.stored(t, rec.ID); len(s.Steps) != 1000 {
			t.Errorf("the store has %d steps in the end", len(s.Steps))
		}
	})
}

// TestLateWriteDoesNotUndoTheEnd holds up a background write until the operation
// is about to end. It waits for a lock, which stops the clock of a bubble, so it
// runs outside of one.
func TestLateWriteDoesNotUndoTheEnd(t *testing.T) {
	hold, background := make(chan struct{}), make(chan struct{})
	var updates atomic.Int32
	store := &memStore{before: func(_ int, method string, _ Record) error {
		if method == "update" && updates.Add(1) == 2 { // the first made it running
			close(background)
			<-hold
		}
		return nil
	}}
	r := newTestRunner(store)
	rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
		o.SetPartial()
		<-background
		return nil
	})
	<-background
	o := r.live(rec.ID)
	for ending := false; !ending; runtime.Gosched() {
		o.mu.Lock()
		ending = o.tooLate != ""
		o.mu.Unlock()
	}
	if s, _ := r.Operation(t.Context(), rec.ID); s.State != Running {
		t.Errorf("it is seen %s before its end is recorded", s.State)
	}
	close(hold)
	wantEnd(t, wait(t, r, rec.ID), Succeeded, "")
	if err := r.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if s := store.stored(t, rec.ID); s.State != Succeeded {
		t.Errorf("the store has %s", s.State)
	}
}
