package testvm

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestSlotsAreLimitedAndGivenBack(t *testing.T) {
	t.Setenv("VMSNAP_CACHE", t.TempDir())
	n, err := slots()
	if err != nil {
		t.Fatal(err)
	}
	var last func()
	for range n {
		if last, err = acquireSlot(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer last()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*slotInterval)
	defer cancel()
	if _, err := acquireSlot(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("slot %d of %d: %v", n+1, n, err)
	}
	time.AfterFunc(2*slotInterval, last)
	release, err := acquireSlot(t.Context())
	if err != nil {
		t.Fatalf("after one was given back: %v", err)
	}
	release()
}

func TestATestAndThoseBelowItShareASlot(t *testing.T) {
	t.Setenv("VMSNAP_CACHE", t.TempDir())
	t.Run("above", func(t *testing.T) {
		takeSlot(t)
		t.Run("below", func(t *testing.T) {
			if !holdsSlot(t.Name()) {
				t.Error("the test below would wait for a slot")
			}
		})
		if holdsSlot(t.Name()[:len(t.Name())-1]) {
			t.Error("a test of a like name has the slot")
		}
	})
	if holdsSlot(t.Name() + "/above") {
		t.Error("the slot was not given back")
	}
}
