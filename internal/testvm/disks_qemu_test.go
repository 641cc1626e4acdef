package testvm_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// Every kind of disk boots, is written, and keeps what was written when QEMU is
// killed and started again.
func TestQEMUDiskKinds(t *testing.T) {
	for _, kind := range []struct {
		name  string
		disks []testvm.Disk
	}{
		{"drive", []testvm.Disk{
			{Name: "plain"},
			{Name: "raw", Format: testvm.Raw},
			{Name: "undeclared", NoDeclaredFormat: true},
			{Name: "throttled", Throttle: true},
			{Name: "threaded", IOThread: true},
			{Name: "large", Size: 1 << 30},
		}},
		{"blockdev", []testvm.Disk{
			{Name: "plain", Style: testvm.StyleBlockdev},
			{Name: "raw", Style: testvm.StyleBlockdev, Format: testvm.Raw},
			{Name: "throttled", Style: testvm.StyleBlockdev, Throttle: true, IOThread: true},
			{Name: "scsi", Style: testvm.StyleBlockdev, Bus: testvm.SCSI},
			{Name: "ide", Style: testvm.StyleBlockdev, Bus: testvm.IDE},
		}},
		{"scsi and ide", []testvm.Disk{
			{Name: "scsi", Bus: testvm.SCSI, Throttle: true},
			{Name: "threaded", Bus: testvm.SCSI, IOThread: true},
			{Name: "ide", Bus: testvm.IDE},
			{Name: "raw", Bus: testvm.IDE, Format: testvm.Raw},
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
				g := testvm.Start(t, testvm.Config{QEMU: q, Disks: kind.disks})
				for _, d := range g.Disks() {
					if err := g.WriteFile(soon(t), testvm.Mountpoint(d.Name)+"/file", []byte(d.Name)); err != nil {
						t.Error(err)
					}
				}
				if err := g.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
				for _, d := range g.Disks() {
					got, err := g.ReadFile(soon(t), testvm.Mountpoint(d.Name)+"/file")
					if err != nil || string(got) != d.Name {
						t.Errorf("disk %s holds %q, %v", d.Name, got, err)
					}
				}
			})
		})
	}
}

func TestQEMUDisksWithoutFilesystemAndWithBacking(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		first := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{
			{Name: "data"},
			{Name: "blank", NoFilesystem: true, Size: 1 << 20},
		}})
		if err := first.WriteFile(soon(t), "/mnt/data/file", []byte("below")); err != nil {
			t.Fatal(err)
		}
		if out, err := first.Exec(soon(t), "blockdev --getsize64 /dev/vdb; ls /mnt"); err != nil || out != "1048576\ndata\n" {
			t.Errorf("the blank disk's size and the mounts are %q, %v", out, err)
		}
		if err := first.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		base := first.Disk("data").Path
		second := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{{Name: "data", Backing: base}}})
		if got, err := second.ReadFile(soon(t), "/mnt/data/file"); err != nil || string(got) != "below" {
			t.Errorf("the overlay shows %q, %v", got, err)
		}
		if out, err := exec.Command(q.Img, "check", "-q", "-U", base).CombinedOutput(); err != nil {
			t.Errorf("check of %s: %v: %s", filepath.Base(base), err, out)
		}
	})
}
