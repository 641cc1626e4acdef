package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// still is a VM whose guest never runs. It starts in a fraction of a second,
// and the test writes to its disks through QEMU as the guest would, so that it
// can be killed and started again many times.
type still struct {
	t     *testing.T
	q     testvm.QEMU
	name  string
	uuid  string
	dir   string
	disks []string // device ids

	further []string // directories of its layers beside dir

	args  []string
	cmd   *exec.Cmd
	ended chan struct{}
	own   *monitor.Session // the second monitor, beside the daemon's
}

// newStill makes a VM with a disk for each "NAME.FORMAT".
func newStill(t *testing.T, q testvm.QEMU, name string, files ...string) *still {
	t.Helper()
	dir, err := os.MkdirTemp("", "vs-")
	if err != nil {
		t.Fatal(err)
	}
	s := &still{t: t, q: q, name: name, dir: dir, uuid: newUUID(t)}
	s.args = append(append([]string{}, q.Args...), "-name", name, "-uuid", s.uuid, "-S", "-display", "none", "-nodefaults",
		"-machine", "pc,accel=tcg", "-m", "16", "-qmp", "unix:"+dir+"/q1,server=on,wait=off", "-qmp", "unix:"+dir+"/q2,server=on,wait=off")
	for _, file := range files {
		id, format, _ := strings.Cut(file, ".")
		img(t, q, "create", "-q", "-f", format, dir+"/"+file, "8M")
		s.disks = append(s.disks, id)
		s.args = append(s.args, "-drive", fmt.Sprintf("file=%s/%s,if=none,id=drive-%s,format=%s", dir, file, id, format),
			"-device", "virtio-blk-pci,drive=drive-"+id+",id="+id)
	}
	t.Cleanup(func() {
		s.kill()
		if out, err := exec.Command("chattr", "-R", "-i", dir).CombinedOutput(); err != nil && !strings.Contains(string(out), "not supported") {
			t.Errorf("chattr: %v\n%s", err, out)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s.start()
	return s
}

func newUUID(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// start starts QEMU by its unchanged command line and says whether it came up.
func (s *still) tryStart() error {
	_ = os.Remove(s.dir + "/q1")
	_ = os.Remove(s.dir + "/q2")
	var stderr strings.Builder
	cmd := exec.Command(s.q.Binary, s.args...)
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	own, err := testvm.Connect(ctx, ended, func(ctx context.Context) (*monitor.Session, error) {
		return monitor.Dial(ctx, s.dir+"/q2")
	})
	if err != nil {
		_ = cmd.Process.Kill()
		<-ended
		return fmt.Errorf("QEMU: %w\n%s", err, &stderr)
	}
	s.cmd, s.ended, s.own = cmd, ended, own
	return nil
}

func (s *still) start() {
	s.t.Helper()
	deadline := time.Now().Add(eventLimit)
	for {
		err := s.tryStart()
		if err == nil {
			return
		}
		// A start that comes too early fails rather than corrupts.
		early := strings.Contains(err.Error(), `Failed to get "write" lock`) || strings.Contains(err.Error(), "No such file or directory")
		if !early || time.Now().After(deadline) {
			s.t.Fatal(err)
		}
	}
}

// kill kills QEMU with SIGKILL.
func (s *still) kill() {
	if s.cmd == nil {
		return
	}
	_ = s.own.Close()
	_ = s.cmd.Process.Kill()
	<-s.ended
	s.cmd = nil
}

// write writes a value to each disk, durably, as the guest would.
func (s *still) write(value int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	for _, d := range s.disks {
		// HMP's qemu-io reports to QEMU's standard output, so what it did is
		// read back from the image.
		line := fmt.Sprintf(`qemu-io -d /machine/peripheral/%s/virtio-backend "write -f -P %d 0 64k"`, d, value)
		if err := s.own.Execute(ctx, "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
			s.t.Fatal(err)
		}
	}
	s.holds(value, "just written")
}

// holds verifies that each disk of the running VM holds a value, in the layer
// that QEMU has active.
func (s *still) holds(value int, when string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	g, err := blockdev.ReadGraph(ctx, s.own)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, d := range g.Drives() {
		chain, err := g.Chain(d)
		if err != nil {
			s.t.Fatal(err)
		}
		s.imageHolds(snapshotDisk{Device: d.Device, Path: chain[0].Filename, Format: chain[0].Node.Driver}, value, when)
	}
}

// imageHolds verifies that a layer, with all below it, holds a value.
func (s *still) imageHolds(d snapshotDisk, value int, when string) {
	s.t.Helper()
	if err := s.reads(d, value); err != nil {
		s.t.Errorf("%s: %v", when, err)
	}
}

// reads fails unless a layer, with all below it, holds a value.
func (s *still) reads(d snapshotDisk, value int) error {
	args := []string{"-U", "-r", "-f", d.Format, "-c", fmt.Sprintf("read -P %d 0 64k", value), d.Path}
	out, err := exec.Command(s.q.Tool("qemu-io"), args...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "verification failed") {
		return fmt.Errorf("layer %s does not hold %d: %v\n%s", d.Path, value, err, out)
	}
	return nil
}

// images returns the paths of the VM's images.
func (s *still) images() []string {
	s.t.Helper()
	var paths []string
	for _, dir := range append([]string{s.dir}, s.further...) {
		for _, f := range files(s.t, dir) {
			if f != ".vmsnap" {
				paths = append(paths, dir+"/"+f)
			}
		}
	}
	return paths
}

// check verifies all qcow2 files of the VM.
func (s *still) check(when string) {
	s.t.Helper()
	for _, f := range s.images() {
		if strings.HasSuffix(f, ".qcow2") {
			if out, err := exec.Command(s.q.Img, "check", "-q", "-U", "-f", "qcow2", f).CombinedOutput(); err != nil {
				s.t.Errorf("%s: qemu-img check %s: %v\n%s", when, f, err, out)
			}
		}
	}
}
