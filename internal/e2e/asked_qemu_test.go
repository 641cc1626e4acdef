package e2e

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// TestQEMUOthersAskMeanwhile does everything that changes a block graph while another
// client of QEMU asks about it without a pause. There are moments at which QEMU dies
// of a question (see blockdev.Overlay.Format); none may come about.
func TestQEMUOthersAskMeanwhile(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "asked-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		b := &bench{host: h, vm: vm}
		h.await(vm.name, "paused")
		ctx, cancel := context.WithCancel(h.ctx())
		var asking sync.WaitGroup
		asked := 0
		asking.Go(func() { asked = ask(ctx, t, vm.own) })
		defer asking.Wait()
		defer cancel()
		rounds := 3
		if thorough() {
			rounds = 30
		}
		for round := range rounds {
			name := func(n int) string { return fmt.Sprintf("%d-%d", round, n) }
			for n := 1; n <= 3; n++ {
				vm.write(n)
				h.must("snapshot", "create", vm.name, name(n), "--quiesce", "none")
			}
			h.must("snapshot", "delete", vm.name+"/"+name(2))
			h.must("snapshot", "preview", vm.name+"/"+name(1), "--discard-running-state")
			vm.holds(1, "in a preview")
			h.must("preview", "undo", vm.name)
			h.must("snapshot", "restore", vm.name+"/"+name(1))
			vm.holds(1, "restored")
			h.must("snapshot", "delete", b.newestBefore(), vm.name+"/"+name(3), vm.name+"/"+name(1))
		}
		cancel()
		asking.Wait()
		vm.check("asked")
		if t.Logf("asked %d times", asked); asked == 0 {
			t.Error("nobody has asked")
		}
	})
}

// ask asks about the block graph until it is cancelled, and returns how often.
func ask(ctx context.Context, t *testing.T, m *monitor.Session) (asked int) {
	for {
		for _, question := range []string{"query-named-block-nodes", "query-block", "query-jobs", "query-block-jobs", "query-blockstats", "x-debug-query-block-graph"} {
			err := m.Execute(ctx, question, nil, nil)
			if errors.Is(err, context.Canceled) {
				return asked
			}
			if err != nil {
				t.Errorf("%s: %v", question, err)
				return asked
			}
			asked++
		}
	}
}
