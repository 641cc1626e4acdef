package agent

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// modelFile is an image: what it holds, and the path of what it lies on.
type modelFile struct {
	data    map[int]int
	backing string
}

// model is the files that a layerTree is about, and what must not change of them.
type model struct {
	t     *testing.T
	tree  *layerTree
	files map[string]*modelFile
	reads map[string]map[int]int // by layer id, of those that something needs
	found map[string]map[int]int // by path, what outsiders read
	still map[string]map[int]int // by path, what nobody may write to
}

const modelBlocks = 8

// read returns what an image reads as, with all below it.
func (m *model) read(path string) map[int]int {
	content := map[int]int{}
	var chain []*modelFile
	for path != "" {
		f := m.files[path]
		if f == nil {
			m.t.Fatalf("the file %s is gone, and something lies on it", path)
		}
		chain = append(chain, f)
		path = f.backing
	}
	for _, f := range slices.Backward(chain) {
		maps.Copy(content, f.data)
	}
	return content
}

// newModel makes a random tree of layers of one disk.
func newModel(t *testing.T, random *rand.Rand) (m *model, wanted map[string]bool) {
	m = &model{t: t, files: map[string]*modelFile{}, reads: map[string]map[int]int{}, found: map[string]map[int]int{}, still: map[string]map[int]int{}}
	n := 2 + random.IntN(9)
	var layers []catalog.Layer
	foreign := random.IntN(2)
	for i := range n {
		l := catalog.Layer{ID: fmt.Sprint(i), DiskID: "d", Path: fmt.Sprintf("/%d", i), Format: "qcow2", Covered: true}
		if i > foreign {
			l.Operation = "0badcafe"
		}
		f := &modelFile{data: map[int]int{}}
		if i > 0 {
			on := i - 1
			if random.IntN(3) == 0 && i > foreign {
				on = max(random.IntN(i), foreign-1, 0)
			}
			l.Parent, f.backing = layers[on].ID, layers[on].Path
		}
		l.Foreign = i < foreign
		for b := range modelBlocks {
			if random.IntN(3) == 0 {
				f.data[b] = i + 1
			}
		}
		layers = append(layers, l)
		m.files[l.Path] = f
	}
	disk := catalog.Disk{ID: "d", Device: "root", ActiveLayer: layers[n-1].ID}
	var snapshots []catalog.Snapshot
	gone, wanted := map[string]bool{}, map[string]bool{}
	for _, l := range layers[:n-1] {
		if l.Foreign || random.IntN(4) == 0 {
			continue // an idle one
		}
		s := catalog.Snapshot{ID: "s" + l.ID, VMName: "web", Name: l.ID, Disks: []catalog.SnapshotDisk{{DiskID: "d", LayerID: l.ID}}}
		snapshots = append(snapshots, s)
		if random.IntN(2) == 0 {
			gone[s.ID], wanted[l.ID] = true, true
		}
	}
	m.tree = newLayerTree([]catalog.Disk{disk}, layers, snapshots, gone)
	for _, l := range layers {
		if m.tree.needed[l.ID] || l.ID == disk.ActiveLayer {
			m.reads[l.ID] = m.read(l.Path)
		}
		if l.ID != disk.ActiveLayer && random.IntN(8) == 0 {
			m.tree.hold(l.ID, []string{"/clone"})
			m.found[l.Path] = m.read(l.Path)
			for below := l; below.ID != ""; below = m.tree.layers[below.Parent] {
				m.still[below.Path] = maps.Clone(m.files[below.Path].data)
			}
		}
		if random.IntN(12) == 0 {
			m.tree.fixed[l.ID] = "nobody may touch it"
		}
		if m.tree.fixed[l.ID] != "" {
			m.still[l.Path] = maps.Clone(m.files[l.Path].data)
		}
	}
	return m, wanted
}

// do merges the files as a merge of the tree says.
func (m *model) do(g merge) {
	lower, upper := m.tree.layers[g.lower], m.tree.layers[g.upper]
	low, up := m.files[lower.Path], m.files[upper.Path]
	switch g.way {
	case MergeRemove:
		delete(m.files, lower.Path)
	case MergeCommit:
		if n := len(m.tree.children[g.lower]); n != 1 {
			m.t.Errorf("%s is committed into %s, on which %d layers lie", g.upper, g.lower, n)
		}
		if n := len(m.tree.children[g.upper]); n > 1 {
			m.t.Errorf("%s is committed into %s, and %d layers name it", g.upper, g.lower, n)
		}
		maps.Copy(low.data, up.data)
		delete(m.files, upper.Path)
		for _, above := range m.tree.children[g.upper] {
			if m.tree.fixed[above] != "" || len(m.tree.held[above]) > 0 {
				m.t.Errorf("the header of %s is written to", above)
			}
			m.files[m.tree.layers[above].Path].backing = lower.Path
		}
	case MergeStream, MergeFlatten:
		for b, v := range low.data {
			if _, has := up.data[b]; !has {
				up.data[b] = v
			}
		}
		up.backing = low.backing
		if g.way == MergeStream {
			delete(m.files, lower.Path)
		}
	default:
		m.t.Fatalf("a merge by the way %q", g.way)
	}
}

