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

func TestOnFailureComesAfterTheReverts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		var order []string
		recipe := func(fail error) Recipe {
			return func(_ context.Context, o *Op) error {
				o.OnFailure(func(ctx context.Context, why Failure) {
					if ctx.Err() != nil {
						t.Error("it runs on a context that has ended")
					}
					order = append(order, "failed: "+why.Message)
					// Also when the operation was cancelled.
					if err := o.StepInAnyCase(ctx, "hook", func(context.Context) error {
						o.Output("printed")
						return nil
					}); err != nil {
						t.Error(err)
					}
					panic("in a hook")
				})
				o.Cleanup(func() { order = append(order, "cleanup") })
				o.Revert("one", func(context.Context) error { order = append(order, "revert"); return nil })
				return fail
			}
		}
		got := wait(t, r, mustStart(t, r, web, recipe(errors.New("full"))).ID)
		if d := cmp.Diff([]string{"revert", "cleanup", "failed: full"}, order); d != "" {
			t.Error(d)
		}
		if got.State != Failed || got.Failure.Message != "full" || len(got.Steps) != 1 || got.Steps[0].Output != "printed" {
			t.Errorf("%+v", got)
		}
		order = nil
		mustStart(t, r, web, recipe(nil))
		synctest.Wait()
		mustStart(t, r, web, recipe(ErrLeave))
		synctest.Wait()
		if d := cmp.Diff([]string{"cleanup", "cleanup"}, order); d != "" {
			t.Errorf("one that succeeds and one that is left: %s", d)
		}
	})
}

func TestAStepInAnyCaseOfACancelledOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		ran := false
		rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			<-ctx.Done()
			if err := o.Step(ctx, "freeze", func(context.Context) error { return nil }); fault.Of(err) != fault.Cancelled {
				t.Errorf("a step of a cancelled operation: %v", err)
			}
			err := o.StepInAnyCase(context.WithoutCancel(ctx), "post-thaw", func(context.Context) error { ran = true; return nil })
			return errors.Join(err, context.Cause(ctx))
		})
		time.Sleep(time.Second) // by the bubble's clock
		if _, err := r.Cancel(t.Context(), rec.ID); err != nil {
			t.Fatal(err)
		}
		if got := wait(t, r, rec.ID); got.State != Cancelled || !ran {
			t.Errorf("%+v, ran %t", got, ran)
		}
	})
}
