package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// machine is a QEMU whose guest never runs: enough for the block layer.
type machine struct {
	t      *testing.T
	dir    string
	args   []string
	binary string
	cmd    *exec.Cmd
	*monitor.Session
}

// drives is what the test machines have: each way to attach a disk.
const drives = `-object iothread,id=io0
-drive file=%[1]s/a.qcow2,if=none,id=d-a,format=qcow2,throttling.iops-total=1000,cache=none,discard=unmap,detect-zeroes=on
-device virtio-blk-pci,drive=d-a,id=a,iothread=io0
-blockdev driver=file,filename=%[1]s/b.raw,node-name=b-file
-blockdev driver=raw,file=b-file,node-name=b-fmt
-device virtio-scsi-pci,id=scsi0 -device scsi-hd,drive=b-fmt,id=b
-drive file=%[1]s/c.qcow2,if=ide,index=0
-object throttle-group,id=tg0,x-iops-total=500
-blockdev {"driver":"throttle","throttle-group":"tg0","node-name":"d-top","file":{"driver":"qcow2","node-name":"d-fmt","file":{"driver":"file","filename":"%[1]s/d.qcow2"}}}
-device virtio-blk-pci,drive=d-top,id=d`

func start(t *testing.T, q testvm.QEMU) *machine {
	t.Helper()
	m := &machine{t: t, dir: t.TempDir(), binary: q.Binary}
	for _, name := range []string{"a.qcow2", "b.raw", "c.qcow2", "d.qcow2"} {
		m.tool("create", "-q", "-f", strings.TrimPrefix(filepath.Ext(name), "."), m.path(name), "16M")
	}
	m.args = append(append([]string{}, q.Args...), "-S", "-display", "none", "-nodefaults", "-m", "64", "-machine", "pc,accel=tcg",
		"-qmp", "unix:"+m.path("q")+",server=on,wait=off")
	m.args = append(m.args, strings.Fields(fmt.Sprintf(drives, m.dir))...)
	m.launch()
	t.Cleanup(m.kill)
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) tool(args ...string) {
	m.t.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		m.t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

// launch starts QEMU by its unchanged command line.
func (m *machine) launch() {
	m.t.Helper()
	_ = os.Remove(m.path("q"))
	m.cmd = exec.Command(m.binary, m.args...)
	var stderr strings.Builder
	m.cmd.Stderr = &stderr
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	cmd, ended := m.cmd, make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	var err error
	m.Session, err = testvm.Connect(m.ctx(), ended, func(ctx context.Context) (*monitor.Session, error) {
		return monitor.Dial(ctx, m.path("q"))
	})
	if err != nil {
		m.t.Fatalf("QEMU: %v\n%s", err, &stderr)
	}
}

func (m *machine) kill() {
	_ = m.Close()
	_ = m.cmd.Process.Kill()
	<-m.Done()
}

func (m *machine) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	m.t.Cleanup(cancel)
	return ctx
}

func (m *machine) graph() *blockdev.Graph {
	m.t.Helper()
	g, err := blockdev.ReadGraph(m.ctx(), m)
	if err != nil {
		m.t.Fatal(err)
	}
	return g
}

// drive finds a drive by its label.
func (m *machine) drive(g *blockdev.Graph, label string) blockdev.Drive {
	m.t.Helper()
	var have []string
	for _, d := range g.Drives() {
		if d.Device == label {
			return d
		}
		have = append(have, d.Device)
	}
	m.t.Fatalf("no drive %s among %v", label, have)
	return blockdev.Drive{}
}

func (m *machine) chain(g *blockdev.Graph, label string) []blockdev.Layer {
	m.t.Helper()
	c, err := g.Chain(m.drive(g, label))
	if err != nil {
		m.t.Fatal(err)
	}
	return c
}

// labels are the drives of the test machine; the third has no id of its own.
var labels = []string{"a", "b", "ide0-hd0", "d"}

