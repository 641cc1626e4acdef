package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUPreviewMemory previews a snapshot with its memory and without, and has
// the guest go on each time from where it was before.
func TestQEMUPreviewMemory(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{{Name: "root"}, {Name: "data"}}})
		h := newHost(t, g)
		if err := g.StartCounter(t.Context()); err != nil {
			t.Fatal(err)
		}
		// qemu-ga wants this program, which the test's guest has no clock for.
		if _, err := g.Exec(t.Context(), "mkdir -p /sbin && printf '#!/bin/sh\n' >/sbin/hwclock && chmod 755 /sbin/hwclock"); err != nil {
			t.Fatal(err)
		}
		put(t, g, "file", "at the snapshot")
		h.must("snapshot", "create", g.Name, "good", "--memory", "--quiesce", "require")
		put(t, g, "file", "before")
		kept := len(memoryFiles(t, g.Dir))
		layers := h.layers(g.Name)

		h.must("snapshot", "preview", g.Name+"/good", "--memory")
		h.followed(g, "previewed")
		counts(t, g, "previewed")
		h.guestHolds(g, "at the snapshot")
		put(t, g, "file", "on trial")
		h.signal(syscall.SIGKILL)
		h.start()
		if shown := h.must("preview", "show", g.Name); !strings.Contains(shown, "undo loads it") {
			t.Errorf("shown is:\n%s", shown)
		}
		h.must("doctor", g.Name)
		h.undoNeedsItsMemory(g)
		h.must("preview", "undo", g.Name)
		h.asBefore(g, "undone", kept, layers)

		h.fails(14, "guest and disks would not fit together", "snapshot", "preview", g.Name+"/good", "--disk", "root")
		h.must("snapshot", "preview", g.Name+"/good")
		h.followed(g, "booted")
		h.must("preview", "undo", g.Name)
		h.asBefore(g, "undone after a boot", kept, layers)
	})
}

// undoNeedsItsMemory takes away what the undo of a preview loads, and has the doctor
// find it, and puts it back.
func (h *host) undoNeedsItsMemory(g *testvm.Guest) {
	h.t.Helper()
	files := memoryFiles(h.t, g.Dir)
	for _, path := range files {
		if err := os.Rename(path, path+".away"); err != nil {
			h.t.Fatal(err)
		}
	}
	found := h.findings(g.Name)
	if !slices.ContainsFunc(found, func(f finding) bool {
		return f.Code == "memory-missing" && strings.Contains(f.Message, "cannot be undone")
	}) {
		h.t.Errorf("no memory for the undo, and the doctor finds %+v", found)
	}
	for _, path := range files {
		if err := os.Rename(path+".away", path); err != nil {
			h.t.Fatal(err)
		}
	}
}

// asBefore fails unless the guest goes on from before a preview, of which nothing
// is left.
func (h *host) asBefore(g *testvm.Guest, when string, kept int, layers []int) {
	h.t.Helper()
	h.followed(g, when)
	counts(h.t, g, when)
	h.guestHolds(g, "before")
	thawed(h.t, g)
	if n := len(memoryFiles(h.t, g.Dir)); n != kept {
		h.t.Errorf("%s: %d memory files, were %d", when, n, kept)
	}
	if n := h.layers(g.Name); fmt.Sprint(n) != fmt.Sprint(layers) {
		h.t.Errorf("%s: %v layers, were %v", when, n, layers)
	}
	if w := h.warningsOf(g.Name); len(w) > 0 {
		h.t.Errorf("%s: the undo has warnings: %v", when, w)
	}
}

// previewDeath is a moment of a preview in a new process at which something dies.
type previewDeath struct{ verb, step, how string }

// TestQEMUPreviewMemoryDies kills the daemon, QEMU or both in the steps of opening
// a preview that saves the memory of the state before, of its undo, and of its
// commit: the VM has the trial state with its preview, or without after a commit,
// or the state before, and nothing is left over.
func TestQEMUPreviewMemoryDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h := runningStill(t, q, "pvdies")
		first, _ := share(t, q)
		round := 0
		for _, verb := range []string{"preview --memory", "preview", "undo", "commit"} {
			steps := []string{"save", "end", "point", "launch", "resume", "settle", "commit"}
			if verb == "commit" {
				steps = []string{"network", "commit"}
			}
			for _, step := range steps {
				for _, how := range []string{"the daemon dies", "QEMU dies", "both die"} {
					round++
					if !thorough() && round%8 != first%8 {
						continue
					}
					h.previewMemoryDies(vm, previewDeath{verb, step, how}, round%200+10)
					if t.Failed() {
						t.FailNow()
					}
				}
			}
		}
	})
}

