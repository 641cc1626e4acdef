package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// imgGate is a qemu-img for the daemon that waits before a command for as long as
// the test wants it to.
type imgGate struct {
	t   *testing.T
	dir string
}

// newImgGate makes the daemon, which is yet to be started, use a version's own
// qemu-img.
func newImgGate(t *testing.T, q testvm.QEMU, h *host) imgGate {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf(`#!/bin/sh
if [ -e %[1]s/hold-$1 ]; then : > %[1]s/reached-$1; while [ -e %[1]s/hold-$1 ]; do sleep 0.02; done; fi
exec %[2]s "$@"
`, dir, q.Img)
	if err := os.WriteFile(dir+"/qemu-img", []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	h.env = append(h.env, "PATH="+dir+":"+os.Getenv("PATH"))
	return imgGate{t, dir}
}

// hold makes the next command of a name wait.
func (g imgGate) hold(command string) {
	g.t.Helper()
	_ = os.Remove(g.dir + "/reached-" + command)
	if err := os.WriteFile(g.dir+"/hold-"+command, nil, 0o600); err != nil {
		g.t.Fatal(err)
	}
}

// await waits until a command waits.
func (g imgGate) await(h *host, command string) {
	h.eventually(eventLimit, "qemu-img "+command, func() error {
		_, err := os.Stat(g.dir + "/reached-" + command)
		return err
	})
}

func (g imgGate) release(command string) {
	g.t.Helper()
	if err := os.Remove(g.dir + "/hold-" + command); err != nil {
		g.t.Fatal(err)
	}
}

// gatedHost starts a daemon that manages a VM, with a qemu-img that can be held.
func gatedHost(t *testing.T, q testvm.QEMU, vm *still, flags ...string) (*host, imgGate) {
	t.Helper()
	h := prepareHost(t, flags...)
	g := newImgGate(t, q, h)
	h.list(vm.name, vm.uuid)
	h.start()
	t.Cleanup(h.end)
	h.await(vm.name, "paused")
	return h, g
}

// TestQEMUExport makes standalone images of a running and of a stopped VM's
// snapshots.
func TestQEMUExport(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "export-"+q.Name, "root.qcow2", "data.raw")
		h, _ := gatedHost(t, q, vm)
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		vm.write(2)
		h.must("snapshot", "create", vm.name, "two", "--quiesce", "none")
		vm.write(3)
		out := t.TempDir()
		exported := func(disk, snapshot, format string, value int, flags ...string) {
			t.Helper()
			path := filepath.Join(out, fmt.Sprintf("%s-%s-%d.%s", disk, snapshot, len(files(t, out)), format))
			h.must(append([]string{"snapshot", "export", vm.name + "/" + snapshot, path, "--disk", disk, "--format", format}, flags...)...)
			vm.isStandalone(path, format, value)
			if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
				t.Errorf("%s has the mode %v, %v", path, fi.Mode(), err)
			}
		}
		for _, disk := range []string{"root", "data"} {
			exported(disk, "one", "qcow2", 1)
			exported(disk, "two", "raw", 2)
			exported(disk, "two", "qcow2", 2, "--compress")
		}
		vm.holds(3, "after exports")
		vm.kill()
		h.await(vm.name, "stopped")
		h.eventually(eventLimit, "it is settled", func() error {
			now, err := h.vm(vm.name)
			for _, d := range now.GetDisks() {
				if d.GetSettleNeeded() {
					err = fmt.Errorf("%s is not", d.GetDevice())
				}
			}
			return errors.Join(err, h.idle())
		})
		exported("root", "two", "raw", 2)
		exported("data", "one", "qcow2", 1)
		for _, f := range everything(t, out) {
			if strings.Contains(f, "partial") {
				t.Errorf("left behind: %s", f)
			}
		}
		vm.check("in the end")
	})
}

