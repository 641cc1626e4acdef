package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
)

// TestDisksSeenAtOnce has several look at a VM whose disks nobody has seen.
func TestDisksSeenAtOnce(t *testing.T) {
	dir := t.TempDir()
	c, err := catalog.Open(t.Context(), t.TempDir(), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	a, v, r := &Agent{catalog: c, log: hclog.NewNullLogger()}, &vm{id: newID()}, newRun(self(t))
	err = c.Update(t.Context(), func(tx *catalog.Tx) error {
		v.rec, err = tx.UpsertVM(t.Context(), catalog.VM{ID: v.id, Identity: "name:web", Name: "web"})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	const disks, lookers = 4, 4
	var all sync.WaitGroup
	for i := range disks {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("%d.qcow2", i)))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		for range lookers {
			all.Go(func() {
				top := blockdev.Layer{Node: &blockdev.Node{Driver: "qcow2"}, Filename: f.Name()}
				d := liveDisk{drive: blockdev.Drive{Device: fmt.Sprint(i)}, chain: []blockdev.Layer{top}, path: f.Name()}
				if err := a.recognise(t.Context(), v, r, &d); err != nil {
					t.Errorf("disk %d: %v", i, err)
				}
			})
		}
	}
	all.Wait()
	recorded, err := c.Disks(t.Context(), v.id)
	if err != nil || len(recorded) != disks || len(v.disks) != disks || len(v.layers) != disks {
		t.Errorf("recorded %+v, error %v; known %+v with layers %+v", recorded, err, v.disks, v.layers)
	}
}
