package e2e

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// finding is one of the doctor's, as the command line shows it.
type finding struct {
	Code       string `json:"code"`
	Message    string `json:"message"`
	Repairable bool   `json:"repairable"`
	Repaired   bool   `json:"repaired"`
}

// findings are what the doctor says of a VM.
func (h *host) findings(vm string, flags ...string) []finding {
	h.t.Helper()
	r := h.run(append([]string{"doctor", vm, "-o", "json"}, flags...)...)
	var d struct {
		Findings []finding
		Skipped  string
	}
	if err := json.Unmarshal([]byte(r.stdout), &d); err != nil || d.Skipped != "" {
		h.t.Fatalf("the doctor says: %s%s (%v)\nvmsnapd's log:\n%s", r.stdout, r.stderr, err, h.log)
	}
	left := 0
	for _, f := range d.Findings {
		if !f.Repaired {
			left++
		}
	}
	if (r.code != 0) != (left > 0) {
		h.t.Errorf("exit code %d with %+v", r.code, d.Findings)
	}
	return d.Findings
}

// ailing is a stopped VM with a file that is spoilt, and healed, in many ways.
type ailing struct {
	*still
	h       *host
	launch  string
	covered snapshotDisk // of the first snapshot
	active  string
	memory  string
}

// only fails unless the doctor finds just one thing.
func (a *ailing) only(code string, repairable bool, flags ...string) {
	a.t.Helper()
	found := a.h.findings(a.name, flags...)
	if len(found) != 1 || found[0].Code != code || found[0].Repairable != repairable || found[0].Repaired {
		a.t.Errorf("want %s: %+v", code, found)
	}
}

// repaired fails unless a repair leaves nothing that is wrong.
func (a *ailing) repaired(code string) {
	a.t.Helper()
	found := a.h.findings(a.name, "--repair")
	if len(found) != 1 || found[0].Code != code || !found[0].Repaired {
		a.t.Errorf("want %s repaired: %+v", code, found)
	}
	a.healthy()
}

func (a *ailing) healthy() {
	a.t.Helper()
	if found := a.h.findings(a.name); len(found) != 0 {
		a.t.Errorf("something is left: %+v", found)
	}
}