// isStandalone fails unless a file is a sparse image of 8 MiB that
// depends on nothing and holds a value.
func (s *still) isStandalone(path, format string, value int) {
	s.t.Helper()
	s.imageHolds(snapshotDisk{Path: path, Format: format}, value, path)
	info, err := blockdev.StatPath(path)
	if err != nil {
		s.t.Fatal(err)
	}
	if info.Allocated > 1<<20 {
		s.t.Errorf("%s takes %d bytes", path, info.Allocated)
	}
	if format == "raw" {
		if info.Size != 8<<20 {
			s.t.Errorf("%s has %d bytes", path, info.Size)
		}
		return
	}
	if out, err := exec.Command(s.q.Img, "check", "-q", "-f", "qcow2", path).CombinedOutput(); err != nil {
		s.t.Errorf("qemu-img check %s: %v\n%s", path, err, out)
	}
	if h, err := blockdev.ReadHeaderFile(path); err != nil || h.Backing != "" || h.VirtualSize != 8<<20 {
		s.t.Errorf("%s: %+v, %v", path, h, err)
	}
}

// TestQEMUExportEnds cancels exports, kills the daemon in the middle of them, and
// has the copy altered before it is verified.
func TestQEMUExportEnds(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "exportends-"+q.Name, "root.qcow2")
		h, gate := gatedHost(t, q, vm)
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		out := t.TempDir()
		for _, command := range []string{"convert", "compare"} {
			gate.hold(command)
			c := h.meanwhile("snapshot", "export", vm.name+"/one", out+"/a.raw", "--format", "raw")
			gate.await(h, command)
			if err := h.cancel(h.operation(vm.name)); err != nil {
				t.Error(err)
			}
			c.end()
			if c.code != 130 {
				t.Errorf("cancelled at %s: exit code %d: %s", command, c.code, c.stderr)
			}
			gate.release(command)
			h.leftNothing(out, "cancelled at "+command)

			gate.hold(command)
			c = h.meanwhile("snapshot", "export", vm.name+"/one", out+"/a.raw", "--format", "raw")
			gate.await(h, command)
			h.signal(syscall.SIGKILL)
			gate.release(command)
			h.start()
			h.eventually(eventLimit, "recovery ends", h.idle)
			c.end()
			if c.code != 1 {
				t.Errorf("killed at %s: exit code %d: %s", command, c.code, c.stderr)
			}
			h.leftNothing(out, "killed at "+command)
		}

		gate.hold("compare")
		c := h.meanwhile("snapshot", "export", vm.name+"/one", out+"/a.raw", "--format", "raw")
		gate.await(h, "compare")
		f, err := os.OpenFile(h.only(out), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("x"), 4096); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		gate.release("compare")
		c.end()
		if c.code != 1 || !strings.Contains(c.stderr, "differs") {
			t.Errorf("altered: exit code %d: %s", c.code, c.stderr)
		}
		h.leftNothing(out, "altered")
	})
}

