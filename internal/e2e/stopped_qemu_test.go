package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// TestQEMUAShutDownGuestIsOffline tells a shutdown from a kill.
func TestQEMUAShutDownGuestIsOffline(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{{Name: "root"}, {Name: "data", Format: testvm.Raw}}})
		h := newHost(t, g)
		put(t, g, "file", "at the shutdown")
		if err := g.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.await(g.Name, "stopped")
		h.must("snapshot", "create", g.Name, "offline", "--quiesce", "require")
		if s := h.snapshot(g.Name + "/offline"); s.Consistency != "offline" || len(s.Disks) != 2 {
			t.Errorf("snapshot %+v", s)
		}
		if err := g.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.await(g.Name, "running")
		h.guestHolds(g, "at the shutdown")
		put(t, g, "file", "at the kill")
		g.Kill()
		h.await(g.Name, "stopped")
		h.fails(5, "nobody saw its guest shut down", "snapshot", "create", g.Name, "x", "--quiesce", "require")
		h.must("snapshot", "create", g.Name, "crash")
		if s := h.snapshot(g.Name + "/crash"); s.Consistency != "crash" || s.Quiesce.Reason == "" {
			t.Errorf("snapshot %+v", s)
		}
		for name, want := range map[string]string{"offline": "at the shutdown", "crash": "at the kill"} {
			for _, d := range h.snapshot(g.Name + "/" + name).Disks {
				checkImage(t, q, d.Path)
				image := raw(t, q, d)
				if name == "offline" {
					clean(t, image)
				} else {
					recovered(t, image)
				}
				if got := inImage(t, image, "file"); got != want {
					t.Errorf("%s: %s holds %q", name, d.Device, got)
				}
			}
		}
		if err := g.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.guestHolds(g, "at the kill")
		thawed(t, g)
	})
}

// guestHolds verifies a file in each file system, from inside.
func (h *host) guestHolds(g *testvm.Guest, want string) {
	h.t.Helper()
	for _, d := range g.Disks() {
		if got, err := g.ReadFile(h.ctx(), testvm.Mountpoint(d.Name)+"/file"); err != nil || string(got) != want {
			h.t.Errorf("%s holds %q, %v", d.Name, got, err)
		}
	}
}

// TestQEMUSnapshotsOfAStoppedVM mixes them with those of the running one.
func TestQEMUSnapshotsOfAStoppedVM(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "stopped-"+q.Name, "root.qcow2", "data.raw")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		covered := ledger{}
		for round := 1; round <= 4; round++ {
			when := fmt.Sprint("round ", round)
			h.await(vm.name, "paused")
			vm.write(3 * round)
			h.must("snapshot", "create", vm.name, fmt.Sprint("live", round), "--quiesce", "none")
			covered.cover(t, h.snapshot(fmt.Sprintf("%s/live%d", vm.name, round)))
			vm.write(3*round + 1)
			vm.kill()
			h.await(vm.name, "stopped")
			h.settledRaw(vm, when)
			h.must("snapshot", "create", vm.name, fmt.Sprint("stopped", round))
			covered.cover(t, h.snapshot(fmt.Sprintf("%s/stopped%d", vm.name, round)))
			vm.start()
			vm.holds(3*round+1, when)
		}
		h.await(vm.name, "paused")
		covered.verify(t, q)
		for round := 1; round <= 4; round++ {
			for i, name := range []string{"live", "stopped"} {
				for _, d := range h.snapshot(fmt.Sprintf("%s/%s%d", vm.name, name, round)).Disks {
					vm.imageHolds(d, 3*round+i, name)
				}
			}
		}
		vm.check("in the end")
		h.accounted(vm, "in the end")
	})
}

