package e2e

import (
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUAttachDies kills the daemon, or QEMU, at each command by which a disk is
// plugged in and taken out. Afterwards the disk is a disk of the VM, and can be
// snapshotted, or nobody has it open, and it can be plugged in again.
func TestQEMUAttachDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "attachdies")
		b.vm.args = append(b.vm.args, "-device", "virtio-scsi-pci,id=scsi0")
		b.restart()
		img(t, q, "create", "-q", "-f", "qcow2", b.vm.dir+"/third.qcow2", "8M")
		first, stride := share(t, q)
		round := 0
		for _, command := range []string{"blockdev-add", "device_add", "device_del", "blockdev-del"} {
			for _, how := range []string{"the daemon dies", "the daemon dies before it is sent", "QEMU dies"} {
				round++
				if !thorough() && round%stride != first%stride {
					continue // it is the other version's
				}
				b.attachDies(command, how)
				if t.Failed() {
					t.FailNow()
				}
			}
		}
	})
}

func (b *bench) attachDies(command, how string) {
	b.t.Helper()
	when := command + ", " + how
	attach := []string{"disk", "attach", b.vm.name, b.vm.dir + "/third.qcow2", "--device", "third", "--bus", "scsi"}
	line := attach
	if strings.HasSuffix(command, "del") {
		b.must(attach...)
		line = []string{"disk", "detach", b.vm.name, "third"}
	}
	g := b.r.hold(command, 1)
	c := b.meanwhile(line...)
	g.await(b.host)
	switch how {
	case "QEMU dies":
		b.vm.kill()
		g.release(pass)
		b.restart()
	case "the daemon dies before it is sent":
		b.signal(syscall.SIGKILL)
		g.release(swallow)
		b.start()
	default:
		b.signal(syscall.SIGKILL)
		g.release(disconnect) // a QEMU whose client has gone first may forget what it was asked for
		b.start()
	}
	b.eventually(eventLimit, when+": recovery ends", b.idle)
	c.end()
	there, err := blockdev.HasDevice(b.ctx(), b.vm.own, "third")
	if err != nil {
		b.t.Fatal(err)
	}
	if want := command == "device_add" && how == "the daemon dies" || command == "device_del" && how == "the daemon dies before it is sent"; there != want {
		b.t.Errorf("%s: plugged in: %t", when, there)
	}
	if there {
		b.eventually(eventLimit, when+": it is a disk of the VM", func() error { return b.hasDisks(b.vm.name, "root", "data", "third") })
		b.must("disk", "detach", b.vm.name, "third")
	}
	b.eventually(eventLimit, when+": it is none of the VM", func() error { return b.hasDisks(b.vm.name, "root", "data") })
	l, err := blockdev.LockNoWriters(b.vm.dir + "/third.qcow2")
	if err != nil {
		b.t.Fatalf("%s: it is open still: %v\nvmsnapd's log:\n%s", when, err, b.log)
	}
	if err := l.Close(); err != nil {
		b.t.Error(err)
	}
	b.must(attach...)
	b.must("disk", "detach", b.vm.name, "third")
	b.vm.check(when)
}
