package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMURandomTree writes, takes snapshots, restores, clones and deletes them, and
// starts and stops a VM in random order, and kills what does it now and then. Each
// snapshot and clone that there is reads at each step as it did at its beginning.
func TestQEMURandomTree(t *testing.T) {
	seed := *tortureSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	steps := 12
	if thorough() {
		steps = *tortureRounds
	}
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		t.Logf("seed %d (-torture.seed repeats it)", seed)
		vm := newStill(t, q, "tree-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		w := &walk{tree: newTree(h, vm), random: rand.New(rand.NewPCG(seed, 0)), done: map[string]int{}, dir: t.TempDir()}
		w.grow("first")
		for w.step = range steps {
			w.one()
		}
		if !w.runs() {
			w.power()
		}
		for _, clone := range w.clones() {
			h.must("disk", "forget", w.flat(clone))
		}
		if len(w.names()) > 0 { // its steps may have deleted them all
			h.must("snapshot", "delete", vm.name, "--all")
		}
		w.gone(w.names()...)
		w.verify("all deleted")
		if n := h.layers(vm.name); !slices.Equal(n, []int{1}) {
			t.Errorf("the disk has %d layers without a snapshot", n)
		}
		if f := h.findings(vm.name); len(f) != 0 {
			t.Errorf("the doctor finds %+v", f)
		}
		t.Logf("%d steps: %v", steps, w.done)
	})
}

// walk is a random walk over what can be done to a tree.
type walk struct {
	*tree
	random *rand.Rand
	step   int
	dir    string // of clones
	done   map[string]int
}

// one does something.
func (w *walk) one() {
	w.h.t.Helper()
	names := w.names()
	what := []string{"take", "take", "take", "restore", "delete", "delete", "delete", "clone", "power"}[w.random.IntN(9)]
	if len(names) == 0 || what == "take" && len(names) > 12 {
		what = map[bool]string{true: "take", false: "delete"}[len(names) == 0]
	}
	when := fmt.Sprintf("step %d, %s", w.step, what)
	switch what {
	case "take":
		if w.runs() && w.random.IntN(4) > 0 {
			w.write()
		}
		w.take(fmt.Sprintf("s%d", w.step))
	case "restore":
		w.restore(w.pick(names))
	case "clone":
		w.clone(w.pick(names))
	case "power":
		w.power()
	case "delete":
		chosen := []string{w.pick(names)}
		if other := w.pick(names); w.random.IntN(2) == 0 && other != chosen[0] {
			chosen = append(chosen, other)
		}
		how := []string{"", "--flatten", "--keep-layers"}[w.random.IntN(3)]
		when += fmt.Sprintf(" %v %s, running %v", chosen, how, w.runs())
		w.delete(chosen, how, when)
	}
	w.done[what]++
	w.verify(when)
}

func (w *walk) pick(names []string) string { return names[w.random.IntN(len(names))] }

func (w *walk) runs() bool { return w.vm.cmd != nil }

// power starts or stops the VM.
func (w *walk) power() {
	w.h.t.Helper()
	if w.runs() {
		w.vm.kill()
		w.h.await(w.vm.name, "stopped")
		return
	}
	w.vm.start()
	w.h.await(w.vm.name, "paused")
}

func (w *walk) restore(name string) {
	w.h.t.Helper()
	args := []string{"snapshot", "restore", name}
	if w.random.IntN(2) == 0 {
		args = append(args, "--no-safety-snapshot")
	}
	before := w.want["now root"]
	w.h.must(args...)
	w.want["now root"] = w.want[name+" root"]
	for _, n := range strings.Fields(w.h.must("snapshot", "list", w.vm.name, "-o", "name")) {
		if w.want[n+" root"] == "" { // the state before
			w.want[n+" root"] = before
		}
	}
}

func (w *walk) clone(name string) {
	w.h.t.Helper()
	path := fmt.Sprintf("%s/clone%d.qcow2", w.dir, w.step)
	w.h.must("snapshot", "clone", name, path)
	w.want[path] = w.want[name+" root"]
}

func (w *walk) clones() []string {
	var paths []string
	for what := range w.want {
		if strings.HasPrefix(what, "/") {
			paths = append(paths, what)
		}
	}
	slices.Sort(paths)
	return paths
}

// flat removes a clone.
func (w *walk) flat(path string) string {
	w.h.t.Helper()
	sh(w.h.t, "rm", path)
	delete(w.want, path)
	return path
}

// delete deletes snapshots, and may kill what deletes them.
func (w *walk) delete(names []string, how, when string) {
	w.h.t.Helper()
	args := append([]string{"snapshot", "delete"}, names...)
	if how != "" {
		args = append(args, how)
	}
	if w.random.IntN(3) > 0 {
		r := w.h.run(args...)
		switch {
		case r.code == 0:
			w.gone(names...)
		case r.code != 12 || how == "--keep-layers":
			w.h.t.Fatalf("%s: exit code %d: %s\nvmsnapd's log:\n%s", when, r.code, r.stderr, w.h.log)
		}
		return
	}
	refused := w.h.run(append(args, "--dry-run")...).code != 0
	w.h.run(append(args, "--detach")...)
	<-time.After(time.Duration(w.random.IntN(120)) * time.Millisecond)
	daemon, machine := w.random.IntN(3) > 0, w.runs() && w.random.IntN(2) == 0
	if daemon {
		w.h.signal(syscall.SIGKILL)
	}
	if machine {
		w.vm.kill()
	}
	w.done[fmt.Sprintf("killed the daemon %v, QEMU %v", daemon, machine)]++
	if machine && w.random.IntN(2) == 0 {
		w.vm.start()
	}
	if daemon {
		w.h.start()
	}
	w.h.eventually(eventLimit, when+": recovery ends", w.h.idle)
	w.h.await(w.vm.name, map[bool]string{true: "paused", false: "stopped"}[w.runs()])
	if refused {
		return
	}
	for _, name := range names {
		// Killed before it had begun, it has changed nothing; else it goes on.
		if r := w.h.run("snapshot", "show", name); r.code == 4 {
			w.gone(name)
		}
	}
}