// stopAtCall stops the daemon as it enters a system call for the first time, and
// returns once it stands.
func (h *host) stopAtCall(call string, during func()) (resume func()) {
	h.t.Helper()
	log := filepath.Join(h.t.TempDir(), "calls")
	tracer := exec.Command("strace", "-f", "-b", "execve", "-q", "-o", log, "-e", "trace="+call,
		"-e", "inject="+call+":signal=SIGSTOP:when=1", "-p", fmt.Sprint(h.daemon.Process.Pid))
	if err := tracer.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.traced()
	during()
	h.eventually(eventLimit, "the daemon stands at "+call, func() error {
		b, err := os.ReadFile(log)
		if err == nil && !strings.Contains(string(b), "stopped by SIGSTOP") {
			err = errors.New("it goes on")
		}
		return err
	})
	_ = tracer.Process.Signal(syscall.SIGINT)
	_ = tracer.Wait()
	return func() { h.signal(syscall.SIGCONT) }
}

// TestQEMUAStartWhileDisksAreChanged starts the VM at moments of a snapshot of
// its disks, and of a conversion.
func TestQEMUAStartWhileDisksAreChanged(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, file := range []string{"root.qcow2", "root.raw"} {
			vm := newStill(t, q, "early-"+q.Name, file)
			h := newHostOf(t, map[string]string{vm.name: vm.uuid})
			h.await(vm.name, "paused")
			for i, call := range []string{"linkat", "renameat", "ioctl"} {
				when, name := fmt.Sprintf("%s, at %s", file, call), fmt.Sprint("s", i)
				vm.write(i + 1)
				vm.kill()
				h.await(vm.name, "stopped")
				var c *creation
				resume := h.stopAtCall(call, func() { c = h.create(vm.name, name) })
				came := vm.tooEarly(i+1, when)
				if came && call == "linkat" { // later it starts on the overlay

					t.Errorf("%s: the VM has started", when)
				}
				resume()
				if r := c.end(); r.code != 0 && (!came || r.code != 11) {
					t.Errorf("%s: exit code %d: %s", when, r.code, r.stderr)
				}
				h.settledRaw(vm, when)
				if !came {
					vm.start()
				}
				vm.holds(i+1, when)
				h.await(vm.name, "paused")
				for _, d := range h.snapshot(vm.name + "/" + name).Disks {
					vm.imageHolds(d, i+1, when)
				}
				vm.check(when)
				h.accounted(vm, when)
			}
		}
	})
}

// TestQEMUSomebodyElseHasTheImage has an image of a stopped VM open for writing.
func TestQEMUSomebodyElseHasTheImage(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "busy-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "first", "--quiesce", "none")
		vm.write(2)
		vm.kill()
		h.await(vm.name, "stopped")
		other := exec.Command(q.Tool("qemu-io"), "-f", "qcow2", vm.dir+"/data.qcow2")
		in, err := other.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := other.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := other.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 9)); err != nil { // its prompt: it has the image open
			t.Fatal(err)
		}
		before := h.world(nil, vm.dir)
		h.fails(11, "in use by another process", "snapshot", "create", vm.name, "x")
		h.unchanged(vm, "x", before, "in use")
		_ = in.Close()
		_ = other.Wait()
		h.must("snapshot", "create", vm.name, "x")
		vm.start()
		vm.holds(2, "in the end")
		vm.check("in the end")
	})
}

// TestQEMUALaunchPathOfAnother finds a file of somebody else under the launch
// path, which is neither used nor replaced.
func TestQEMUALaunchPathOfAnother(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "replaced-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		launch := vm.dir + "/root.qcow2"
		replace := func() (hash string) {
			sh(t, "mv", launch, vm.dir+"/was")
			img(t, q, "create", "-q", "-f", "qcow2", launch, "8M")
			return sha256sum(t, launch)
		}
		putBack := func() { sh(t, "mv", vm.dir+"/was", launch) }
		refused := func(when string) {
			t.Helper()
			hash := replace()
			before := h.world(vm.session(), vm.dir)
			h.fails(14, launch, "snapshot", "create", vm.name, "x", "--quiesce", "none")
			h.unchanged(vm, "x", before, when)
			if sha256sum(t, launch) != hash {
				t.Errorf("%s: the file was touched", when)
			}
			putBack()
		}
		vm.write(1)
		refused("running, no layer was covered")
		h.must("snapshot", "create", vm.name, "first", "--quiesce", "none")
		vm.write(2)
		refused("running")
		vm.kill()
		h.await(vm.name, "stopped")
		refused("stopped")
		h.must("snapshot", "create", vm.name, "x")

		base := h.snapshot(vm.name + "/first").Disks[0].Path
		sh(t, "chattr", "-i", base)
		sh(t, "mv", base, vm.dir+"/lost")
		before := h.world(nil, vm.dir)
		h.fails(1, base, "snapshot", "create", vm.name, "y")
		h.unchanged(vm, "y", before, "a layer is missing")
		sh(t, "mv", vm.dir+"/lost", base)
		h.must("snapshot", "create", vm.name, "y")
		vm.start()
		vm.holds(2, "in the end")
		vm.check("in the end")
	})
}

