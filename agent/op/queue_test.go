package op

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// bench starts operations that run until they are told to end.
type bench struct {
	t       *testing.T
	r       *Runner
	mu      sync.Mutex
	began   []string // under mu: recipes begin by themselves
	release map[string]chan struct{}
	ids     map[string]string
}

func newBench(t *testing.T, s Store, l Limits) *bench {
	return &bench{t: t, r: newTestRunner(s, Limit(l)), release: map[string]chan struct{}{}, ids: map[string]string{}}
}

func (b *bench) recipe(name string) Recipe {
	end := make(chan struct{})
	b.release[name] = end
	return func(ctx context.Context, _ *Op) error {
		b.mu.Lock()
		b.began = append(b.began, name)
		b.mu.Unlock()
		select {
		case <-end:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// start starts an operation on a VM, or on no VM, that loads some storage.
func (b *bench) start(name string, spec Spec) Record {
	b.t.Helper()
	spec.Kind = KindSnapshot
	if spec.VMName == "" {
		spec.VMID, spec.VMName = name, name
	}
	rec := mustStart(b.t, b.r, spec, b.recipe(name))
	b.ids[name] = rec.ID
	synctest.Wait()
	return rec
}

// end ends some operations, and returns those that began, in their order.
func (b *bench) end(names ...string) string {
	for _, n := range names {
		close(b.release[n])
		synctest.Wait()
	}
	return b.news()
}

func (b *bench) news() string {
	synctest.Wait()
	b.mu.Lock()
	began := strings.Join(b.began, " ")
	b.began = nil
	b.mu.Unlock()
	return began
}

func (b *bench) wants(what, got, want string) {
	b.t.Helper()
	if got != want {
		b.t.Errorf("%s: %q began, not %q", what, got, want)
	}
}

// places returns who waits, in order.
func (b *bench) places() string {
	b.t.Helper()
	at := map[int]string{}
	for name, id := range b.ids {
		rec, err := b.r.Operation(b.t.Context(), id)
		if err != nil {
			b.t.Fatal(err)
		}
		if p := rec.Queue.Position; p > 0 {
			if at[p] != "" || rec.State != Queued || rec.Queue.Reason == "" {
				b.t.Errorf("%s stands at %+v, as does %q, and is %s", name, rec.Queue, at[p], rec.State)
			}
			at[p] = name
		}
	}
	var names []string
	for p := range len(at) {
		names = append(names, at[p+1])
	}
	return strings.Join(names, " ")
}

func TestQueueOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, &memStore{}, Limits{Operations: 2})
		for _, n := range []string{"a", "b", "c", "d"} {
			b.start(n, Spec{})
		}
		if rec := b.start("e", Spec{}); rec.State != Queued || rec.Queue != (Place{3, "2 operations run, as many as max-operations lets"}) {
			t.Errorf("%+v", rec)
		}
		b.start("light", Spec{Light: true})
		b.wants("at first", b.news(), "a b light")
		if got := b.places(); got != "c d e" {
			t.Errorf("the queue is %q", got)
		}
		// The VM of one that waits is taken.
		_, err := b.r.Start(t.Context(), Spec{Kind: KindSnapshot, VMID: "d", VMName: "d"}, b.recipe("x"))
		wantKind(t, "second operation on d", err, fault.Busy)

		if _, err := b.r.Cancel(t.Context(), b.ids["c"]); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, wait(t, b.r, b.ids["c"]), Cancelled, fault.Cancelled)
		b.wants("one that waits is cancelled", b.news(), "")
		if got := b.places(); got != "d e" {
			t.Errorf("the queue is %q", got)
		}
		b.wants("one ends", b.end("b"), "d")
		b.wants("all end", b.end("a", "d", "light"), "e")
		b.end("e")
	})
}

func TestQueueOfStorage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, &memStore{}, Limits{PerStorage: 1})
		on := func(s ...string) Spec { return Spec{Storage: s} }
		b.start("a", on("x", "x"))
		b.start("both", on("x", "y"))
		b.start("y", on("y")) // could run, and would keep both waiting for ever
		b.start("z", on("z"))
		b.start("none", on())
		b.wants("at first", b.news(), "a z none")
		if got := b.places(); got != "both y" {
			t.Errorf("the queue is %q", got)
		}
		b.wants("x is free", b.end("a"), "both")
		b.wants("y is free", b.end("both", "z", "none"), "y")
		b.end("y")
		if q := b.r.queue; q.running != 0 || len(q.loaded) != 0 {
			t.Errorf("%d run, %v is loaded", q.running, q.loaded)
		}
	})
}

func TestQueueIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, &memStore{}, Limits{Operations: 1})
		b.start("first", Spec{})
		for i := range 5 { // work on no VM, so that one VM has several
			b.start(fmt.Sprint("a", i), Spec{VMName: "a"})
		}
		b.start("b0", Spec{VMName: "b"})
		b.start("b1", Spec{VMName: "b"})
		b.news()
		if got := b.places(); got != "a0 b0 a1 b1 a2 a3 a4" {
			t.Errorf("the queue is %q", got)
		}
		b.end("first", "a0", "b0")
		b.start("c0", Spec{VMName: "c"})
		if got := b.places(); got != "b1 a2 c0 a3 a4" && got != "b1 c0 a2 a3 a4" {
			t.Errorf("the queue with a newcomer is %q", got)
		}
		b.end("a1", "b1")
		for range 4 {
			b.end(b.running())
		}
	})
}