// overlays builds an overlay for each drive.
func (m *machine) overlays(round int, names ...string) ([]blockdev.Overlay, []blockdev.Pair, []blockdev.Layer) {
	m.t.Helper()
	dir, err := blockdev.OpenDir(m.dir, "")
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	g := m.graph()
	var overlays []blockdev.Overlay
	var pairs []blockdev.Pair
	var bases []blockdev.Layer
	for _, label := range names {
		base := m.chain(g, label)[0]
		file := filepath.Base(base.Filename)
		perm := file
		if round == 0 {
			perm = blockdev.LayerName(file, "base", base.Node.Driver)
			if err := dir.Name(file, perm); err != nil {
				m.t.Fatal(err)
			}
		}
		name := blockdev.LayerName(strings.SplitN(file, ".", 2)[0]+".x", fmt.Sprintf("o%d", round), "qcow2")
		if err := dir.CreateFile(name, m.path(perm)); err != nil {
			m.t.Fatal(err)
		}
		o := blockdev.Overlay{
			Path: m.path(name), Node: fmt.Sprintf("vmsnap-%d-%s", round, label), Size: base.Node.VirtualSize,
			BasePath: m.path(perm), BaseFormat: base.Node.Driver,
			Options: blockdev.Options{Cache: base.Node.Cache, DetectZeroes: base.Node.DetectZeroes, Discard: "unmap"},
		}
		if err := build(m.ctx(), m, dir, o); err != nil {
			m.t.Fatal(err)
		}
		overlays, bases = append(overlays, o), append(bases, base)
		pairs = append(pairs, blockdev.Pair{Base: base.Node.Name, Overlay: o.Node})
	}
	return overlays, pairs, bases
}

func TestQEMUGraphOfEachKindOfDrive(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := start(t, q)
		g := m.graph()
		for label, want := range map[string]struct {
			driver, file string
			throttled    bool
		}{"a": {"qcow2", "a.qcow2", true}, "b": {"raw", "b.raw", false}, "ide0-hd0": {"qcow2", "c.qcow2", false}, "d": {"qcow2", "d.qcow2", true}} {
			c := m.chain(g, label)
			if len(c) != 1 || c[0].Node.Driver != want.driver || c[0].Filename != m.path(want.file) || c[0].Node.VirtualSize != 16<<20 {
				t.Errorf("%s: %d layers, %+v", label, len(c), c[0].Node)
			}
			if d := m.drive(g, label); d.Throttled != want.throttled || d.ReadOnly {
				t.Errorf("%s: %+v", label, d)
			}
			if job := g.Job(m.drive(g, label)); job != "" {
				t.Errorf("%s is used by job %s", label, job)
			}
		}
	})
}

