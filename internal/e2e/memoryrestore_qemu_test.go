package e2e

import (
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
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
		// qemu-ga wants this program, which the test's guest has no clock for.
		if _, err := g.Exec(t.Context(), "mkdir -p /sbin && printf '#!/bin/sh\n' >/sbin/hwclock && chmod 755 /sbin/hwclock"); err != nil {
			t.Fatal(err)
		}
		if _, err := g.Exec(t.Context(), "date -u -s 2020-02-02 && (exec 7>"+testvm.Mountpoint("data")+"/open; while sleep 0.1; do echo x >&7; done) >/dev/null 2>&1 &"); err != nil {
			t.Fatal(err)
		}
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
		h.isAsToday(g)
		if w := h.warningsOf(g.Name); len(w) > 0 {
			t.Errorf("the restore has warnings: %v", w)
		}
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

// isAsToday fails unless the guest's clock, which was wrong when it was saved, is
// right, and a program writes on to a file that it had open.
func (h *host) isAsToday(g *testvm.Guest) {
	h.t.Helper()
	now, err := g.Exec(h.ctx(), "date -u +%s")
	if err != nil {
		h.t.Fatal(err)
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(now), 10, 64)
	if off := time.Since(time.Unix(seconds, 0)).Abs(); err != nil || off > time.Minute {
		h.t.Errorf("the guest's clock is off by %s: %v", off, err)
	}
	size := func() string {
		out, err := g.Exec(h.ctx(), "stat -c %s "+testvm.Mountpoint("data")+"/open")
		if err != nil {
			h.t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	first := size()
	h.eventually(eventLimit, "the program writes on to its open file", func() error {
		if size() == first {
			return errors.New(first)
		}
		return nil
	})
}

// warningsOf returns the warnings of a VM's newest operation.
func (h *host) warningsOf(vm string) (codes []string) {
	h.t.Helper()
	res, err := h.Operations().ListOperations(h.ctx(), connect.NewRequest(&vmsnapv1.ListOperationsRequest{Vm: vm}))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, w := range res.Msg.GetOperations()[0].GetWarnings() {
		codes = append(codes, w.GetCode()+": "+w.GetMessage())
	}
	return codes
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
