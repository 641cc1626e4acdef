package freeze

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/outlive"
	"github.com/vmsnap/vmsnap/qga"
	"github.com/vmsnap/vmsnap/qga/qgatest"
)

func startGuard(t *testing.T, s *qgatest.Server, r Request) *Guard {
	t.Helper()
	g, err := Start(within(t), guards(filepath.Join(t.TempDir(), "leases")), r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return g
}

func TestFreezeThaw(t *testing.T) {
	s := qgatest.New(t)
	s.SetFilesystems(
		qgatest.Filesystem{Name: "vda1", Mountpoint: "/", Type: "ext4"},
		qgatest.Filesystem{Name: "vda1", Mountpoint: "/var/bind", Type: "ext4"},
		qgatest.Filesystem{Name: "vda2", Mountpoint: "/boot/efi", Type: "vfat"},
		qgatest.Filesystem{Name: "vdb", Mountpoint: "/data", Type: "xfs"},
	)
	s.Once(qgatest.Freeze, qgatest.Then(func(*qgatest.Turn) { s.SetFrozen(true) }, qgatest.Return(2)))
	s.Once(qgatest.Thaw, qgatest.Then(func(*qgatest.Turn) { s.SetFrozen(false) }, qgatest.Return(2)))
	g := startGuard(t, s, request(t, s))
	want := []Filesystem{
		{"vda1", "/", "ext4", true}, {"vda1", "/var/bind", "ext4", true},
		{"vda2", "/boot/efi", "vfat", false}, {"vdb", "/data", "xfs", true},
	}
	if diff := cmp.Diff(want, g.Filesystems()); diff != "" {
		t.Errorf("file systems (-want +got):\n%s", diff)
	}
	if s.Frozen() {
		t.Error("frozen by the start")
	}
	frozen, err := g.Freeze(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if frozen.Count != 2 || frozen.Total != 2 || frozen.Deadline.Sub(frozen.At) != g.Request.Lease || time.Since(frozen.At) > time.Minute {
		t.Errorf("frozen %+v", frozen)
	}
	checkLease(t, g)
	if _, err := g.Freeze(within(t)); !errors.Is(err, ErrUsed) {
		t.Errorf("second freeze: %v, want %v", err, ErrUsed)
	}
	thawed, err := g.Thaw(within(t))
	if err != nil || !thawed.Verified || thawed.Reason != "" || thawed.Window <= 0 {
		t.Errorf("thawed %+v, error %v", thawed, err)
	}
	if got, want := outcome(t, s, g), (Outcome{End: OnRequest, Verified: true, Window: thawed.Window}); got != want {
		t.Errorf("outcome %+v, want %+v", got, want)
	}
	if again, err := g.Thaw(within(t)); err != nil || again != thawed {
		t.Errorf("second thaw: %+v, error %v, want the same as the first", again, err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

func checkLease(t *testing.T, g *Guard) {
	t.Helper()
	leases, err := Leases(g.cfg.Dir)
	if err != nil || len(leases) != 1 {
		t.Fatalf("leases %+v, error %v, want one", leases, err)
	}
	l := leases[0]
	if l.ID != g.LeaseID() || l.State != LeaseHeld || l.Guard != g.Process() || l.Owner.PID != os.Getpid() {
		t.Errorf("lease %+v", l)
	}
	if diff := cmp.Diff(g.Request, l.Request); diff != "" {
		t.Errorf("request in the lease (-want +got):\n%s", diff)
	}
	path := filepath.Join(g.cfg.Dir, l.ID+".json")
	for path, mode := range map[string]os.FileMode{path: 0o600, g.cfg.Dir: 0o700 | os.ModeDir} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, error %v, want mode %v", path, st.Mode(), err, mode)
		}
	}
}

// The lease is on disk before the freeze reaches the guest.
func TestLeaseBeforeFreeze(t *testing.T) {
	s := qgatest.New(t)
	g := startGuard(t, s, request(t, s))
	seen := make(chan int, 1)
	s.Once(qgatest.Freeze, func(turn *qgatest.Turn) {
		leases, _ := Leases(g.cfg.Dir)
		seen <- len(leases)
		turn.Behave()
	})
	if _, err := g.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	if n := <-seen; n != 1 {
		t.Errorf("the freeze came with %d leases on disk, want 1", n)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if got := outcome(t, s, g); got.End != AgentGone {
		t.Errorf("outcome %+v", got)
	}
}

func TestNoLeaseNoFreeze(t *testing.T) {
	s := qgatest.New(t)
	g := startGuard(t, s, request(t, s))
	if err := os.RemoveAll(g.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Freeze(within(t)); !errors.Is(err, ErrLease) {
		t.Errorf("error %v, want %v", err, ErrLease)
	}
	if got := outcome(t, s, g); got.End != Unused || s.Count(qgatest.Freeze) != 0 {
		t.Errorf("outcome %+v, %d freezes", got, s.Count(qgatest.Freeze))
	}
}

func TestMountpoints(t *testing.T) {
	s := qgatest.New(t)
	r := request(t, s)
	r.Mountpoints = []string{"/data"}
	g := startGuard(t, s, r)
	frozen, err := g.Freeze(within(t))
	if err != nil || frozen.Count != 1 || frozen.Total != 2 {
		t.Errorf("frozen %+v, error %v, want 1 of 2", frozen, err)
	}
	if thawed, err := g.Thaw(within(t)); err != nil || !thawed.Verified {
		t.Errorf("thawed %+v, error %v", thawed, err)
	}
}

func TestStartRefuses(t *testing.T) {
	tests := []struct {
		name   string
		script func(*qgatest.Server, *Request)
		want   error
	}{
		{"frozen already", func(s *qgatest.Server, _ *Request) { s.SetFrozen(true) }, ErrAlreadyFrozen},
		{"no freeze in the guest agent", func(s *qgatest.Server, _ *Request) {
			s.Always(qgatest.Status, qgatest.Refuse(qga.ClassCommandNotFound, "no such command"))
		}, ErrUnsupported},
		{"freeze disabled", func(s *qgatest.Server, _ *Request) {
			s.Always(qgatest.Info, qgatest.Return(map[string]any{"version": "9", "supported_commands": []any{
				map[string]any{"name": qgatest.Freeze, "enabled": false}}}))
		}, ErrUnsupported},
		{"guest agent silent", func(s *qgatest.Server, _ *Request) { s.Always(qgatest.Sync, qgatest.Silent) }, qga.ErrTimeout},
		{"guest agent babbles", func(s *qgatest.Server, _ *Request) { s.Always(qgatest.Info, qgatest.Raw("what?\n")) }, qga.ErrMalformed},
		{"QEMU dies", func(s *qgatest.Server, _ *Request) { s.Once(qgatest.Info, qgatest.Die) }, qga.ErrGone},
		{"no socket", func(_ *qgatest.Server, r *Request) { r.AgentSocket += ".no" }, nil},
		{"no lease time", func(_ *qgatest.Server, r *Request) { r.Lease = 0 }, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := qgatest.New(t)
			r := request(t, s)
			test.script(s, &r)
			before := s.Frozen()
			dir := filepath.Join(t.TempDir(), "leases")
			g, err := Start(within(t), guards(dir), r)
			if err == nil {
				_ = g.Close()
				t.Fatal("started")
			}
			if test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
			if !strings.Contains(err.Error(), "web") {
				t.Errorf("error %q does not name the VM", err)
			}
			if s.Frozen() != before || s.Count(qgatest.Thaw) > 0 {
				t.Error("the guest was touched")
			}
		})
	}
}

func TestStartWithoutGuard(t *testing.T) {
	s := qgatest.New(t)
	for name, argv := range map[string][]string{"no such file": {"/nonexistent/guard"}, "something else": {"/bin/true"}} {
		_, err := Start(within(t), Config{Executable: argv, Dir: t.TempDir()}, request(t, s))
		if !errors.Is(err, ErrGuard) {
			t.Errorf("%s: error %v, want %v", name, err, ErrGuard)
		}
	}
	ctx, cancel := context.WithTimeout(within(t), 100*time.Millisecond)
	defer cancel()
	_, err := Start(ctx, Config{Executable: []string{"/bin/sleep", "60"}, Dir: t.TempDir()}, request(t, s))
	if !errors.Is(err, ErrGuard) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent guard: error %v", err)
	}
}

// Every freeze that fails leaves the guest thawed and no lease, by itself.
func TestFreezeFails(t *testing.T) {
	tests := []struct {
		name   string
		freeze qgatest.Behaviour
		want   error
		end    End
	}{
		{"nothing frozen", qgatest.Return(0), ErrNothingFrozen, FreezeFailed},
		{"negative count", qgatest.Return(-3), ErrNothingFrozen, FreezeFailed},
		{"malformed but frozen", qgatest.Then(qgatest.Raw("{\n"), qgatest.Mute), qga.ErrMalformed, FreezeFailed},
		{"reply lost", qgatest.Mute, ErrFreezeTimeout, FreezeFailed},
		{"flood, then frozen", qgatest.Then(qgatest.Flood(8<<20), qgatest.Mute), qga.ErrTooLarge, FreezeFailed},
		{"connection lost, then frozen", func(turn *qgatest.Turn) { turn.Server.HangUp(); qgatest.Mute(turn) }, qga.ErrGone, FreezeFailed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := qgatest.New(t)
			s.Once(qgatest.Freeze, test.freeze)
			r := request(t, s)
			r.FreezeTimeout = time.Second
			g := startGuard(t, s, r)
			if _, err := g.Freeze(within(t)); !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
			if got := outcome(t, s, g); got.End != test.end || got.Reason == "" {
				t.Errorf("outcome %+v, want %s", got, test.end)
			}
			if s.Count(qgatest.Thaw) == 0 {
				t.Error("no thaw was sent")
			}
			if thawed, err := g.Thaw(within(t)); err != nil || thawed.Verified {
				t.Errorf("thaw afterwards: %+v, error %v", thawed, err)
			}
		})
	}
}

func TestFreezeRefused(t *testing.T) {
	s := qgatest.New(t)
	s.Once(qgatest.Freeze, qgatest.Refuse("GenericError", "hook has failed with status 1"))
	g := startGuard(t, s, request(t, s))
	_, err := g.Freeze(within(t))
	var refused *qga.CommandError
	if !errors.As(err, &refused) || refused.Desc != "hook has failed with status 1" || refused.Command != qgatest.Freeze {
		t.Errorf("error %v, want the guest agent's own", err)
	}
	if got := outcome(t, s, g); got.End != FreezeFailed {
		t.Errorf("outcome %+v", got)
	}
}

// A freeze by someone else, after the guard was started, is left alone.
func TestFrozenByOthers(t *testing.T) {
	s := qgatest.New(t)
	g := startGuard(t, s, request(t, s))
	s.SetFrozen(true)
	if _, err := g.Freeze(within(t)); !errors.Is(err, ErrAlreadyFrozen) {
		t.Errorf("error %v, want %v", err, ErrAlreadyFrozen)
	}
	if got := g.Outcome(); got.End != Unused || !s.Frozen() || s.Count(qgatest.Thaw) > 0 {
		t.Errorf("outcome %+v, frozen %t, %d thaws", got, s.Frozen(), s.Count(qgatest.Thaw))
	}
}

// What the guest says at the thaw decides whether the freeze counts.
func TestVerification(t *testing.T) {
	tests := []struct {
		name    string
		script  func(*qgatest.Server)
		verdict string
	}{
		{"says thawed", func(s *qgatest.Server) { s.Once(qgatest.Status, qgatest.Return("thawed")) }, "not frozen any more"},
		{"was thawed in between", func(s *qgatest.Server) { s.SetFrozen(false) }, "not frozen any more"},
		{"thaws fewer", func(s *qgatest.Server) { s.Once(qgatest.Thaw, qgatest.Then(qgatest.Return(1), thawSilently)) }, "of 2 frozen file systems only 1"},
		{"VSS gave up", func(s *qgatest.Server) {
			s.Once(qgatest.Thaw, qgatest.Then(qgatest.Refuse("GenericError", "couldn't hold writes: fsfreeze is limited up to 10 seconds"), thawSilently))
		}, "limited up to 10 seconds"},
		{"status silent", func(s *qgatest.Server) { s.Once(qgatest.Status, qgatest.Silent) }, "did not say"},
		{"status nonsense", func(s *qgatest.Server) { s.Once(qgatest.Status, qgatest.Return("melted")) }, "did not say"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := qgatest.New(t)
			g := startGuard(t, s, request(t, s))
			if _, err := g.Freeze(within(t)); err != nil {
				t.Fatal(err)
			}
			test.script(s)
			thawed, err := g.Thaw(within(t))
			if err != nil || thawed.Verified || !strings.Contains(thawed.Reason, test.verdict) {
				t.Errorf("thawed %+v, error %v, want not verified: %s", thawed, err, test.verdict)
			}
			if got := outcome(t, s, g); got.End != OnRequest || got.Verified {
				t.Errorf("outcome %+v", got)
			}
		})
	}
}

func thawSilently(turn *qgatest.Turn) { turn.Server.SetFrozen(false) }

// A guest that pretends not to thaw keeps the guard trying until its QEMU ends.
func TestNeverThaws(t *testing.T) {
	s := qgatest.New(t)
	r := request(t, s)
	var kill func()
	r.QEMU, kill = standIn(t)
	g := startGuard(t, s, r)
	if _, err := g.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	s.Always(qgatest.Thaw, qgatest.Return(2))
	if _, err := g.Thaw(within(t)); !errors.Is(err, ErrUnresolved) {
		t.Errorf("error %v, want %v", err, ErrUnresolved)
	}
	<-g.Unresolved()
	if err := s.Await(within(t), qgatest.Thaw, 4); err != nil {
		t.Error(err)
	}
	leases, err := Leases(g.cfg.Dir)
	if err != nil || len(leases) != 1 || leases[0].State != LeaseUnresolved || leases[0].Problem == "" {
		t.Errorf("leases %+v, error %v, want one unresolved", leases, err)
	}
	if err := g.Close(); !errors.Is(err, ErrUnresolved) {
		t.Errorf("close: %v, want %v", err, ErrUnresolved)
	}
	kill()
	s.Stop()
	s.SetFrozen(false)
	if got := outcome(t, s, g); got.End != VMGone {
		t.Errorf("outcome %+v, want %s", got, VMGone)
	}
	if err := g.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func TestCloseWithoutFreeze(t *testing.T) {
	s := qgatest.New(t)
	g := startGuard(t, s, request(t, s))
	for range 2 {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	if got := outcome(t, s, g); got.End != Unused || s.Count(qgatest.Thaw) > 0 {
		t.Errorf("outcome %+v, %d thaws", got, s.Count(qgatest.Thaw))
	}
	if g.Process().Alive() {
		t.Error("the guard lives")
	}
}

// The guard is out of reach of what ends the agent's session and service.
func TestGuardIsProtected(t *testing.T) {
	s := qgatest.New(t)
	g := startGuard(t, s, request(t, s))
	if _, err := g.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	pid := g.Process().PID
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session %d, error %v, want its own", sid, err)
	}
	score, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/oom_score_adj")
	if want := lowestScore(t); err != nil || strings.TrimSpace(string(score)) != want {
		t.Errorf("oom_score_adj %q, error %v, want %s", score, err, want)
	}
	checkScope(t, g)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE} {
		if err := unix.Kill(pid, sig); err != nil {
			t.Error(err)
		}
	}
	thawed, err := g.Thaw(within(t))
	if err != nil || !thawed.Verified {
		t.Errorf("thawed %+v, error %v after signals", thawed, err)
	}
	outcome(t, s, g)
}

// checkScope checks that systemd, if it runs, has moved the guard.
func checkScope(t *testing.T, g *Guard) {
	t.Helper()
	scope, none := g.Scope()
	groups, err := os.ReadFile("/proc/" + strconv.Itoa(g.Process().PID) + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		if scope != "" || none != outlive.ErrNoSystemd.Error() {
			t.Errorf("scope %q, because %q, without systemd", scope, none)
		}
		return
	}
	want := "vmsnap-guard-" + g.LeaseID() + ".scope"
	if scope != want || !strings.Contains(string(groups), "/"+want+"\n") {
		t.Errorf("scope %q, because %q, control groups %s, want %s", scope, none, groups, want)
	}
}

// lowestScore is what a process like the guard can get here: it takes
// CAP_SYS_RESOURCE to go below what was inherited.
func lowestScore(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "{ echo "+outlive.OOMScore+" >/proc/self/oom_score_adj; } 2>&-; cat /proc/self/oom_score_adj").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}
