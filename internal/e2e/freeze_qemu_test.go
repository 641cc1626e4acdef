package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/freeze"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/qga"
)

// watched is a booted guest whose writes are watched from outside: they say
// whether it is frozen, whatever anybody says.
type watched struct {
	*testvm.Guest
	*host
	writers *testvm.Writers
}

func newWatched(t *testing.T, c testvm.Config) *watched {
	t.Helper()
	g := testvm.Start(t, c)
	h := newHost(t, g)
	w, err := g.StartWriters(h.ctx())
	if err != nil {
		t.Fatal(err)
	}
	return &watched{Guest: g, host: h, writers: w}
}

// sh runs a command in the guest.
func (g *watched) sh(command string) {
	g.t.Helper()
	if _, err := g.Exec(g.ctx(), command); err != nil {
		g.t.Fatal(err)
	}
}

// signalAgent sends the guest's qemu-ga a signal.
func (g *watched) signalAgent(signal string) {
	g.t.Helper()
	if err := g.SignalAgent(g.ctx(), signal); err != nil {
		g.t.Fatal(err)
	}
}

// standing is how a VM's freeze is shown.
type standing struct {
	Since      time.Time `json:"since"`
	Deadline   time.Time `json:"deadline"`
	Frozen     int       `json:"frozen"`
	Total      int       `json:"total"`
	Operation  string    `json:"operation_id"`
	Unresolved bool      `json:"unresolved"`
}

// freeze freezes the guest.
func (g *watched) freeze(args ...string) (f standing) {
	g.t.Helper()
	out := g.must(append([]string{"freeze", g.Name, "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		g.t.Fatal(err)
	}
	return f
}

// shown returns the freeze that the daemon tells of, nil when there is none, and
// the operation that runs on the VM.
func (g *watched) shown() (f *standing, operation string) {
	g.t.Helper()
	vm, err := g.vm(g.Name)
	if err != nil {
		g.t.Fatal(err)
	}
	if shown := vm.GetFreeze(); shown != nil {
		f = &standing{
			Since: shown.GetSince().AsTime(), Deadline: shown.GetDeadline().AsTime(), Frozen: int(shown.GetFrozen()), Total: int(shown.GetTotal()),
			Operation: shown.GetOperationId(), Unresolved: shown.GetUnresolved(),
		}
	}
	return f, vm.GetOperationId()
}

// ended verifies how an operation ended.
func (g *watched) ended(id, state, words string) {
	g.t.Helper()
	g.eventually(eventLimit, "operation "+id+" has ended", func() error {
		res, err := g.Operations().GetOperation(g.ctx(), connect.NewRequest(&vmsnapv1.GetOperationRequest{Id: id}))
		if err != nil {
			return err
		}
		if o := res.Msg.GetOperation(); o.GetEnded() == nil {
			return fmt.Errorf("it is %s", o.GetState())
		}
		return nil
	})
	if out := g.must("operation", "show", id, "-o", "json"); !strings.Contains(out, `"state": "`+state+`"`) || !strings.Contains(out, words) {
		g.t.Errorf("operation %s is not %s, or %q is not in:\n%s", id, state, words, out)
	}
}

// measures verifies a value among the metrics.
func (g *watched) measures(name string, value int) {
	g.t.Helper()
	if line := fmt.Sprintf("\n%s %d\n", name, value); !strings.Contains(g.scrape(), line) {
		g.t.Errorf("%q is not among the metrics:\n%s", strings.TrimSpace(line), g.scrape())
	}
}

// writesNothing looks for writes during some time, in which there would be
// hundreds. One may have been on its way when the guest froze.
func (g *watched) writesNothing(when string, disks ...string) {
	g.t.Helper()
	before := g.writers.Completed()
	g.sh("sleep 0.3")
	after := g.writers.Completed()
	for _, d := range disks {
		if after[d] > before[d]+1 {
			g.t.Errorf("%s: disk %s completed writes %d to %d while it was to be frozen", when, d, before[d]+1, after[d])
		}
	}
}

// writesBy waits until the guest writes on all disks, and says when that was.
func (g *watched) writesBy(when string) time.Time {
	g.t.Helper()
	if err := g.writers.AwaitWrites(g.ctx(), 2); err != nil {
		g.t.Fatalf("%s: %v\nvmsnapd's log:\n%s", when, err, g.log)
	}
	return time.Now()
}

// status asks the guest's agent.
func (g *watched) status() qga.FreezeState {
	g.t.Helper()
	c, err := qga.Dial(g.ctx(), g.AgentSocket(), qga.DefaultLimits)
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	state, err := c.FreezeStatus(g.ctx())
	if err != nil {
		g.t.Fatal(err)
	}
	return state
}

// leases returns the freezes that are on record.
func (g *watched) leases() []freeze.Lease {
	g.t.Helper()
	leases, err := freeze.Leases(g.path("state/leases"))
	if err != nil {
		g.t.Fatal(err)
	}
	return leases
}

// thawed ends each story: the guest writes to every file system and says that
// it is thawed, the daemon says so too, and nothing of the freeze is left.
func (g *watched) thawed(when string) {
	g.t.Helper()
	g.writesBy(when)
	g.eventually(eventLimit, when+": the freeze is over", func() error {
		if f, operation := g.shown(); f != nil || operation != "" {
			return fmt.Errorf("%+v, operation %q", f, operation)
		}
		if l := g.leases(); len(l) > 0 {
			return fmt.Errorf("leases %+v", l)
		}
		return nil
	})
	thawed(g.t, g.Guest)
	if s := g.status(); s != qga.Thawed {
		g.t.Errorf("%s: the guest says %s", when, s)
	}
	g.measures("vmsnap_guests_frozen", 0)
	g.measures("vmsnap_guests_freeze_unresolved", 0)
	if guards := g.guards(); len(guards) > 0 {
		g.t.Errorf("%s: processes %v", when, guards)
	}
	if g.t.Failed() {
		g.t.FailNow()
	}
}

func TestQEMUFreezeUntilThaw(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := newWatched(t, testvm.Config{QEMU: q})
		g.freezesAndThaws()
		g.thawsWhatOthersFroze()
		g.freezesOneFilesystem()
		g.thawsWhenCancelled()
		g.thawsAtTheEndOfTheLease()
		g.vmKilled()
	})
}

