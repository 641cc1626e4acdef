package op

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// The tests run in bubbles with a clock of their own. A bubble fails its test
// when a goroutine is left behind.

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		var entries []Entry
		rec := mustStart(t, r, web, snapshotLike(t, r, store, &entries))
		if rec.State != Queued || len(rec.ID) != 8 || rec.Created.IsZero() {
			t.Errorf("started %+v", rec)
		}
		if s := store.stored(t, rec.ID); string(s.Request) != `{"Name":"one"}` || s.UID != 7 {
			t.Errorf("stored %+v", s)
		}
		got := wait(t, r, rec.ID)
		if d := cmp.Diff(got, store.stored(t, rec.ID)); d != "" {
			t.Errorf("the store has another end: %s", d)
		}
		began := rec.Created
		want := Record{
			ID: rec.ID, Kind: KindSnapshot, VMID: "vm1", VMName: "web", State: Succeeded,
			Request: json.RawMessage(`{"Name":"one"}`), UID: 7,
			Steps: []Step{
				{Name: "freeze", Started: began, Ended: began.Add(40 * time.Millisecond)},
				{Name: "cut", Started: began.Add(40 * time.Millisecond), Ended: began.Add(40 * time.Millisecond)},
			},
			Progress: Progress{Done: 2, Total: 2, Unit: "steps"},
			Warnings: []Warning{{Code: "disk-excluded", Disk: "disk1", Message: "left out"}},
			Partial:  true, Snapshot: "5a5a5a5a",
			Created: began, Started: began, Ended: began.Add(40 * time.Millisecond), Revision: got.Revision,
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("-want +got\n%s", d)
		}
		if len(entries) != 1 || string(entries[0].Data) != `{"pid":7}` || entries[0].Kind != "freeze" {
			t.Errorf("journal while it ran: %+v", entries)
		}
		if left, _ := store.Journal(t.Context(), rec.ID); len(left) > 0 {
			t.Errorf("journal after its end: %+v", left)
		}
		// A short operation writes its start and its end, and nothing between.
		if n := store.count("create") + store.count("update"); n != 3 {
			t.Errorf("%d writes, want 3", n)
		}
		if _, ok := r.Running("vm1"); ok {
			t.Error("the VM is still held")
		}
	})
}

// snapshotLike is a recipe that tells of everything there is to tell. It returns
// its journal in entries.
func snapshotLike(t *testing.T, r *Runner, store *memStore, entries *[]Entry) Recipe {
	return func(ctx context.Context, o *Op) error {
		if s := store.stored(t, o.ID()); s.State != Running || s.Started.IsZero() {
			t.Errorf("the recipe runs while the store has %s", s.State)
		}
		if holder, ok := r.Running("vm1"); !ok || holder != o.ID() {
			t.Errorf("the VM is held by %q", holder)
		}
		o.Plan(2)
		o.SetSnapshot("5a5a5a5a")
		o.Warn(Warning{Code: "disk-excluded", Disk: "disk1", Message: "left out"})
		o.SetPartial()
		if err := o.Step(ctx, "freeze", func(context.Context) error {
			time.Sleep(40 * time.Millisecond) // by the bubble's clock
			return o.Journal(ctx, "freeze", map[string]int{"pid": 7})
		}); err != nil {
			return err
		}
		if p := o.record().Progress; p != (Progress{Done: 1, Total: 2, Unit: "steps"}) {
			t.Errorf("progress %+v", p)
		}
		*entries, _ = store.Journal(ctx, o.ID())
		return o.Step(ctx, "cut", func(context.Context) error { return nil })
	}
}

func TestRecipeOutlivesTheCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type key struct{}
		r := newTestRunner(&memStore{})
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "kept"))
		rec, err := r.Start(ctx, web, func(ctx context.Context, o *Op) error {
			if ctx.Value(key{}) != "kept" {
				t.Error("the context lost its values")
			}
			time.Sleep(time.Minute) // by the bubble's clock
			return ctx.Err()
		})
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		wantEnd(t, wait(t, r, rec.ID), Succeeded, "")
	})
}

func TestBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		release := make(chan struct{})
		block := func(context.Context, *Op) error { <-release; return nil }
		first := mustStart(t, r, web, block)

		_, err := r.Start(t.Context(), web, block)
		wantKind(t, "second operation", err, fault.Busy)
		var b *BusyError
		if !errors.As(err, &b) || b.Operation != first.ID || b.VM != "web" {
			t.Errorf("%#v does not name the operation %s", b, first.ID)
		}
		other := web
		other.VMID = "vm2"
		mustStart(t, r, other, block)
		for range 2 { // work on no VM is never in the way
			mustStart(t, r, Spec{Kind: KindSettle}, block)
		}
		close(release)
		// Whoever sees the end can start at once.
		for range 20 {
			wait(t, r, first.ID)
			first = mustStart(t, r, web, func(context.Context, *Op) error { return nil })
		}
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestRequestIDUnderConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{before: func(int, string, Record) error {
			time.Sleep(time.Millisecond) // by the bubble's clock: let the others in
			return nil
		}})
		spec := web
		spec.RequestID = "key"
		var runs atomic.Int32
		release := make(chan struct{})
		var wg sync.WaitGroup
		ids := make([]string, 50)
		for i := range ids {
			wg.Go(func() {
				rec, err := r.Start(t.Context(), spec, func(context.Context, *Op) error {
					runs.Add(1)
					<-release
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				ids[i] = rec.ID
			})
		}
		wg.Wait()
		close(release)
		for _, id := range ids {
			if id != ids[0] {
				t.Fatalf("operations %s and %s for one request id", id, ids[0])
			}
		}
		wait(t, r, ids[0])
		if n := runs.Load(); n != 1 {
			t.Errorf("the recipe ran %d times", n)
		}
	})
}

func TestStartWaitsNoLongerThanItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		r := newTestRunner(&memStore{before: func(_ int, method string, _ Record) error {
			if method == "create" {
				<-hang
			}
			return nil
		}})
		var wg sync.WaitGroup
		wg.Go(func() { wait(t, r, mustStart(t, r, web, func(context.Context, *Op) error { return nil }).ID) })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Start(ctx, web, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want the end of its context", err)
		}
		close(hang)
		wg.Wait()
	})
}

func TestRequestID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		spec := web
		spec.RequestID, spec.Request = "key", map[string]any{"A": 1, "B": uint64(1<<63 + 1)}
		first := mustStart(t, r, spec, func(context.Context, *Op) error { return nil })
		ended := wait(t, r, first.ID)
		never := func(context.Context, *Op) error { t.Error("it ran again"); return nil }

		for name, change := range map[string]func(s *Spec){
			"the same":              func(*Spec) {},
			"members in any order":  func(s *Spec) { s.Request = json.RawMessage(`{"B": 9223372036854775809, "A": 1}`) },
			"the VM's name changed": func(s *Spec) { s.VMName = "web2" },
		} {
			s := spec
			change(&s)
			if d := cmp.Diff(ended, mustStart(t, r, s, never)); d != "" {
				t.Errorf("%s: another operation: %s", name, d)
			}
		}
		for name, change := range map[string]func(s *Spec){
			"kind":          func(s *Spec) { s.Kind = KindFreeze },
			"VM":            func(s *Spec) { s.VMID = "vm2" },
			"request":       func(s *Spec) { s.Request = map[string]any{"A": 1, "B": uint64(1 << 63)} },
			"other request": func(s *Spec) { s.Request = nil },
		} {
			s := spec
			change(&s)
			_, err := r.Start(t.Context(), s, never)
			wantKind(t, "another "+name, err, fault.Usage)
		}
		spec.UID++
		if rec := mustStart(t, r, spec, func(context.Context, *Op) error { return nil }); rec.ID == first.ID {
			t.Error("the request id of one user stands for the operation of another")
		}
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestRequestThatIsNotJSON(t *testing.T) {
	spec := web
	spec.Request = func() {}
	_, err := newTestRunner(&memStore{}).Start(t.Context(), spec, nil)
	wantKind(t, "start", err, fault.Usage)
}

func TestIDsDoNotCollide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		ids := []string{"aaaaaaaa", "aaaaaaaa", "aaaaaaaa", "bbbbbbbb"}
		r.newID = func() string {
			id := ids[0]
			ids = ids[1:]
			return id
		}
		for _, want := range []string{"aaaaaaaa", "bbbbbbbb"} {
			rec := mustStart(t, r, web, func(context.Context, *Op) error { return nil })
			if rec.ID != want {
				t.Errorf("id %s, want %s", rec.ID, want)
			}
			wait(t, r, rec.ID)
		}
	})
}

func TestOperationsAreShownAsTheyAre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		done := mustStart(t, r, web, func(context.Context, *Op) error { return nil })
		wait(t, r, done.ID)
		release := make(chan struct{})
		running := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			return o.Step(ctx, "wait", func(context.Context) error { <-release; return nil })
		})
		synctest.Wait()
		for _, tc := range []struct {
			filter Filter
			want   []string
		}{
			{Filter{}, []string{running.ID, done.ID}},
			{Filter{Active: true}, []string{running.ID}},
			{Filter{Limit: 1}, []string{running.ID}},
			{Filter{VMID: "vm2"}, nil},
		} {
			recs, err := r.Operations(t.Context(), tc.filter)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, rec := range recs {
				got = append(got, rec.ID)
				if rec.ID == running.ID && len(rec.Steps) != 1 {
					t.Errorf("its step is not shown: %+v", rec)
				}
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("%+v: %s", tc.filter, d)
			}
		}
		rec, err := r.Operation(t.Context(), running.ID)
		if err != nil || len(rec.Steps) != 1 {
			t.Errorf("%+v, %v", rec, err)
		}
		rec.Steps[0].Name = "scribble"
		if again, _ := r.Operation(t.Context(), running.ID); again.Steps[0].Name != "wait" {
			t.Error("a record that was handed out is not a copy")
		}
		_, err = r.Operation(t.Context(), "00000000")
		wantKind(t, "unknown operation", err, fault.NotFound)
		close(release)
		wait(t, r, running.ID)
	})
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		finish := make(chan struct{})
		past := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			if err := o.PointOfNoReturn(); err != nil {
				return err
			}
			select {
			case <-finish:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
		other := web
		other.VMID = "vm2"
		early := mustStart(t, r, other, func(ctx context.Context, _ *Op) error {
			<-ctx.Done()
			return fmt.Errorf("waiting: %w", context.Cause(ctx))
		})
		synctest.Wait()

		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := r.Shutdown(short)
		wantKind(t, "shutdown in a hurry", err, fault.Busy)
		if want := "operations still run: " + past.ID + ": context deadline exceeded"; err == nil || err.Error() != want {
			t.Errorf("%v, want %q", err, want)
		}
		ended := wait(t, r, early.ID)
		wantEnd(t, ended, Cancelled, fault.Cancelled)
		if want := "waiting: operation " + early.ID + " was cancelled: vmsnapd is stopping"; ended.Failure.Message != want {
			t.Errorf("%q, want %q", ended.Failure.Message, want)
		}
		_, err = r.Start(t.Context(), other, nil)
		wantKind(t, "start while stopping", err, fault.Busy)

		close(finish)
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		wantEnd(t, wait(t, r, past.ID), Succeeded, "")
	})
}
