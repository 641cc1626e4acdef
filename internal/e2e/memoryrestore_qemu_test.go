package e2e

import (
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// followed takes over the QEMU that the daemon has started for a guest, which
// must be another process than before.
func (h *host) followed(g *testvm.Guest, when string) {
	h.t.Helper()
	before := g.PID()
	pid := int(h.await(g.Name, "running").GetProcess().GetPid())
	if pid == before {
		h.t.Errorf("%s: QEMU is the same process, %d", when, pid)
		return
	}
	if err := g.Follow(h.ctx(), pid); err != nil {
		h.t.Fatalf("%s: %v\nvmsnapd's log:\n%s", when, err, h.log)
	}
}

// TestQEMURestoreMemory takes a running guest back to where it was, with its
// memory, and forth again.
func TestQEMURestoreMemory(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{{Name: "root"}, {Name: "data"}}})
		h := newHost(t, g)
		if err := g.StartCounter(t.Context()); err != nil {
			t.Fatal(err)
		}
		put(t, g, "file", "at the snapshot")
		h.must("snapshot", "create", g.Name, "good", "--memory", "--quiesce", "require")
		put(t, g, "file", "broken")
		counts(t, g, "after the snapshot")
		plan := h.must("snapshot", "restore", g.Name+"/good", "--memory", "--dry-run")
		for _, want := range []string{"new QEMU process", "launcher exec", "stands still", "root", "data"} {
			if !strings.Contains(plan, want) {
				t.Errorf("the plan does not say %q:\n%s", want, plan)
			}
		}

		back := h.restored(g.Name+"/good", "--memory")
		h.followed(g, "restored")
		counts(t, g, "restored")
		h.guestHolds(g, "at the snapshot")
		thawed(t, g)
		if s := h.snapshot(back); s.Consistency != "memory" || len(s.Disks) != 2 {
			t.Errorf("the safety snapshot is %+v", s)
		}

		h.must("snapshot", "restore", back, "--memory")
		h.followed(g, "and back")
		counts(t, g, "and back")
		h.guestHolds(g, "broken")
		thawed(t, g)
	})
}