// verify fails unless everything that is needed reads as it did, and nothing was
// written to that must not be.
func (m *model) verify(when string) {
	m.t.Helper()
	for id, was := range m.reads {
		l, there := m.tree.layers[id]
		if !there {
			m.t.Errorf("%s: the layer %s is gone, and is needed", when, id)
		} else if is := m.read(l.Path); !maps.Equal(is, was) {
			m.t.Errorf("%s: the layer %s reads as %v, and was %v", when, id, is, was)
		}
	}
	for path, was := range m.found {
		if is := m.read(path); !maps.Equal(is, was) {
			m.t.Errorf("%s: who lies on %s from outside reads %v, and read %v", when, path, is, was)
		}
	}
	for path, was := range m.still {
		if f := m.files[path]; f == nil || !maps.Equal(f.data, was) {
			m.t.Errorf("%s: %s was written to or removed", when, path)
		}
	}
	if len(m.files) != len(m.tree.layers) {
		m.t.Errorf("%s: %d files for %d layers", when, len(m.files), len(m.tree.layers))
	}
}

// measure counts blocks.
func (m *model) measure(lower, upper catalog.Layer) (mergeCost, error) {
	low, up := m.files[lower.Path].data, m.files[upper.Path].data
	both := maps.Clone(low)
	maps.Copy(both, up)
	return mergeCost{
		Low: uint64(len(low)), Down: uint64(len(up)), Up: uint64(len(both) - len(up)),
		RoomBelow: uint64(len(both) - len(low)), RoomAbove: uint64(len(both) - len(up)),
	}, nil
}

// TestLayerTree deletes snapshots from random trees: all that stays reads as
// before, after each step, and what could not go says why.
func TestLayerTree(t *testing.T) {
	ways := map[MergeWay]int{}
	for seed := range uint64(5000) {
		random := rand.New(rand.NewPCG(seed, 1))
		m, wanted := newModel(t, random)
		flatten := random.IntN(3) == 0
		for step := 0; ; step++ {
			g, ok, err := m.tree.next(wanted, flatten, m.measure)
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			when := fmt.Sprintf("seed %d, step %d, %s of %s and %s", seed, step, g.way, g.lower, g.upper)
			if step > 100 {
				t.Fatalf("%s: it comes to no end", when)
			}
			ways[g.way]++
			m.do(g)
			m.tree.apply(g)
			m.verify(when)
		}
		for id := range wanted {
			_, there := m.tree.layers[id]
			kept, stays := m.tree.kept[id]
			needed := there && !m.tree.idle(id)
			if there != stays && !needed {
				t.Errorf("seed %d: the layer %s is there: %v, kept: %v (%+v)", seed, id, there, stays, kept)
			}
			if stays && kept.Reason == "" {
				t.Errorf("seed %d: nobody knows why %s is kept", seed, id)
			}
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	for _, way := range []MergeWay{MergeRemove, MergeCommit, MergeStream, MergeFlatten} {
		if ways[way] < 50 {
			t.Errorf("only %d merges by the way %q", ways[way], way)
		}
	}
}

// TestLayerTreeKeeps says for which reasons layers stay, and what is named.
func TestLayerTreeKeeps(t *testing.T) {
	layer := func(id, parent string) catalog.Layer {
		return catalog.Layer{ID: id, Parent: parent, DiskID: "d", Path: "/" + id, Format: "qcow2"}
	}
	point := func(name, layer string) catalog.Snapshot {
		return catalog.Snapshot{ID: name, VMName: "web", Name: name, Disks: []catalog.SnapshotDisk{{DiskID: "d", LayerID: layer}}}
	}
	disk := catalog.Disk{ID: "d", Device: "root", ActiveLayer: "c"}
	layers := []catalog.Layer{layer("a", ""), layer("b", "a"), layer("c", "a")}
	snapshots := []catalog.Snapshot{point("one", "a"), point("two", "b")}
	cost := func(catalog.Layer, catalog.Layer) (mergeCost, error) { return mergeCost{}, nil }

	tree := newLayerTree([]catalog.Disk{disk}, layers, snapshots, map[string]bool{"one": true})
	if _, ok, err := tree.next(map[string]bool{"a": true}, false, cost); ok || err != nil {
		t.Errorf("a branch point is merged: %v", err)
	}
	if got := tree.dependantsOf("a", snapshots); !slices.Equal(got, []string{"the state of disk root now", "web/two"}) {
		t.Errorf("on it lie %q", got)
	}
	if k := tree.kept["a"]; !k.Branches {
		t.Errorf("it is kept because of %+v", k)
	}

	tree = newLayerTree([]catalog.Disk{disk}, layers, snapshots, map[string]bool{"one": true, "two": true})
	tree.hold("b", []string{"/clone"})
	wanted := map[string]bool{"a": true, "b": true}
	if m, ok, err := tree.next(wanted, false, cost); ok || err != nil {
		t.Errorf("%+v, with a clone on it: %v", m, err)
	}
	if k := tree.kept["b"]; !slices.Equal(k.Dependants, []string{"/clone"}) || k.Branches {
		t.Errorf("the layer with the clone is kept because of %+v", k)
	}

	disk.SettleNeeded = true
	tree = newLayerTree([]catalog.Disk{disk}, layers, snapshots, map[string]bool{"one": true, "two": true})
	if m, ok, err := tree.next(wanted, false, cost); ok || err != nil {
		t.Errorf("%+v, of a disk that is not settled: %v", m, err)
	}
	if k := tree.kept["a"]; k.Reason == "" || len(k.Dependants) > 0 {
		t.Errorf("it is kept because of %+v", k)
	}
}
