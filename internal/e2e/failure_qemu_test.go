package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// bench is a VM behind a relay with its daemon.
type bench struct {
	*host
	vm *still
	r  *relay
}

func newBench(t *testing.T, q testvm.QEMU, name string) *bench {
	t.Helper()
	vm := newStill(t, q, name+"-"+q.Name, "root.qcow2", "data.qcow2")
	r := newRelay(t, vm.dir+"/q1")
	h := newHostOf(t, map[string]string{vm.name: vm.uuid})
	h.await(vm.name, "paused")
	return &bench{h, vm, r}
}

// qmp executes a command on the test's own monitor.
func (b *bench) qmp(command string, args any) {
	b.t.Helper()
	if err := b.vm.own.Execute(b.ctx(), command, args, nil); err != nil {
		b.t.Fatal(err)
	}
}

// occupy starts a block job that works on the disk "data" and does not end.
func (b *bench) occupy(command string) (end func()) {
	b.t.Helper()
	sub := b.vm.own.Subscribe(64, "JOB_STATUS_CHANGE")
	b.qmp("blockdev-add", map[string]any{"driver": "null-co", "node-name": "sink", "size": 8 << 20})
	b.qmp(command, map[string]any{"job-id": "nightly-backup", "device": "drive-data", "target": "sink", "sync": "full", "speed": 1})
	return func() {
		b.t.Helper()
		defer sub.Close()
		b.qmp("block-job-cancel", map[string]any{"device": "nightly-backup", "force": true})
		for {
			var e struct {
				Status string `json:"status"`
			}
			select {
			case got := <-sub.C:
				if err := got.Decode(&e); err != nil {
					b.t.Fatal(err)
				}
			case <-time.After(eventLimit):
				b.t.Fatal("the job does not end")
			}
			if e.Status == "null" {
				b.qmp("blockdev-del", map[string]any{"node-name": "sink"})
				return
			}
		}
	}
}

// refused expects that a snapshot fails and leaves everything as it was.
func (b *bench) refused(code int, words string, args ...string) {
	b.t.Helper()
	before := b.world(b.vm.own, b.vm.dir)
	b.fails(code, words, append([]string{"snapshot", "create"}, args...)...)
	b.unchanged(b.vm, "x", before, fmt.Sprint(args))
}

func sh(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func TestQEMUARefusedSnapshotChangesNothing(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "refused")
		name, dir := b.vm.name, b.vm.dir
		b.vm.write(1)
		b.refused(2, "name", name, "../x")
		b.refused(4, "no-such-vm", "no-such-vm", "x")
		b.refused(4, "nope", name, "x", "--disk", "nope", "--quiesce", "none")
		b.refused(2, "both", name, "x", "--disk", "data", "--exclude", "data")
		b.refused(5, "prelaunch", name, "x", "--quiesce", "require")
		b.refused(1, "vm-paused", name, "x", "--strict")

		sh(t, "chattr", "+i", dir)
		b.refused(7, "not permitted", name, "x", "--quiesce", "none")
		sh(t, "chattr", "-i", dir)

		sh(t, "mount", "--bind", dir, dir)
		sh(t, "mount", "-o", "remount,ro,bind", dir)
		b.refused(7, "read-only", name, "x", "--quiesce", "none")
		sh(t, "umount", dir)

		for _, command := range []string{"blockdev-backup", "blockdev-mirror"} {
			end := b.occupy(command)
			b.refused(11, "nightly-backup", name, "x", "--quiesce", "none")
			b.refused(11, "nightly-backup", name, "x", "--quiesce", "none", "--dry-run")
			end()
		}

		before := b.world(b.vm.own, dir)
		b.must("snapshot", "create", name, "x", "--quiesce", "none", "--dry-run")
		b.unchanged(b.vm, "x", before, "dry run")

		b.must("snapshot", "create", name, "x", "--quiesce", "none")
		b.vm.write(2)
		b.whole(b.vm, "x", 1, 2, "after all")
		b.fails(13, "x", "snapshot", "create", name, "x", "--quiesce", "none")
	})
}

