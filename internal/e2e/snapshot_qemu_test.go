package e2e

import (
	"strconv"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// put writes a file into each of the guest's file systems, durably.
func put(t *testing.T, g *testvm.Guest, name, content string) {
	t.Helper()
	for _, d := range g.Disks() {
		if _, err := g.Exec(t.Context(), "printf %s '"+content+"' > /mnt/"+d.Name+"/"+name+" && sync"); err != nil {
			t.Fatal(err)
		}
	}
}

// thawed verifies from inside that every file system takes a write.
func thawed(t *testing.T, g *testvm.Guest) {
	t.Helper()
	for _, d := range g.Disks() {
		if d.NoFilesystem {
			continue
		}
		if _, err := g.Exec(t.Context(), "echo x > /mnt/"+d.Name+"/.thawed && sync"); err != nil {
			t.Errorf("%s: the guest cannot write: %v", d.Name, err)
		}
	}
}

func TestQEMUQuiescedSnapshotOfAWritingGuest(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := newHost(t, g)
		w, err := g.StartWriters(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		put(t, g, "before", "before")
		h.must("snapshot", "create", g.Name, "first", "--quiesce", "require", "--description", "a test", "--label", "k=v")
		if err := w.AwaitWrites(h.ctx(), 20); err != nil {
			t.Errorf("the guest does not write on: %v", err)
		}
		put(t, g, "after", "after")
		thawed(t, g)

		s := h.snapshot(g.Name + "/first")
		if s.Consistency != "filesystem" || s.Quiesce.Frozen != 2 || s.Quiesce.Total != 2 || s.Quiesce.Reason != "" || len(s.Disks) != 2 {
			t.Errorf("snapshot %+v", s)
		}
		for _, d := range s.Disks {
			checkImage(t, q, d.Path)
			image := raw(t, q, d)
			clean(t, image)
			if got := inImage(t, image, "before"); got != "before" {
				t.Errorf("%s: the file from before the cut holds %q", d.Device, got)
			}
			if got := inImage(t, image, "after"); got != "" {
				t.Errorf("%s: a file from after the cut is there: %q", d.Device, got)
			}
		}
		if m := h.scrape(); !strings.Contains(m, `vmsnap_operations_total{kind="snapshot",result="succeeded"} 1`) {
			t.Errorf("the metrics do not count the snapshot:\n%s", m)
		}
	})
}

// counter makes the guest count on both disks, the first always first.
const counter = `i=0; while :; do i=$((i+1)); for d in root data; do
printf %08d $i | dd of=/mnt/$d/counter conv=notrunc,fsync 2>/dev/null; done; done`

func TestQEMUDisksAreCutAtOneInstant(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := newHost(t, g)
		put(t, g, "counter", "00000000")
		if _, err := g.Exec(t.Context(), "("+counter+") >/dev/null 2>&1 &"); err != nil {
			t.Fatal(err)
		}
		for i, quiesce := range []string{"none", "require", "none", "require"} {
			name := "s" + strconv.Itoa(i)
			h.must("snapshot", "create", g.Name, name, "--quiesce", quiesce)
			counts := map[string]int{}
			for _, d := range h.snapshot(g.Name + "/" + name).Disks {
				image := raw(t, q, d)
				recovered(t, image)
				n, err := strconv.Atoi(inImage(t, image, "counter"))
				if err != nil {
					t.Fatal(err)
				}
				counts[d.Device] = n
			}
			if ahead := counts["root"] - counts["data"]; ahead != 0 && ahead != 1 {
				t.Errorf("%s: root counts %d, data %d", name, counts["root"], counts["data"])
			}
		}
		thawed(t, g)
	})
}

func TestQEMUWithoutGuestAgent(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks(), NoGuestAgent: true})
		h := newHost(t, g)
		before := files(t, g.Dir)
		h.fails(5, "no guest agent", "snapshot", "create", g.Name, "x", "--quiesce", "require")
		if after := files(t, g.Dir); strings.Join(after, " ") != strings.Join(before, " ") {
			t.Errorf("before %v, after %v", before, after)
		}
		h.must("snapshot", "create", g.Name, "y")
		s := h.snapshot(g.Name + "/y")
		if s.Consistency != "crash" || len(s.Warnings) == 0 || s.Warnings[0].Code != "no-guest-agent" {
			t.Errorf("snapshot %+v", s)
		}
		h.fails(1, "no-guest-agent", "snapshot", "create", g.Name, "z", "--strict")
		thawed(t, g)
	})
}
