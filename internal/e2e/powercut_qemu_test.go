package e2e

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// mark is what is known from a position of the record on.
type mark struct {
	at        int64
	holds     []int          // one of these is what the disks hold; nil while they are written to
	snapshots map[string]int // that were acknowledged, and what they hold
}

// history is what a VM went through on a rig.
type history struct {
	*rig
	marks []mark
}

// add records what is known from now on.
func (p *history) add(snapshots map[string]int, holds ...int) {
	p.marks = append(p.marks, mark{p.position(), holds, maps.Clone(snapshots)})
}

// TestQEMUTorturePowerCut cuts the power of a host at moments of a VM's life with
// snapshots and restores, its images and the catalog on one disk. Each time the
// daemon comes back with all that it had acknowledged, and the VM comes up, by its
// unchanged command line, with all that was written to its disks before.
func TestQEMUTorturePowerCut(t *testing.T) {
	seed := seedOf(t)
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		random := rand.New(rand.NewPCG(seed, 2))
		vm := newStill(t, q, "powercut", "root.qcow2", "data.qcow2")
		p := &history{rig: vm.onRig()}
		h := prepareHost(t, "--state-dir", vm.dir+"/state")
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		h.await(vm.name, "paused")
		held := p.live(h, vm)
		h.signal(syscall.SIGKILL)
		vm.kill()
		p.unmount()

		c := p.cutter()
		first := slices.IndexFunc(c.entries, func(e diskWrite) bool { return e.end >= p.marks[0].at })
		n := 3
		if thorough() {
			n = *tortureRounds * 5 / 2
		}
		at := make([]int, n)
		for i := range at {
			at[i] = first + random.IntN(len(c.entries)-first)
		}
		slices.Sort(at)
		for _, i := range at {
			c.cut(i, random)
			now := p.marks[0]
			for _, m := range p.marks {
				if m.at <= c.entries[i].end {
					now = m
				}
			}
			p.comesBack(h, vm, now, held, fmt.Sprintf("the power cut at %d of %d entries, %d not flushed", i, len(c.entries), len(c.pending)))
			if t.Failed() {
				t.FailNow()
			}
		}
		tally.add("power cuts", n)
		t.Logf("%d cuts of %d entries, %d marks", n, len(c.entries)-first, len(p.marks))
	})
}

// onRig moves a VM's files onto a rig.
func (s *still) onRig() *rig {
	s.t.Helper()
	s.kill()
	away := s.t.TempDir()
	for _, f := range files(s.t, s.dir) {
		if err := os.Rename(s.dir+"/"+f, away+"/"+f); err != nil {
			s.t.Fatal(err)
		}
	}
	r := newRig(s.t, s.q, s.dir)
	s.t.Cleanup(s.kill) // before it is unmounted
	for _, f := range files(s.t, away) {
		sh(s.t, "cp", "--sparse=always", away+"/"+f, s.dir+"/"+f)
	}
	sh(s.t, "sync", "--file-system", s.dir)
	s.start()
	return r
}

// live has the VM written to, snapshotted and restored, and returns what each
// snapshot holds, the ones that were not acknowledged included.
func (p *history) live(h *host, vm *still) (held map[string]int) {
	taken, held := map[string]int{}, map[string]int{}
	value := 1
	write := func() {
		p.add(taken)
		value++
		vm.write(value)
		p.add(taken, value)
	}
	for round := range 3 {
		write()
		name := fmt.Sprint(vm.name, "/s", round)
		held[name] = value
		h.must("snapshot", "create", vm.name, fmt.Sprint("s", round), "--quiesce", "none")
		taken[name] = value
		p.add(taken, value)
		write()
		if round == 1 {
			p.add(taken, value, held[vm.name+"/s0"])
			h.must("snapshot", "restore", vm.name+"/s0")
			value++ // a value is written once
			p.add(taken, held[vm.name+"/s0"])
		}
	}
	return held
}

// comesBack verifies what a power cut has left, with what is known of it.
func (p *history) comesBack(h *host, vm *still, now mark, held map[string]int, when string) {
	h.t.Helper()
	p.mount("cut", vm.dir)
	defer func() {
		vm.kill()
		h.signal(syscall.SIGKILL)
		p.unmount()
	}()
	h.start()
	h.eventually(eventLimit, when+": recovery ends", h.idle)
	for name := range now.snapshots {
		if r := h.run("snapshot", "show", name); r.code != 0 {
			h.t.Errorf("%s: %s was acknowledged: %s", when, name, r.stderr)
		}
	}
	for name, value := range held {
		if r := h.run("snapshot", "show", name); r.code == 0 {
			for _, d := range h.snapshot(name).Disks {
				vm.imageHolds(d, value, when+": "+name)
			}
		}
	}
	vm.start()
	h.await(vm.name, "paused")
	if len(now.holds) > 0 {
		(&bench{host: h, vm: vm}).oneOf(when, now.holds...)
	}
	h.launchesActive(vm, when)
	vm.notCorrupt(when)
}

// notCorrupt verifies the VM's qcow2 files. Clusters that a power cut has leaked
// are no harm.
func (s *still) notCorrupt(when string) {
	s.t.Helper()
	const leaks = 3 // qemu-img's exit code
	for _, f := range s.images() {
		if !strings.HasSuffix(f, ".qcow2") {
			continue
		}
		out, err := exec.Command(s.q.Img, "check", "-q", "-U", "-f", "qcow2", f).CombinedOutput()
		if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() != leaks) {
			s.t.Errorf("%s: qemu-img check %s: %v\n%s", when, f, err, out)
		}
	}
}
