package op

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
)

func TestRevertsRunInReverseAndAllOfThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		var order []string
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			for _, what := range []string{"delete file", "close node", "delete node", "thaw"} {
				o.Revert(what, func(context.Context) error {
					order = append(order, what)
					if s := o.record(); s.State != Reverting || s.Failure == nil || s.Failure.Message != "cut web: full" {
						t.Errorf("while it reverts: %s, %+v", s.State, s.Failure)
					}
					switch what {
					case "delete node":
						return errors.New("in use")
					case "close node":
						panic("no such node")
					}
					return nil
				})
			}
			return fault.New(fault.NoSpace, "cut web: full").WithHint("make space")
		})
		ended := wait(t, r, rec.ID)
		if d := cmp.Diff([]string{"thaw", "delete node", "close node", "delete file"}, order); d != "" {
			t.Error(d)
		}
		want := &Failure{
			Kind:    fault.NoSpace,
			Message: "cut web: full; reverting failed: delete node: in use; close node: internal error: no such node",
			Hint:    "make space",
		}
		if d := cmp.Diff(want, ended.Failure); d != "" {
			t.Error(d)
		}
	})
}

func TestRevertAtLength(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{}, RevertTimeout(3*time.Second))
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			o.RevertAtLength("merge", func(ctx context.Context) error {
				o.Progress(1, 2, "bytes")
				time.Sleep(time.Hour) // by the bubble's clock
				return ctx.Err()
			})
			return errors.New("no")
		})
		ended := wait(t, r, rec.ID)
		if ended.Failure.Message != "no" || ended.Ended.Sub(ended.Started) < time.Hour || ended.Progress.Total != 2 {
			t.Errorf("%+v after %s, progress %+v", ended.Failure, ended.Ended.Sub(ended.Started), ended.Progress)
		}
	})
}

func TestCleanupsComeLast(t *testing.T) {
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := newTestRunner(&memStore{})
			var order []string
			rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
				o.Cleanup(func() { order = append(order, "unlock") })
				o.Cleanup(func() {
					order = append(order, "close")
					if o.record().State.Final() {
						t.Error("it has ended already")
					}
				})
				o.Revert("undo", func(context.Context) error { order = append(order, "undo"); return nil })
				if fails {
					return errors.New("no")
				}
				return nil
			})
			wait(t, r, rec.ID)
			want := []string{"close", "unlock"}
			if fails {
				want = []string{"undo", "close", "unlock"}
			}
			if d := cmp.Diff(want, order); d != "" {
				t.Errorf("fails: %v (-want +got):\n%s", fails, d)
			}
		})
	}
}

func TestRevertLeftToTheNextDaemon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		first := false
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			o.Revert("first", func(context.Context) error { first = true; return nil })
			o.RevertAtLength("second", func(context.Context) error { return fmt.Errorf("stopping: %w", ErrLeave) })
			return errors.New("no")
		})
		if _, err := r.Wait(t.Context(), rec.ID); err == nil {
			t.Error("whoever waits for it is not told")
		}
		if got := store.stored(t, rec.ID); got.State.Final() || first {
			t.Errorf("it is %s; what comes after was reverted: %v", got.State, first)
		}
	})
}

func TestRevertHasADeadlineOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{}, RevertTimeout(3*time.Second))
		hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			o.Revert("first", hang)
			o.Revert("second", func(ctx context.Context) error {
				if d, ok := ctx.Deadline(); !ok || time.Until(d) != 3*time.Second {
					t.Errorf("deadline in %v", time.Until(d))
				}
				return nil
			})
			o.Revert("third", hang)
			return errors.New("broken")
		})
		ended := wait(t, r, rec.ID)
		if took := ended.Ended.Sub(ended.Created); took != 6*time.Second {
			t.Errorf("it took %v", took)
		}
		if want := "broken; reverting failed: third: context deadline exceeded; first: context deadline exceeded"; ended.Failure.Message != want {
			t.Errorf("%q, want %q", ended.Failure.Message, want)
		}
	})
}

func TestRevertThatPushesARevert(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		var order []string
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error {
			o.Revert("outer", func(context.Context) error {
				order = append(order, "outer")
				o.Revert("inner", func(context.Context) error { order = append(order, "inner"); return nil })
				return nil
			})
			return errors.New("broken")
		})
		wantEnd(t, wait(t, r, rec.ID), Failed, fault.Failed)
		if !slices.Equal(order, []string{"outer", "inner"}) {
			t.Error(order)
		}
	})
}

func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := NewRunner(&memStore{}, hclog.New(&hclog.LoggerOptions{Output: &log}))
		reverted := false
		rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			o.Revert("put it back", func(context.Context) error { reverted = true; return nil })
			return o.Step(ctx, "cut", func(context.Context) error {
				var none *Record
				return errors.New(none.ID)
			})
		})
		ended := wait(t, r, rec.ID)
		wantEnd(t, ended, Failed, fault.Failed)
		if want := "internal error: runtime error: invalid memory address or nil pointer dereference"; ended.Failure.Message != want {
			t.Errorf("%q, want %q", ended.Failure.Message, want)
		}
		if !reverted {
			t.Error("nothing was reverted")
		}
		if s := ended.Steps[0]; s.Ended.IsZero() || s.Error != "step cut did not return" {
			t.Errorf("its step: %+v", s)
		}
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		for _, want := range []string{"revert_test.go", "operation=" + rec.ID, "vm=web"} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log does not tell %q:\n%s", want, log.String())
			}
		}
	})
}
