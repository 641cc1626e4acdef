package e2e

import (
	"context"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUMigratedVMIsLeftAlone migrates a VM away: its disks may be in use
// elsewhere from then on, also when its QEMU has ended.
func TestQEMUMigratedVMIsLeftAlone(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "migrated-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
		defer cancel()
		if err := vm.own.Cont(ctx); err != nil {
			t.Fatal(err)
		}
		if err := vm.own.Execute(ctx, "migrate", map[string]any{"uri": "exec:cat >/dev/null"}, nil); err != nil {
			t.Fatal(err)
		}
		h.eventually(eventLimit, "the VM has migrated", func() error {
			return h.shows(vm.name, "run_state", "postmigrate")
		})
		before := files(t, vm.dir)
		h.fails(14, "postmigrate", "snapshot", "create", vm.name, "x")
		vm.kill()
		h.await(vm.name, "stopped")
		h.fails(14, "migrated", "snapshot", "create", vm.name, "x")
		if after := files(t, vm.dir); len(after) != len(before) {
			t.Errorf("before %v, after %v", before, after)
		}
	})
}
