package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/op"
)

// hang is a file system that does not answer until it is let go.
type hang struct {
	until chan struct{}
	asked atomic.Int32
}

func (h *hang) stat(path string) (fileStat, error) {
	h.asked.Add(1)
	<-h.until
	return statFile(path)
}

// shelf is an agent with stopped VMs, each of which has one disk of one layer.
func shelf(t *testing.T, names ...string) *Agent {
	t.Helper()
	c, err := catalog.Open(t.Context(), t.TempDir(), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	a := &Agent{catalog: c, log: hclog.NewNullLogger(), vms: map[string]*vm{}, ops: op.NewRunner(c, hclog.NewNullLogger())}
	for _, name := range names {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, make([]byte, 64<<10), 0o600); err != nil {
			t.Fatal(err)
		}
		a.vms[name] = &vm{
			id: name, rec: catalog.VM{ID: name, Name: name},
			disks:  []catalog.Disk{{ID: "d-" + name, Device: "root", ActiveLayer: "l-" + name}},
			layers: []catalog.Layer{{ID: "l-" + name, DiskID: "d-" + name, Path: path, Format: "raw", Immutable: true}},
		}
	}
	return a
}

// TestAHungFileSystemHoldsUpNobody shows a VM whose layers cannot be looked at.
func TestAHungFileSystemHoldsUpNobody(t *testing.T) {
	a := shelf(t, "hung", "well")
	h := &hang{until: make(chan struct{})}
	a.vms["hung"].stats.stat = h.stat
	look := func() map[string]LayerView {
		t.Helper()
		began := time.Now()
		views, _ := a.VMs(t.Context())
		if took := time.Since(began); took > 20*statPatience {
			t.Errorf("it took %s", took)
		}
		layers := map[string]LayerView{}
		for _, v := range views {
			layers[v.Name] = v.Disks[0].Layers[0]
		}
		return layers
	}
	for range 3 {
		layers := look()
		if l := layers["well"]; l.Allocated < 64<<10 || l.ID != "l-well" {
			t.Errorf("the VM that is well: %+v", l)
		}
		if l := layers["hung"]; l.Allocated != 0 || l.ID != "l-hung" || !l.Immutable {
			t.Errorf("the VM that hangs: %+v", l)
		}
	}
	if n := h.asked.Load(); n != 1 {
		t.Errorf("%d looks hang", n)
	}
	snapshot := catalog.Snapshot{VMID: "hung", Disks: []catalog.SnapshotDisk{{LayerID: "l-hung"}}}
	if view, err := a.snapshotView(t.Context(), snapshot); err != nil || view.Layers["l-hung"].ID != "l-hung" || view.VMName != "hung" {
		t.Errorf("a snapshot of it: %+v", view)
	}
	close(h.until)
	if l := look()["hung"]; l.Allocated < 64<<10 {
		t.Errorf("once it answers: %+v", l)
	}
}

func TestFileStatsShowWhatIsThere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	var s fileStats
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for size := range 4 {
		if err := os.WriteFile(path, make([]byte, size<<16), 0o600); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				if f, ok := s.look(ctx, []string{path})[path]; !ok || f.allocated < uint64(size)<<16 {
					t.Errorf("%d: %+v, %v", size, f, ok)
				}
			})
		}
		all.Wait()
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if known := s.look(ctx, []string{path}); len(known) != 0 {
		t.Errorf("a file that is gone: %+v", known)
	}
}

func BenchmarkVMs(b *testing.B) {
	a := &Agent{log: hclog.NewNullLogger(), vms: map[string]*vm{}, ops: op.NewRunner(nil, hclog.NewNullLogger())}
	path := filepath.Join(b.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	for i := range 500 {
		id := fmt.Sprint(i)
		v := &vm{id: id, rec: catalog.VM{ID: id, Name: id}, disks: []catalog.Disk{{ID: id, ActiveLayer: id + "-3"}}}
		for n := range 4 {
			l := catalog.Layer{ID: fmt.Sprint(id, "-", n), DiskID: id, Path: path}
			if n > 0 {
				l.Parent = fmt.Sprint(id, "-", n-1)
			}
			v.layers = append(v.layers, l)
		}
		a.vms[id] = v
	}
	for b.Loop() {
		a.VMs(b.Context())
	}
}
