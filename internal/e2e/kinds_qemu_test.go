package e2e

import (
	"fmt"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUEveryKindOfDisk snapshots a guest that has a disk of each kind, kills
// it, and starts it by its unchanged command line.
func TestQEMUEveryKindOfDisk(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{
			{Name: "root", IOThread: true},
			{Name: "scsi", Bus: testvm.SCSI, Style: testvm.StyleBlockdev, Throttle: true},
			{Name: "ide", Bus: testvm.IDE, Throttle: true},
			{Name: "probed", Format: testvm.Raw, NoDeclaredFormat: true},
			{Name: "left", Format: testvm.Raw},
		}})
		h := newHost(t, g)
		for round := range 2 { // the second covers layers that the agent made
			put(t, g, "state", fmt.Sprint("before ", round))
			name := fmt.Sprint("s", round)
			h.must("snapshot", "create", g.Name, name, "--quiesce", "require", "--exclude", "left")
			put(t, g, "state", fmt.Sprint("after ", round))
			s := h.snapshot(g.Name + "/" + name)
			if s.Consistency != "filesystem" || s.Quiesce.Frozen != 5 || len(s.Disks) != 5 {
				t.Errorf("snapshot %+v", s)
			}
			for _, d := range s.Disks {
				if d.Excluded {
					continue
				}
				image := raw(t, q, d)
				clean(t, image)
				if got := inImage(t, image, "state"); got != fmt.Sprint("before ", round) {
					t.Errorf("%s of %s holds %q", d.Device, name, got)
				}
			}
		}
		g.Kill()
		if err := g.Restart(h.ctx()); err != nil {
			t.Fatal(err)
		}
		for _, d := range g.Disks() {
			b, err := g.ReadFile(h.ctx(), testvm.Mountpoint(d.Name)+"/state")
			if err != nil || string(b) != "after 1" {
				t.Errorf("%s holds %q after the restart: %v", d.Name, b, err)
			}
		}
		thawed(t, g)
	})
}