func (g *watched) freezesAndThaws() {
	g.t.Helper()
	g.fails(5, g.Name+" was not frozen", "thaw", g.Name)
	began := time.Now()
	f := g.freeze("--lease", "30s")
	if held := f.Deadline.Sub(f.Since); f.Frozen != 2 || f.Total != 2 || held < 29*time.Second || held > 31*time.Second || f.Unresolved {
		g.t.Errorf("freeze: %+v", f)
	}
	g.writesNothing("frozen", "root", "data")
	if s, operation := g.shown(); s == nil || operation != f.Operation || !cmp.Equal(*s, f) {
		g.t.Errorf("vm show: %+v, operation %q; want %+v", s, operation, f)
	}
	g.measures("vmsnap_guests_frozen", 1)
	g.measures(`vmsnap_guest_frozen{vm="`+g.Name+`"}`, 1)
	g.fails(11, f.Operation, "snapshot", "create", g.Name, "busy")
	g.fails(11, f.Operation, "freeze", g.Name)
	g.fails(4, "", "snapshot", "show", g.Name+"/busy")

	out := g.object("thaw", g.Name)
	window, err := time.ParseDuration(fmt.Sprint(out["freeze_window"]))
	if err != nil || out["was_frozen"] != true || window < 300*time.Millisecond || window > time.Since(began) {
		g.t.Errorf("thaw: %v, error %v", out, err)
	}
	g.thawed("thawed on request")
	g.ended(f.Operation, "succeeded", "")
}

