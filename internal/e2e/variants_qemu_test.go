package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// layerShown and diskShown are parts of a VM as the command line shows it.
type layerShown struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	Format    string `json:"format"`
	Foreign   bool   `json:"foreign"`
	Immutable bool   `json:"immutable"`
}

type diskShown struct {
	Device       string       `json:"device"`
	LaunchPath   string       `json:"launch_path"`
	Throttled    bool         `json:"throttled"`
	NotCuttable  string       `json:"not_cuttable"`
	SettleNeeded bool         `json:"settle_needed"`
	Layers       []layerShown `json:"layers"`
}

// disksOf returns a VM's disks by their device ids.
func (h *host) disksOf(vm string) map[string]diskShown {
	h.t.Helper()
	var shown struct {
		Disks []diskShown `json:"disks"`
	}
	if err := json.Unmarshal([]byte(h.must("vm", "show", vm, "-o", "json")), &shown); err != nil {
		h.t.Fatal(err)
	}
	disks := map[string]diskShown{}
	for _, d := range shown.Disks {
		disks[d.Device] = d
	}
	return disks
}

// fileOf returns a file's inode and whether it is immutable.
func fileOf(t *testing.T, path string) (inode uint64, immutable bool) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Ino, flags&0x10 != 0 // FS_IMMUTABLE_FL
}

// sha256sum returns the hash of a file.
func sha256sum(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("sha256sum", path).Output()
	if err != nil {
		t.Fatalf("sha256sum %s: %v", path, err)
	}
	return strings.Fields(string(out))[0]
}

// session connects to a monitor of a guest.
func session(t *testing.T, socket string) *monitor.Session {
	t.Helper()
	s, err := monitor.Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// zoo is a disk of each kind. dir holds the foreign image.
func zoo(foreign string) []testvm.Disk {
	const small = 16 << 20
	return []testvm.Disk{
		{Name: "plain", Size: small},
		{Name: "undeclared", Size: small, Format: testvm.Raw, NoDeclaredFormat: true},
		{Name: "declared", Size: small, Format: testvm.Raw},
		{Name: "throttled", Size: small, Throttle: true},
		{Name: "threaded", Size: small, IOThread: true},
		{Name: "backed", Backing: foreign},
		{Name: "ide", Size: small, Bus: testvm.IDE},
		{Name: "scsi", Size: small, Bus: testvm.SCSI},
		{Name: "nodes", Size: small, Style: testvm.StyleBlockdev},
		{Name: "nodes-limited", Size: small, Style: testvm.StyleBlockdev, Throttle: true, IOThread: true},
	}
}

// foreignImage makes an image with a file system, as a template that many VMs
// share, in a directory of its own.
func foreignImage(t *testing.T, q testvm.QEMU) string {
	t.Helper()
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "template.raw"), filepath.Join(dir, "template.qcow2")
	if err := os.WriteFile(raw, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(raw, 16<<20); err != nil {
		t.Fatal(err)
	}
	sh(t, "mkfs.ext4", "-q", "-F", "-L", "backed", raw)
	img(t, q, "convert", "-f", "raw", "-O", "qcow2", raw, image)
	return image
}

// TestQEMUAZooOfDisks snapshots a guest that has a disk of each kind.
func TestQEMUAZooOfDisks(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		foreign := foreignImage(t, q)
		template := listing(t, filepath.Dir(foreign))
		hash := sha256sum(t, foreign)
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: zoo(foreign), ExtraQMP: 1})
		h := newHost(t, g)
		own := session(t, g.ExtraQMPSockets()[0])

		put(t, g, "before", "before")
		h.must("snapshot", "create", g.Name, "all", "--quiesce", "require")
		put(t, g, "after", "after")
		h.zooIsWhole(g, h.snapshot(g.Name+"/all"))
		h.limitsHold(g, own)

		h.partOfTheZoo(g)

		thawed(t, g)
		if _, flagged := fileOf(t, foreign); flagged || sha256sum(t, foreign) != hash || !slices.Equal(listing(t, filepath.Dir(foreign)), template) {
			t.Errorf("the foreign layer was touched: immutable %v, before %v, after %v", flagged, template, listing(t, filepath.Dir(foreign)))
		}
		if d := h.disksOf(g.Name)["backed"]; len(d.Layers) < 3 || !d.Layers[len(d.Layers)-1].Foreign || d.Layers[0].Foreign {
			t.Errorf("the disk with a foreign layer: %+v", d)
		}
		h.zooStartsAgain(g)
	})
}

