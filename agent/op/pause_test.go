package op

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// resting is a recipe that can be paused, and says in states whether it was.
func resting(states chan<- bool) Recipe {
	return func(ctx context.Context, o *Op) error {
		o.Pausable()
		for rested := false; ; {
			rests, changed := o.Rests()
			if rests != rested {
				rested = rests
				states <- rests
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		states := make(chan bool, 8)
		rec := mustStart(t, r, web, resting(states))
		synctest.Wait()
		for _, want := range []bool{true, false} {
			call := map[bool]func(context.Context, string) (Record, error){true: r.Pause, false: r.GoOn}[want]
			for range 2 { // a second one changes nothing
				if got, err := call(t.Context(), rec.ID); err != nil || got.Paused != want {
					t.Errorf("paused %v: %v, %v", want, got.Paused, err)
				}
			}
			if got := <-states; got != want {
				t.Errorf("the recipe rests: %v", got)
			}
		}
		if _, err := r.Pause(t.Context(), rec.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * saveInterval) // by the bubble's clock: it is written in the background
		if !store.stored(t, rec.ID).Paused {
			t.Error("the next daemon would not know that it is paused")
		}
		if got, err := r.Cancel(t.Context(), rec.ID); err != nil || got.Paused {
			t.Errorf("cancelled: paused %v, %v", got.Paused, err)
		}
		if got := wait(t, r, rec.ID); got.State != Cancelled || got.Paused {
			t.Errorf("it ended as %s, paused %v", got.State, got.Paused)
		}
		if _, err := r.Pause(t.Context(), rec.ID); fault.Of(err) != fault.TooLate {
			t.Errorf("paused after its end: %v", err)
		}
		if _, err := r.Pause(t.Context(), "00000000"); fault.Of(err) != fault.NotFound {
			t.Errorf("one that there is not: %v", err)
		}
	})
}

func TestPauseIsForThoseThatLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		rec := mustStart(t, r, web, func(ctx context.Context, _ *Op) error {
			<-ctx.Done()
			return context.Cause(ctx)
		})
		synctest.Wait()
		if _, err := r.Pause(t.Context(), rec.ID); fault.Of(err) != fault.Unsupported {
			t.Errorf("paused: %v", err)
		}
		if _, err := r.GoOn(t.Context(), rec.ID); err != nil {
			t.Errorf("resumed: %v", err)
		}
		if _, err := r.Cancel(t.Context(), rec.ID); err != nil {
			t.Error(err)
		}
		wait(t, r, rec.ID)
	})
}

// TestStopLeavesThoseThatAskForIt says so to an operation that LeaveAtStop was
// called for, and does not cancel it.
func TestStopLeavesThoseThatAskForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		stop := make(chan struct{})
		rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			o.LeaveAtStop()
			select {
			case <-stop:
				return ErrLeave
			case <-ctx.Done():
				return errors.New("it was cancelled")
			}
		})
		synctest.Wait()
		ended := make(chan error)
		go func() { ended <- r.Shutdown(t.Context()) }()
		synctest.Wait() // a cancel would have come by now
		close(stop)
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := store.stored(t, rec.ID); got.State.Final() {
			t.Errorf("it ended as %s", got.State)
		}
	})
}