// thawsWhatOthersFroze: what is frozen by a script is left so by a freeze, and
// thawed by a thaw.
func (g *watched) thawsWhatOthersFroze() {
	g.t.Helper()
	script, err := qga.Dial(g.ctx(), g.AgentSocket(), qga.DefaultLimits)
	if err != nil {
		g.t.Fatal(err)
	}
	if n, err := script.Freeze(g.ctx(), nil); err != nil || n != 2 {
		g.t.Fatalf("the script froze %d file systems, error %v", n, err)
	}
	_ = script.Close()
	g.fails(5, "frozen already", "freeze", g.Name)
	g.writesNothing("frozen by a script", "root", "data")
	if out := g.must("thaw", g.Name); !strings.Contains(out, g.Name+" is thawed") || strings.Contains(out, "0s") {
		g.t.Errorf("thaw says %q", out)
	}
	g.thawed("frozen by a script")
}

func (g *watched) freezesOneFilesystem() {
	g.t.Helper()
	root := testvm.Mountpoint("root")
	if f := g.freeze("--mountpoint", root); f.Frozen != 1 || f.Total != 2 {
		g.t.Errorf("freeze of one file system: %+v", f)
	}
	before := g.writers.Completed()
	g.writesNothing("frozen alone", "root")
	if after := g.writers.Completed(); after["data"] < before["data"]+2 {
		g.t.Errorf("writes %v became %v: the other file system does not go on", before, after)
	}
	g.must("thaw", g.Name)
	g.thawed("one file system")

	g.must("snapshot", "create", g.Name, "one", "--mountpoint", root, "--quiesce", "require", "--disk", "root")
	s := g.snapshot(g.Name + "/one")
	if s.Consistency != "filesystem" || s.Quiesce.Frozen != 1 || s.Quiesce.Total != 2 {
		g.t.Errorf("snapshot of one file system: %+v", s)
	}
	for _, d := range s.Disks {
		if d.Device == "root" {
			clean(g.t, raw(g.t, g.QEMU(), d))
		}
	}
	g.thawed("snapshot of one file system")
	g.fails(5, "froze no file system", "snapshot", "create", g.Name, "none", "--mountpoint", "/nowhere", "--quiesce", "require")
	g.thawed("no such mount point")
}

func (g *watched) thawsWhenCancelled() {
	g.t.Helper()
	f := g.freeze("--lease", "60s")
	g.writesNothing("before the cancel", "root", "data")
	if err := g.cancel(f.Operation); err != nil {
		g.t.Error(err)
	}
	g.thawed("cancelled")
	g.ended(f.Operation, "cancelled", "")
}

func (g *watched) thawsAtTheEndOfTheLease() {
	g.t.Helper()
	f := g.freeze("--lease", "2s")
	g.writesNothing("under the lease", "root", "data")
	g.thawedByLease(f, 2*time.Second)
	g.thawed("the lease has ended")
	g.ended(f.Operation, "failed", "thawed by its lease of 2s")
	if log := g.log.String(); !strings.Contains(log, "thawed by its lease of 2s") {
		g.t.Errorf("the log does not tell that the lease has ended:\n%s", log)
	}
	g.fails(5, "not frozen", "thaw", g.Name)
}

// vmKilled: the freeze ends with the guest, and nobody takes it for the lease.
func (g *watched) vmKilled() {
	g.t.Helper()
	f := g.freeze("--lease", "60s")
	g.Kill()
	g.await(g.Name, "stopped")
	g.ended(f.Operation, "failed", "the QEMU process has ended")
	if f, operation := g.shown(); f != nil || operation != "" || len(g.leases()) > 0 {
		g.t.Errorf("killed VM: freeze %+v, operation %q, leases %+v", f, operation, g.leases())
	}
	g.measures("vmsnap_guests_frozen", 0)
}