// TestQEMUANameThatIsTaken finds files where the snapshot wants to make its
// own.
func TestQEMUANameThatIsTaken(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "taken")
		b.vm.write(1)
		for _, taken := range []string{"root.%s-0.qcow2", "root.%s-0b.qcow2", "data.%s-1.qcow2", "data.%s-1b.qcow2"} {
			g := b.r.hold("query-named-block-nodes", 1)
			c := b.create(b.vm.name, "x", "--quiesce", "none")
			g.await(b.host)
			file := filepath.Join(b.vm.dir, fmt.Sprintf(taken, b.operation(b.vm.name)))
			if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			before := b.world(b.vm.own, b.vm.dir)
			g.release(pass)
			if r := c.end(); r.code != 1 || !strings.Contains(r.stderr, "file exists") {
				t.Errorf("%s: exit code %d: %s", taken, r.code, r.stderr)
			}
			b.unchanged(b.vm, "x", before, taken)
			if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
				t.Errorf("%s holds %q: %v", taken, text, err)
			}
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		b.vm.kill()
		b.vm.start()
		b.vm.holds(1, "started again")
	})
}

func TestQEMUTheTransactionIsRefused(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "transaction")
		b.vm.write(1)
		before := b.world(b.vm.own, b.vm.dir)

		g := b.r.hold("transaction", 1)
		c := b.create(b.vm.name, "x", "--quiesce", "none")
		g.await(b.host)
		end := b.occupy("blockdev-mirror") // behind the daemon's back
		g.release(pass)
		if r := c.end(); r.code != 1 || !strings.Contains(r.stderr, "refused the cut") {
			t.Errorf("a busy node: exit code %d: %s", r.code, r.stderr)
		}
		end()
		b.unchanged(b.vm, "x", before, "a busy node")

		g = b.r.hold("transaction", 1)
		c = b.create(b.vm.name, "x", "--quiesce", "none")
		g.await(b.host)
		b.qmp("blockdev-del", map[string]any{"node-name": "vmsnap-" + b.operation(b.vm.name) + "-1"})
		g.release(pass)
		if r := c.end(); r.code != 1 || !strings.Contains(r.stderr, "refused the cut") {
			t.Errorf("a node that is gone: exit code %d: %s", r.code, r.stderr)
		}
		b.unchanged(b.vm, "x", before, "a node that is gone")
		b.next("x")
	})
}

// next takes a snapshot as if nothing had been.
func (b *bench) next(name string) {
	b.t.Helper()
	b.vm.write(7)
	b.must("snapshot", "create", b.vm.name, name, "--quiesce", "none")
	b.vm.write(8)
	b.whole(b.vm, name, 7, 8, "the next snapshot")
}

// guardPID returns the process id of the daemon's only guard of a kind.
func (b *bench) guardPID(kind string) int {
	b.t.Helper()
	for _, g := range b.guards() {
		if name, pid, _ := strings.Cut(g, " "); name == kind {
			n, err := strconv.Atoi(pid)
			if err != nil {
				b.t.Fatal(err)
			}
			return n
		}
	}
	b.t.Fatalf("no %s runs", kind)
	return 0
}