// flag sets or lifts the immutable flag of a file.
func (a *ailing) flag(path string, on bool) {
	a.t.Helper()
	d, err := blockdev.OpenDir(filepath.Dir(path), "")
	if err != nil {
		a.t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	if err := d.SetImmutable(filepath.Base(path), on); err != nil {
		a.t.Fatal(err)
	}
}

// do fails the test for an error.
func (a *ailing) do(errs ...error) {
	a.t.Helper()
	if err := errors.Join(errs...); err != nil {
		a.t.Fatal(err)
	}
}

// spoil changes bytes of a file, and returns what puts them back.
func (a *ailing) spoil(path string, at int64, b []byte) (heal func()) {
	a.t.Helper()
	old := make([]byte, len(b))
	write := func(b []byte) {
		a.t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		a.do(err)
		_, err = f.WriteAt(b, at)
		a.do(err, f.Close())
	}
	f, err := os.Open(path)
	a.do(err)
	_, err = f.ReadAt(old, at)
	a.do(err, f.Close())
	write(b)
	return func() { write(old) }
}

// refcounts returns where an image counts the use of its first clusters.
func (a *ailing) refcounts(path string) int64 {
	a.t.Helper()
	var table, block [8]byte
	f, err := os.Open(path)
	a.do(err)
	_, err = f.ReadAt(table[:], 48)
	a.do(err)
	_, err = f.ReadAt(block[:], int64(binary.BigEndian.Uint64(table[:])))
	a.do(err, f.Close())
	return int64(binary.BigEndian.Uint64(block[:]))
}

// TestQEMUDoctorFindsAndRepairsFiles spoils the files of a stopped VM. What is
// found does not depend on QEMU's version.
func TestQEMUDoctorFindsAndRepairsFiles(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	vm := newStill(t, versions[0], "ailing", "root.qcow2")
	h := newHostOf(t, map[string]string{vm.name: vm.uuid})
	h.await(vm.name, "paused")
	vm.write(1)
	h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
	vm.write(2)
	h.must("snapshot", "create", vm.name, "two", "--memory")
	vm.kill()
	h.await(vm.name, "stopped")
	a := &ailing{still: vm, h: h, launch: vm.dir + "/root.qcow2", covered: h.snapshot(vm.name + "/one").Disks[0]}
	for _, l := range h.object("vm", "show", vm.name)["disks"].([]any)[0].(map[string]any)["layers"].([]any)[:1] {
		a.active = l.(map[string]any)["path"].(string)
	}
	a.memory = h.object("snapshot", "show", vm.name+"/two")["memory"].(map[string]any)["path"].(string)
	a.healthy()
	for name, ail := range map[string]func(*ailing){
		"layer-not-protected":   unprotected,
		"layer-missing":         missing,
		"layer-replaced":        replaced,
		"layer-damaged":         damaged,
		"layer-leaks":           leaking,
		"backing-path-wrong":    wrongBacking,
		"launch-path-elsewhere": astray,
		"orphans":               orphans,
		"memory":                spoiltMemory,
		"manifests":             spoiltManifests,
	} {
		t.Run(name, func(t *testing.T) {
			b := *a
			s := *a.still
			s.t, b.still = t, &s
			inner := *h
			inner.t, b.h = t, &inner
			ail(&b)
			b.healthy()
		})
	}
	vm.start()
	vm.holds(2, "in the end")
	vm.imageHolds(a.covered, 1, "in the end")
	h.await(vm.name, "paused")
	h.must("snapshot", "restore", vm.name+"/one")
	a.healthy() // with branches too
	vm.kill()
	h.await(vm.name, "stopped")
	a.healthy()
}

func unprotected(a *ailing) {
	a.flag(a.covered.Path, false)
	a.only("layer-not-protected", true)
	a.repaired("layer-not-protected")
	if err := os.WriteFile(a.covered.Path, nil, 0); err == nil {
		a.t.Error("the layer can be written to")
	}
}

func missing(a *ailing) {
	a.do(os.Remove(a.active)) // the launch path is another name of it
	a.only("layer-missing", true)
	a.repaired("layer-missing")
	away := filepath.Join(a.t.TempDir(), "away")
	a.flag(a.covered.Path, false)
	a.do(os.Link(a.covered.Path, a.dir+"/away"), os.Remove(a.covered.Path))
	a.only("layer-missing", true) // the file is there by another name
	a.do(os.Rename(a.dir+"/away", away))
	a.only("layer-missing", false)
	a.do(os.Rename(away, a.covered.Path))
	a.flag(a.covered.Path, true)
}

func replaced(a *ailing) {
	a.flag(a.covered.Path, false)
	away := a.covered.Path + ".away"
	a.do(os.Rename(a.covered.Path, away), os.WriteFile(a.covered.Path, []byte("x"), 0o600))
	found := a.h.findings(a.name, "--repair")
	if len(found) == 0 || found[0].Code != "layer-replaced" || found[0].Repairable {
		a.t.Errorf("another file: %+v", found)
	}
	if b, err := os.ReadFile(a.covered.Path); err != nil || string(b) != "x" {
		a.t.Errorf("the stranger was touched: %q, %v", b, err)
	}
	a.do(os.Rename(away, a.covered.Path))
	a.flag(a.covered.Path, true)
}

func damaged(a *ailing) {
	a.flag(a.covered.Path, false)
	heal := a.spoil(a.covered.Path, 0, []byte("nope"))
	a.flag(a.covered.Path, true)
	a.only("layer-damaged", false)
	a.flag(a.covered.Path, false)
	heal()
	heal = a.spoil(a.covered.Path, a.refcounts(a.covered.Path)+2, []byte{0, 0}) // a cluster in use is free
	a.flag(a.covered.Path, true)
	a.only("layer-damaged", false)
	a.flag(a.covered.Path, false)
	heal()
	a.flag(a.covered.Path, true)
}

func leaking(a *ailing) {
	a.do(os.Truncate(a.active, 1001*64<<10))
	a.spoil(a.active, a.refcounts(a.active)+2*1000, []byte{0, 1}) // a cluster that nothing uses is in use
	a.only("layer-leaks", true)
	a.repaired("layer-leaks")
}

func wrongBacking(a *ailing) {
	rebase := func(path, backing string) {
		a.t.Helper()
		img(a.t, a.q, "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, path)
	}
	rebase(a.active, "/nowhere/base.qcow2")
	a.only("backing-path-wrong", true)
	a.repaired("backing-path-wrong")
	middle := a.h.snapshot(a.name + "/two").Disks[0].Path
	a.flag(middle, false)
	rebase(middle, "/nowhere/base.qcow2")
	a.flag(middle, true)
	a.only("backing-path-wrong", true)
	a.repaired("backing-path-wrong")
	// A name that leads to another image is not certain to be wrong.
	other := filepath.Join(a.t.TempDir(), "other.qcow2")
	img(a.t, a.q, "create", "-q", "-f", "qcow2", other, "8M")
	rebase(a.active, other)
	a.only("backing-path-wrong", false)
	rebase(a.active, middle)
}

func astray(a *ailing) {
	a.do(os.Remove(a.launch))
	a.only("launch-path-elsewhere", true)
	a.repaired("launch-path-elsewhere")
	a.flag(a.covered.Path, false)
	a.do(os.Remove(a.launch), os.Link(a.covered.Path, a.launch))
	a.flag(a.covered.Path, true)
	a.only("launch-path-elsewhere", true)
	a.repaired("launch-path-elsewhere")
	a.do(os.Remove(a.launch), os.WriteFile(a.launch, []byte("somebody's"), 0o600))
	a.only("launch-path-elsewhere", false)
	a.h.findings(a.name, "--repair")
	if b, err := os.ReadFile(a.launch); err != nil || string(b) != "somebody's" {
		a.t.Errorf("the stranger was touched: %q, %v", b, err)
	}
	a.do(os.Remove(a.launch), os.Link(a.active, a.launch))
}

func orphans(a *ailing) {
	orphan, above := a.dir+"/root.0badcafe-0.qcow2", a.dir+"/mine.qcow2"
	img(a.t, a.q, "create", "-q", "-f", "qcow2", orphan, "8M")
	img(a.t, a.q, "create", "-q", "-f", "qcow2", "-b", orphan, "-F", "qcow2", above)
	a.only("layer-orphaned", false)
	a.do(os.Remove(above))
	holder := exec.Command(a.q.Tool("qemu-io"), "-f", "qcow2", orphan)
	in, err := holder.StdinPipe()
	a.do(err, holder.Start())
	a.h.eventually(10*time.Second, "a process has the orphan open", func() error {
		if used, err := blockdev.InUse(orphan); err != nil || !used {
			return fmt.Errorf("not yet: %w", err)
		}
		return nil
	})
	a.only("layer-orphaned", false)
	a.do(in.Close(), holder.Wait())
	a.flag(orphan, true)
	a.only("layer-orphaned", true)
	a.repaired("layer-orphaned")
	if _, err := os.Stat(a.dir + "/.vmsnap/quarantine/root.0badcafe-0.qcow2"); err != nil {
		a.t.Error(err)
	}
	a.do(os.Link(a.active, a.launch+".vmsnap-link"))
	a.only("name-left-behind", true)
	a.repaired("name-left-behind")
	a.do(os.Symlink(a.active, a.launch+".vmsnap-link"))
	a.only("name-left-behind", true)
	a.repaired("name-left-behind")
}

func spoiltMemory(a *ailing) {
	away := filepath.Join(a.t.TempDir(), "memory")
	a.do(os.Rename(a.memory, away))
	a.only("memory-missing", false)
	a.do(os.Rename(away, a.memory))
	info, err := os.Stat(a.memory)
	a.do(err)
	heal := a.spoil(a.memory, info.Size()/2, []byte("nope"))
	a.healthy()
	a.only("memory-altered", false, "--deep")
	heal()
	if found := a.h.findings(a.name, "--deep"); len(found) != 0 {
		a.t.Errorf("memory as it was saved: %+v", found)
	}
	a.do(os.Truncate(a.memory, info.Size()+1))
	a.only("memory-altered", false)
	a.do(os.Truncate(a.memory, info.Size()))
	a.do(os.WriteFile(a.dir+"/.vmsnap/0badcafe.mem", []byte("x"), 0o600))
	a.only("memory-orphaned", true)
	a.repaired("memory-orphaned")
	if _, err := os.Stat(a.dir + "/.vmsnap/quarantine/0badcafe.mem"); err != nil {
		a.t.Error(err)
	}
}

func spoiltManifests(a *ailing) {
	dir := a.dir + "/.vmsnap/"
	one := dir + a.h.snapshot(a.name+"/one").ID + ".json"
	a.do(os.Remove(one))
	a.only("manifest-missing", true)
	a.repaired("manifest-missing")
	data, err := os.ReadFile(one)
	a.do(err, os.WriteFile(one, []byte(strings.ReplaceAll(string(data), `"Name": "one"`, `"Name": "two"`)), 0o600))
	a.only("manifest-differs", true)
	a.repaired("manifest-differs")
	trees, err := filepath.Glob(dir + "vm-*.json")
	a.do(err)
	if len(trees) != 1 {
		a.t.Fatalf("manifests of the VM: %v", trees)
	}
	a.do(os.WriteFile(trees[0], []byte("{}"), 0o600))
	a.only("manifest-differs", true)
	a.repaired("manifest-differs")
	a.do(os.WriteFile(dir+"0badcafe.json", data, 0o600))
	a.only("manifest-orphaned", true)
	a.repaired("manifest-orphaned")
	if _, err := os.Stat(dir + "quarantine/0badcafe.json"); err != nil {
		a.t.Error(err)
	}
}
