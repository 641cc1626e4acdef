package memdump

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// nobody is a user without rights.
const nobody = 65534

func TestQEMUProbe(t *testing.T) {
	eachStill(t, func(t *testing.T, q *still) {
		f := q.probe()
		if f.RAM < 64<<20 || f.RAM > 96<<20 || f.Resident == 0 || f.Resident > f.RAM || f.Running ||
			f.Status != monitor.RunStatePrelaunch || f.Tracking != "" || f.Busy != "" || f.Blocked != nil {
			t.Errorf("%+v", f)
		}
		if err := q.Cont(q.ctx()); err != nil {
			t.Fatal(err)
		}
		f = q.probe()
		if !f.Running || f.Status != monitor.RunStateRunning {
			t.Errorf("%+v", f)
		}
		caps, err := queryCapabilities(q.ctx(), q.Session)
		if err != nil || caps[capBackground] {
			t.Errorf("probing has switched on a capability: %v, %v", caps, err)
		}
		// What a migration would cover, in its own words.
		s, err := Prepare(q.ctx(), Config{Session: q.Session, Strategy: Stopped, Facts: f, ID: "x", Target: q.file("m", f.Reserve())})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Cut(q.ctx(), func(context.Context) error { return nil }, nil); err != nil {
			t.Fatal(err)
		}
		m, err := q.QueryMigrate(q.ctx())
		if err != nil || uint64(m.RAM.Total) != f.RAM {
			t.Errorf("QEMU saves %d bytes, %v; probed %d", m.RAM.Total, err, f.RAM)
		}
		if err := s.Close(q.ctx()); err != nil {
			t.Error(err)
		}
	}, "-device", "VGA")
}

// TestQEMUTrackingObstacles has what write tracking cannot be used with, and
// what it can.
func TestQEMUTrackingObstacles(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string // in the reason; "" for none
		// refused tells that QEMU itself refuses too.
		refused bool
	}{
		"memfd":           {args: []string{"-object", "memory-backend-memfd,id=m0,size=64M", "-machine", "memory-backend=m0"}},
		"shared memory":   {args: []string{"-object", "memory-backend-file,id=m0,size=64M,share=on,mem-path=/dev/shm", "-machine", "memory-backend=m0"}},
		"-mem-path":       {args: []string{"-mem-path", "%DIR"}, want: "/objects/pc.ram is a file on a disk", refused: true},
		"file, shared":    {args: []string{"-object", "memory-backend-file,id=m0,size=64M,share=on,mem-path=%DIR/ram", "-machine", "memory-backend=m0"}, want: "/objects/m0 is a file on a disk", refused: true},
		"file, private":   {args: []string{"-object", "memory-backend-file,id=m0,size=64M,share=off,mem-path=%DIR/ram", "-machine", "memory-backend=m0"}, want: "/objects/m0 is a file on a disk", refused: true},
		"ivshmem":         {args: []string{"-object", "memory-backend-file,id=m1,size=1M,share=on,mem-path=/dev/shm", "-device", "ivshmem-plain,memdev=m1,master=on"}, want: "(ivshmem-plain) writes to the guest's memory past QEMU"},
		"ordinary things": {args: []string{"-netdev", "user,id=vhost-user", "-device", "virtio-net-pci,netdev=vhost-user", "-drive", "driver=null-co,if=virtio,id=nvme"}},
	} {
		t.Run(name, func(t *testing.T) {
			eachStill(t, func(t *testing.T, q *still) { wantObstacle(t, q, c.want, c.refused) }, c.args...)
		})
	}
}

func wantObstacle(t *testing.T, q *still, want string, refused bool) {
	t.Helper()
	f := q.probe()
	if want == "" && f.Tracking != "" || !strings.Contains(f.Tracking, want) {
		t.Errorf("tracking: %q, want %q", f.Tracking, want)
	}
	if err := q.Cont(q.ctx()); err != nil {
		t.Fatal(err)
	}
	f.Running, f.Status, f.Tracking = true, monitor.RunStateRunning, ""
	before, err := queryCapabilities(q.ctx(), q.Session)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Prepare(q.ctx(), Config{Session: q.Session, Strategy: Background, Facts: f, ID: "x", Target: q.file("m", f.Reserve())})
	var unsuitable *UnsuitableError
	if got := errors.As(err, &unsuitable); got != refused || err != nil && !refused {
		t.Errorf("Prepare: %v", err)
	}
	if err == nil {
		err = s.Close(q.ctx())
	} else {
		var command *monitor.CommandError
		if !errors.As(err, &command) || unsuitable.Strategy != Background || unsuitable.Reason != command.Desc {
			t.Errorf("%+v", unsuitable)
		}
		err = nil
	}
	after, qerr := queryCapabilities(q.ctx(), q.Session)
	if err := errors.Join(err, qerr); err != nil {
		t.Fatal(err)
	}
	for name, on := range before {
		if after[name] != on {
			t.Errorf("capability %s was %v, is %v", name, on, after[name])
		}
	}
}

