package op

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// world is what the recipes of these tests change.
type world struct {
	mu      sync.Mutex
	effects []string
	undone  []string
}

func (w *world) do(o *Op, what string) {
	o.Revert(what, func(context.Context) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.effects = slices.DeleteFunc(w.effects, func(e string) bool { return e == what })
		w.undone = append(w.undone, what)
		return nil
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.effects = append(w.effects, what)
}

func (w *world) seen() (effects, undone []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.effects), slices.Clone(w.undone)
}

func TestCancelAtEveryStep(t *testing.T) {
	const steps = 4
	for at := range steps {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var w world
				r := newTestRunner(&memStore{})
				rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
					for i := range steps {
						if err := o.Step(ctx, fmt.Sprint("step", i), func(ctx context.Context) error {
							w.do(o, fmt.Sprint("effect", i))
							if i != at {
								return nil
							}
							<-ctx.Done()
							return fmt.Errorf("step %d: %w", i, ctx.Err())
						}); err != nil {
							return err
						}
					}
					return nil
				})
				synctest.Wait()
				acknowledged, err := r.Cancel(t.Context(), rec.ID)
				if err != nil || acknowledged.State != Cancelling {
					t.Errorf("cancel: %s, %v", acknowledged.State, err)
				}
				ended := wait(t, r, rec.ID)
				wantEnd(t, ended, Cancelled, fault.Cancelled)
				if n := len(ended.Steps); n != at+1 {
					t.Errorf("%d steps ran, want %d", n, at+1)
				}
				var want []string
				for i := at; i >= 0; i-- {
					want = append(want, fmt.Sprint("effect", i))
				}
				effects, undone := w.seen()
				if d := cmp.Diff(want, undone); d != "" || len(effects) > 0 {
					t.Errorf("left %v, undone %s", effects, d)
				}
				_, err = r.Cancel(t.Context(), rec.ID)
				wantKind(t, "cancel after the end", err, fault.TooLate)
			})
		})
	}
}

func TestStepDoesNotStartOnceCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			<-ctx.Done()
			// The step's own context does not know; the operation does.
			err := o.Step(context.WithoutCancel(ctx), "late", func(context.Context) error { t.Error("it ran"); return nil })
			wantKind(t, "step", err, fault.Cancelled)
			expired, cancel := context.WithDeadlineCause(context.WithoutCancel(ctx), time.Time{}, errors.New("slow"))
			defer cancel()
			o.mu.Lock()
			o.rec.State = Reverting // as in a revert that has steps
			o.mu.Unlock()
			if got := o.Step(expired, "late", nil); got == nil || got.Error() != "slow" {
				t.Errorf("step on an ended context: %v", got)
			}
			o.mu.Lock()
			o.rec.State = Cancelling
			o.mu.Unlock()
			return err
		})
		synctest.Wait()
		for range 2 { // the second changes nothing
			if _, err := r.Cancel(t.Context(), rec.ID); err != nil {
				t.Error(err)
			}
		}
		ended := wait(t, r, rec.ID)
		wantEnd(t, ended, Cancelled, fault.Cancelled)
		if len(ended.Steps) > 0 {
			t.Errorf("steps %+v", ended.Steps)
		}
	})
}

// gate holds up the store's update that makes an operation running.
func gate(store *memStore) (entered chan struct{}, release chan struct{}) {
	entered, release = make(chan struct{}), make(chan struct{})
	var once sync.Once
	store.before = func(_ int, method string, _ Record) error {
		if method == "update" {
			once.Do(func() {
				close(entered)
				<-release
			})
		}
		return nil
	}
	return entered, release
}

func TestCancelBeforeItRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		entered, release := gate(store)
		r := newTestRunner(store)
		rec := mustStart(t, r, web, func(context.Context, *Op) error { t.Error("it ran"); return nil })
		<-entered
		// The store hangs; the answer does not wait for it.
		acknowledged, err := r.Cancel(t.Context(), rec.ID)
		if err != nil || acknowledged.State != Cancelling {
			t.Errorf("cancel: %s, %v", acknowledged.State, err)
		}
		close(release)
		wantEnd(t, wait(t, r, rec.ID), Cancelled, fault.Cancelled)
	})
}