// running returns the one that runs.
func (b *bench) running() string {
	for name, id := range b.ids {
		if rec, err := b.r.Operation(b.t.Context(), id); err == nil && rec.State == Running {
			return name
		}
	}
	b.t.Fatal("nothing runs")
	return ""
}

func TestQueueOutlivesTheDaemon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		b := newBench(t, store, Limits{Operations: 1})
		for _, n := range []string{"a", "b", "c"} {
			b.start(n, Spec{})
		}
		if err := b.r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.wants("before the stop", b.news(), "a")
		wantEnd(t, store.stored(t, b.ids["a"]), Cancelled, fault.Cancelled)
		next := newBench(t, store, Limits{Operations: 1})
		left, err := store.Operations(t.Context(), Filter{Active: true})
		if err != nil || len(left) != 2 {
			t.Fatalf("%d are left, %v", len(left), err)
		}
		for _, rec := range slices.Backward(left) {
			next.ids[rec.VMName] = rec.ID
			if err := next.r.Requeue(t.Context(), rec, Spec{}, next.recipe(rec.VMName)); err != nil {
				t.Fatal(err)
			}
		}
		next.wants("after it", next.news(), "b")
		if got := next.places(); got != "c" {
			t.Errorf("the queue is %q", got)
		}
		next.wants("then", next.end("b"), "c")
		next.end("c")
		if err := next.r.Requeue(t.Context(), store.stored(t, b.ids["c"]), Spec{}, nil); err == nil {
			t.Error("an operation that has ended is requeued")
		}
	})
}

// TestQueueAtRandom has random operations come, end and be cancelled, and holds
// what runs against the limits, and who waits against whether they could run.
func TestQueueAtRandom(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			limits := Limits{Operations: rng.IntN(5), PerStorage: rng.IntN(3)}
			b := newBench(t, &memStore{}, limits)
			specs := map[string]Spec{}
			active := func() (names []string) {
				for n, id := range b.ids {
					if rec, _ := b.r.Operation(t.Context(), id); !rec.State.Final() {
						names = append(names, n)
					}
				}
				slices.Sort(names)
				return names
			}
			for i := range 120 {
				names := active()
				if len(names) < 12 && rng.IntN(2) == 0 {
					n := fmt.Sprint("vm", i)
					specs[n] = Spec{Storage: []string{"x", "y", "z"}[rng.IntN(3):]}
					b.start(n, specs[n])
				} else if len(names) > 0 {
					n := names[rng.IntN(len(names))]
					if _, err := b.r.Cancel(t.Context(), b.ids[n]); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
				}
				b.check(limits, specs)
			}
			for _, n := range active() {
				_, _ = b.r.Cancel(t.Context(), b.ids[n])
			}
			synctest.Wait()
			if left := active(); len(left) > 0 || b.r.queue.running != 0 {
				t.Errorf("left: %v, %d counted", left, b.r.queue.running)
			}
		})
	}
}

// check holds what runs against the limits.
func (b *bench) check(l Limits, specs map[string]Spec) {
	b.t.Helper()
	running, loaded := 0, map[string]int{}
	first := ""
	for n, id := range b.ids {
		rec, err := b.r.Operation(b.t.Context(), id)
		if err != nil {
			b.t.Fatal(err)
		}
		switch rec.State {
		case Running:
			running++
			for _, s := range specs[n].Storage {
				loaded[s]++
			}
		case Queued:
			if rec.Queue.Position == 1 {
				first = n
			}
		}
	}
	over := l.Operations > 0 && running > l.Operations
	idle := first != "" && (l.Operations == 0 || running < l.Operations)
	for s, n := range loaded {
		over = over || l.PerStorage > 0 && n > l.PerStorage
		if first != "" && slices.Contains(specs[first].Storage, s) && n >= l.PerStorage {
			idle = false
		}
	}
	if over || idle {
		b.t.Fatalf("limits %+v: %d run, %v is loaded, %q waits first", l, running, loaded, first)
	}
}

func TestAnOperationThatWaitsIsNotStoredMoreOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		b := newBench(t, store, Limits{Operations: 1})
		for i := range 10 {
			b.start(fmt.Sprint("vm", i), Spec{})
		}
		before := store.count("update")
		for i := range 10 {
			b.end(fmt.Sprint("vm", i))
		}
		// A start and an end each, and nothing for their places.
		if n := store.count("update") - before; n != 19 {
			t.Errorf("%d writes", n)
		}
		rec, err := b.r.Operation(t.Context(), b.ids["vm3"])
		if err != nil || cmp.Diff(Place{}, rec.Queue) != "" {
			t.Errorf("%+v, %v", rec.Queue, err)
		}
	})
}