// zooIsWhole verifies a snapshot of all disks.
func (h *host) zooIsWhole(g *testvm.Guest, s shown) {
	h.t.Helper()
	if s.Consistency != "filesystem" || len(s.Disks) != len(g.Disks()) || s.Quiesce.Frozen != len(g.Disks()) {
		h.t.Errorf("snapshot %+v", s)
	}
	raws := 0
	for _, w := range s.Warnings {
		if w.Code == "launch-format-raw" {
			raws++
			if w.Disk != "declared" {
				h.t.Errorf("warning %+v", w)
			}
		} else if w.Code != "backing-not-reopened" {
			h.t.Errorf("warning %+v", w)
		}
	}
	if raws != 1 {
		h.t.Errorf("%d disks are said to be launched with format=raw", raws)
	}
	for _, d := range s.Disks {
		checkImage(h.t, g.QEMU(), d.Path)
		image := raw(h.t, g.QEMU(), d)
		clean(h.t, image)
		if before, after := inImage(h.t, image, "before"), inImage(h.t, image, "after"); before != "before" || after != "" {
			h.t.Errorf("%s: %q was written before the cut, %q after it", d.Device, before, after)
		}
		if _, immutable := fileOf(h.t, d.Path); !immutable {
			h.t.Errorf("%s: the covered layer %s is not immutable", d.Device, d.Path)
		}
	}
}

// limitsHold verifies that the I/O limits are still those of the launch command.
func (h *host) limitsHold(g *testvm.Guest, own *monitor.Session) {
	h.t.Helper()
	var backends []struct {
		Device   string `json:"device"`
		Inserted struct {
			File string `json:"file"`
			IOPS int    `json:"iops"`
		} `json:"inserted"`
	}
	if err := own.Execute(h.ctx(), "query-block", nil, &backends); err != nil {
		h.t.Fatal(err)
	}
	for _, b := range backends {
		if b.Device == "drive-throttled" && b.Inserted.IOPS == 0 {
			h.t.Errorf("the disk has no limits any more: %+v", b)
		}
	}
	var nodes []struct {
		Name   string `json:"node-name"`
		Driver string `json:"drv"`
	}
	if err := own.Execute(h.ctx(), "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		h.t.Fatal(err)
	}
	if !slices.ContainsFunc(nodes, func(n struct {
		Name   string `json:"node-name"`
		Driver string `json:"drv"`
	}) bool {
		return n.Driver == "throttle" && n.Name == "nodes-limited-throttle"
	}) {
		h.t.Errorf("the throttle node is gone: %+v", nodes)
	}
	for id, d := range h.disksOf(g.Name) {
		if want := strings.Contains(id, "throttled") || strings.Contains(id, "limited"); d.Throttled != want {
			h.t.Errorf("disk %s is shown as throttled: %v", id, d.Throttled)
		}
	}
}

// partOfTheZoo takes snapshots of some disks. The others are not touched.
func (h *host) partOfTheZoo(g *testvm.Guest) {
	h.t.Helper()
	for _, args := range [][]string{{"--disk", "plain", "--disk", "nodes"}, {"--exclude", "declared", "--exclude", "ide"}} {
		was := h.disksOf(g.Name)
		name := strings.TrimLeft(args[0], "-")
		h.must(append([]string{"snapshot", "create", g.Name, name}, args...)...)
		now := h.disksOf(g.Name)
		for _, d := range h.snapshot(g.Name + "/" + name).Disks {
			want := !slices.Contains(args, d.Device)
			if args[0] == "--exclude" {
				want = !want
			}
			if d.Excluded != want {
				h.t.Errorf("%v: disk %s is excluded: %v", args, d.Device, d.Excluded)
			}
			if !d.Excluded {
				if len(now[d.Device].Layers) != len(was[d.Device].Layers)+1 {
					h.t.Errorf("%v: disk %s has no new layer", args, d.Device)
				}
				continue
			}
			before, after := was[d.Device].Layers[0], now[d.Device].Layers[0]
			if before.ID != after.ID || before.Path != after.Path || len(was[d.Device].Layers) != len(now[d.Device].Layers) {
				h.t.Errorf("%v: the excluded disk %s went from %+v to %+v", args, d.Device, before, after)
			}
			if _, immutable := fileOf(h.t, after.Path); immutable {
				h.t.Errorf("%v: the active layer of the excluded disk %s is immutable", args, d.Device)
			}
		}
		put(h.t, g, name, name)
	}
}

