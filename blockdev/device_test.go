package blockdev

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// loop makes a file a block device.
func loop(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("losetup", "-f", "--show", file).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", device).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v\n%s", err, out)
		}
	})
	return device
}

// device makes a block device of a size in bytes.
func device(t *testing.T, size int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	write(t, file, "")
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	return loop(t, file)
}

func TestSetReadOnly(t *testing.T) {
	dev := device(t, 1<<20)
	for _, on := range []bool{false, true, true, false} {
		if err := SetReadOnly(dev, on); err != nil {
			t.Fatal(err)
		}
		if is, err := ReadOnly(dev); err != nil || is != on {
			t.Errorf("read-only %v, %v", is, err)
		}
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte("x")); errors.Is(err, unix.EPERM) != on {
			t.Errorf("read-only %v: write: %v", on, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := SetReadOnly(filepath.Join(t.TempDir(), "missing"), true); err == nil {
		t.Error("a device that is not there became read-only")
	}
}

func TestDeviceID(t *testing.T) {
	one, other := device(t, 1<<20), device(t, 1<<20)
	ids := map[string]bool{}
	for _, dev := range []string{one, other} {
		id, err := DeviceID(dev)
		if err != nil || !strings.HasPrefix(id, "loop/backing_file /") {
			t.Errorf("%s is known by %q, %v", dev, id, err)
		}
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(dev, link); err != nil {
			t.Fatal(err)
		}
		if by, err := DeviceID(link); err != nil || by != id {
			t.Errorf("by a link: %q, %v", by, err)
		}
		ids[id] = true
	}
	if len(ids) != 2 {
		t.Errorf("two devices are known by %v", ids)
	}
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "")
	if id, err := DeviceID(file); err != nil || id != "" {
		t.Errorf("a file is known by %q, %v", id, err)
	}
}

// TestDeviceIDFromSysfs reads directories that look like sysfs.
func TestDeviceIDFromSysfs(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  string
	}{
		"a logical volume": {map[string]string{"dm/uuid": "LVM-abc\n"}, "dm/uuid LVM-abc"},
		"a SCSI disk":      {map[string]string{"device/wwid": "naa.5000\n"}, "device/wwid naa.5000"},
		"no serial":        {map[string]string{"serial": "\n", "wwid": "eui.1"}, "wwid eui.1"},
		"anonymous":        {map[string]string{"serial": "\n"}, "number 7:9 at boot "},
	} {
		sys := t.TempDir()
		for file, text := range c.files {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(sys, file)), 0o755); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(sys, file), text)
		}
		if id, err := deviceID(sys, "7:9"); err != nil || !strings.HasPrefix(id, c.want) {
			t.Errorf("%s is known by %q, %v", name, id, err)
		}
	}
	disk := t.TempDir()
	part := filepath.Join(disk, "sda1")
	if err := os.Mkdir(part, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(disk, "wwid"), "eui.1")
	write(t, filepath.Join(part, "partition"), "1")
	write(t, filepath.Join(part, "start"), "2048")
	if id, err := deviceID(part, "8:1"); err != nil || id != "wwid eui.1 from 2048" {
		t.Errorf("a partition is known by %q, %v", id, err)
	}
}

// tool runs a program of QEMU's.
func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// overlaysOn lays two overlays on an image: the second covers some of the first.
func overlaysOn(t *testing.T, base string) (newestFirst []string) {
	t.Helper()
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one, and.qcow2"), filepath.Join(dir, "two.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", one)
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 64k 1200k", "-c", "write -z 2M 128k", "-c", "write -P 9 3000k 72k", one)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", one, "-F", "qcow2", two)
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 6 70k 4k", "-c", "write -z 256k 64k", "-c", "write -P 7 2M 4k", two)
	return []string{two, one}
}

func TestWriteBack(t *testing.T) {
	const size = 3<<20 + 4096 // its last cluster is cut short
	dev := device(t, size)
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 3076k", dev)
	overlays := overlaysOn(t, dev)
	want := filepath.Join(t.TempDir(), "want")
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlays[0], want)
	var last uint64
	for range 2 { // it can be done again
		err := WriteBack(t.Context(), overlays, dev, size, func(done, total uint64) {
			if done < last && done != 0 && last != total || total != size {
				t.Errorf("%d of %d after %d", done, total, last)
			}
			last = done
		})
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(dev)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, []byte(read(t, want))) {
			t.Error("the device does not hold what the chain holds")
		}
	}
	if last != size {
		t.Errorf("it ended at %d", last)
	}
}

func TestWriteBackRefuses(t *testing.T) {
	dev := device(t, 4<<20)
	overlays := overlaysOn(t, dev)
	none := func(uint64, uint64) {}
	if err := WriteBack(t.Context(), overlays, device(t, 8<<20), 4<<20, none); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("a device of another size: %v", err)
	}
	packed := filepath.Join(t.TempDir(), "packed.qcow2")
	tool(t, "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", overlays[0], packed)
	if err := WriteBack(t.Context(), []string{packed}, dev, 4<<20, none); err == nil || !strings.Contains(err.Error(), "as it is") {
		t.Errorf("compressed clusters: %v", err)
	}
	if err := SetReadOnly(dev, true); err != nil {
		t.Fatal(err)
	}
	if err := WriteBack(t.Context(), overlays, dev, 4<<20, none); !errors.Is(err, unix.EPERM) {
		t.Errorf("a device that is read-only: %v", err)
	}
	if err := SetReadOnly(dev, false); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken")
	write(t, broken, "no qcow2")
	var img *ImgError
	if err := WriteBack(t.Context(), []string{broken}, dev, 4<<20, none); !errors.As(err, &img) {
		t.Errorf("no qcow2: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := WriteBack(ctx, overlays, dev, 4<<20, none); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestRebase(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base")
	write(t, base, strings.Repeat("x", 4<<20))
	overlays := overlaysOn(t, base)
	saved := filepath.Join(t.TempDir(), "saved.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, saved)
	before, after := filepath.Join(t.TempDir(), "before"), filepath.Join(t.TempDir(), "after")
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlays[0], before)
	lock, err := LockNoWriters(overlays[1])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	for range 2 {
		if err := Rebase(t.Context(), overlays[1], saved, "qcow2"); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(base); err != nil {
		t.Fatal(err)
	}
	if h, err := ReadHeaderFile(overlays[1]); err != nil || h.Backing != saved || h.BackingFormat != "qcow2" {
		t.Errorf("header %+v, %v", h, err)
	}
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlays[0], after)
	if read(t, before) != read(t, after) {
		t.Error("the content has changed")
	}
}

func FuzzVisitExtents(f *testing.F) {
	f.Add([]byte(`[{ "start": 0, "length": 65536, "depth": 2, "present": true, "zero": true, "data": false, "offset": 0},` +
		`{ "start": 65536, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "compressed": false}]`))
	f.Add([]byte("[]"))
	f.Add([]byte(`[{"depth":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		err := visitExtents(bytes.NewReader(data), func(e extent) error {
			n++
			if e.Depth < 0 {
				t.Errorf("an extent at depth %d", e.Depth)
			}
			return nil
		})
		if err == nil && !bytes.Contains(data, []byte("]")) {
			t.Errorf("%d extents of a list that does not end", n)
		}
	})
}
