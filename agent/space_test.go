package agent

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// drawing is a yardstick for layers that are drawn: each character is a byte, a
// space where the layer holds nothing and "0" where it holds zeroes.
type drawing map[string]string

var errUndrawn = errors.New("not drawn")

func (d drawing) data(l catalog.Layer) (n uint64, err error) {
	return d.merged([]catalog.Layer{l})
}

func (d drawing) overlap(lower, upper catalog.Layer) (n uint64, err error) {
	up, drawn := d[upper.ID]
	if !drawn {
		return 0, errUndrawn
	}
	for i, c := range d[lower.ID] {
		if c != ' ' && c != '0' && up[i] != ' ' {
			n++
		}
	}
	return n, nil
}

func (d drawing) merged(chain []catalog.Layer) (n uint64, err error) {
	all := map[int]rune{}
	for _, l := range chain {
		text, drawn := d[l.ID]
		if !drawn {
			return 0, errUndrawn
		}
		for i, c := range text {
			if c != ' ' {
				all[i] = c
			}
		}
	}
	for _, c := range all {
		if c != '0' {
			n++
		}
	}
	return n, nil
}

func (d drawing) file(path string) (uint64, error) {
	if path == "" {
		return 0, errUndrawn
	}
	return 100, nil
}

// tree makes layers of one disk: each "LAYER" or "LAYER<PARENT". One that begins
// with "f" is foreign.
func tree(edges ...string) []catalog.Layer {
	var layers []catalog.Layer
	for _, e := range edges {
		l := catalog.Layer{ID: e[:1], DiskID: "d", Foreign: e[0] == 'f'}
		if len(e) > 1 {
			l.Parent = e[2:]
		}
		layers = append(layers, l)
	}
	return layers
}

// points makes a snapshot of each layer, called after it.
func points(layers ...string) []catalog.Snapshot {
	var all []catalog.Snapshot
	for _, l := range layers {
		all = append(all, catalog.Snapshot{ID: "s" + l, Disks: []catalog.SnapshotDisk{{DiskID: "d", LayerID: l}, {DiskID: "x", Excluded: true}}})
	}
	return all
}