// zooStartsAgain kills QEMU and starts it by the unchanged command line.
func (h *host) zooStartsAgain(g *testvm.Guest) {
	h.t.Helper()
	g.Kill()
	h.eventually(eventLimit, "the disk that is launched as raw is settled", func() error {
		if h.disksOf(g.Name)["declared"].SettleNeeded {
			return errors.New("it is not")
		}
		return h.idle()
	})
	if err := g.Restart(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	for _, d := range g.Disks() {
		for _, file := range []string{"before", "after", "disk", "exclude"} {
			if got, err := g.ReadFile(h.ctx(), testvm.Mountpoint(d.Name)+"/"+file); err != nil || string(got) != file {
				h.t.Errorf("after the restart %s on %s holds %q, %v", file, d.Name, got, err)
			}
		}
	}
	h.await(g.Name, "running")
	h.must("snapshot", "create", g.Name, "again", "--quiesce", "require")
	thawed(h.t, g)
	for _, d := range h.snapshot(g.Name + "/again").Disks {
		image := raw(h.t, g.QEMU(), d)
		clean(h.t, image)
		if got := inImage(h.t, image, "exclude"); got != "exclude" {
			h.t.Errorf("%s: the snapshot after the restart holds %q", d.Device, got)
		}
	}
}

// stillWith makes a VM of one disk whose -drive has further options, and of
// further arguments. DIR in an argument is its directory.
func stillWith(t *testing.T, q testvm.QEMU, name, options string, args ...string) *still {
	t.Helper()
	vm := newStill(t, q, name, "root.qcow2")
	vm.kill()
	for i, a := range vm.args {
		if strings.HasPrefix(a, "file=") {
			vm.args[i] += options
		}
	}
	for _, a := range args {
		vm.args = append(vm.args, os.Expand(a, func(string) string { return vm.dir }))
	}
	return vm
}

// execute executes a command on the test's own monitor.
func (s *still) execute(command string, args, result any) {
	s.t.Helper()
	if err := s.own.Execute(s.t.Context(), command, args, result); err != nil {
		s.t.Fatal(err)
	}
}

// TestQEMUAnOverlayKeepsTheOptions gives a disk every option that the launch
// command may choose.
func TestQEMUAnOverlayKeepsTheOptions(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := stillWith(t, q, "options-"+q.Name, ",cache=none,aio=native,discard=unmap,detect-zeroes=unmap")
		vm.start()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "x", "--quiesce", "none")
		var nodes []struct {
			Name         string          `json:"node-name"`
			DetectZeroes string          `json:"detect_zeroes"`
			Cache        map[string]bool `json:"cache"`
			File         string          `json:"file"`
			Driver       string          `json:"drv"`
		}
		vm.execute("query-named-block-nodes", map[string]any{"flat": true}, &nodes)
		overlay := h.disksOf(vm.name)["root"].Layers[0].Path
		seen := 0
		for _, n := range nodes {
			if n.File != overlay {
				continue
			}
			seen++
			if !n.Cache["direct"] || n.Cache["no-flush"] || !n.Cache["writeback"] || n.Driver == "qcow2" && n.DetectZeroes != "unmap" {
				t.Errorf("node %+v", n)
			}
		}
		if seen != 2 {
			t.Errorf("%d nodes of the overlay in %+v", seen, nodes)
		}
		if calls := vm.traced("io_submit", func() { vm.write(2) }); !strings.Contains(calls, "io_submit(") {
			t.Errorf("aio=native is not kept: %q", calls)
		}
		blocks := func() int64 {
			fi, err := os.Stat(overlay)
			if err != nil {
				t.Fatal(err)
			}
			return fi.Sys().(*syscall.Stat_t).Blocks
		}
		written := blocks()
		vm.io("root", "discard 0 64k")
		if left := blocks(); left >= written {
			t.Errorf("discard=unmap is not kept: %d blocks, then %d", written, left)
		}
		vm.check("options")
	})
}