func TestPointOfNoReturn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w world
		r := newTestRunner(&memStore{})
		for name, tc := range map[string]struct {
			drop   bool
			result error
			state  State
			kind   fault.Kind
			left   []string
			undone []string
		}{
			"done":                     {false, nil, Succeeded, "", []string{"overlay"}, nil},
			"the cut failed":           {false, fault.New(fault.NoSpace, "full"), Failed, fault.NoSpace, nil, []string{"overlay"}},
			"failed, but what is done": {true, errors.New("late"), Failed, fault.Failed, []string{"overlay"}, nil},
		} {
			w.effects, w.undone = nil, nil
			finish := make(chan struct{})
			rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
				w.do(o, "overlay")
				if err := o.PointOfNoReturn(); err != nil {
					return err
				}
				if tc.drop {
					o.DropReverts()
				}
				<-finish
				if ctx.Err() != nil {
					t.Error("the context was cancelled past the point of no return")
				}
				return tc.result
			})
			synctest.Wait()
			_, err := r.Cancel(t.Context(), rec.ID)
			wantKind(t, name+": cancel", err, fault.TooLate)
			if want := "operation " + rec.ID + " cannot be cancelled: it is past the point of no return"; err == nil || err.Error() != want {
				t.Errorf("%v, want %q", err, want)
			}
			close(finish)
			wantEnd(t, wait(t, r, rec.ID), tc.state, tc.kind)
			effects, undone := w.seen()
			if !slices.Equal(effects, tc.left) || !slices.Equal(undone, tc.undone) {
				t.Errorf("%s: left %v, undone %v; want %v, %v", name, effects, undone, tc.left, tc.undone)
			}
		}
	})
}

func TestCancelRacesThePointOfNoReturn(t *testing.T) {
	r := newTestRunner(&memStore{})
	var cancelled, completed int
	for round := 0; round < 500 || cancelled == 0 || completed == 0; round++ {
		ready, race, answer := make(chan struct{}), make(chan struct{}), make(chan error)
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			close(ready)
			<-race
			return o.PointOfNoReturn()
		})
		go func() {
			<-race
			_, err := r.Cancel(t.Context(), rec.ID)
			answer <- err
		}()
		<-ready
		close(race)
		err := <-answer
		ended := wait(t, r, rec.ID)
		switch {
		case err == nil && ended.State == Cancelled:
			cancelled++
		case err != nil && fault.Of(err) == fault.TooLate && ended.State == Succeeded:
			completed++
		default:
			t.Fatalf("cancel said %v, and it ended %s", err, ended.State)
		}
	}
	t.Logf("%d cancelled, %d completed", cancelled, completed)
}

func TestEndOfACancelledOperation(t *testing.T) {
	disk := fault.New(fault.NoSpace, "full")
	for name, tc := range map[string]struct {
		result func(ctx context.Context) error
		revert error
		state  State
		kind   fault.Kind
	}{
		"gives in, by the context":  {func(ctx context.Context) error { return ctx.Err() }, nil, Cancelled, fault.Cancelled},
		"gives in, by the cause":    {context.Cause, nil, Cancelled, fault.Cancelled},
		"gives in below a kind":     {func(ctx context.Context) error { return fault.New(fault.Unresponsive, "x: %w", ctx.Err()) }, nil, Cancelled, fault.Cancelled},
		"fails for its own reasons": {func(context.Context) error { return disk }, nil, Failed, fault.NoSpace},
		"was done already":          {func(context.Context) error { return nil }, nil, Succeeded, ""},
		"cannot be reverted":        {context.Cause, disk, Failed, fault.Failed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newTestRunner(&memStore{})
				rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
					o.Revert("put it back", func(context.Context) error { return tc.revert })
					<-ctx.Done()
					return tc.result(ctx)
				})
				synctest.Wait()
				if _, err := r.Cancel(t.Context(), rec.ID); err != nil {
					t.Error(err)
				}
				wantEnd(t, wait(t, r, rec.ID), tc.state, tc.kind)
			})
		})
	}
}

func TestNobodyCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		rec := mustStart(t, r, web, func(context.Context, *Op) error { return context.Canceled })
		wantEnd(t, wait(t, r, rec.ID), Failed, fault.Failed)
	})
}

func TestCancelWhileReverting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		release := make(chan struct{})
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			o.Revert("put it back", func(context.Context) error { <-release; return nil })
			return fault.New(fault.NotQuiesced, "not frozen")
		})
		synctest.Wait()
		now, err := r.Cancel(t.Context(), rec.ID)
		wantKind(t, "cancel", err, fault.TooLate)
		wantEnd(t, now, Reverting, fault.NotQuiesced) // it tells why meanwhile
		if !strings.HasSuffix(err.Error(), "it has failed and is being reverted") {
			t.Error(err)
		}
		close(release)
		wantEnd(t, wait(t, r, rec.ID), Failed, fault.NotQuiesced)
	})
}

func TestCancelOfWhatDoesNotRun(t *testing.T) {
	store := &memStore{ops: []Record{{ID: "left", State: Running}}}
	r := newTestRunner(store)
	_, err := r.Cancel(t.Context(), "none")
	wantKind(t, "unknown", err, fault.NotFound)
	_, err = r.Cancel(t.Context(), "left")
	wantKind(t, "abandoned", err, fault.Failed)
}
