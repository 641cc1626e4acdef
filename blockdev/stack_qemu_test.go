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

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// diskSize is the virtual size of the disks of the merge tests.
const diskSize = 64 << 20

// stack is a machine with one disk, "a", whose layers the test piles up as an
// agent does. What each layer reads as is kept in pattern.
type stack struct {
	*machine
	tools    string // directory of qemu-img and qemu-io
	layers   []string
	ids      []string // of their nodes
	patterns [][]write
	ended    chan struct{}
	reopens  bool // the covered layers are opened anew by their permanent names
	baseDir  string
}

// write is a run of one byte in the disk, in units of 64 KiB.
type write struct{ value, at, length int }

// how the disk of a stack is attached.
var attached = map[string]string{
	"drive": `-drive file=%[1]s,if=none,id=d,format=%[2]s,discard=unmap,detect-zeroes=on -device virtio-blk-pci,drive=d,id=a,share-rw=on`,
	"iothread": `-object iothread,id=io0 -drive file=%[1]s,if=none,id=d,format=%[2]s,discard=unmap,detect-zeroes=on
		-device virtio-blk-pci,drive=d,id=a,iothread=io0`,
	"filter": `-object throttle-group,id=tg0,x-iops-total=5000
		-blockdev {"driver":"throttle","throttle-group":"tg0","node-name":"filter","file":{"driver":"%[2]s","node-name":"fmt","detect-zeroes":"on","file":{"driver":"file","filename":"%[1]s"}}}
		-device virtio-blk-pci,drive=filter,id=a`,
}

// newStack starts a machine whose disk is the file launch.FORMAT in a directory.
func newStack(t *testing.T, q testvm.QEMU, attach, format, dir string) *stack {
	t.Helper()
	s := &stack{machine: &machine{t: t, dir: t.TempDir(), binary: q.Binary}, tools: filepath.Dir(q.Img), reopens: true, baseDir: dir}
	if dir == "" {
		s.baseDir = s.dir
	}
	launch := s.launchPath(format)
	s.img("create", "-q", "-f", format, launch, "64M")
	s.args = append(append([]string{}, q.Args...), "-S", "-display", "none", "-nodefaults", "-m", "64", "-machine", "pc,accel=tcg",
		"-qmp", "unix:"+s.path("q")+",server=on,wait=off")
	s.args = append(s.args, strings.Fields(fmt.Sprintf(attached[attach], launch, format))...)
	s.layers, s.ids, s.patterns = []string{launch}, []string{""}, [][]write{nil}
	s.start()
	t.Cleanup(func() { s.end(); s.lift() })
	return s
}

func (s *stack) launchPath(format string) string {
	return filepath.Join(s.baseDir, "launch."+format)
}

// lift takes the immutable flags away, so that the files can be removed.
func (s *stack) lift() {
	for i := range s.layers {
		s.flag(i, false)
	}
}

func (s *stack) flag(layer int, on bool) {
	s.t.Helper()
	dir := s.openDir(filepath.Dir(s.layers[layer]))
	defer func() { _ = dir.Close() }()
	err := dir.SetImmutable(filepath.Base(s.layers[layer]), on)
	if err != nil && !errors.Is(err, blockdev.ErrNoImmutable) {
		s.t.Fatal(err)
	}
}

func (s *stack) openDir(path string) *blockdev.Dir {
	s.t.Helper()
	dir, err := blockdev.OpenDir(path, "")
	if err != nil {
		s.t.Fatal(err)
	}
	return dir
}