// session is the test's monitor, nil while the VM is stopped.
func (s *still) session() *monitor.Session {
	if s.cmd == nil {
		return nil
	}
	return s.own
}

// TestQEMUALaunchPathOfAnotherInAConversion is found when the VM has stopped.
func TestQEMUALaunchPathOfAnotherInAConversion(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "replacedraw-"+q.Name, "root.raw")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "first", "--quiesce", "none")
		vm.write(2)
		launch, base := vm.dir+"/root.raw", h.snapshot(vm.name + "/first").Disks[0].Path
		h.signal(syscall.SIGSTOP)
		vm.kill()
		sh(t, "chattr", "-i", base)
		sh(t, "mv", launch, vm.dir+"/was")
		if err := os.WriteFile(launch, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		sh(t, "chattr", "+i", base)
		h.signal(syscall.SIGCONT)
		h.eventually(eventLimit, "the conversion is refused", func() error {
			if out := h.must("operation", "list", "-o", "json"); !strings.Contains(out, "leads to another file") {
				return errors.New(out)
			}
			return h.idle()
		})
		if b, err := os.ReadFile(launch); err != nil || string(b) != "precious" {
			t.Errorf("the file holds %q, %v", b, err)
		}
		h.fails(11, "not settled", "snapshot", "create", vm.name, "x")
		h.fails(11, "does not lead to its newest layer", "vm", "forget", vm.name)
		sh(t, "chattr", "-i", base)
		sh(t, "mv", vm.dir+"/was", launch)
		sh(t, "chattr", "+i", base)
		h.signal(syscall.SIGTERM)
		h.start()
		h.settledRaw(vm, "put back")
		vm.start()
		vm.holds(2, "put back")
		h.await(vm.name, "paused")
		h.accounted(vm, "put back")
	})
}

// TestQEMUALaunchPathThatIsALink settles the file that the link leads to.
func TestQEMUALaunchPathThatIsALink(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "link-"+q.Name, "root.qcow2")
		vm.kill()
		images := vm.dir + "/images"
		sh(t, "mkdir", images)
		sh(t, "mv", vm.dir+"/root.qcow2", images+"/real.qcow2")
		sh(t, "ln", "-s", "images/real.qcow2", vm.dir+"/root.qcow2")
		vm.start()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		for i := 1; i < 8; i += 2 {
			when := fmt.Sprint("snapshot ", i)
			h.await(vm.name, "paused")
			vm.write(i)
			if i == 5 {
				vm.kill()
				h.await(vm.name, "stopped")
			}
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", i), "--quiesce", "none")
			if i == 5 {
				vm.start()
			}
			vm.write(i + 1)
			vm.kill()
			vm.start()
			vm.holds(i+1, when)
			if to, err := os.Readlink(vm.dir + "/root.qcow2"); err != nil || to != "images/real.qcow2" {
				t.Errorf("%s: the link leads to %s, %v", when, to, err)
			}
		}
		h.await(vm.name, "paused")
		for i := 1; i < 8; i += 2 {
			for _, d := range h.snapshot(fmt.Sprintf("%s/s%d", vm.name, i)).Disks {
				vm.imageHolds(d, i, fmt.Sprint("snapshot ", i))
				if filepath.Dir(d.Path) != images {
					t.Errorf("the layer %s is not beside the image", d.Path)
				}
			}
		}
	})
}