func (h *host) previewMemoryDies(vm *still, d previewDeath, old int) {
	h.t.Helper()
	when := fmt.Sprintf("state %d, %v", old, d)
	b := &bench{host: h, vm: vm}
	vm.write(old)
	trial := 1
	line := []string{"snapshot", "preview", vm.name + "/one"}
	switch d.verb {
	case "preview --memory":
		line = append(line, "--memory")
	case "undo", "commit":
		h.must(append(line, "--memory")...)
		if !h.followStill(vm, when) {
			h.t.Errorf("%s: the previewed guest does not run", when)
		}
		trial = old%100 + 101
		vm.write(trial)
		line = []string{"preview", d.verb, vm.name}
	}
	c := h.meanwhile(line...)
	h.reaches(vm.name, d)
	h.dies(vm, d.how, when)
	c.end()
	if !h.followStill(vm, when) {
		h.t.Errorf("%s: the guest does not run", when)
	}
	state := b.oneOf(when, old, trial)
	open := h.run("preview", "show", vm.name).code == 0
	if d.verb != "commit" && open != (state == trial) || d.verb == "commit" && state != trial {
		h.t.Errorf("%s: the VM has the state %d, and a preview is open: %t\nvmsnapd's log:\n%s", when, state, open, h.log)
	}
	if n := len(processes(h.t, vm.uuid)); n != 1 {
		h.t.Errorf("%s: %d QEMU processes", when, n)
	}
	h.launchesActive(vm, when)
	if open {
		h.must("preview", "undo", vm.name)
		if !h.followStill(vm, when) || b.oneOf(when+", undone", old, trial) != old {
			h.t.Errorf("%s: undone to another state, or the guest does not run\nvmsnapd's log:\n%s", when, h.log)
		}
	}
	h.noOrphans(vm, when)
	vm.check(when)
	if n := h.memories(vm.name); len(memoryFiles(h.t, vm.dir)) != n {
		h.t.Errorf("%s: %v of %d snapshots", when, memoryFiles(h.t, vm.dir), n)
	}
}

// reaches waits until the VM's operation is in a step, or has ended.
func (h *host) reaches(vm string, d previewDeath) {
	h.t.Helper()
	var id string
	h.eventually(eventLimit, "the operation begins", func() error {
		if id = strings.TrimSpace(h.must("operation", "list", vm, "--active", "-o", "name")); id == "" || strings.Contains(id, "\n") {
			return fmt.Errorf("running: %q", id)
		}
		return nil
	})
	ctx, cancel := context.WithCancel(h.ctx())
	defer cancel()
	_, _ = h.Follow(ctx, id, func(o *vmsnapv1.Operation) {
		for _, s := range o.GetSteps() {
			if s.GetName() == d.step {
				cancel()
			}
		}
	})
}

// dies kills the daemon, the VM's QEMU, or both, and waits until all is recovered
// and the VM runs.
func (h *host) dies(vm *still, how, when string) {
	h.t.Helper()
	if how != "QEMU dies" {
		h.signal(syscall.SIGKILL)
	}
	if how != "the daemon dies" {
		for _, pid := range processes(h.t, vm.uuid) {
			if n, err := strconv.Atoi(pid); err == nil {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
	}
	if how != "QEMU dies" {
		h.start()
	}
	h.eventually(eventLimit, when+": recovery ends", h.idle)
	if how != "the daemon dies" && len(processes(h.t, vm.uuid)) == 0 {
		h.await(vm.name, "stopped")
		vm.cmd = nil
		vm.start()
		if err := vm.own.Cont(h.ctx()); err != nil {
			h.t.Fatal(err)
		}
		h.await(vm.name, "running")
	}
}