// io gives a disk one of qemu-io's commands.
func (s *still) io(disk, command string) {
	s.t.Helper()
	line := fmt.Sprintf(`qemu-io -d /machine/peripheral/%s/virtio-backend "%s"`, disk, command)
	s.execute("human-monitor-command", map[string]any{"command-line": line}, nil)
}

// traced returns the calls of a kind that QEMU makes while f runs.
func (s *still) traced(call string, f func()) string {
	s.t.Helper()
	out := filepath.Join(s.t.TempDir(), "calls")
	tracer := exec.Command("strace", "-f", "-q", "-o", out, "-e", "trace="+call, "-p", fmt.Sprint(s.cmd.Process.Pid))
	if err := tracer.Start(); err != nil {
		s.t.Fatal(err)
	}
	deadline := time.Now().Add(eventLimit)
	for {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
		if err != nil || time.Now().After(deadline) {
			s.t.Fatalf("the tracer is not attached: %v", err)
		}
		if !strings.Contains(string(status), "TracerPid:\t0\n") {
			break
		}
		<-time.After(5 * time.Millisecond)
	}
	f()
	_ = tracer.Process.Signal(syscall.SIGINT)
	_ = tracer.Wait()
	calls, err := os.ReadFile(out)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(calls)
}

// TestQEMUDisksThatCannotBeCut names each with its reason, and does not let
// them stand in the way of the others.
func TestQEMUDisksThatCannotBeCut(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := stillWith(t, q, "uncuttable-"+q.Name, "",
			"-drive", "driver=null-co,size=1M,if=none,id=drive-null", "-device", "virtio-blk-pci,drive=drive-null,id=null",
			"-drive", "file=${DIR}/temporary.qcow2,snapshot=on,if=none,id=drive-temporary,format=qcow2", "-device", "virtio-blk-pci,drive=drive-temporary,id=temporary",
			"-blockdev", "driver=qcow2,node-name=below,read-only=on,file.driver=file,file.filename=${DIR}/below.qcow2",
			"-blockdev", "driver=qcow2,node-name=above,backing=below,file.driver=file,file.filename=${DIR}/above.qcow2",
			"-device", "virtio-blk-pci,drive=above,id=above")
		for _, name := range []string{"temporary", "below"} {
			img(t, q, "create", "-q", "-f", "qcow2", vm.dir+"/"+name+".qcow2", "1M")
		}
		img(t, q, "create", "-q", "-f", "qcow2", "-b", vm.dir+"/below.qcow2", "-F", "qcow2", vm.dir+"/above.qcow2")
		vm.start()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		reasons := map[string]string{
			"null": "null-co", "temporary": "snapshot=on", "above": "names the backing node",
		}
		before := h.world(vm.own, vm.dir)
		shown := h.disksOf(vm.name)
		exclude := []string{}
		for id, reason := range reasons {
			if !strings.Contains(shown[id].NotCuttable, reason) {
				t.Errorf("disk %s: %q is not in %q", id, reason, shown[id].NotCuttable)
			}
			h.fails(14, reason, "snapshot", "create", vm.name, "x", "--quiesce", "none", "--disk", id, "--disk", "root")
			exclude = append(exclude, "--exclude", id)
		}
		if shown["root"].NotCuttable != "" {
			t.Errorf("disk root: %s", shown["root"].NotCuttable)
		}
		h.fails(14, "", "snapshot", "create", vm.name, "x", "--quiesce", "none")
		h.unchanged(vm, "x", before, "refused")
		vm.io("root", "write -P 1 0 64k")
		h.must(append([]string{"snapshot", "create", vm.name, "x", "--quiesce", "none"}, exclude...)...)
		vm.io("root", "write -P 2 0 64k")
		h.fails(3, "", "snapshot", "create", vm.name, "y", "--quiesce", "none", "--allow-partial")
		for name, value := range map[string]int{"x": 1, "y": 2} {
			s := h.snapshot(vm.name + "/" + name)
			for _, d := range s.Disks {
				if d.Excluded != (d.Device != "root") {
					t.Errorf("%s: disk %+v", name, d)
				}
				if !d.Excluded {
					vm.imageHolds(d, value, name)
				}
			}
			if len(s.Disks) != 4 || s.Partial != (name == "y") {
				t.Errorf("%+v", s)
			}
		}
		checkImage(t, q, h.disksOf(vm.name)["root"].Layers[0].Path)
	})
}

