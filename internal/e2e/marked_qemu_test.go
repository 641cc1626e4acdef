package e2e

import (
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUWhatIsDeletedIsMarkedFirst kills the daemon when QEMU is about to change
// the data of a restore point: the catalog has it as none any more, for good.
func TestQEMUWhatIsDeletedIsMarkedFirst(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "marked")
		for i, name := range []string{"one", "two", "three"} {
			b.vm.write(i + 1)
			b.must("snapshot", "create", b.vm.name, name, "--quiesce", "none")
		}
		b.vm.write(4)
		merge := func(line string) bool {
			return strings.Contains(line, `"block-commit"`) || strings.Contains(line, `"block-stream"`)
		}
		g := b.r.stop(&gate{name: "a merge", is: merge}, 1)
		c := b.meanwhile("snapshot", "delete", b.vm.name+"/two")
		g.await(b.host)
		b.signal(syscall.SIGKILL)
		if state := b.recordedState("two"); state != "deleting" {
			t.Errorf("QEMU is about to merge a layer of a snapshot that is recorded as %s", state)
		}
		g.release(swallow)
		b.start()
		b.eventually(eventLimit, "the deletion has ended", b.idle)
		c.end()
		b.fails(4, "", "snapshot", "show", b.vm.name+"/two")
		for name, value := range map[string]int{"one": 1, "three": 3} {
			for _, d := range b.snapshot(b.vm.name + "/" + name).Disks {
				b.vm.imageHolds(d, value, name)
			}
		}
		b.vm.holds(4, "in the end")
		b.noOrphans(b.vm, "in the end")
	})
}

// recordedState reads from the catalog what a snapshot can be restored for.
func (h *host) recordedState(snapshot string) (state string) {
	h.t.Helper()
	db := h.database()
	defer func() { _ = db.Close() }()
	if err := db.QueryRowContext(h.ctx(), "SELECT state FROM snapshots WHERE name = ?", snapshot).Scan(&state); err != nil {
		h.t.Fatal(err)
	}
	return state
}