func TestQEMUTheLaunchGuardFails(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "launch-guard")
		b.vm.write(1)
		before := b.world(b.vm.own, b.vm.dir)

		g := b.r.hold("query-named-block-nodes", 1) // it cannot be started
		c := b.create(b.vm.name, "x", "--quiesce", "none")
		g.await(b.host)
		lock := b.path("state/launch-guard-" + b.operation(b.vm.name) + ".lock")
		if err := os.Mkdir(lock, 0o700); err != nil {
			t.Fatal(err)
		}
		g.release(pass)
		if r := c.end(); r.code != 1 || !strings.Contains(r.stderr, "launch guard") {
			t.Errorf("it cannot be started: exit code %d: %s", r.code, r.stderr)
		}
		if err := os.Remove(lock); err != nil {
			t.Fatal(err)
		}
		b.unchanged(b.vm, "x", before, "it cannot be started")

		m := moment{step: "cut", command: "blockdev-add", nth: 4, locked: true} // it is killed before the cut
		c, id, resume := b.stopAt(b.r, m, b.vm.name, "x", "--quiesce", "none")
		if err := syscall.Kill(b.guardPID("launch-guard"), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := b.cancel(id); err != nil {
			t.Error(err)
		}
		resume(pass)
		if r := c.end(); r.code != 130 {
			t.Errorf("killed before the cut: exit code %d: %s", r.code, r.stderr)
		}
		b.unchanged(b.vm, "x", before, "killed before the cut")

		m = moment{step: "cut", command: "transaction", nth: 1} // it is killed in the cut
		c, _, resume = b.stopAt(b.r, m, b.vm.name, "x", "--quiesce", "none")
		if err := syscall.Kill(b.guardPID("launch-guard"), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		resume(pass)
		if r := c.end(); r.code != 0 {
			t.Errorf("killed in the cut: exit code %d: %s", r.code, r.stderr)
		}
		b.vm.write(2)
		b.whole(b.vm, "x", 1, 2, "killed in the cut")
		if left := b.world(b.vm.own, b.vm.dir).State; !slices.Equal(left, before.State) {
			t.Errorf("the state directory holds %v", left)
		}
	})
}

// small moves the VM's files onto a file system of a few MiB.
func (s *still) small(size string) {
	s.t.Helper()
	s.kill()
	from := s.dir + ".away"
	if err := os.Rename(s.dir, from); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	sh(s.t, "mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", s.dir)
	s.t.Cleanup(func() {
		s.kill()
		sh(s.t, "umount", s.dir)
	})
	for _, f := range files(s.t, from) {
		sh(s.t, "cp", "--sparse=always", from+"/"+f, s.dir+"/"+f)
	}
	if err := os.RemoveAll(from); err != nil {
		s.t.Fatal(err)
	}
	s.start()
}

// fill fills a file system but for some bytes.
func fill(t *testing.T, dir string, left uint64) (free func()) {
	t.Helper()
	f, err := os.Create(dir + "/fill")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for err = syscall.ENOSPC; errors.Is(err, syscall.ENOSPC); { // a VM may write meanwhile
		var st syscall.Statfs_t
		if err := syscall.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		err = syscall.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail*uint64(st.Bsize))-int64(left))
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.Remove(f.Name()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestQEMUNoSpaceForLayers(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "space-"+q.Name, "root.qcow2", "data.qcow2")
		vm.small("40m")
		r := newRelay(t, vm.dir+"/q1")
		b := &bench{newHostOf(t, map[string]string{vm.name: vm.uuid}), vm, r}
		b.await(vm.name, "paused")
		vm.write(1)

		free := fill(t, vm.dir, 8<<20)
		b.refused(6, "free", vm.name, "x", "--quiesce", "none")
		b.refused(6, "free", vm.name, "x", "--quiesce", "none", "--dry-run")
		free()

		before := b.world(vm.own, vm.dir)
		g := r.hold("blockdev-add", 2) // the first disk is formatted, and the second is not
		c := b.create(vm.name, "x", "--quiesce", "none")
		g.await(b.host)
		free = fill(t, vm.dir, 0)
		g.release(pass)
		if got := c.end(); got.code != 6 || !strings.Contains(got.stderr, "disk data") {
			t.Errorf("full while formatting: exit code %d: %s", got.code, got.stderr)
		}
		free()
		b.unchanged(vm, "x", before, "full while formatting")
		b.next("x")
	})
}

