package op

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/fault"
)

func TestWatchTellsOfEachChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		begin := make(chan struct{})
		rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			<-begin
			for _, name := range []string{"freeze", "cut"} {
				if err := o.Step(ctx, name, func(context.Context) error {
					time.Sleep(time.Millisecond) // by the bubble's clock
					return nil
				}); err != nil {
					return err
				}
				time.Sleep(time.Millisecond) // by the bubble's clock
			}
			return nil
		})
		synctest.Wait()
		var got []string
		var last uint64
		for rec, err := range r.Watch(t.Context(), rec.ID) {
			if err != nil {
				t.Fatal(err)
			}
			if rec.Revision <= last {
				t.Errorf("revision %d after %d", rec.Revision, last)
			}
			last = rec.Revision
			line := string(rec.State)
			for _, s := range rec.Steps {
				line += " " + s.Name
				if !s.Ended.IsZero() {
					line += "."
				}
			}
			got = append(got, line)
			if len(got) == 1 {
				close(begin)
			}
		}
		want := []string{
			"running", "running freeze", "running freeze.",
			"running freeze. cut", "running freeze. cut.", "succeeded freeze. cut.",
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	})
}

// TestWatchersDoNotHoldUpAnOperation watches one that reports progress a
// thousand times a second, with readers of all speeds.
func TestWatchersDoNotHoldUpAnOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			for i := range 10000 {
				o.Progress(uint64(i), 10000, "bytes")
				time.Sleep(time.Millisecond) // by the bubble's clock
			}
			return nil
		})
		read := func(pause time.Duration) (n int, last Record) {
			for rec, err := range r.Watch(t.Context(), rec.ID) {
				if err != nil {
					t.Error(err)
				}
				n, last = n+1, rec
				time.Sleep(pause) // by the bubble's clock
			}
			return n, last
		}
		type result struct {
			n    int
			last Record
		}
		results := make(chan result)
		pauses := []time.Duration{0, time.Second, time.Hour}
		for _, pause := range pauses {
			go func() {
				n, last := read(pause)
				results <- result{n, last}
			}()
		}
		counts := make([]int, len(pauses))
		for i := range pauses { // they finish in the order of their pauses
			got := <-results
			counts[i] = got.n
			if got.last.State != Succeeded || got.last.Progress.Done != 9999 {
				t.Errorf("reader %d saw last %+v", i, got.last)
			}
			if took := got.last.Ended.Sub(got.last.Created); took != 10*time.Second {
				t.Errorf("the operation took %v", took)
			}
		}
		if fast := counts[0]; fast < 35 || fast > 43 {
			t.Errorf("the fastest reader was told %d times in ten seconds, want four a second", fast)
		}
		if counts[1] > 13 || counts[2] > 2 {
			t.Errorf("the slow readers were told %v times", counts[1:])
		}
	})
}

func TestWatchEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{ops: []Record{{ID: "left", State: Running}, {ID: "done", State: Failed}}}
		r := newTestRunner(store)
		collect := func(ctx context.Context, id string) (states []State, err error) {
			for rec, e := range r.Watch(ctx, id) {
				if e != nil {
					err = e
					continue
				}
				states = append(states, rec.State)
			}
			return states, err
		}
		_, err := collect(t.Context(), "none")
		wantKind(t, "unknown", err, fault.NotFound)
		states, err := collect(t.Context(), "done")
		if err != nil || !cmp.Equal(states, []State{Failed}) {
			t.Errorf("ended: %v, %v", states, err)
		}
		states, err = collect(t.Context(), "left")
		wantKind(t, "abandoned", err, fault.Failed)
		if !cmp.Equal(states, []State{Running}) {
			t.Errorf("abandoned: %v", states)
		}

		release := make(chan struct{})
		rec := mustStart(t, r, web, func(context.Context, *Op) error { <-release; return nil })
		synctest.Wait()
		gone := errors.New("the client went away")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, gone)
		defer cancel()
		states, err = collect(ctx, rec.ID)
		if !errors.Is(err, gone) || !cmp.Equal(states, []State{Running}) {
			t.Errorf("context: %v, %v", states, err)
		}
		if last, err := r.Wait(ctx, rec.ID); !errors.Is(err, gone) || last.State != Running {
			t.Errorf("wait: %+v, %v", last, err)
		}
		for _, err := range r.Watch(t.Context(), rec.ID) {
			if err != nil {
				t.Error(err)
			}
			break // a reader may stop at any time
		}
		close(release)
		wait(t, r, rec.ID)
	})
}