// TestQEMUAMovedLaunchPath gives a VM another launch command.
func TestQEMUAMovedLaunchPath(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "moved-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		move := func(from, to string) {
			vm.kill()
			sh(t, "mv", vm.dir+"/"+from, vm.dir+"/"+to)
			for i, a := range vm.args {
				vm.args[i] = strings.Replace(a, "file="+vm.dir+"/"+from+",", "file="+vm.dir+"/"+to+",", 1)
			}
			vm.start()
		}
		h.await(vm.name, "paused")
		sh(t, "mkdir", vm.dir+"/images")
		move("root.qcow2", "images/other.qcow2") // as long as it has no other layer
		h.await(vm.name, "paused")
		move("images/other.qcow2", "root.qcow2")
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "first", "--quiesce", "none")
		vm.write(2)
		move("root.qcow2", "web.qcow2") // in its directory
		vm.holds(2, "renamed")
		h.await(vm.name, "paused")
		h.must("snapshot", "create", vm.name, "second", "--quiesce", "none")
		vm.write(3)
		vm.kill()
		vm.start()
		vm.holds(3, "renamed, and started again")
		h.await(vm.name, "paused")
		h.accounted(vm, "renamed")

		sh(t, "mkdir", vm.dir+"/elsewhere")
		vm.further = []string{vm.dir + "/elsewhere"}
		move("web.qcow2", "elsewhere/web.qcow2")
		h.await(vm.name, "paused")
		for i := 4; i < 7; i++ { // its layers stay where they are
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", i), "--quiesce", "none")
			vm.write(i)
			vm.kill()
			vm.start()
			vm.holds(i, "moved elsewhere, and started again")
			leadsTo(t, vm.dir+"/elsewhere/web.qcow2", vm.dir, "moved elsewhere")
			h.await(vm.name, "paused")
		}
		vm.check("moved")
		h.accounted(vm, "moved elsewhere")
	})
}

// TestQEMUAForgottenVM is one that was never seen.
func TestQEMUAForgottenVM(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, release := range []bool{false, true} {
			vm := newStill(t, q, fmt.Sprintf("forgotten-%v-%s", release, q.Name), "root.qcow2")
			h := newHostOf(t, map[string]string{vm.name: vm.uuid})
			for i := 1; i < 4; i++ {
				h.await(vm.name, "paused")
				vm.write(i)
				h.must("snapshot", "create", vm.name, fmt.Sprint("s", i), "--quiesce", "none")
			}
			h.fails(11, "is running", "vm", "forget", vm.name)
			layers := h.disksOf(vm.name)["root"].Layers
			vm.write(4)
			vm.kill()
			h.await(vm.name, "stopped")
			args := []string{"vm", "forget", vm.name, "-o", "name"}
			if release {
				args = append(args, "--release")
			}
			left := strings.Fields(h.must(args...))
			for _, l := range layers {
				if !slices.Contains(left, l.Path) {
					t.Errorf("%s is not among the layers left: %v", l.Path, left)
				}
				if _, immutable := fileOf(t, l.Path); immutable != (!release && l.Immutable) {
					t.Errorf("release %v: %s is immutable: %v", release, l.Path, immutable)
				}
			}
			h.fails(4, "", "vm", "show", vm.name)
			h.fails(4, "", "snapshot", "show", vm.name+"/s1")
			vm.start()
			vm.holds(4, "forgotten")
			h.await(vm.name, "paused")
			for i, l := range h.disksOf(vm.name)["root"].Layers {
				if l.Foreign != (i > 0) {
					t.Errorf("layer %d: %+v", i, l)
				}
			}
			h.must("snapshot", "create", vm.name, "s1", "--quiesce", "none")
			vm.write(5)
			vm.kill()
			vm.start()
			vm.holds(5, "snapshotted again")
			vm.imageHolds(h.snapshot(vm.name + "/s1").Disks[0], 4, "the snapshot after")
			vm.check("forgotten")
		}
	})
}
