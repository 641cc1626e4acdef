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
		h.failsToLoad(g)
	})
}

// failsToLoad has restores of the snapshot "good" go wrong: the guest runs on.
func (h *host) failsToLoad(g *testvm.Guest) {
	h.t.Helper()
	before, saved := g.PID(), len(memoryFiles(h.t, g.Dir))
	good := g.Name + "/good"
	h.fails(2, "goes only with all of its disks", "snapshot", "restore", good, "--memory", "--disk", "root")
	alter(h.t, h.memoryOf(good))
	h.fails(1, "altered", "snapshot", "restore", good, "--memory")
	if g.PID() != before {
		h.t.Errorf("QEMU is another process after a restore that was refused")
	}
	counts(h.t, g, "refused")
	alter(h.t, h.memoryOf(good)) // as it was

	// A QEMU that is another machine than the one that was saved.
	db := h.database()
	res, err := db.ExecContext(h.ctx(), `UPDATE snapshots SET config = replace(config, '"192"', '"256"') WHERE name = 'good'`)
	if err == nil {
		err = db.Close()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	if n, err := res.RowsAffected(); n != 1 || err != nil {
		h.t.Fatal(n, err)
	}
	h.fails(1, "could not load the memory", "snapshot", "restore", good, "--memory")
	h.followed(g, "after a load that failed")
	counts(h.t, g, "after a load that failed")
	h.guestHolds(g, "broken")
	if n := len(memoryFiles(h.t, g.Dir)); n != saved {
		h.t.Errorf("%d memory files, were %d", n, saved)
	}
	if n := len(processes(h.t, g.UUID)); n != 1 {
		h.t.Errorf("%d QEMU processes", n)
	}
	h.must("snapshot", "create", g.Name, "after", "--memory", "--quiesce", "require")
	counts(h.t, g, "in the end")
}