func TestSpaceOfSnapshots(t *testing.T) {
	withMemory := points("a", "b")
	withMemory[1].Memory = &catalog.SavedMemory{Path: "memory"}
	twoDisks := points("a")
	twoDisks[0].Disks = append(twoDisks[0].Disks, catalog.SnapshotDisk{DiskID: "e", LayerID: "m"})
	second := tree("m", "n<m")
	second[0].DiskID, second[1].DiskID = "e", "e"
	for _, c := range []struct {
		name       string
		layers     []catalog.Layer
		dependants []catalog.Layer
		snapshots  []catalog.Snapshot
		active     []string
		drawn      drawing
		want       map[string][2]uint64 // exclusive and shared
		reclaims   uint64
	}{
		{
			name: "a chain", layers: tree("a", "b<a", "c<b"), snapshots: points("a", "b"), active: []string{"c"},
			drawn: drawing{"a": "xxxxxx  ", "b": " xx   x ", "c": "  x0  x "},
			want:  map[string][2]uint64{"sa": {2, 4}, "sb": {2, 7}}, reclaims: 5,
		},
		{
			name: "zeroes hide, and are nothing themselves", layers: tree("a", "b<a"), snapshots: points("a"), active: []string{"b"},
			drawn: drawing{"a": "xx00", "b": "0 x0"}, want: map[string][2]uint64{"sa": {1, 1}}, reclaims: 1,
		},
		{
			name: "a branch point", layers: tree("a", "b<a", "c<a", "d<b"), snapshots: points("a", "b", "c"), active: []string{"d"},
			drawn: drawing{"a": "xxxx", "b": "xx  ", "c": "x   ", "d": "x   "},
			// Without c, nothing but b lies on a, which stays a restore point.
			want: map[string][2]uint64{"sa": {0, 4}, "sb": {1, 5}, "sc": {1, 4}}, reclaims: 4,
		},
		{
			name: "a branch that goes takes what was kept for it", layers: tree("a", "b<a", "c<b", "d<a"), snapshots: points("c"), active: []string{"d"},
			drawn: drawing{"a": "xxxx", "b": "x   ", "c": "xx  ", "d": "x   "},
			want:  map[string][2]uint64{"sc": {4, 3}}, reclaims: 4,
		},
		{
			name: "a branch that goes leaves what another snapshot needs", layers: tree("a", "b<a", "d<a"), snapshots: points("a", "b"), active: []string{"d"},
			drawn: drawing{"a": "xxxx", "b": "x   ", "d": "x   "},
			want:  map[string][2]uint64{"sa": {0, 4}, "sb": {1, 4}}, reclaims: 2,
		},
		{
			name: "foreign layers stay", layers: tree("f", "a<f", "b<a"), snapshots: points("a"), active: []string{"b"},
			drawn: drawing{"f": "xxxx", "a": "xx  ", "b": "x   "}, want: map[string][2]uint64{"sa": {1, 5}}, reclaims: 1,
		},
		{
			name: "two snapshots of one layer", layers: tree("a", "b<a"), snapshots: append(points("a"), catalog.Snapshot{
				ID: "again", Disks: []catalog.SnapshotDisk{{DiskID: "d", LayerID: "a"}},
			}), active: []string{"b"},
			drawn: drawing{"a": "xx", "b": "x "}, want: map[string][2]uint64{"sa": {0, 2}, "again": {0, 2}}, reclaims: 1,
		},
		{
			name: "a clone lies on it", layers: tree("a", "b<a"), dependants: []catalog.Layer{{ID: "z", DiskID: "other", Parent: "a"}},
			snapshots: points("a"), active: []string{"b"},
			drawn: drawing{"a": "xx", "b": "x "}, want: map[string][2]uint64{"sa": {0, 2}}, reclaims: 1,
		},
		{
			name: "only a clone lies on it", layers: tree("a", "b<a", "c<a"), dependants: []catalog.Layer{{ID: "z", DiskID: "other", Parent: "c"}},
			snapshots: points("c"), active: []string{"b"},
			drawn: drawing{"a": "xx", "b": "x ", "c": "xx"}, want: map[string][2]uint64{"sc": {0, 4}}, reclaims: 3,
		},
		{
			name: "memory", layers: tree("a", "b<a", "c<b"), snapshots: withMemory, active: []string{"c"},
			drawn: drawing{"a": "xx", "b": "x ", "c": "x "}, want: map[string][2]uint64{"sa": {1, 1}, "sb": {101, 2}}, reclaims: 102,
		},
		{
			name: "two disks", layers: append(tree("a", "b<a"), second...), snapshots: twoDisks, active: []string{"b", "n"},
			drawn: drawing{"a": "xx", "b": "x ", "m": "xxx", "n": "xx "}, want: map[string][2]uint64{"sa": {3, 2}}, reclaims: 3,
		},
		{
			name: "a layer that cannot be read", layers: tree("a", "b<a", "c<a"), snapshots: points("a", "b"), active: []string{"c"},
			drawn: drawing{"a": "xx", "c": "x "}, want: map[string][2]uint64{"sa": {0, 2}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var disks []catalog.Disk
			for _, l := range c.active {
				disks = append(disks, catalog.Disk{ID: "d" + l, ActiveLayer: l})
			}
			h := newHoldings(disks, c.layers, c.dependants, c.snapshots)
			got := map[string][2]uint64{}
			for _, s := range c.snapshots {
				if space, err := h.snapshot(s, c.drawn); err == nil {
					got[s.ID] = [2]uint64{space.Exclusive, space.Shared}
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			all := h.vm(disks, c.drawn)
			if all.Reclaimable != c.reclaims || all.Incomplete != (c.reclaims == 0) {
				t.Errorf("%+v, want %d", all, c.reclaims)
			}
		})
	}
}