// TestQEMUVhostUser has a disk served by another process, which writes to the
// guest's memory without QEMU knowing. QEMU allows write tracking with it.
func TestQEMUVhostUser(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range versions {
		t.Run("qemu-"+v.Name, func(t *testing.T) {
			socket := serveVhostUser(t)
			q := startStill(t, v, 0, "-object", "memory-backend-memfd,id=m0,size=64M,share=on", "-machine", "memory-backend=m0",
				"-chardev", "socket,id=c0,path="+socket, "-device", "vhost-user-blk-pci,chardev=c0,id=disk")
			wantObstacle(t, q, "/machine/peripheral/disk (vhost-user-blk-pci) writes to the guest's memory past QEMU", false)
		})
	}
}

// serveVhostUser starts a process that serves a disk, and returns its socket.
func serveVhostUser(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	disk, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("qemu-storage-daemon", "--blockdev", "file,node-name=f,filename="+disk,
		"--export", "vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path="+socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for range 1000 {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		<-time.After(10 * time.Millisecond) // it announces nothing
	}
	t.Fatal("qemu-storage-daemon does not listen")
	return ""
}

// TestQEMUWithoutRights has a QEMU that the kernel does not let track writes.
func TestQEMUWithoutRights(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range versions {
		t.Run("qemu-"+v.Name, func(t *testing.T) {
			q := startStill(t, v, nobody)
			wantObstacle(t, q, "the kernel does not let this QEMU process use userfaultfd", true)
			f := q.probe()
			c, err := Choose(f, "")
			want := Precopy
			if f.Inexact != "" {
				want = Stopped
			}
			if err != nil || c.Strategy != want || len(c.Warnings) != 1 || c.Warnings[0].Code != WarnTracking {
				t.Errorf("%+v, %v", c, err)
			}
			p, err := Predict(q.ctx(), q.Session, f, c, 0)
			if err != nil || p.Bytes == 0 || p.Pause <= 0 || p.Pause > time.Second {
				t.Errorf("%+v, %v", p, err)
			}
		})
	}
}

// TestQEMUBlocked has a device that cannot be migrated.
func TestQEMUBlocked(t *testing.T) {
	eachStill(t, func(t *testing.T, q *still) {
		f := q.probe()
		var unsuitable *UnsuitableError
		if _, err := Choose(f, ""); len(f.Blocked) == 0 || !errors.As(err, &unsuitable) || !strings.Contains(err.Error(), "ivshmem") {
			t.Errorf("%+v: %v", f, err)
		}
	}, "-object", "memory-backend-file,id=m1,size=1M,share=on,mem-path=/dev/shm", "-device", "ivshmem-plain,memdev=m1")
}

// TestQEMUNeverStarted saves a VM that its owner has not let run yet.
func TestQEMUNeverStarted(t *testing.T) {
	eachStill(t, func(t *testing.T, q *still) {
		f := q.probe()
		s, err := Prepare(q.ctx(), Config{Session: q.Session, Strategy: Stopped, Facts: f, ID: "x", Target: q.file("m", f.Reserve())})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Cut(q.ctx(), func(context.Context) error { return nil }, nil)
		if err == nil {
			err = s.Wait(q.ctx(), nil)
		}
		if err := errors.Join(err, s.Close(q.ctx())); err != nil {
			t.Fatal(err)
		}
		st, err := q.QueryStatus(q.ctx())
		want := monitor.RunStatePostMigrate
		if staysPaused(f) {
			want = monitor.RunStatePrelaunch
		}
		if err != nil || st.Running || st.Status != want {
			t.Errorf("%+v, %v; want %s", st, err, want)
		}
		if err := q.Cont(q.ctx()); err != nil {
			t.Error(err)
		}
	})
}