// TestQEMUADiskPluggedInLater is not in the launch command.
func TestQEMUADiskPluggedInLater(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "plugged-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		for _, format := range []string{"qcow2", "raw"} {
			id := "late-" + format
			img(t, q, "create", "-q", "-f", format, vm.dir+"/"+id+"."+format, "8M")
			vm.execute("blockdev-add", map[string]any{"driver": format, "node-name": id + "-node",
				"file": map[string]any{"driver": "file", "filename": vm.dir + "/" + id + "." + format}}, nil)
			vm.execute("device_add", map[string]any{"driver": "virtio-blk-pci", "drive": id + "-node", "id": id}, nil)
			vm.disks = append(vm.disks, id)
		}
		for i := 1; i < 6; i += 2 {
			vm.write(i)
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", i), "--quiesce", "none")
			vm.write(i + 1)
		}
		for i := 1; i < 6; i += 2 {
			s := h.snapshot(vm.name + "/" + fmt.Sprint("s", i))
			if len(s.Disks) != 3 {
				t.Errorf("snapshot %+v", s)
			}
			for _, d := range s.Disks {
				vm.imageHolds(d, i, s.Name)
			}
		}
		vm.check("plugged in")
		vm.kill()
		for id, d := range h.disksOf(vm.name) {
			vm.imageHolds(snapshotDisk{Device: id, Path: d.LaunchPath, Format: "qcow2"}, 6, "the launch path")
		}
	})
}

// TestQEMUNamesThatNobodyChose has a device without an id on nodes, and a
// launch path that is relative to QEMU's directory.
func TestQEMUNamesThatNobodyChose(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "nameless-"+q.Name, "root.qcow2")
		vm.kill()
		img(t, q, "create", "-q", "-f", "qcow2", vm.dir+"/nodes.qcow2", "8M")
		for i, a := range vm.args {
			vm.args[i] = strings.Replace(a, "file="+vm.dir+"/", "file=", 1)
		}
		vm.args = append([]string{"-C", vm.dir, q.Binary}, append(vm.args,
			"-blockdev", "driver=qcow2,node-name=nodes,file.driver=file,file.filename=nodes.qcow2", "-device", "virtio-blk-pci,drive=nodes")...)
		vm.q.Binary = "/usr/bin/env"
		vm.start()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		write := func(value int) {
			vm.io("root", fmt.Sprintf("write -f -P %d 0 64k", value))
			line := fmt.Sprintf(`qemu-io -d /machine/peripheral-anon/device[0]/virtio-backend "write -f -P %d 0 64k"`, value)
			vm.execute("human-monitor-command", map[string]any{"command-line": line}, nil)
		}
		for i := 1; i < 8; i += 2 {
			h.await(vm.name, "paused")
			write(i)
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", i), "--quiesce", "none")
			write(i + 1)
			if i == 3 {
				vm.kill()
				vm.start()
			}
			h.eventually(eventLimit, "the disks are known", func() error {
				if known := h.disksOf(vm.name); len(known) != 2 || known["root"].NotCuttable != "" || known["nodes"].NotCuttable != "" {
					return fmt.Errorf("%+v", known)
				}
				return nil
			})
			disks := h.disksOf(vm.name)
			for _, id := range []string{"root", "nodes"} {
				d := disks[id]
				if len(disks) != 2 || d.NotCuttable != "" || d.LaunchPath != vm.dir+"/"+id+".qcow2" || len(d.Layers) < 2 || d.Layers[0].ID == "" {
					t.Fatalf("disk %s: %+v of %+v", id, d, disks)
				}
				vm.imageHolds(snapshotDisk{Device: id, Path: d.LaunchPath, Format: "qcow2"}, i+1, "the launch path")
			}
		}
		for i := 1; i < 8; i += 2 {
			for _, d := range h.snapshot(fmt.Sprintf("%s/s%d", vm.name, i)).Disks {
				vm.imageHolds(d, i, fmt.Sprint("snapshot ", i))
			}
		}
		vm.check("nameless")
	})
}
