package agent

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// history plays what was done to a VM: "s1" snapshots all disks, "s1:a" the disk
// a only, "s1<s0" restores all disks of s0 before, "s1<s0:a" the disk a only.
type history struct {
	active    map[string]string
	layers    []catalog.Layer
	snapshots []catalog.Snapshot
}

func play(disks string, steps ...string) *history {
	h := &history{active: map[string]string{}}
	for _, d := range disks {
		h.cover(string(d), "")
	}
	for _, s := range steps {
		verb, on, chosen := strings.Cut(s, ":")
		if !chosen {
			on = disks
		}
		if to, ok := strings.CutPrefix(verb, "restore "); ok {
			for _, d := range on {
				h.cover(string(d), h.point(to, string(d)))
			}
			continue
		}
		h.snapshot(verb, disks, on)
	}
	return h
}

func (h *history) cover(disk, base string) {
	id := fmt.Sprintf("%s%d", disk, len(h.layers))
	h.layers = append(h.layers, catalog.Layer{ID: id, DiskID: disk, Parent: base})
	h.active[disk] = id
}

func (h *history) point(snapshot, disk string) string {
	for _, s := range h.snapshots {
		for _, d := range s.Disks {
			if s.ID == snapshot && d.DiskID == disk {
				return d.LayerID
			}
		}
	}
	return ""
}

func (h *history) snapshot(name, disks, on string) {
	s := catalog.Snapshot{ID: name}
	for _, d := range disks {
		disk := catalog.SnapshotDisk{DiskID: string(d), Device: string(d)}
		if disk.Excluded = !strings.ContainsRune(on, d); !disk.Excluded {
			disk.LayerID = h.active[string(d)]
			h.cover(string(d), disk.LayerID)
		}
		s.Disks = append(s.Disks, disk)
	}
	h.snapshots = slices.Insert(h.snapshots, 0, s)
}

func (h *history) disks() (disks []catalog.Disk) {
	for id, active := range h.active {
		disks = append(disks, catalog.Disk{ID: id, Device: id, ActiveLayer: active})
	}
	slices.SortFunc(disks, func(x, y catalog.Disk) int { return strings.Compare(x.ID, y.ID) })
	return disks
}

// text is "PARENT" or "PARENT DISK=SNAPSHOT…".
func (p Position) text() string {
	text := p.Parent
	for _, s := range p.Strays {
		text += " " + s.Device + "=" + s.Snapshot
	}
	return text
}

func TestArrange(t *testing.T) {
	for _, c := range []struct {
		name  string
		disks string
		steps []string
		want  map[string]string
		here  string
	}{
		{"nothing", "a", nil, map[string]string{}, ""},
		{"a line", "ab", []string{"1", "2", "3"}, map[string]string{"1": "", "2": "1", "3": "2"}, "3"},
		{"a branch", "ab", []string{"1", "2", "restore 1", "3"}, map[string]string{"1": "", "2": "1", "3": "1"}, "3"},
		{"restored and not gone on", "a", []string{"1", "2", "restore 1"}, map[string]string{"1": "", "2": "1"}, "1"},
		{"a branch of a branch", "a", []string{"1", "2", "restore 1", "3", "restore 2", "4", "restore 3", "5"},
			map[string]string{"1": "", "2": "1", "3": "1", "4": "2", "5": "3"}, "5"},
		{"a disk left out once", "ab", []string{"1", "2:a", "3"}, map[string]string{"1": "", "2": "1", "3": "2"}, "3"},
		{"one disk restored", "ab", []string{"1", "2", "restore 1:a", "3"},
			map[string]string{"1": "", "2": "1", "3": "1 b=2"}, "3"},
		{"one disk restored, and running", "ab", []string{"1", "2", "restore 1:a"}, map[string]string{"1": "", "2": "1"}, "1 b=2"},
		{"what comes after it is in one line", "ab", []string{"1", "2", "restore 1:a", "3", "4"},
			map[string]string{"1": "", "2": "1", "3": "1 b=2", "4": "3"}, "4"},
		{"most of three disks", "abc", []string{"1:ab", "2:bc", "restore 1:a", "3:abc"},
			map[string]string{"1": "", "2": "1", "3": "2"}, "3"},
		{"disks of two branches and none above", "abc", []string{"1:a", "restore 0:bc", "2:bc", "restore 0", "3:abc", "restore 1:a", "restore 2:bc", "4"},
			map[string]string{"1": "", "2": "", "3": "", "4": "2 a=1"}, "4"},
		{"a majority", "abc", []string{"1", "2", "restore 0", "3", "restore 2:a", "restore 3:bc", "4"},
			map[string]string{"1": "", "2": "1", "3": "", "4": "3 a=2"}, "4"},
		{"disks taken in turn", "ab", []string{"1:a", "2:b", "3"}, map[string]string{"1": "", "2": "", "3": "2 a=1"}, "3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := play(c.disks, c.steps...)
			positions, here := arrange(h.snapshots, h.layers, h.disks())
			got := map[string]string{}
			for id, p := range positions {
				got[id] = p.text()
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if here.text() != c.here {
				t.Errorf("here is %q, want %q", here.text(), c.here)
			}
		})
	}
}

// TestArrangeMergedLayers deletes a snapshot whose layer stays for a branch, and
// one whose layer is merged.
func TestArrangeMergedLayers(t *testing.T) {
	h := play("a", "1", "2", "restore 1", "3", "4")
	h.snapshots = slices.DeleteFunc(h.snapshots, func(s catalog.Snapshot) bool { return s.ID == "1" || s.ID == "3" })
	positions, here := arrange(h.snapshots, h.layers, h.disks())
	if positions["2"].Parent != "" || positions["4"].Parent != "" || here.Parent != "4" {
		t.Errorf("%+v, %+v", positions, here)
	}
}

// TestArrangeABrokenCatalog has layers that lie on each other.
func TestArrangeABrokenCatalog(t *testing.T) {
	h := play("a", "1", "2")
	h.layers[0].Parent = h.layers[1].ID
	positions, _ := arrange(h.snapshots, h.layers, h.disks())
	if len(positions) != 2 {
		t.Errorf("%+v", positions)
	}
}