func TestQEMUCutAndReopen(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := start(t, q)
		overlays, pairs, bases := m.overlays(0, labels...)
		if err := blockdev.Cut(m.ctx(), m, pairs); err != nil {
			t.Fatal(err)
		}
		for i, o := range overlays {
			deeper := bases[i].Node.Child("backing")
			node := "vmsnap-base-" + labels[i]
			if i == 1 { // as an agent leaves it that dies in the middle
				args := map[string]any{"driver": "file", "filename": o.BasePath, "node-name": node + "-file", "read-only": true}
				if err := m.Execute(m.ctx(), "blockdev-add", args, nil); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 { // the second time there is nothing to do
				if err := o.ReopenBacking(m.ctx(), m, node, deeper, bases[i].Filename); err != nil {
					t.Fatalf("%s: %v", labels[i], err)
				}
			}
		}
		g := m.graph()
		for i, label := range labels {
			c := m.chain(g, label)
			if len(c) != 2 || c[0].Filename != overlays[i].Path || c[1].Filename != overlays[i].BasePath {
				t.Fatalf("%s: %d layers: %+v", label, len(c), c)
			}
			if !c[1].Node.ReadOnly || !c[1].File.ReadOnly {
				t.Errorf("%s: the covered layer is open for writing", label)
			}
		}
		for _, n := range g.Nodes {
			for _, launch := range []string{"a.qcow2", "b.raw", "c.qcow2", "d.qcow2"} {
				if n.Filename == m.path(launch) {
					t.Errorf("node %s (%s) is still called by the launch path %s", n.Name, n.Driver, launch)
				}
			}
		}
		if top := m.chain(g, "a")[0].Node; !top.Cache.Direct || top.DetectZeroes != "on" {
			t.Errorf("the overlay of a: cache %+v, detect-zeroes %s", top.Cache, top.DetectZeroes)
		}
		if !m.drive(g, "a").Throttled {
			t.Error("the throttle was lost")
		}
		// A second cut covers layers that QEMU has open by their permanent names.
		second, pairs, _ := m.overlays(1, labels...)
		if err := blockdev.Cut(m.ctx(), m, pairs); err != nil {
			t.Fatal(err)
		}
		m.kill()
		for _, o := range append(overlays, second...) {
			if err := blockdev.Check(m.ctx(), o.Path); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestQEMUCutIsAllOrNothing(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := start(t, q)
		before := len(m.graph().Nodes)
		overlays, pairs, _ := m.overlays(0, "a", "b")
		pairs[1].Base = "no-such-node"
		var refused *monitor.CommandError
		if err := blockdev.Cut(m.ctx(), m, pairs); !errors.As(err, &refused) {
			t.Fatalf("a cut of a missing node: %v", err)
		}
		if c := m.chain(m.graph(), "a"); len(c) != 1 {
			t.Errorf("a has %d layers after a refused cut", len(c))
		}
		for _, o := range overlays {
			for range 2 { // the second time there is nothing to remove
				if err := o.Remove(m.ctx(), m); err != nil {
					t.Error(err)
				}
			}
		}
		if after := len(m.graph().Nodes); after != before {
			t.Errorf("%d nodes before, %d after", before, after)
		}
	})
}

// build formats an overlay and opens it in QEMU.
func build(ctx context.Context, m blockdev.Monitor, dir *blockdev.Dir, o blockdev.Overlay) error {
	if err := o.Format(ctx, dir); err != nil {
		return err
	}
	return o.Open(ctx, m)
}

func TestQEMUOverlayFailsWithoutTrace(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := start(t, q)
		dir, err := blockdev.OpenDir(m.dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = dir.Close() }()
		before := len(m.graph().Nodes)
		o := blockdev.Overlay{Node: "vmsnap-x", Size: 16 << 20, BasePath: m.path("a.qcow2"), BaseFormat: "qcow2"}
		o.Path = m.path("absent.qcow2")
		if err := o.Format(m.ctx(), dir); err == nil || !strings.Contains(err.Error(), o.Path) {
			t.Errorf("an overlay without a file is formatted: %v", err)
		}
		if err := o.Open(m.ctx(), m); err == nil || !strings.Contains(err.Error(), o.Path) {
			t.Errorf("an overlay without a file is opened: %v", err)
		}
		o.Path = m.path("empty.qcow2")
		if err := dir.CreateFile("empty.qcow2", m.path("a.qcow2")); err != nil {
			t.Fatal(err)
		}
		if err := o.Open(m.ctx(), m); err == nil {
			t.Error("an overlay that is not formatted is opened")
		}
		huge := o
		huge.Size = 1 << 62 // no qcow2 can be that large
		var failed *blockdev.ImgError
		if err := huge.Format(m.ctx(), dir); !errors.As(err, &failed) {
			t.Errorf("an overlay that cannot be formatted: %v", err)
		}
		if after := len(m.graph().Nodes); after != before {
			t.Errorf("%d nodes before, %d after", before, after)
		}
	})
}

// TestFormatTouchesNoOtherFile is of one that has come in the place of the file that
// was made.
func TestFormatTouchesNoOtherFile(t *testing.T) {
	path := t.TempDir()
	dir, err := blockdev.OpenDir(path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	const content = "somebody's"
	if err := errors.Join(os.WriteFile(path+"/other", []byte(content), 0o600), os.Symlink("other", path+"/link"), os.Mkdir(path+"/directory", 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"other", "link", "directory"} {
		o := blockdev.Overlay{Path: path + "/" + name, Size: 1 << 20, BasePath: "/base.raw", BaseFormat: "raw"}
		if err := o.Format(t.Context(), dir); err == nil {
			t.Errorf("%s was formatted", name)
		}
	}
	if got, err := os.ReadFile(path + "/other"); err != nil || string(got) != content {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

func TestQEMUJobIsSeen(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := start(t, q)
		m.tool("create", "-q", "-f", "raw", m.path("mirror.raw"), "16M")
		for _, c := range []struct {
			name string
			args map[string]any
		}{
			{"blockdev-add", map[string]any{"driver": "file", "filename": m.path("mirror.raw"), "node-name": "mirror"}},
			{"blockdev-mirror", map[string]any{"job-id": "mirror0", "device": "b-fmt", "target": "mirror", "sync": "none"}},
		} {
			if err := m.Execute(m.ctx(), c.name, c.args, nil); err != nil {
				t.Fatal(err)
			}
		}
		g := m.graph()
		if job := g.Job(m.drive(g, "b")); job == "" {
			t.Error("a mirror job on b is not seen")
		}
		if job := g.Job(m.drive(g, "a")); job != "" {
			t.Errorf("a is said to be used by %s", job)
		}
	})
}