// everything returns the names in a directory.
func everything(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// only returns the path of the only file of a directory.
func (h *host) only(dir string) string {
	h.t.Helper()
	all := everything(h.t, dir)
	if len(all) != 1 {
		h.t.Fatalf("%s holds %v\nvmsnapd's log:\n%s", dir, all, h.log)
	}
	return filepath.Join(dir, all[0])
}

// leftNothing fails unless a directory is empty.
func (h *host) leftNothing(dir, when string) {
	h.t.Helper()
	if left := everything(h.t, dir); len(left) > 0 {
		h.t.Errorf("%s: left behind: %v\nvmsnapd's log:\n%s", when, left, h.log)
	}
}

// TestQEMUExportPlaces exports to places where nobody should, or may.
func TestQEMUExportPlaces(t *testing.T) {
	const admin, group = 65531, 65534
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	q := versions[0]
	vm := newStill(t, q, "exportplaces", "root.qcow2")
	h, gate := gatedHost(t, q, vm, "--socket-group", "nogroup", "--admins", "nogroup")
	h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
	dir, err := os.MkdirTemp("", "vs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, c := range []struct {
		name string
		uid  int
		mode os.FileMode
	}{{"", 0, 0o755}, {"own", admin, 0o700}, {"roots", 0, 0o755}, {"closed", 0, 0o700}, {"closed/own", admin, 0o700}, {"shared", 0, 0o777}} {
		path := filepath.Join(dir, c.name)
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, c.uid, group); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range [][2]string{{dir + "/roots", dir + "/own/link"}, {"/etc/passwd", dir + "/own/passwd"}, {dir + "/own/nowhere", dir + "/own/dangling"}} {
		if err := os.Symlink(link[0], link[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/own/taken", []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, words string
		code        string
	}{
		{"/own/taken", "is there already", "ALREADY_EXISTS"},
		{"/own/passwd", "is there already", "ALREADY_EXISTS"},
		{"/own/dangling", "is there already", "ALREADY_EXISTS"},
		{"/own/link/a", "is a symbolic link", "PERMISSION_DENIED"},
		{"/roots/a", "may not make files in", "PERMISSION_DENIED"},
		{"/closed/own/a", "may not search", "PERMISSION_DENIED"},
		{"/own/none/a", "there is no directory", "NOT_FOUND"},
		{"/own/taken/a", "is not a directory", "INVALID_ARGUMENT"},
		{"/own/../roots/a", "plain path", "INVALID_ARGUMENT"},
	} {
		r := h.exportAs(t, admin, group, vm.name+"/one", dir+c.path)
		if !strings.Contains(r, c.words) {
			t.Errorf("%s: %q is not in %s", c.path, c.words, r)
		}
	}
	// A name that comes to lead elsewhere while the copy is made is not followed.
	gate.hold("convert")
	c := h.meanwhile("snapshot", "export", vm.name+"/one", dir+"/shared/a")
	gate.await(h, "convert")
	partial := h.only(dir + "/shared")
	if err := os.Remove(partial); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir+"/own/taken", partial); err != nil {
		t.Fatal(err)
	}
	gate.release("convert")
	c.end()
	if c.code != 1 || !strings.Contains(c.stderr, "not the file") {
		t.Errorf("exchanged: exit code %d: %s", c.code, c.stderr)
	}
	if b, err := os.ReadFile(dir + "/own/taken"); err != nil || string(b) != "mine" {
		t.Errorf("somebody's file holds %q, %v", b, err)
	}

	if r := h.strangers()(admin, group, "snapshot", "export", vm.name+"/one", dir+"/own/a.qcow2"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	fi, err := os.Stat(dir + "/own/a.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); st.Uid != admin || st.Gid != group || fi.Mode() != 0o600 {
		t.Errorf("the export is of uid %d, gid %d, mode %v", st.Uid, st.Gid, fi.Mode())
	}
	if want, got := "a.qcow2 dangling link passwd taken", strings.Join(everything(t, dir+"/own"), " "); got != want {
		t.Errorf("there are %s, want %s", got, want)
	}
}

// exportAs asks for an export as a user, past the command line's own checks, and
// returns what became of it.
func (h *host) exportAs(t *testing.T, uid, gid uint32, snapshot, path string) string {
	t.Helper()
	h.strangers()
	cmd := exec.CommandContext(h.ctx(), "curl", "-sS", "--unix-socket", h.socket, "-H", "Content-Type: application/json",
		"-d", fmt.Sprintf(`{"snapshot":%q,"path":%q}`, snapshot, path), "http://vmsnapd/vmsnap.v1.SnapshotService/ExportSnapshot")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("curl: %v: %s", err, out)
	}
	h.eventually(eventLimit, "the export ends", h.idle)
	if !strings.Contains(string(out), `"operation"`) {
		return string(out)
	}
	return h.must("operation", "list", "-o", "json")
}