func TestQEMUAPartialSnapshot(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "partial")
		b.vm.write(1)
		end := b.occupy("blockdev-backup")
		b.fails(3, "data", "snapshot", "create", b.vm.name, "busy", "--quiesce", "none", "--allow-partial")
		end()
		b.partial("busy", 1)

		g := b.r.hold("query-named-block-nodes", 1)
		c := b.create(b.vm.name, "taken", "--quiesce", "none", "--allow-partial")
		g.await(b.host)
		taken := filepath.Join(b.vm.dir, fmt.Sprintf("data.%s-1.qcow2", b.operation(b.vm.name)))
		if err := os.WriteFile(taken, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		g.release(pass)
		if r := c.end(); r.code != 3 || !strings.Contains(r.stderr, "file exists") {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		if err := os.Remove(taken); err != nil {
			t.Fatal(err)
		}
		b.partial("taken", 1)
		b.next("all")
		b.vm.kill()
		b.vm.start()
		b.vm.holds(8, "started again")
	})
}

// partial verifies a snapshot that lacks the disk "data", which has no new layer.
func (b *bench) partial(name string, content int) {
	b.t.Helper()
	s := b.snapshot(b.vm.name + "/" + name)
	if !s.Partial || !slices.ContainsFunc(s.Warnings, func(w struct {
		Code string `json:"code"`
		Disk string `json:"disk"`
	}) bool {
		return w.Code == "disk-dropped" && w.Disk == "data"
	}) {
		b.t.Errorf("snapshot %+v", s)
	}
	for _, d := range s.Disks {
		if d.Excluded != (d.Device == "data") {
			b.t.Errorf("disk %+v", d)
		}
		if !d.Excluded {
			b.vm.imageHolds(d, content, name)
		}
	}
	if left, err := filepath.Glob(b.vm.dir + "/data.*.qcow2"); err != nil || len(left) > 0 {
		b.t.Errorf("%v, %v", left, err)
	}
	b.vm.holds(content, name)
	b.noOrphans(b.vm, name)
}

// TestQEMUTheStateDirectoryIsFull fills the catalog's file system before a
// snapshot, within it, and after its cut.
func TestQEMUTheStateDirectoryIsFull(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "state")
		state := b.path("state")
		b.signal(syscall.SIGTERM)
		if err := os.RemoveAll(state); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(state, 0o700); err != nil {
			t.Fatal(err)
		}
		sh(t, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", state)
		t.Cleanup(func() { b.end(); sh(t, "umount", state) })
		b.start()
		b.await(b.vm.name, "paused")
		b.vm.write(1)
		before := b.world(b.vm.own, b.vm.dir)

		free := fill(t, state, 0)
		b.fails(6, "", "snapshot", "create", b.vm.name, "x", "--quiesce", "none")
		free()
		b.unchanged(b.vm, "x", before, "full before")

		m := moment{step: "overlays", command: "blockdev-add", nth: 4}
		c, _, resume := b.stopAt(b.r, m, b.vm.name, "x", "--quiesce", "none")
		free = fill(t, state, 0)
		resume(pass)
		if r := c.end(); r.code != 6 {
			t.Errorf("full within: exit code %d: %s", r.code, r.stderr)
		}
		free()
		b.must("snapshot", "create", b.vm.name, "y", "--quiesce", "none") // which records the end of the one before
		b.vm.write(2)
		b.whole(b.vm, "y", 1, 2, "full within")

		g := b.r.hold("transaction", 1)
		c = b.create(b.vm.name, "z", "--quiesce", "none")
		g.await(b.host)
		free = fill(t, state, 0)
		g.release(pass)
		b.awaitStep(b.operation(b.vm.name), "commit")
		free()
		if r := c.end(); r.code != 0 {
			t.Errorf("full at the commit: exit code %d: %s", r.code, r.stderr)
		}
		b.vm.write(3)
		b.whole(b.vm, "z", 2, 3, "full at the commit")

		b.signal(syscall.SIGTERM)
		free = fill(t, state, 0)
		out, err := exec.Command(b.daemon.Path, b.daemon.Args[1:]...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "no space is left") {
			t.Errorf("full at the start: %v\n%s", err, out)
		}
		free()
		b.start()
		b.await(b.vm.name, "paused")
		b.next("started")
	})
}
