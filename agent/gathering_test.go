package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// line is what the members of a group do, in its order.
type line struct {
	mu   sync.Mutex
	done []string
}

func (l *line) note(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done = append(l.done, what)
}

// live goes through the stages as a snapshot does.
func (l *line) live(ctx context.Context, m *member, failAt stage, hangAt stage) (err error) {
	defer func() { m.drop(err) }()
	at := func(s stage) error {
		switch s {
		case failAt:
			return fault.New(fault.NoSpace, "full")
		case hangAt:
			<-ctx.Done()
			return context.Cause(ctx)
		}
		return nil
	}
	if err := at(ready); err != nil {
		return err
	}
	m.reach(ready)
	if err := errors.Join(m.all(ctx, ready), m.earlier(ctx, frozen)); err != nil {
		return err
	}
	if err := at(frozen); err != nil {
		return err
	}
	l.note("freeze " + m.vm)
	m.reach(frozen)
	if err := m.all(ctx, frozen); err != nil {
		l.note("thaw " + m.vm)
		return err
	}
	sent := time.Now()
	if err := at(cutTaken); err != nil {
		l.note("thaw " + m.vm)
		return err
	}
	m.transaction(sent, time.Now().Add(time.Duration(m.at)*time.Millisecond))
	l.note("cut " + m.vm)
	m.reach(cutTaken)
	m.allAWhile(ctx, cutTaken, cutPatience)
	m.laterAWhile(ctx, thawed, thawPatience)
	l.note("thaw " + m.vm)
	m.reach(thawed)
	if err := at(fit); err != nil {
		return err
	}
	m.reach(fit)
	return m.all(ctx, fit)
}

func gather(t *testing.T, best bool, failAt, hangAt map[int]stage) (*gathering, []error, []string) {
	t.Helper()
	g := newGathering(3, best)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l := &line{}
	errs := make([]error, 3)
	var all sync.WaitGroup
	for i, vm := range []string{"a", "b", "c"} {
		fail, hang := stage(-1), stage(-1)
		if s, ok := failAt[i]; ok {
			fail = s
		}
		if s, ok := hangAt[i]; ok {
			hang = s
		}
		all.Go(func() { errs[i] = l.live(ctx, &member{gathering: g, at: i, vm: vm}, fail, hang) })
	}
	all.Wait()
	return g, errs, l.done
}

func TestGatheringIsInOrder(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			g, errs, done := gather(t, false, nil, nil)
			if err := errors.Join(errs...); err != nil {
				t.Fatal(err)
			}
			cuts := slices.Clone(done[3:6])
			slices.Sort(cuts)
			got := strings.Join(slices.Concat(done[:3], cuts, done[6:]), ", ")
			if got != "freeze a, freeze b, freeze c, cut a, cut b, cut c, thaw c, thaw b, thaw a" {
				t.Fatal(got)
			}
			if s := g.skew(); s != 2*time.Millisecond {
				t.Errorf("the skew is %s", s)
			}
		})
	}
}

func TestGatheringFailsAsAWhole(t *testing.T) {
	for _, s := range []stage{ready, frozen, cutTaken, fit} {
		for i := range 3 {
			synctest.Test(t, func(t *testing.T) {
				_, errs, done := gather(t, false, map[int]stage{i: s}, nil)
				for n, err := range errs {
					if fault.Of(err) != fault.NoSpace || n != i && !strings.Contains(err.Error(), ofTheGroup+": full") {
						t.Errorf("member %d fails at %d, %d has %v", i, s, n, err)
					}
				}
				evenly(t, done)
			})
		}
	}
}

// evenly fails the test unless all that were frozen are thawed.
func evenly(t *testing.T, done []string) {
	t.Helper()
	for _, vm := range []string{"a", "b", "c"} {
		if slices.Contains(done, "freeze "+vm) != slices.Contains(done, "thaw "+vm) {
			t.Errorf("%s is left: %v", vm, done)
		}
	}
}

func TestGatheringMakesItsBestEffort(t *testing.T) {
	for _, s := range []stage{ready, frozen, cutTaken, fit} {
		for i := range 3 {
			synctest.Test(t, func(t *testing.T) {
				_, errs, done := gather(t, true, map[int]stage{i: s}, nil)
				for n, err := range errs {
					if (err != nil) != (n == i) {
						t.Errorf("member %d fails at %d, %d has %v", i, s, n, err)
					}
				}
				evenly(t, done)
			})
		}
	}
}

// TestGatheringKeepsNoGuestFrozen has a member that does not come back from its
// cut.
func TestGatheringKeepsNoGuestFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		g := newGathering(2, false)
		l := &line{}
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { _ = l.live(ctx, &member{gathering: g, at: 0, vm: "a"}, -1, -1) })
		all.Go(func() { _ = l.live(ctx, &member{gathering: g, at: 1, vm: "b"}, -1, cutTaken) })
		time.Sleep(cutPatience + thawPatience) // by the bubble's clock
		synctest.Wait()
		l.mu.Lock()
		got := slices.Contains(l.done, "thaw a")
		l.mu.Unlock()
		if !got {
			t.Errorf("after %s: %v", time.Since(began), l.done)
		}
		cancel()
		all.Wait()
	})
}
