package memdump

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// ramBlocks72 and ramBlocks100 are what QEMU 7.2 and 10.0 list.
const (
	ramBlocks72 = "              Block Name    PSize              Offset               Used              Total\r\n" +
		"                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n" +
		"    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000\r\n" +
		"                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000\r\n"
	ramBlocks100 = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n" +
		"                  pc.ram    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f7213e00000  rw\r\n" +
		"  0000:00:02.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 0x0000000001000000 0x00007f726ce00000  ro\r\n"
)

func TestSumBlocks(t *testing.T) {
	for _, c := range []struct {
		list string
		want uint64
	}{
		{ramBlocks72, 0x4000000 + 0x20000 + 0x40000},
		{ramBlocks100, 0x4000000 + 0x1000000},
		{"", 0},
		{"no such command", 0},
		{strings.Replace(ramBlocks72, "0x0000000004000000 0x0000000004000000", "0xffffffffffffffff 0xffffffffffffffff", 1), 0},
		{" 4 KiB  0x0 0x10000000000000000 0x0", 0},
	} {
		if got := sumBlocks(c.list); got != c.want {
			t.Errorf("%#x, want %#x in\n%s", got, c.want, c.list)
		}
	}
}

func FuzzSumBlocks(f *testing.F) {
	f.Add(ramBlocks72)
	f.Add(ramBlocks100)
	f.Fuzz(func(t *testing.T, list string) {
		if n := sumBlocks(list); n > maxBlocks {
			t.Errorf("%#x", n)
		}
	})
}

func TestExternalNet(t *testing.T) {
	for list, want := range map[string]string{
		"virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n" +
			" \\ n0: index=0,type=vhost-user,vhost-user0 to chr0\r\n": "n0",
		"net1: index=0,type=vhost-vdpa,vhost-vdpa0\r\n":                         "net1",
		" \\ n0: index=0,type=user,net=10.0.2.0,restrict=off\r\n":               "",
		" \\ n0: index=0,type=tap,ifname=t0,script=/x: index=0,type=vhost-user": "",
	} {
		got := ""
		if m := externalNet.FindStringSubmatch(list); m != nil {
			got = m[1]
		}
		if got != want {
			t.Errorf("%q, want %q in %q", got, want, list)
		}
	}
}

func TestStatusFields(t *testing.T) {
	fields := statusFields([]byte("Rss:              123 kB\nUid:\t0\t1\t2\t3\nCapEff:\t0000000000080000\nnonsense\nHuge: 1 MB\nBig: 99999999999999999999 kB\n"))
	if got := kilobytes(fields["Rss"]); got != 123<<10 {
		t.Errorf("Rss %d", got)
	}
	for _, name := range []string{"Huge", "Big", "none"} {
		if got := kilobytes(fields[name]); got != 0 {
			t.Errorf("%s: %d", name, got)
		}
	}
	if ok, err := hasCapability(fields, 19); !ok || err != nil {
		t.Errorf("CAP_SYS_PTRACE: %v, %v", ok, err)
	}
	if ok, err := hasCapability(fields, 21); ok || err != nil {
		t.Errorf("CAP_SYS_ADMIN: %v, %v", ok, err)
	}
	if _, err := hasCapability(nil, 19); err == nil {
		t.Error("no capabilities are no error")
	}
}

func TestMayOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		mode     os.FileMode
		uid, gid int
		status   string
		want     bool
	}{
		{0o600, 5, 6, "Uid:\t0\t5\t0\t0\nGid:\t0\t9\t0\t0\nGroups:\t\n", true},
		{0o600, 5, 6, "Uid:\t5\t4\t5\t5\nGid:\t6\t9\t6\t6\nGroups:\t\n", false},
		{0o660, 5, 6, "Uid:\t4\t4\t4\t4\nGid:\t9\t6\t9\t9\nGroups:\t\n", true},
		{0o660, 5, 6, "Uid:\t4\t4\t4\t4\nGid:\t9\t9\t9\t9\nGroups:\t7 6\n", true},
		{0o640, 5, 6, "Uid:\t4\t4\t4\t4\nGid:\t9\t9\t9\t9\nGroups:\t7 6\n", false},
		{0o606, 5, 6, "Uid:\t4\t4\t4\t4\nGid:\t9\t9\t9\t9\nGroups:\t6\n", false}, // as the kernel has it
		{0o666, 5, 6, "Uid:\t4\t4\t4\t4\nGid:\t9\t9\t9\t9\n", true},
		{0o066, 5, 6, "Uid:\t5\t5\t5\t5\nGid:\t9\t9\t9\t9\n", false},
	} {
		if err := os.Chown(path, c.uid, c.gid); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		if got := mayOpen(path, statusFields([]byte(c.status))); got != c.want {
			t.Errorf("mode %o, %q: %v", c.mode, c.status, got)
		}
	}
	if mayOpen(path+"x", nil) {
		t.Error("what is not there can be opened")
	}
}
