package e2e

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// deleteMoments are commands of merges: of the active layer, of one below, and of
// what is copied up.
var deleteMoments = []struct {
	what, command string
	nth           int
}{
	{"newest", "block-commit", 1},
	{"newest", "job-complete", 1},
	{"newest", "job-finalize", 1},
	{"newest", "job-dismiss", 1},
	{"newest", "blockdev-del", 1},
	{"middle", "block-commit", 1},
	{"middle", "job-finalize", 1},
	{"middle", "blockdev-del", 2},
	{"stream", "block-stream", 1},
	{"stream", "job-finalize", 1},
	{"stream", "blockdev-del", 1},
}

// TestQEMUDeleteDies kills QEMU, the daemon, or both at each moment of merges. The
// deletion comes to its end when they are back, and everything else reads as it
// did, whatever comes up first.
func TestQEMUDeleteDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "deletedies")
		k := newTree(b.host, b.vm)
		first, stride := share(t, q)
		round := 0
		for _, m := range deleteMoments {
			for _, how := range []string{"QEMU dies", "the daemon dies", "the daemon dies before it is sent", "both die", "both die, and the VM is back first"} {
				round++
				if !thorough() && round%(7*stride) != first {
					continue // a short run takes some of them
				}
				when := fmt.Sprintf("%s, %s %d, %s", m.what, m.command, m.nth, how)
				b.deleteDies(k, m.what, m.command, m.nth, how, when, round)
			}
		}
	})
}

func (b *bench) deleteDies(k *tree, what, command string, nth int, how, when string, round int) {
	b.t.Helper()
	name := func(n int) string { return fmt.Sprintf("r%d-%d", round, n) }
	k.write()
	k.take(name(1))
	k.writeAt("4M 64k")
	k.take(name(2))
	k.writeAt("5M 512k")
	target := name(2)
	if what != "stream" {
		k.take(name(3))
		k.writeAt("6M 512k")
		if target = name(3); what == "middle" {
			k.take(name(4))
		}
	}
	g := b.r.hold(command, nth)
	c := b.meanwhile("snapshot", "delete", b.vm.name+"/"+target)
	g.await(b.host)
	passage := pass
	switch how {
	case "QEMU dies":
		b.vm.kill()
		g.release(pass)
		b.restart()
	case "the daemon dies before it is sent":
		passage = swallow
		fallthrough
	case "the daemon dies":
		b.signal(syscall.SIGKILL)
		g.release(passage)
		b.start()
	default:
		b.signal(syscall.SIGKILL)
		b.vm.kill()
		g.release(pass)
		b.r.close()
		if how == "both die" {
			b.start()
			b.eventually(eventLimit, when+": recovery ends", b.idle)
			b.vm.start()
		} else {
			b.vm.start()
			b.start()
		}
		b.eventually(eventLimit, when+": recovery ends", b.idle)
		b.restart()
	}
	b.eventually(eventLimit, when+": recovery ends", b.idle)
	b.await(b.vm.name, "paused")
	c.end()
	if r := b.run("snapshot", "show", b.vm.name+"/"+target); r.code != 4 {
		b.t.Errorf("%s: the snapshot is there still: %s%s", when, r.stdout, b.must("operation", "list", "-o", "wide"))
	}
	k.gone(b.vm.name + "/" + target)
	k.verify(when)
	b.launchesActive(b.vm, when)
	b.restart()
	if now := k.now(); now["now root"] != k.want["now root"] || now["now data"] != k.want["now data"] {
		b.t.Errorf("%s, started again: the disks hold something else", when)
	}
	if len(k.names()) > 6 {
		b.must("snapshot", "delete", b.vm.name, "--all")
		k.gone(k.names()...)
		k.verify(when + ", and all are deleted")
	}
}

// TestQEMUDeleteKilled kills the daemon at the changes that a deletion makes to
// files, while the VM runs, or when it is stopped.
func TestQEMUDeleteKilled(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "deletekilled-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		k := newTree(h, vm)
		calls := []string{"renameat", "ioctl", "unlinkat", "fsync"}
		files := []string{vm.dir}
		if thorough() {
			files = nil // also the catalog's
		}
		round := func(p killPoint, round int) bool {
			name := fmt.Sprintf("k%d", round)
			when := fmt.Sprintf("round %d, %s", round, p)
			k.grow(name+"-1", name+"-2")
			k.write()
			stopped := round%2 == 0
			if stopped {
				vm.kill()
				h.await(vm.name, "stopped")
			}
			tracer := h.killAt(p)
			h.run("snapshot", "delete", vm.name+"/"+name+"-1", vm.name+"/"+name+"-2", "--detach")
			killed := h.diedOr(tracer, h.idle)
			if killed {
				if stopped {
					vm.start()
				}
				h.start()
			}
			h.eventually(eventLimit, when+": recovery ends", h.idle)
			k.gone(vm.name+"/"+name+"-1", vm.name+"/"+name+"-2")
			k.verify(when)
			if vm.cmd == nil {
				vm.start()
			}
			h.await(vm.name, "paused")
			h.launchesActive(vm, when)
			return killed
		}
		h.killedAtEach(q, calls, files, round, "renameat", "unlinkat")
	})
}