// thawedByLease waits until the guest writes again, which has to be within five
// seconds after the end of its lease, and not before.
func (g *watched) thawedByLease(f standing, lease time.Duration) {
	g.t.Helper()
	// The guest's reply is some milliseconds older than the daemon's.
	if after := g.writesBy("the lease").Sub(f.Since); after < lease-100*time.Millisecond || after > lease+5*time.Second {
		g.t.Errorf("the guest wrote again %s after the freeze, with a lease of %s", after, lease)
	}
}

func TestQEMUFreezeOutlivedByNobody(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := newWatched(t, testvm.Config{QEMU: q})
		g.daemonKilled()
		g.daemonStopped()
		g.abandoned(syscall.SIGKILL)
		g.abandoned(syscall.SIGSTOP)
		g.thawAll()
	})
}

// daemonKilled: the guard's pipe closes, so it thaws at once.
func (g *watched) daemonKilled() {
	g.t.Helper()
	f := g.freeze("--lease", "60s")
	g.writesNothing("before the kill", "root", "data")
	killed := time.Now()
	g.signal(syscall.SIGKILL)
	if after := g.writesBy("killed daemon").Sub(killed); after > 5*time.Second {
		g.t.Errorf("the guest wrote again only %s after the daemon was killed", after)
	}
	g.start()
	g.thawed("killed daemon")
	g.ended(f.Operation, "failed", "vmsnapd ended while the operation ran")
}

// daemonStopped: the guard alone is left to see the end of the lease.
func (g *watched) daemonStopped() {
	g.t.Helper()
	f := g.freeze("--lease", "3s")
	g.signal(syscall.SIGSTOP)
	g.writesNothing("stopped daemon", "root", "data")
	g.thawedByLease(f, 3*time.Second)
	g.signal(syscall.SIGCONT)
	g.thawed("stopped daemon")
	g.ended(f.Operation, "failed", "thawed by its lease of 3s")

	g.freeze("--lease", "3s")
	g.signal(syscall.SIGSTOP)
	g.signal(syscall.SIGKILL)
	g.start()
	g.thawed("stopped and killed daemon")
}

// abandon freezes the guest, kills the daemon, and hits the guard before it
// can notice.
func (g *watched) abandon(guard syscall.Signal) (f standing) {
	g.t.Helper()
	f = g.freeze("--lease", "60s")
	leases := g.leases()
	if len(leases) != 1 || leases[0].Request.Operation != f.Operation {
		g.t.Fatalf("leases %+v", leases)
	}
	pid := leases[0].Guard.PID
	for _, hit := range []func() error{
		func() error { return syscall.Kill(pid, syscall.SIGSTOP) },
		func() error { g.signal(syscall.SIGKILL); return nil },
		func() error { return syscall.Kill(pid, guard) },
	} {
		if err := hit(); err != nil {
			g.t.Fatal(err)
		}
	}
	g.writesNothing("abandoned", "root", "data")
	return f
}

// abandoned: with nobody left to thaw, the next daemon does, before it serves.
func (g *watched) abandoned(guard syscall.Signal) {
	g.t.Helper()
	when := fmt.Sprintf("killed daemon, guard hit by %s", guard)
	f := g.abandon(guard)
	before := len(g.log.String())
	g.start()
	if s := g.status(); s != qga.Thawed { // at once: the daemon answers already
		g.t.Errorf("%s: the daemon is ready, and the guest says %s", when, s)
	}
	thaw, rest, found := strings.Cut(g.log.String()[before:], "a freeze was left behind")
	if !found || strings.Contains(thaw, ": ready") || !strings.Contains(rest, f.Operation) {
		g.t.Errorf("%s: the daemon did not tell of the thaw before it was ready:\n%s", when, g.log.String()[before:])
	}
	g.thawed(when)
	g.ended(f.Operation, "failed", "vmsnapd ended while the operation ran")
}

