package discover

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRecordedCgroups(t *testing.T) {
	tests := []struct {
		file string
		want Cgroup
	}{
		{"v1", Cgroup{CgroupV1, "qemu@web.service", "system.slice", "/system.slice/qemu@web.service"}},
		{"v2", Cgroup{CgroupV2, `qemu@web\x2d1.service`, "system-qemu.slice",
			`/system.slice/system-qemu.slice/qemu@web\x2d1.service`}},
		{"hybrid", Cgroup{CgroupHybrid, `machine-qemu\x2d3\x2dweb.scope`, "machine.slice",
			`/machine.slice/machine-qemu\x2d3\x2dweb.scope`}},
		{"hybrid-old-only", Cgroup{CgroupHybrid, "100.scope", "qemu.slice", "/qemu.slice/100.scope"}},
	}
	for _, tt := range tests {
		data, err := os.ReadFile("testdata/cgroup/" + tt.file + ".cgroup")
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseCgroup(tt.want.Mode, data)
		if err != nil {
			t.Errorf("%s: %v", tt.file, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", tt.file, diff)
		}
	}
	if got, err := parseCgroup(CgroupV2, []byte("nonsense\n")); err == nil {
		t.Errorf("nonsense: got %+v, want an error", got)
	}
}

func TestUnitOf(t *testing.T) {
	tests := []struct{ path, unit, slice string }{
		{"/", "", ""},
		{"", "", ""},
		{"/init.scope", "", "-.slice"},
		{"/vm.service", "vm.service", "-.slice"},
		{"/system.slice/_cpu.service", "cpu.service", "system.slice"},
		{"/user.slice/user-1000.slice/session-3.scope", "", "user-1000.slice"},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/vm.service", "", "user-1000.slice"},
		{"/system.slice/session-broker.service", "session-broker.service", "system.slice"},
		{`/machine.slice/machine-qemu\x2d1\x2dweb.scope/libvirt/emulator`, `machine-qemu\x2d1\x2dweb.scope`, "machine.slice"},
		{"/../../system.slice/vm.service", "vm.service", "system.slice"},
		{"/docker/0123abcd", "", ""},
		{"/kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope", "cri-containerd-1.scope", "kubepods-pod1.slice"},
	}
	for _, tt := range tests {
		if unit, slice := unitOf(tt.path); unit != tt.unit || slice != tt.slice {
			t.Errorf("%s: %q in %q, want %q in %q", tt.path, unit, slice, tt.unit, tt.slice)
		}
	}
}

func TestOwnCgroup(t *testing.T) {
	c, err := readCgroup(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if c.Mode == CgroupNone || c.Path == "" {
		t.Errorf("got %+v, want a mode and a path", c)
	}
}
