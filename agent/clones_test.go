package agent

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// TestClonesKeepLayers sees what becomes of a restore point that clones lie on:
// it stays for as long as one does, or may do so.
func TestClonesKeepLayers(t *testing.T) {
	dir := t.TempDir()
	cat, err := catalog.Open(t.Context(), dir+"/state", hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cat.Close() })
	a := &Agent{catalog: cat, log: hclog.NewNullLogger()}
	vm, err := cat.UpsertVM(t.Context(), catalog.VM{Name: "web", Identity: "name:web", FirstSeen: time.Now(), LastSeen: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	base := catalog.Layer{ID: "aa", DiskID: "d1", Path: dir + "/root.aa.qcow2", Format: "qcow2", Covered: true}
	s := catalog.Snapshot{ID: "s1", VMID: vm.ID, VMName: "web", Name: "golden",
		Disks: []catalog.SnapshotDisk{{DiskID: "d1", Device: "root", LayerID: "aa"}, {Device: "data", Excluded: true}}}
	err = cat.CommitSnapshot(t.Context(), catalog.Commit{
		Snapshot: s, Layers: []catalog.Layer{base}, Disks: []catalog.Disk{{ID: "d1", VMID: vm.ID, Device: "root"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.checkDeletable(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	clone := func(name, backing string) {
		t.Helper()
		path := dir + "/" + name
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2", path, "1M").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		file, err := fileAt(path)
		if err != nil {
			t.Fatal(err)
		}
		err = a.putClones(t.Context(), []catalog.Clone{{Path: path, LayerID: "aa", Dev: file.Dev, Ino: file.Ino, Created: time.Now()}})
		if err != nil {
			t.Fatal(err)
		}
	}
	clone("linked", base.Path)
	clone("moved", base.Path)
	clone("elsewhere", dir+"/other.qcow2") // as after somebody has rebased it
	if err := os.Rename(dir+"/moved", dir+"/moved-away"); err != nil {
		t.Fatal(err)
	}
	err = a.checkDeletable(t.Context(), s)
	if fault.Of(err) != fault.HasDependants || !strings.Contains(err.Error(), "linked") || !strings.Contains(err.Error(), "moved (missing)") ||
		strings.Contains(err.Error(), "elsewhere") {
		t.Errorf("with clones: %v", err)
	}
	if err := cat.DeleteSnapshot(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	if err := cat.DeleteLayer(t.Context(), "aa"); fault.Of(err) != fault.HasDependants {
		t.Errorf("the catalog lets the layer go: %v", err)
	}
	if err := a.ForgetClone(t.Context(), dir+"/linked"); fault.Of(err) != fault.HasDependants {
		t.Errorf("one that is there was forgotten: %v", err)
	}
	if err := errors.Join(os.Remove(dir+"/linked"), a.ForgetClone(t.Context(), dir+"/linked"), a.ForgetClone(t.Context(), dir+"/moved")); err != nil {
		t.Error(err)
	}
	if left, err := a.clonesOn(t.Context(), "aa"); err != nil || !slices.Equal(left, nil) {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := cat.DeleteLayer(t.Context(), "aa"); err != nil {
		t.Error(err)
	}
}

func TestTemplatesStay(t *testing.T) {
	s := catalog.Snapshot{ID: "s1", VMName: "web", Name: "golden", Template: true}
	if err := (&Agent{}).checkDeletable(t.Context(), s); fault.Of(err) != fault.Denied {
		t.Errorf("a template: %v", err)
	}
}
