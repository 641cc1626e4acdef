package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUUpkeep keeps layers for a clone. They are merged by themselves once it is
// gone, and not before, and whoever wants the VM meanwhile gets it.
func TestQEMUUpkeep(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "upkeep-"+q.Name, "root.qcow2")
		h := prepareHost(t, "--upkeep-interval", "200ms", "--upkeep-speed", "1")
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		h.await(vm.name, "paused")
		k := newTree(h, vm)
		k.grow("one")
		for i, where := range []string{"1M 3M", "4M 3M"} {
			k.writeAt(where)
			k.take([]string{"two", "three"}[i])
		}
		clone := t.TempDir() + "/clone.qcow2"
		h.must("snapshot", "clone", vm.name+"/two", clone)
		h.must("snapshot", "delete", vm.name+"/two", "--keep-layers")
		k.gone(vm.name + "/two")
		<-time.After(time.Second) // some intervals: that it looks and leaves a layer alone is no event
		if kinds := h.kinds(vm.name); strings.Contains(kinds, "upkeep") {
			t.Errorf("the layers below a clone were looked after: %s", kinds)
		}
		k.verify("kept for a clone")

		sh(t, "rm", clone)
		h.must("disk", "forget", clone)
		upkeep := func() error {
			if id := h.operation(vm.name); h.object("operation", "show", id)["kind"] != "upkeep" {
				return errors.New("something else runs")
			}
			return nil
		}
		h.eventually(eventLimit, "the layer is being merged", upkeep)
		k.take("four") // who wants the VM gets it
		h.eventually(eventLimit, "the layer is being merged again", upkeep)
		h.signal(syscall.SIGKILL)
		h.start()
		h.eventually(eventLimit, "the layer is gone", func() error {
			if n := h.layers(vm.name); !slices.Equal(n, []int{4}) { // none are known until QEMU has answered
				return fmt.Errorf("%v layers", n)
			}
			return h.idle()
		})
		k.verify("merged")
		<-time.After(time.Second)
		if err := h.idle(); err != nil {
			t.Errorf("an upkeep of nothing: %v", err)
		}
	})
}

// kinds returns the kinds of a VM's operations.
func (h *host) kinds(vm string) string {
	h.t.Helper()
	res, err := h.Operations().ListOperations(h.ctx(), connect.NewRequest(&vmsnapv1.ListOperationsRequest{Vm: vm}))
	if err != nil {
		h.t.Fatal(err)
	}
	var kinds []string
	for _, o := range res.Msg.GetOperations() {
		kinds = append(kinds, o.GetKind())
	}
	return strings.Join(kinds, " ")
}
