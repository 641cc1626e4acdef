package blockdev_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// failing adds a disk to the machine whose n-th flush with something to flush
// fails, once or from then on. Its node is label-fmt.
func (m *machine) failing(label string, n int, once bool) {
	m.t.Helper()
	m.tool("create", "-q", "-f", "qcow2", m.path(label+".qcow2"), "16M")
	var states []any
	for i := 1; i < n; i++ {
		states = append(states, map[string]any{"event": "flush_to_disk", "state": i, "new_state": i + 1})
	}
	debug := map[string]any{
		"driver": "blkdebug", "node-name": label + "-debug", "image": label + "-file",
		"inject-error": []any{map[string]any{"event": "flush_to_disk", "iotype": "flush", "state": n, "once": once}},
	}
	if n > 1 {
		debug["set-state"] = states
	}
	for _, node := range []map[string]any{
		{"driver": "file", "filename": m.path(label + ".qcow2"), "node-name": label + "-file"},
		debug,
		{"driver": "qcow2", "file": label + "-debug", "node-name": label + "-fmt"},
	} {
		if err := m.Execute(m.ctx(), "blockdev-add", node, nil); err != nil {
			m.t.Fatal(err)
		}
	}
	device := map[string]any{"driver": "virtio-blk-pci", "id": label, "drive": label + "-fmt"}
	if err := m.Execute(m.ctx(), "device_add", device, nil); err != nil {
		m.t.Fatal(err)
	}
}

// io has a disk of the machine do something as its guest would.
func (m *machine) io(label, command string) {
	m.t.Helper()
	line := fmt.Sprintf("qemu-io -d /machine/peripheral/%s/virtio-backend %q", label, command)
	if err := m.Execute(m.ctx(), "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
		m.t.Fatal(err)
	}
}

// over builds an overlay for a node of the machine.
func (m *machine) over(label, node string) (blockdev.Overlay, blockdev.Pair) {
	m.t.Helper()
	dir, err := blockdev.OpenDir(m.dir, "")
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	name := label + ".over.qcow2"
	if err := dir.CreateFile(name, m.path(label+".qcow2")); err != nil {
		m.t.Fatal(err)
	}
	o := blockdev.Overlay{
		Path: m.path(name), Node: "vmsnap-" + label, Size: 16 << 20, BasePath: m.path(label + ".qcow2"), BaseFormat: "qcow2",
	}
	if err := build(m.ctx(), m, dir, o); err != nil {
		m.t.Fatal(err)
	}
	return o, blockdev.Pair{Base: node, Overlay: o.Node}
}

// A disk fails at its n-th flush, which is that of the cut: QEMU refuses the
// transaction as a whole, and the disk beside it is not cut either. Where it fails
// once only, the same cut can be made then; where it fails for good, it cannot, and
// does no harm however often it is tried.
func TestQEMUCutOfAFailingDisk(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := start(t, q)
		for n := 1; n <= 3; n++ {
			for _, once := range []bool{true, false} {
				m.cutFails(fmt.Sprintf("e%d-%v", n, once), n, once)
			}
		}
	})
}

func (m *machine) cutFails(label string, n int, once bool) {
	t := m.t
	t.Helper()
	m.failing(label, n, once)
	beside := "beside-" + label
	m.tool("create", "-q", "-f", "qcow2", m.path(beside+".qcow2"), "16M")
	good := map[string]any{"driver": "qcow2", "node-name": beside + "-fmt", "file": map[string]any{"driver": "file", "filename": m.path(beside + ".qcow2")}}
	if err := m.Execute(m.ctx(), "blockdev-add", good, nil); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < n; i++ {
		m.io(label, fmt.Sprintf("write -P %d 0 64k", i))
		m.io(label, "flush")
	}
	m.io(label, fmt.Sprintf("write -P %d 0 64k", n))
	overlay, pair := m.over(label, label+"-fmt")
	other, second := m.over(beside, beside+"-fmt")
	pairs := []blockdev.Pair{second, pair}
	attempts := 1
	if !once {
		attempts = 3
	}
	for range attempts {
		var refused *monitor.CommandError
		if err := blockdev.Cut(m.ctx(), m, pairs); !errors.As(err, &refused) {
			t.Fatalf("%s: a cut of a disk that cannot be flushed: %v", label, err)
		}
		g := m.graph()
		for _, o := range []blockdev.Overlay{overlay, other} {
			if backing := g.Nodes[o.Node].Child("backing"); backing != "" {
				t.Errorf("%s: %s lies on %s after a cut that was refused", label, o.Node, backing)
			}
		}
		if c := m.chain(g, label); len(c) != 1 || c[0].Node.Name != label+"-fmt" {
			t.Errorf("%s: it has %d layers, the first is %s", label, len(c), c[0].Node.Name)
		}
	}
	if !once {
		for _, o := range []blockdev.Overlay{overlay, other} {
			if err := o.Remove(m.ctx(), m); err != nil {
				t.Errorf("%s: %v", label, err)
			}
		}
		return
	}
	if err := blockdev.Cut(m.ctx(), m, pairs); err != nil {
		t.Errorf("%s: once it works: %v", label, err)
	}
	if c := m.chain(m.graph(), label); len(c) != 2 {
		t.Errorf("%s: %d layers after the cut", label, len(c))
	}
}
