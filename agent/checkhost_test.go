package agent

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// allCapabilities are those of the packaged unit.
const allCapabilities = 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_CHOWN | 1<<unix.CAP_FOWNER |
	1<<unix.CAP_LINUX_IMMUTABLE | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_NICE

// goodHost is one at which everything works.
func goodHost() hostFacts {
	return hostFacts{
		release: "6.12.3-amd64", capabilities: allCapabilities, uid: 990, userFaults: true, stateDir: "/var/lib/vmsnap",
		find:      func(p string) (string, error) { return "/usr/bin/" + p, nil },
		room:      func(string) (hostRoom, error) { return hostRoom{Free: 1 << 40, Kind: "ext4", Flags: true}, nil },
		discovery: Discovery{Source: "netlink"},
		vms: []VMView{{
			ID: "1", Name: "web", State: Running, Process: &ProcessView{PID: 7, QEMUVersion: "7.2.22"}, GuestAgent: GuestAgentView{Presence: Connected},
			Disks: []DiskView{{Device: "root", Layers: []LayerView{{Path: "/srv/vm/web/root.qcow2"}}}},
		}},
		owners: map[int]int{7: 64055},
	}
}

func TestHostThatWorks(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range goodHost().check() {
		seen[c.Code] = true
		if c.State != HostWorks || c.Message == "" || c.Hint != "" {
			t.Errorf("%+v", c)
		}
	}
	if len(seen) != 12 {
		t.Errorf("%d things were looked at: %v", len(seen), seen)
	}
}

func TestHostAilments(t *testing.T) {
	missing := func(string) (string, error) { return "", exec.ErrNotFound }
	space := func(r hostRoom, err error) func(string) (hostRoom, error) {
		return func(string) (hostRoom, error) { return r, err }
	}
	for name, c := range map[string]struct {
		ail   func(*hostFacts)
		code  string
		state HostState
		tells string // a part of the message or the hint
	}{
		"old kernel":        {func(f *hostFacts) { f.release = "4.19.0" }, hostKernel, HostBroken, "5.10"},
		"no huge pages":     {func(f *hostFacts) { f.release = "5.15.0-generic" }, hostKernel, HostLimited, "6.1"},
		"old QEMU":          {func(f *hostFacts) { f.vms[0].Process.QEMUVersion = "6.2.0" }, hostQEMU, HostBroken, "web (6.2.0)"},
		"no QEMU":           {func(f *hostFacts) { f.vms, f.find = nil, missing }, hostQEMU, HostLimited, "qemu-system-x86"},
		"no qemu-img":       {func(f *hostFacts) { f.find = missing }, hostQEMUImg, HostBroken, "qemu-utils"},
		"scanning":          {func(f *hostFacts) { f.discovery = Discovery{"scan", "no netlink"} }, hostProcessEvents, HostLimited, "no netlink"},
		"VMs of others":     {func(f *hostFacts) { f.capabilities = 0 }, hostOtherUsers, HostBroken, "web"},
		"VMs of one user":   {func(f *hostFacts) { f.capabilities, f.owners = 0, map[int]int{7: 990} }, hostOtherUsers, HostLimited, "unprivileged.conf"},
		"no immutable flag": {func(f *hostFacts) { f.capabilities = 0 }, hostImmutableFlag, HostLimited, "CAP_LINUX_IMMUTABLE"},
		"no collapsing":     {func(f *hostFacts) { f.capabilities = 0 }, hostHugePages, HostLimited, "unprivileged.conf"},
		"no write tracking": {func(f *hostFacts) { f.userFaults = false }, hostWriteTracking, HostLimited, "vm.unprivileged_userfaultfd=1"},
		"memory key is gone": {func(f *hostFacts) {
			f.keyError = fault.New(fault.Failed, "the key cannot be used: no such file").WithHint("put the key right")
		}, hostMemoryKey, HostBroken, "put the key right"},
		"catalog in memory":   {func(f *hostFacts) { f.room = space(hostRoom{Free: 1 << 40, Kind: "tmpfs"}, nil) }, hostStateDirectory, HostLimited, "state-dir"},
		"catalog on NFS":      {func(f *hostFacts) { f.room = space(hostRoom{Free: 1 << 40, Kind: "nfs"}, nil) }, hostStateDirectory, HostLimited, "nfs"},
		"catalog out of room": {func(f *hostFacts) { f.room = space(hostRoom{Free: 1 << 20, Kind: "ext4"}, nil) }, hostStateDirectory, HostLimited, "make space"},
		"catalog is gone":     {func(f *hostFacts) { f.room = space(hostRoom{}, errors.New("no such directory")) }, hostStateDirectory, HostBroken, "no such directory"},
		"libvirt": {func(f *hostFacts) {
			f.vms[0].Problems = []Problem{{"libvirt-managed", "libvirt manages this VM", "use libvirt"}}
		}, hostSockets, HostBroken, "use libvirt"},
		"no agent":        {func(f *hostFacts) { f.vms[0].GuestAgent.Presence = NoChannel }, hostSockets, HostLimited, "org.qemu.guest_agent.0"},
		"storage full":    {func(f *hostFacts) { f.room = space(hostRoom{Free: 1 << 20, Kind: "xfs", Flags: true}, nil) }, hostStorage, HostBroken, "/srv/vm/web"},
		"storage no flag": {func(f *hostFacts) { f.room = space(hostRoom{Free: 1 << 40, Kind: "nfs"}, nil) }, hostStorage, HostLimited, "immutable"},
		"storage hidden":  {func(f *hostFacts) { f.room = space(hostRoom{}, errors.New("permission denied")) }, hostStorage, HostBroken, "ProtectHome=no"},
	} {
		t.Run(name, func(t *testing.T) {
			f := goodHost()
			c.ail(&f)
			found := false
			for _, check := range f.check() {
				if check.Code != c.code {
					continue
				}
				found = true
				if check.State != c.state || !strings.Contains(check.Message+check.Hint, c.tells) || check.Hint == "" {
					t.Errorf("%+v", check)
				}
			}
			if !found {
				t.Errorf("nothing is said of %s", c.code)
			}
		})
	}
}

// TestHostThatHangs has a file system that does not answer.
func TestHostThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		f := goodHost()
		f.room = func(string) (hostRoom, error) { <-release; return hostRoom{}, nil }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := fencedChecks(ctx, f); fault.Of(err) != fault.Unresponsive {
			t.Errorf("got %v", err)
		}
		close(release)
	})
}

func TestEffective(t *testing.T) {
	if got := effective("Name:\tx\nCapPrm:\t0000000000000001\nCapEff:\t000001ffffffffff\n"); got != 0x1ffffffffff {
		t.Errorf("got %x", got)
	}
	if got := effective("CapEff:\tnone\n"); got != 0 {
		t.Errorf("got %x", got)
	}
}
