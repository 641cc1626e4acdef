package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/qga"
)

// TestQEMUDoctorRescues has another client save a guest's memory and cancel it,
// which holds the guest for good on a QEMU before 8.1.
func TestQEMUDoctorRescues(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks(), ExtraQMP: 1})
		h := newHost(t, g)
		if out := h.must("doctor", g.Name); !strings.Contains(out, "Nothing is wrong") {
			t.Errorf("the doctor says: %s", out)
		}
		script, err := qga.Dial(h.ctx(), g.AgentSocket(), qga.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := script.Freeze(h.ctx(), nil); err != nil {
			t.Fatal(err)
		}
		_ = script.Close()
		if f := h.ails(g.Name, "guest-frozen"); !f.Repairable {
			t.Errorf("a guest that a script froze: %+v", f)
		}
		if f := h.ails(g.Name, "guest-frozen", "--repair"); !f.Repaired {
			t.Errorf("a guest that a script froze: %+v", f)
		}
		thawed(t, g)
		w, err := g.StartWriters(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := w.AwaitWrites(h.ctx(), 5); err != nil {
			t.Fatal(err)
		}
		abandonSave(h, g)
		if q.Name != "7.2" {
			w.Reset()
			if err := w.AwaitWrites(h.ctx(), 5); err != nil {
				t.Errorf("the guest does not go on by itself: %v", err)
			}
			h.must("doctor", g.Name)
			return
		}
		got := h.fails(1, "1 finding", "doctor", g.Name)
		if !strings.Contains(got.stdout, "guest-write-protected") || !strings.Contains(got.stdout, "--repair") {
			t.Errorf("the doctor says: %s", got.stdout)
		}
		w.Reset()
		h.must("doctor", g.Name, "--repair")
		if err := w.AwaitWrites(h.ctx(), 5); err != nil {
			t.Errorf("the guest does not go on: %v", err)
		}
		h.must("doctor", g.Name)
		thawed(t, g)
	})
}

// abandonSave begins a background save by another client, and cancels it.
func abandonSave(h *host, g *testvm.Guest) {
	h.t.Helper()
	other, err := monitor.Dial(h.ctx(), g.ExtraQMPSockets()[0])
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	execute := func(command string, args any) {
		h.t.Helper()
		if err := other.Execute(h.ctx(), command, args, nil); err != nil {
			h.t.Fatal(err)
		}
	}
	execute("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "background-snapshot", "state": true}}})
	f, err := os.Create(filepath.Join(h.dir, "abandoned"))
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := other.ExecuteWithFile(h.ctx(), "getfd", map[string]string{"fdname": "abandoned"}, nil, f); err != nil {
		h.t.Fatal(err)
	}
	execute("migrate", map[string]string{"uri": "fd:abandoned"})
	for {
		m, err := other.QueryMigrate(h.ctx())
		if err != nil {
			h.t.Fatal(err)
		}
		if m.RAM.Normal+m.RAM.Duplicate > 0 {
			break
		}
		<-time.After(time.Millisecond) // there is no event for it
	}
	execute("migrate_cancel", nil)
}
