package testvm

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestConfigRefusesWhatCannotWork(t *testing.T) {
	q := QEMU{Binary: "/bin/true"}
	for _, test := range []struct {
		name   string
		config Config
		want   string
	}{
		{"no QEMU", Config{}, "no QEMU"},
		{"a long directory", Config{QEMU: q, Dir: "/tmp/" + strings.Repeat("x", 100)}, "longer than 107 bytes"},
		{"a disk without a name", Config{QEMU: q, Disks: []Disk{{}}}, "needs a name"},
		{"a name with a comma", Config{QEMU: q, Disks: []Disk{{Name: "a,b"}}}, "needs a name"},
		{"a long label", Config{QEMU: q, Disks: []Disk{{Name: "seventeen--------"}}}, "16 bytes"},
		{"a format", Config{QEMU: q, Disks: []Disk{{Name: "a", Format: "vmdk"}}}, `unknown format "vmdk"`},
		{"a bus", Config{QEMU: q, Disks: []Disk{{Name: "a", Bus: "sata"}}}, `unknown bus "sata"`},
		{"a style", Config{QEMU: q, Disks: []Disk{{Name: "a", Style: "hda"}}}, `unknown style "hda"`},
		{"an I/O thread on IDE", Config{QEMU: q, Disks: []Disk{{Name: "a", Bus: IDE, IOThread: true}}}, "no I/O thread"},
		{"a blockdev without a format", Config{QEMU: q, Disks: []Disk{{Name: "a", Style: StyleBlockdev, NoDeclaredFormat: true}}}, "always has a format"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.config.Dir == "" {
				test.config.Dir = t.TempDir()
			}
			_, err := test.config.withDefaults()
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("withDefaults: %v, want %q", err, test.want)
			}
		})
	}
}

func TestDiskArgs(t *testing.T) {
	for _, test := range []struct {
		name string
		disk Disk
		want string
	}{
		{"default", Disk{},
			"-drive if=none,id=drive-d,file=/v,,m/d.qcow2,format=qcow2 -device virtio-blk-pci,id=d,drive=drive-d"},
		{"undeclared raw with limits", Disk{Format: Raw, NoDeclaredFormat: true, Throttle: true},
			"-drive if=none,id=drive-d,file=/v,,m/d.raw,throttling.iops-total=100000 -device virtio-blk-pci,id=d,drive=drive-d"},
		{"scsi with a thread", Disk{Bus: SCSI, IOThread: true},
			"-object iothread,id=iothread-d -device virtio-scsi-pci,id=scsi0,iothread=iothread-d " +
				"-drive if=none,id=drive-d,file=/v,,m/d.qcow2,format=qcow2 -device scsi-hd,bus=scsi0.0,id=d,drive=drive-d"},
		{"ide", Disk{Bus: IDE, Path: "/else"},
			"-drive if=none,id=drive-d,file=/else,format=qcow2 -device ide-hd,id=d,drive=drive-d"},
		{"blockdev with limits", Disk{Style: StyleBlockdev, Throttle: true},
			"-blockdev driver=file,node-name=d-file,filename=/v,,m/d.qcow2 " +
				"-blockdev driver=qcow2,node-name=d-format,file=d-file " +
				"-object throttle-group,id=d-limits,x-iops-total=100000 " +
				"-blockdev driver=throttle,node-name=d-throttle,throttle-group=d-limits,file=d-format " +
				"-device virtio-blk-pci,id=d,drive=d-throttle"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.disk.Name = "d"
			if err := test.disk.setDefaults("/v,m"); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(diskArgs([]Disk{test.disk}), " ")
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("arguments (-want +got):\n%s", diff)
			}
		})
	}
}

func TestVersionsWithoutDeps(t *testing.T) {
	t.Setenv("VMSNAP_CACHE", t.TempDir())
	if _, err := Versions(); err == nil || !strings.Contains(err.Error(), "make deps") {
		t.Errorf("Versions: %v", err)
	}
}
