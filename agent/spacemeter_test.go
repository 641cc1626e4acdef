package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// chained is an agent with a stopped VM of one disk, whose two layers are files.
func chained(t *testing.T) (a *Agent, v *vm, layers []catalog.Layer) {
	t.Helper()
	a = shelf(t)
	dir := t.TempDir()
	ctx := t.Context()
	rec, err := a.catalog.UpsertVM(ctx, catalog.VM{Name: "web", Identity: "name:web"})
	if err != nil {
		t.Fatal(err)
	}
	layers = []catalog.Layer{
		{ID: "aaaaaaaa", DiskID: "d0000000", Path: filepath.Join(dir, "a.qcow2"), Format: "qcow2", Covered: true},
		{ID: "bbbbbbbb", DiskID: "d0000000", Path: filepath.Join(dir, "b.qcow2"), Format: "qcow2", Parent: "aaaaaaaa"},
	}
	run := func(args ...string) {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	run("qemu-img", "create", "-q", "-f", "qcow2", layers[0].Path, "8M")
	run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", layers[0].Path)
	run("qemu-img", "create", "-q", "-f", "qcow2", "-b", layers[0].Path, "-F", "qcow2", layers[1].Path)
	run("qemu-io", "-f", "qcow2", "-c", "write 512k 1M", layers[1].Path)
	disk := catalog.Disk{ID: "d0000000", VMID: rec.ID, Device: "root", LaunchPath: layers[1].Path, ActiveLayer: "bbbbbbbb"}
	snapshot := catalog.Snapshot{ID: "s1", VMID: rec.ID, VMName: "web", Name: "one", Disks: []catalog.SnapshotDisk{{DiskID: disk.ID, Device: "root", LayerID: "aaaaaaaa"}}}
	if err := a.catalog.CommitSnapshot(ctx, catalog.Commit{Snapshot: snapshot, Layers: layers, Disks: []catalog.Disk{disk}}); err != nil {
		t.Fatal(err)
	}
	v = &vm{id: rec.ID, rec: rec}
	if err := a.reload(ctx, v); err != nil {
		t.Fatal(err)
	}
	a.vms[rec.ID] = v
	return a, v, layers
}

// measure measures a VM now.
func measure(t *testing.T, a *Agent, v *vm) *spaceReading {
	t.Helper()
	v.space.outdate()
	a.awaitSpace(t.Context(), v, time.Minute)
	r := v.space.reading()
	if r == nil {
		t.Fatal("nothing was measured")
	}
	return r
}

func TestSpaceIsReadOnce(t *testing.T) {
	a, v, layers := chained(t)
	r := measure(t, a, v)
	if got := r.snapshots["s1"]; got.Exclusive != 512<<10 || got.Shared != 512<<10 {
		t.Errorf("%+v", got)
	}
	if r.vm.Layers != 2<<20 || r.vm.Reclaimable != 512<<10 || r.vm.Incomplete {
		t.Errorf("%+v", r.vm)
	}
	view, err := a.Snapshot(t.Context(), "web/one")
	if err != nil || view.Space == nil || view.Space.Exclusive != 512<<10 {
		t.Errorf("%+v, %v", view.Space, err)
	}
	list, _ := a.VMs(t.Context())
	if len(list) != 1 || list[0].Space == nil || list[0].Space.Layers != 2<<20 {
		t.Errorf("%+v", list)
	}
	// What is known of files that do not change is taken for theirs: here it is
	// wrong, which only somebody can see who reads them.
	poison := func() {
		for key := range v.space.known {
			v.space.known[key] = 42
		}
	}
	poison()
	if r := measure(t, a, v); r.vm.Layers != 2<<20 {
		t.Errorf("files that have changed just now were not read again: %+v", r.vm)
	}
	<-time.After(stampAge + 10*time.Millisecond) // the time of a change cannot be set
	measure(t, a, v)
	poison()
	if r := measure(t, a, v); r.vm.Layers != 84 {
		t.Errorf("files that have not changed were read again: %+v", r.vm)
	}
	if err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 4M 1M", layers[1].Path).Run(); err != nil {
		t.Fatal(err)
	}
	if r := measure(t, a, v); r.vm.Layers != 42+2<<20 {
		t.Errorf("after a write to one of two: %+v", r.vm)
	}
}

// TestSpaceOfAHungFile has a layer that cannot be opened for as long as it likes.
func TestSpaceOfAHungFile(t *testing.T) {
	a, v, layers := chained(t)
	if err := os.Remove(layers[0].Path); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(layers[0].Path, 0o600); err != nil {
		t.Fatal(err)
	}
	r := measure(t, a, v)
	if !r.vm.Incomplete || len(r.snapshots) != 0 {
		t.Errorf("%+v", r)
	}
	v.space.measuring = make(chan struct{}) // a measurement that never ends
	v.space.outdate()
	began := time.Now()
	if got := a.space(t.Context(), v); got != r {
		t.Errorf("%+v", got)
	}
	if took := time.Since(began); took < spacePatience || took > 20*spacePatience {
		t.Errorf("it took %s", took)
	}
	began = time.Now()
	a.VMs(t.Context())
	if took := time.Since(began); took > spacePatience {
		t.Errorf("the list of VMs took %s", took)
	}
}
