package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// ledger remembers the hash of each layer from when it was covered.
type ledger map[string]string

// cover adds the layers of a snapshot.
func (l ledger) cover(t *testing.T, s shown) {
	t.Helper()
	for _, d := range s.Disks {
		if fi, err := os.Stat(d.Path); err == nil && fi.Mode()&os.ModeDevice != 0 {
			readOnly(t, d.Path, true, s.Name) // until it gets a file
			continue
		}
		if _, immutable := fileOf(t, d.Path); !immutable {
			t.Errorf("%s: %s is not immutable", s.Name, d.Path)
		}
		l[d.Path] = sha256sum(t, d.Path)
	}
}

// verify expects every covered layer to be what it was.
func (l ledger) verify(t *testing.T, q testvm.QEMU) {
	t.Helper()
	for path, hash := range l {
		checkImage(t, q, path)
		if now := sha256sum(t, path); now != hash {
			t.Errorf("the covered layer %s has changed", path)
		}
	}
}

// TestQEMUCoveredLayersNeverChange snapshots, writes, kills and starts again by
// the unchanged command line, ten times over.
func TestQEMUCoveredLayersNeverChange(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "covered-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		covered := ledger{}
		for round := 1; round <= 10; round++ {
			h.await(vm.name, "paused")
			vm.write(2 * round)
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", round), "--quiesce", "none")
			covered.cover(t, h.snapshot(fmt.Sprintf("%s/s%d", vm.name, round)))
			vm.write(2*round + 1)
			vm.kill()
			vm.start()
			vm.holds(2*round+1, fmt.Sprint("round ", round))
		}
		h.await(vm.name, "paused")
		if len(covered) != 20 {
			t.Errorf("%d layers were covered", len(covered))
		}
		covered.verify(t, q)
		for round := 1; round <= 10; round++ {
			for _, d := range h.snapshot(fmt.Sprintf("%s/s%d", vm.name, round)).Disks {
				vm.imageHolds(d, 2*round, fmt.Sprint("the snapshot of round ", round))
			}
		}
		vm.check("in the end")
		for id, d := range h.disksOf(vm.name) {
			if len(d.Layers) != 11 {
				t.Errorf("disk %s has %d layers", id, len(d.Layers))
			}
		}
		h.noOrphans(vm, "in the end")
	})
}

// TestQEMUARestartedGuestIsTheNewest kills a guest that writes.
func TestQEMUARestartedGuestIsTheNewest(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := newHost(t, g)
		covered := ledger{}
		for round := range 2 {
			before, after := fmt.Sprint("before ", round), fmt.Sprint("after ", round)
			put(t, g, "file", before)
			h.must("snapshot", "create", g.Name, fmt.Sprint("s", round), "--quiesce", "require")
			covered.cover(t, h.snapshot(fmt.Sprintf("%s/s%d", g.Name, round)))
			put(t, g, "file", after)
			if err := g.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			h.await(g.Name, "running")
			for _, d := range g.Disks() {
				if got, err := g.ReadFile(h.ctx(), testvm.Mountpoint(d.Name)+"/file"); err != nil || string(got) != after {
					t.Errorf("round %d: %s holds %q, %v", round, d.Name, got, err)
				}
			}
		}
		covered.verify(t, q)
		for round := range 2 {
			for _, d := range h.snapshot(fmt.Sprintf("%s/s%d", g.Name, round)).Disks {
				image := raw(t, q, d)
				clean(t, image)
				if got := inImage(t, image, "file"); got != fmt.Sprint("before ", round) {
					t.Errorf("snapshot %d of %s holds %q", round, d.Device, got)
				}
			}
		}
		thawed(t, g)
	})
}

// unsettled fails while a disk's launch path is not settled, or the disks are not
// known because a daemon has just started, or an operation runs, or the daemon
// does not answer.
func (h *host) unsettled(vm string) error {
	h.t.Helper()
	shown, err := h.vm(vm)
	if err != nil {
		return err
	}
	if len(shown.GetDisks()) == 0 {
		return fmt.Errorf("VM %s: its disks are not known yet", vm)
	}
	for _, d := range shown.GetDisks() {
		if d.GetSettleNeeded() {
			return fmt.Errorf("disk %s is not settled", d.GetDevice())
		}
	}
	return h.idle()
}

// settledRaw waits until the disks that are launched as raw can be started.
func (h *host) settledRaw(vm *still, when string) {
	h.t.Helper()
	h.eventually(eventLimit, when+": the disks are settled", func() error { return h.unsettled(vm.name) })
}

// tooEarly starts a VM whose disks may not be settled yet: it fails, or comes up
// with the newest content.
func (s *still) tooEarly(newest int, when string) (came bool) {
	s.t.Helper()
	err := s.tryStart()
	if err == nil {
		s.holds(newest, when+", an early start")
		return true
	}
	refusals := []string{"Operation not permitted", `Failed to get "write" lock`, "The device is not writable"}
	if !slices.ContainsFunc(refusals, func(words string) bool { return strings.Contains(err.Error(), words) }) {
		s.t.Errorf("%s: an early start: %v", when, err)
	}
	return false
}

