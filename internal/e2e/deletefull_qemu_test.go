package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUDeleteFull fills the file system in the middle of merges, live and when
// the VM is stopped. They say how much they need, and go on when there is as much.
// A merge for which there is no room is refused before.
func TestQEMUDeleteFull(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "deletefull-"+q.Name, "root.qcow2")
		vm.small("48m")
		h, gate := gatedHost(t, q, vm)
		k := newTree(h, vm)
		k.bare = true
		for i, where := range []string{"0 1M", "1M 1M", "3M 1M", "5M 1M", "1M 1M"} {
			k.writeAt(where)
			k.take(fmt.Sprint("s", i))
		}
		for i, stopped := range []bool{false, true} {
			name := fmt.Sprintf("%s/s%d", vm.name, 1+2*i)
			when := fmt.Sprintf("%s, stopped %v", name, stopped)
			if stopped {
				vm.kill()
				h.await(vm.name, "stopped")
			}
			free := fill(t, vm.dir, 512<<10)
			h.fails(6, "bytes free", "snapshot", "delete", name)
			h.fails(6, "bytes free", "snapshot", "delete", name, "--dry-run")
			free()

			if stopped {
				gate.hold("commit")
			}
			id := strings.TrimSpace(h.must("snapshot", "delete", name, "--speed", "512KiB", "--detach", "-o", "name"))
			// It has found enough space, and has not written yet.
			if stopped {
				gate.await(h, "commit")
				free = fill(t, vm.dir, 0)
				gate.release("commit")
			} else {
				h.awaitStep(id, "commit root")
				h.rest(id, true)
				h.eventually(eventLimit, when+": its block job", vm.hasJob)
				free = fill(t, vm.dir, 0)
				h.rest(id, false)
			}
			h.eventually(eventLimit, when+": it says that it needs space", func() error {
				if text := h.must("operation", "show", id); !strings.Contains(text, "no-space") || !strings.Contains(text, "it needs") {
					return fmt.Errorf("it says\n%s", text)
				}
				return nil
			})
			free()
			h.eventually(eventLimit, when+": it goes on", h.idle)
			if got := h.object("operation", "show", id)["state"]; got != "succeeded" {
				t.Errorf("%s: it is %v:\n%s", when, got, h.must("operation", "show", id))
			}
			k.gone(name)
			k.verify(when)
		}
		vm.start()
		h.await(vm.name, "paused")
		k.verify("started again")
	})
}

// hasJob tells whether QEMU has a block job.
func (s *still) hasJob() error {
	var jobs []struct{}
	if err := s.own.Execute(s.t.Context(), "query-jobs", nil, &jobs); err != nil {
		return err
	}
	if len(jobs) == 0 {
		return errors.New("there is none")
	}
	return nil
}

// rest pauses an operation, or lets it go on.
func (h *host) rest(id string, paused bool) {
	h.t.Helper()
	var err error
	if paused {
		_, err = h.Operations().PauseOperation(h.ctx(), connect.NewRequest(&vmsnapv1.PauseOperationRequest{Id: id}))
	} else {
		_, err = h.Operations().ResumeOperation(h.ctx(), connect.NewRequest(&vmsnapv1.ResumeOperationRequest{Id: id}))
	}
	if err != nil {
		h.t.Fatal(err)
	}
}