// thawAll is what the unit runs after the daemon has ended.
func (g *watched) thawAll() {
	g.t.Helper()
	f := g.freeze("--lease", "60s")
	g.runThawAll()
	g.writesNothing("a living daemon's freeze", "root", "data")
	g.must("thaw", g.Name)
	g.thawed("a living daemon's freeze")
	g.ended(f.Operation, "succeeded", "")

	g.abandon(syscall.SIGKILL)
	g.runThawAll()
	if s := g.status(); s != qga.Thawed || len(g.leases()) > 0 {
		g.t.Errorf("after thaw-all the guest says %s, and the leases are %+v", s, g.leases())
	}
	g.writesBy("thaw-all")
	g.start()
	g.thawed("thaw-all")
}

func (g *watched) runThawAll() {
	g.t.Helper()
	cmd := exec.CommandContext(g.ctx(), filepath.Join(binaries, "vmsnapd"), "thaw-all", "--config", "/dev/null", "--state-dir", g.path("state"))
	if out, err := cmd.CombinedOutput(); err != nil {
		g.t.Fatalf("thaw-all: %v\n%s", err, out)
	}
}

// hangingHook makes a freeze wait for as long as a file is there.
const hangingHook = `#!/bin/sh
if [ "$1" = freeze ] && [ -e /run/hang ]; then
	touch /run/hanging
	while [ -e /run/hang ]; do sleep 0.05; done
	rm /run/hanging
fi
`

func TestQEMUFreezeOfAGuestThatDoesNotAnswer(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := newWatched(t, testvm.Config{QEMU: q, FreezeHook: hangingHook, ExtraQMP: 1})
		g.requiredOfAHangingHook()
		g.preferredToAHangingHook()
		signals := []os.Signal{os.Interrupt, os.Kill}
		first, stride := share(t, q)
		for i := first - 1; i < len(signals); i += stride {
			g.callerGone(signals[i])
		}
		g.guestAgentKilled()
		g.guestAgentStopped()
	})
}

// unresolved waits until the guest is shown as one that may be frozen.
func (g *watched) unresolved(when string) {
	g.t.Helper()
	g.eventually(eventLimit, when+": unresolved", func() error {
		if f, _ := g.shown(); f == nil || !f.Unresolved {
			return fmt.Errorf("freeze %+v", f)
		}
		return nil
	})
	g.measures("vmsnap_guests_freeze_unresolved", 1)
	if out := g.must("vm", "show", g.Name); !strings.Contains(out, "perhaps still: the guest agent does not answer") {
		g.t.Errorf("%s: vm show does not tell:\n%s", when, out)
	}
}

// look looks at what a snapshot would leave behind. The monitor is the test's
// only for that long.
func (g *watched) look() world {
	g.t.Helper()
	own, err := monitor.Dial(g.ctx(), g.ExtraQMPSockets()[0])
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = own.Close() }()
	return g.world(own, g.Dir)
}

func (g *watched) requiredOfAHangingHook() {
	g.t.Helper()
	before := g.look()
	g.sh("touch /run/hang")
	g.fails(5, "did not answer the freeze in time (2s)", "snapshot", "create", g.Name, "r", "--quiesce", "require", "--freeze-timeout", "2s")
	g.unresolved("require")
	after := g.look()
	after.State, after.Guards = before.State, before.Guards // the guard and its lease go on
	if diff := cmp.Diff(before, after); diff != "" {
		g.t.Errorf("require: before (-) and after (+):\n%s", diff)
	}
	g.fails(8, "", "thaw", g.Name)
	g.fails(4, "", "snapshot", "show", g.Name+"/r")
	g.sh("rm /run/hang")
	g.thawed("require")
	if diff := cmp.Diff(before, g.look()); diff != "" {
		g.t.Errorf("require, in the end: before (-) and after (+):\n%s", diff)
	}
}