// TestQEMUALaunchCommandWithRaw cannot be started on an overlay.
func TestQEMUALaunchCommandWithRaw(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "raw-"+q.Name, "root.raw", "data.raw")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		covered := ledger{}
		for round := 1; round <= 3; round++ {
			when := fmt.Sprint("round ", round)
			h.await(vm.name, "paused")
			vm.write(2 * round)
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", round), "--quiesce", "none")
			s := h.snapshot(fmt.Sprintf("%s/s%d", vm.name, round))
			covered.cover(t, s)
			if n := len(s.Warnings); n != 2 || s.Warnings[0].Code != "launch-format-raw" || s.Warnings[1].Code != "launch-format-raw" {
				t.Errorf("%s: warnings %+v", when, s.Warnings)
			}
			vm.write(2*round + 1)
			h.must("snapshot", "create", vm.name, fmt.Sprint("again", round), "--quiesce", "none")
			covered.cover(t, h.snapshot(fmt.Sprintf("%s/again%d", vm.name, round)))
			h.fails(11, "is running", "vm", "forget", vm.name)

			h.signal(syscall.SIGSTOP)
			vm.kill()
			if vm.tooEarly(2*round+1, when) {
				t.Errorf("%s: the VM started before its disks were settled", when)
			}
			h.signal(syscall.SIGCONT)
			h.settledRaw(vm, when)
			vm.start()
			vm.holds(2*round+1, when)
		}
		h.await(vm.name, "paused")
		covered.verify(t, q)
		for round := 1; round <= 3; round++ {
			for _, d := range h.snapshot(fmt.Sprintf("%s/s%d", vm.name, round)).Disks {
				vm.imageHolds(d, 2*round, fmt.Sprint("snapshot ", round))
			}
			for _, d := range h.snapshot(fmt.Sprintf("%s/again%d", vm.name, round)).Disks {
				vm.imageHolds(d, 2*round+1, fmt.Sprint("the snapshot after ", round))
			}
		}
		vm.check("in the end")
		h.accounted(vm, "in the end")
	})
}

// accounted verifies that every image beside the disks is a launch path or a
// layer of the catalog, and that every layer is there. A conversion begins a
// chain of its own, so the others are not those of the running VM.
func (h *host) accounted(vm *still, when string) {
	h.t.Helper()
	db := h.database()
	defer func() { _ = db.Close() }()
	rows, err := db.QueryContext(h.ctx(), "SELECT path FROM layers")
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = rows.Close() }()
	known := map[string]bool{}
	for rows.Next() {
		var path string
		if err := rows.Scan(&path); err != nil {
			h.t.Fatal(err)
		}
		known[path] = true
		if _, err := os.Stat(path); err != nil {
			h.t.Errorf("%s: a layer: %v", when, err)
		}
	}
	if err := rows.Err(); err != nil {
		h.t.Fatal(err)
	}
	for _, d := range h.disksOf(vm.name) {
		known[d.LaunchPath] = true
	}
	for _, f := range vm.images() {
		if !known[f] {
			h.t.Errorf("%s: %s is left over", when, f)
		}
	}
}

// TestQEMUDaemonKilledInAConversion kills the daemon at the changes that a
// conversion makes to files, and starts the VM before it is back.
func TestQEMUDaemonKilledInAConversion(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "convert-"+q.Name, "root.raw")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.killedInConversions(vm, effects, nil, "linkat", "renameat", "fsync", "ioctl", "unlinkat")
	})
}

// killedInConversions kills the daemon at each of some system calls, of which
// those that it must make are given by name.
func (h *host) killedInConversions(vm *still, calls, files []string, must ...string) {
	h.t.Helper()
	early := 0
	h.killedAtEach(vm.q, calls, files, func(p killPoint, round int) bool {
		killed, came := h.convertRound(vm, p, round)
		if came {
			early++
		}
		return killed
	}, must...)
	h.t.Logf("%d early starts came up", early)
}

// convertRound is one conversion under the tracer.
func (h *host) convertRound(vm *still, p killPoint, round int) (killed, came bool) {
	h.t.Helper()
	when, name := p.String(), fmt.Sprint("s", round)
	atCut := round*2%250 + 1
	newest := atCut + 1
	h.await(vm.name, "paused")
	vm.write(atCut)
	h.must("snapshot", "create", vm.name, name, "--quiesce", "none")
	covered := ledger{}
	covered.cover(h.t, h.snapshot(vm.name+"/"+name))
	vm.write(newest)
	tracer := h.killAt(p)
	vm.kill()
	killed = h.diedOr(tracer, func() error { return h.unsettled(vm.name) })
	if came = vm.tooEarly(newest, when); came {
		vm.kill()
	}
	if killed {
		h.start()
	}
	h.settledRaw(vm, when)
	vm.start()
	vm.holds(newest, when)
	h.await(vm.name, "paused")
	for _, d := range h.snapshot(vm.name + "/" + name).Disks {
		vm.imageHolds(d, atCut, when)
		if _, immutable := fileOf(h.t, d.Path); !immutable {
			h.t.Errorf("%s: the covered layer %s is not immutable any more", when, d.Path)
		}
	}
	covered.verify(h.t, vm.q)
	h.accounted(vm, when)
	if h.t.Failed() {
		h.t.FailNow()
	}
	return killed, came
}