func (s *stack) img(args ...string) {
	s.t.Helper()
	if out, err := exec.Command(filepath.Join(s.tools, "qemu-img"), args...).CombinedOutput(); err != nil {
		s.t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

// write writes through the device, as the guest does.
func (s *stack) write(w write) {
	s.t.Helper()
	line := fmt.Sprintf(`qemu-io -d /machine/peripheral/a/virtio-backend "write -P %d %dk %dk"`, w.value, w.at*64, w.length*64)
	if err := s.Execute(s.ctx(), "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
		s.t.Fatal(err)
	}
	flush := `qemu-io -d /machine/peripheral/a/virtio-backend flush`
	if err := s.Execute(s.ctx(), "human-monitor-command", map[string]any{"command-line": flush}, nil); err != nil {
		s.t.Fatal(err)
	}
	top := len(s.patterns) - 1
	s.patterns[top] = append(s.patterns[top], w)
}

// format is that of a layer.
func (s *stack) format(layer int) string {
	return strings.TrimPrefix(filepath.Ext(s.layers[layer]), ".")
}

// holds fails unless a layer, with all that lies below it in the file's own
// words, reads as what was written until it was covered.
func (s *stack) holds(layer int, when string) {
	s.t.Helper()
	s.fileHolds(s.layers[layer], s.format(layer), s.patterns[layer], when)
}

func (s *stack) fileHolds(path, format string, writes []write, when string) {
	s.t.Helper()
	content := map[int]int{}
	for _, w := range writes {
		for i := range w.length {
			content[w.at+i] = w.value
		}
	}
	args := []string{"-U", "-r", "-f", format}
	for at, value := range content {
		args = append(args, "-c", fmt.Sprintf("read -P %d %dk 64k", value, at*64))
	}
	out, err := exec.Command(filepath.Join(s.tools, "qemu-io"), append(args, path)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "verification failed") {
		s.t.Errorf("%s: %s does not read as what was written to it: %v\n%.2000s", when, path, err, out)
	}
	if format == "qcow2" {
		if err := blockdev.Check(s.ctx(), path); err != nil {
			s.t.Errorf("%s: %v", when, err)
		}
	}
}

// cover puts an overlay on the disk: cut, settled, protected.
func (s *stack) cover() {
	s.t.Helper()
	launch := s.launchPath(s.format(0))
	n := len(s.layers) - 1
	dir := s.openDir(s.baseDir)
	defer func() { _ = dir.Close() }()
	if n == 0 {
		name := blockdev.LayerName(filepath.Base(launch), "base", s.format(0))
		if err := dir.Name(filepath.Base(launch), name); err != nil {
			s.t.Fatal(err)
		}
		s.layers[0] = filepath.Join(s.baseDir, name)
	}
	in := s.openDir(s.dir)
	defer func() { _ = in.Close() }()
	name := fmt.Sprintf("launch.o%d.qcow2", n+1)
	if err := in.CreateFile(name, s.layers[n]); err != nil {
		s.t.Fatal(err)
	}
	top := s.chain(s.graph(), "a")[0]
	o := blockdev.Overlay{
		Path: s.path(name), Node: fmt.Sprintf("vmsnap-o%d", n+1), Size: diskSize, BasePath: s.layers[n], BaseFormat: s.format(n),
		Options: s.options(),
	}
	if err := build(s.ctx(), s, in, o); err != nil {
		s.t.Fatal(err)
	}
	if err := blockdev.Cut(s.ctx(), s, []blockdev.Pair{{Base: top.Node.Name, Overlay: o.Node}}); err != nil {
		s.t.Fatal(err)
	}
	s.layers = append(s.layers, o.Path)
	s.ids = append(s.ids, o.Node)
	s.patterns = append(s.patterns, append([]write(nil), s.patterns[n]...))
	s.point(n + 1)
	if s.reopens && n == 0 {
		s.ids[0] = "vmsnap-base"
		if err := o.ReopenBacking(s.ctx(), s, s.ids[0], "", launch); err != nil {
			s.t.Fatal(err)
		}
	}
	s.flag(n, true)
}

func (s *stack) options() blockdev.Options {
	return blockdev.Options{Discard: "unmap", DetectZeroes: "on"}
}

// point makes the launch path lead to a layer, as a recipe does.
func (s *stack) point(layer int) {
	s.t.Helper()
	if err := s.tryPoint(layer); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) tryPoint(layer int) error {
	dir, in := s.openDir(s.baseDir), s.openDir(filepath.Dir(s.layers[layer]))
	defer func() { _ = dir.Close(); _ = in.Close() }()
	return errors.Join(dir.PointAt(filepath.Base(s.launchPath(s.format(0))), in, filepath.Base(s.layers[layer])), dir.Sync())
}

// leads fails unless the launch path leads to a layer.
func (s *stack) leads(layer int, when string) {
	s.t.Helper()
	if got := s.fileID(s.launchPath(s.format(0))); got != s.fileID(s.layers[layer]) {
		s.t.Errorf("%s: the launch path does not lead to %s", when, s.layers[layer])
	}
}

func (s *stack) fileID(path string) blockdev.FileID {
	s.t.Helper()
	info, err := blockdev.StatPath(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return info.FileID
}

// start starts QEMU by its unchanged command line.
func (s *stack) start() {
	s.t.Helper()
	_ = os.Remove(s.path("q"))
	s.cmd = exec.Command(s.binary, s.args...)
	var stderr strings.Builder
	s.cmd.Stderr = &stderr
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	cmd, ended := s.cmd, make(chan struct{})
	s.ended = ended
	go func() { _ = cmd.Wait(); close(ended) }()
	session, err := testvm.Connect(s.ctx(), ended, func(ctx context.Context) (*monitor.Session, error) {
		return monitor.Dial(ctx, s.path("q"))
	})
	if err != nil {
		s.end()
		s.t.Fatalf("QEMU: %v\n%s", err, &stderr)
	}
	s.Session = session
}

// end kills QEMU with SIGKILL.
func (s *stack) end() {
	_ = s.cmd.Process.Kill()
	<-s.ended
	if s.Session != nil {
		_ = s.Close()
	}
}

func (s *stack) restart() {
	s.t.Helper()
	s.end()
	s.start()
}

// node is the format node that QEMU has for a layer.
func (s *stack) node(layer int) string {
	s.t.Helper()
	id := s.fileID(s.layers[layer])
	for _, l := range s.chain(s.graph(), "a") {
		if info, err := blockdev.StatPath(l.Filename); err == nil && info.FileID == id {
			return l.Node.Name
		}
	}
	s.t.Fatalf("QEMU does not have %s open", s.layers[layer])
	return ""
}

func (s *stack) target(layer int) blockdev.Target {
	s.t.Helper()
	return blockdev.Target{Node: s.node(layer), File: s.fileID(s.layers[layer]), Options: s.options()}
}

// activeMerge is the merge of the active layer into the one below it.
func (s *stack) activeMerge() blockdev.ActiveMerge {
	s.t.Helper()
	top := len(s.layers) - 1
	s.flag(top-1, false)
	return blockdev.ActiveMerge{
		Job: blockdev.Job{ID: "vmsnap-merge"}, Top: s.node(top), Base: s.target(top - 1), PID: s.cmd.Process.Pid,
		BeforePivot: func(context.Context) error { return s.tryPoint(top - 1) },
	}
}

// shape is what a merge without effect must leave as it was.
func (s *stack) shape() map[string]string {
	s.t.Helper()
	shape := map[string]string{}
	g := s.graph()
	for name, n := range g.Nodes {
		shape[name] = fmt.Sprintf("%s %s read-only=%v backing=%s file=%s zeroes=%s cache=%v", n.Driver, n.Filename, n.ReadOnly,
			n.Child("backing"), n.Child("file"), n.DetectZeroes, n.Cache)
	}
	shape["root"] = s.drive(g, "a").Root
	return shape
}

func (s *stack) sameShape(before map[string]string, when string) {
	s.t.Helper()
	if diff := cmp.Diff(before, s.shape()); diff != "" {
		s.t.Errorf("%s the graph is not as it was: %s", when, diff)
	}
}

// noJob fails if a job is left.
func (s *stack) noJob() {
	s.t.Helper()
	var jobs []monitor.Job
	if err := s.Execute(s.ctx(), "query-jobs", nil, &jobs); err != nil {
		s.t.Fatal(err)
	}
	if len(jobs) > 0 {
		s.t.Errorf("jobs are left: %+v", jobs)
	}
}

// merged takes the active layer away from the stack, after a merge that the
// layer below must show.
func (s *stack) merged(when string) {
	s.t.Helper()
	top := len(s.layers) - 1
	gone := s.layers[top]
	s.patterns[top-1] = s.patterns[top]
	if err := os.Remove(s.layers[top]); err != nil {
		s.t.Fatal(err)
	}
	s.layers, s.ids, s.patterns = s.layers[:top], s.ids[:top], s.patterns[:top]
	s.leads(top-1, when)
	s.holds(top-1, when)
	s.noJob()
	c := s.chain(s.graph(), "a")
	if len(c) != top || s.fileID(c[0].Filename) != s.fileID(s.layers[top-1]) || c[0].Node.ReadOnly {
		s.t.Errorf("%s: QEMU has %d layers, %+v is active", when, len(c), c[0].Node)
	}
	for _, n := range s.graph().Nodes {
		if strings.Contains(n.Filename, gone) {
			s.t.Errorf("%s: QEMU still has a node of the top: %s %s", when, n.Name, n.Filename)
		}
	}
}

// within runs f and fails if it takes too long.
func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	begun := time.Now()
	f()
	if took := time.Since(begun); took > d {
		t.Errorf("%s took %v", what, took)
	}
}