func (g *watched) preferredToAHangingHook() {
	g.t.Helper()
	g.sh("touch /run/hang")
	g.must("snapshot", "create", g.Name, "p", "--freeze-timeout", "2s")
	g.unresolved("prefer")
	s := g.snapshot(g.Name + "/p")
	if s.Consistency != "crash" || !strings.Contains(s.Quiesce.Reason, "did not answer the freeze in time (2s)") || s.Quiesce.Frozen != 0 {
		g.t.Errorf("snapshot: %+v", s)
	}
	codes := map[string]bool{}
	for _, w := range s.Warnings {
		codes[w.Code] = true
	}
	if !codes["not-quiesced"] || !codes["thaw-unresolved"] {
		g.t.Errorf("warnings: %+v", s.Warnings)
	}
	g.sh("rm /run/hang")
	g.thawed("prefer")
}

// callerGone ends the command that asked for a freeze before the guest is
// frozen.
func (g *watched) callerGone(signal os.Signal) {
	g.t.Helper()
	when := "caller gone by " + signal.String()
	g.sh("touch /run/hang")
	cmd := exec.CommandContext(g.ctx(), filepath.Join(binaries, "vmsnap"), "freeze", g.Name, "--lease", "60s", "--freeze-timeout", "60s")
	cmd.Env = append(os.Environ(), "VMSNAP_SOCKET="+g.socket)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	id := g.operation(g.Name)
	g.eventually(eventLimit, "the guest is about to freeze", func() error {
		_, err := g.Exec(g.ctx(), "test -e /run/hanging")
		return err
	})
	if err := cmd.Process.Signal(signal); err != nil {
		g.t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || signal == os.Interrupt && exit.ExitCode() != 130 {
		g.t.Errorf("%s: vmsnap ended with %v: %s", when, err, &out)
	}
	g.unresolved(when)
	g.sh("rm /run/hang")
	g.thawed(when)
	g.ended(id, "cancelled", "")
}

// guestAgentKilled: the guest stays frozen, and nobody can thaw it, until its
// agent is there again.
func (g *watched) guestAgentKilled() {
	g.t.Helper()
	f := g.freeze("--lease", "1s")
	g.signalAgent("KILL")
	g.unresolved("agent killed under the lease")
	g.writesNothing("agent killed under the lease", "root", "data")
	if err := g.RestartAgent(g.ctx()); err != nil {
		g.t.Fatal(err)
	}
	g.thawed("agent killed under the lease")
	g.ended(f.Operation, "failed", "does not answer the thaw")

	f = g.freeze("--lease", "60s")
	g.signalAgent("KILL")
	g.fails(8, "thaw", "thaw", g.Name)
	g.unresolved("agent killed before the thaw")
	if err := g.RestartAgent(g.ctx()); err != nil {
		g.t.Fatal(err)
	}
	g.thawed("agent killed before the thaw")
	g.ended(f.Operation, "failed", "thaw")
}

// guestAgentStopped: an agent that is there and does not answer is found out
// before anything is frozen.
func (g *watched) guestAgentStopped() {
	g.t.Helper()
	g.signalAgent("STOP")
	if out := g.must("snapshot", "create", g.Name, "s", "--dry-run", "-o", "json"); !strings.Contains(out, `"guest-agent-not-responding"`) {
		g.t.Errorf("the dry run does not warn:\n%s", out)
	}
	g.fails(5, "does not answer", "snapshot", "create", g.Name, "s", "--quiesce", "require")
	g.must("snapshot", "create", g.Name, "s")
	if s := g.snapshot(g.Name + "/s"); s.Consistency != "crash" || s.Quiesce.Reason == "" || len(s.Warnings) == 0 || s.Warnings[0].Code != "guest-agent-not-responding" {
		g.t.Errorf("snapshot: %+v", s)
	}
	g.signalAgent("CONT")
	g.thawed("agent stopped")
	g.must("snapshot", "create", g.Name, "t", "--quiesce", "require")
	g.thawed("agent continued")
}
