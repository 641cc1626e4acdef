package op

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestAnOperationThatIsLeftStaysUnfinished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		reverted := false
		began := mustStart(t, r, Spec{Kind: KindSnapshot, VMID: "vm1", VMName: "web"}, func(ctx context.Context, o *Op) error {
			o.Revert("undo", func(context.Context) error { reverted = true; return nil })
			if err := o.Journal(ctx, "cut", []byte(`{}`)); err != nil {
				return err
			}
			<-time.After(time.Second) // by the bubble's clock
			return fmt.Errorf("waiting for QEMU: %w", ErrLeave)
		})
		if _, err := r.Wait(t.Context(), began.ID); err == nil {
			t.Error("whoever waits for it is not told")
		}
		if err := r.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if rec := store.stored(t, began.ID); rec.State != Running || reverted {
			t.Errorf("it is %s, reverted: %v", rec.State, reverted)
		}
		if j, err := store.Journal(t.Context(), began.ID); err != nil || len(j) != 1 {
			t.Errorf("journal %v, %v", j, err)
		}
		if _, err := r.Start(t.Context(), Spec{Kind: KindSnapshot, VMID: "vm1"}, nil); err == nil {
			t.Error("another operation may have the VM")
		}
	})
}
