package memdump

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// mayStandStill is how long a guest may stand still whose agent was lost.
const mayStandStill = 2 * time.Second

// guardedQEMU is a QEMU whose guest has nothing to boot. The agent under test
// has its first monitor, the test watches by the second.
type guardedQEMU struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
	vm  guardedVM
	*monitor.Session
}

// eachGuardedQEMU runs the test with each version of QEMU, its guest running.
func eachGuardedQEMU(t *testing.T, test func(t *testing.T, m *guardedQEMU)) {
	t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range versions {
		t.Run("qemu-"+q.Name, func(t *testing.T) {
			m := startGuardedQEMU(t, q)
			if err := m.Cont(guardContext(t)); err != nil {
				t.Fatal(err)
			}
			test(t, m)
		})
	}
}

func startGuardedQEMU(t *testing.T, q testvm.QEMU) *guardedQEMU {
	t.Helper()
	dir, err := os.MkdirTemp("", "pg")
	if err != nil {
		t.Fatal(err)
	}
	m := &guardedQEMU{t: t, dir: dir}
	socket, own := filepath.Join(dir, "q1"), filepath.Join(dir, "q2")
	m.cmd = exec.Command(q.Binary, append(append([]string{}, q.Args...), "-S", "-display", "none", "-nodefaults", "-m", "64",
		"-machine", "pc,accel=tcg", "-qmp", "unix:"+socket+",server=on,wait=off", "-qmp", "unix:"+own+",server=on,wait=off")...)
	var stderr strings.Builder
	m.cmd.Stderr = &stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = m.cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		<-ended
		if m.Session != nil {
			_ = m.Close()
		}
		_ = os.RemoveAll(dir)
	})
	m.Session, err = testvm.Connect(guardContext(t), ended, func(ctx context.Context) (*monitor.Session, error) { return monitor.Dial(ctx, own) })
	if err != nil {
		t.Fatalf("QEMU: %v\n%s", err, &stderr)
	}
	m.vm = guardedVM{Socket: socket, PID: m.cmd.Process.Pid, Resumed: filepath.Join(dir, "resumed")}
	if m.vm.StartTime, err = startTime(m.vm.PID); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *guardedQEMU) status() monitor.Status {
	m.t.Helper()
	st, err := m.QueryStatus(guardContext(m.t))
	if err != nil {
		m.t.Fatal(err)
	}
	return st
}

func (m *guardedQEMU) wantStatus(want monitor.RunState) {
	m.t.Helper()
	if st := m.status(); st.Status != want {
		m.t.Errorf("the VM is %s, want %s", st.Status, want)
	}
}

// awaitRunning returns how long after some moment the VM runs.
func (m *guardedQEMU) awaitRunning(since time.Time) time.Duration {
	m.t.Helper()
	return m.await("running", since, func() bool { return m.status().Running })
}

func (m *guardedQEMU) await(what string, since time.Time, met func() bool) time.Duration {
	m.t.Helper()
	for time.Since(since) < guardTestLimit {
		if met() {
			return time.Since(since)
		}
		<-time.After(2 * time.Millisecond) // a query is the truth
	}
	m.t.Fatalf("never %s: %+v, migration %+v", what, m.status(), m.migration())
	return 0
}

func (m *guardedQEMU) migration() monitor.Migration {
	m.t.Helper()
	mig, err := m.QueryMigrate(guardContext(m.t))
	if err != nil {
		m.t.Fatal(err)
	}
	return mig
}

func (m *guardedQEMU) wantInTime(took time.Duration) {
	m.t.Helper()
	m.t.Logf("the VM ran after %s", took)
	if took > mayStandStill {
		m.t.Errorf("the VM ran after %s, want %s", took, mayStandStill)
	}
}

// wantFree checks that the monitor serves its next client.
func (m *guardedQEMU) wantFree() {
	m.t.Helper()
	s, err := monitor.Dial(guardContext(m.t), m.vm.Socket)
	if err != nil {
		m.t.Error(err)
		return
	}
	_ = s.Close()
}

func (m *guardedQEMU) wantNoted(want bool) {
	m.t.Helper()
	if _, err := os.Stat(m.vm.Resumed); (err == nil) != want {
		m.t.Errorf("noted that the VM was resumed: %v, want %t", err, want)
	}
}

func TestQEMUPauseAgentKilled(t *testing.T) {
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		a := startPausingAgent(t, m.vm)
		a.do("arm 1m", "stop")
		m.wantStatus(monitor.RunStatePaused)
		// Half a reply may have been read, and a command just been sent.
		a.ask("send query-qmp-schema")
		killed := time.Now()
		a.signal(unix.SIGKILL)
		m.wantInTime(m.awaitRunning(killed))
		a.awaitGuardEnd()
		m.wantNoted(true)
		m.wantFree()
	})
}

// The stop is on its way when the agent dies: it is executed, and undone.
func TestQEMUPauseAgentKilledWhileStopping(t *testing.T) {
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		sub := m.Subscribe(8, "STOP", "RESUME")
		a := startPausingAgent(t, m.vm)
		a.do("arm 1m")
		halt(t, m.vm.PID)
		a.ask("send stop")
		a.signal(unix.SIGKILL)
		_ = a.cmd.Wait()
		if err := unix.Kill(m.vm.PID, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		continued := time.Now()
		a.awaitGuardEnd()
		m.wantInTime(time.Since(continued))
		sub.Close()
		for e := range sub.C {
			t.Log(e.Name)
		}
		m.wantStatus(monitor.RunStateRunning)
	})
}

// A client that waits for the monitor changes nothing: the guard has the
// connection already.
func TestQEMUPauseAgentStopped(t *testing.T) {
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		a := startPausingAgent(t, m.vm)
		waiting, err := net.Dial("unix", m.vm.Socket)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = waiting.Close() }()
		a.do("arm 1m", "stop")
		m.wantStatus(monitor.RunStatePaused)
		stopped := time.Now()
		halt(t, a.cmd.Process.Pid)
		m.wantInTime(m.awaitRunning(stopped))
		a.awaitGuardEnd()
		a.signal(unix.SIGCONT)
		if got := a.ask("session"); got != "true" {
			t.Errorf("the session is gone: %s", got)
		}
		if got := a.ask("disarm"); got != "acted true, error <nil>" {
			t.Errorf("disarm: %s", got)
		}
		if got := a.ask("query-status"); !strings.Contains(got, monitor.ErrGone.Error()) {
			t.Errorf("a command after it: %s", got)
		}
		a.do("close")
		m.wantStatus(monitor.RunStateRunning)
		_ = waiting.Close()
		m.wantFree()
	})
}

// An agent that lives, reads its session and does not come to an end with the
// pause lets the guard have the connection.
func TestQEMUPauseOverItsLimit(t *testing.T) {
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		a := startPausingAgent(t, m.vm)
		waiting, err := net.Dial("unix", m.vm.Socket)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = waiting.Close() }()
		const limit = 300 * time.Millisecond
		armed := time.Now()
		a.do("arm "+limit.String(), "stop")
		took := m.awaitRunning(armed)
		if took < limit-50*time.Millisecond || took > limit+time.Second {
			t.Errorf("the VM ran after %s, with a limit of %s", took, limit)
		}
		a.awaitGuardEnd()
		if got := a.ask("session"); got != "true" {
			t.Errorf("the session is gone: %s", got)
		}
		if got := a.ask("disarm"); got != "acted true, error <nil>" {
			t.Errorf("disarm: %s", got)
		}
		m.wantNoted(true)
	})
}

// What the guard must leave alone, or it would resume what others have paused.
func TestQEMUPauseNotGuarded(t *testing.T) {
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		for _, how := range []string{"killed", "closed"} {
			a := startPausingAgent(t, m.vm)
			a.do("arm 1m", "stop", "cont")
			if got := a.ask("disarm"); got != "acted false, error <nil>" {
				t.Errorf("disarm: %s", got)
			}
			if err := m.Stop(guardContext(t)); err != nil { // the owner
				t.Fatal(err)
			}
			if how == "killed" {
				a.signal(unix.SIGKILL)
			} else {
				a.do("close", "query-version")
			}
			a.awaitGuardEnd()
			m.wantStatus(monitor.RunStatePaused)
			m.wantNoted(false)
			a.signal(unix.SIGKILL)
			m.wantFree()
			if err := m.Cont(guardContext(t)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestQEMUPauseVMKilled(t *testing.T) {
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		a := startPausingAgent(t, m.vm)
		a.do("arm 1m", "stop")
		if err := m.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		a.awaitGuardEnd()
		// It may have begun to act, since the session ends before the process.
		if got := a.ask("disarm"); !strings.HasSuffix(got, "error <nil>") {
			t.Errorf("disarm: %s", got)
		}
		a.do("close")
		m.wantNoted(false)
	})
}

// save begins a save by the agent's session.
func (m *guardedQEMU) save(a *agentUnderTest, capabilities ...string) {
	m.t.Helper()
	var set []string
	for _, c := range capabilities {
		set = append(set, fmt.Sprintf(`{"capability":%q,"state":true}`, c))
	}
	a.do(`migrate-set-capabilities {"capabilities":[`+strings.Join(set, ",")+`]}`,
		"getfd "+filepath.Join(m.dir, "memory"), `migrate {"uri":"fd:memory"}`)
}

func (m *guardedQEMU) awaitMigration(want monitor.MigrationStatus) {
	m.t.Helper()
	m.await("migration "+string(want), time.Now(), func() bool { return m.migration().Status == want })
}

// slow makes a migration last.
const slow = `migrate-set-parameters {"max-bandwidth":65536}`

func TestQEMUPauseInAPrecopySave(t *testing.T) {
	tests := map[string]struct {
		parameters, before string
		at                 monitor.MigrationStatus
		then               monitor.MigrationStatus
	}{
		// It would reach its switchover with nobody there.
		"active":         {slow, "", monitor.MigrationActive, monitor.MigrationCancelled},
		"pre-switchover": {`migrate-set-parameters {"max-bandwidth":0}`, "", monitor.MigrationPreSwitch, monitor.MigrationCancelled},
		"paused before":  {slow, "stop", monitor.MigrationActive, monitor.MigrationCancelled},
		"completed":      {`migrate-set-parameters {"max-bandwidth":0}`, "", monitor.MigrationCompleted, monitor.MigrationCompleted},
	}
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		for name, test := range tests {
			t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
				defer func(outer *testing.T) { m.t = outer }(m.t)
				m.t = t
				a := startPausingAgent(t, m.vm)
				a.do("arm 1m", test.parameters)
				if test.before != "" {
					a.do(test.before)
				}
				m.save(a, "events", "pause-before-switchover")
				if test.at == monitor.MigrationCompleted {
					m.awaitMigration(monitor.MigrationPreSwitch)
					a.do(`migrate-continue {"state":"pre-switchover"}`)
				}
				m.awaitMigration(test.at)
				before := m.status()
				killed := time.Now()
				a.signal(unix.SIGKILL)
				took := m.awaitRunning(killed)
				a.awaitGuardEnd()
				m.wantInTime(took)
				m.wantStatus(monitor.RunStateRunning)
				if got := m.migration().Status; got != test.then {
					t.Errorf("the migration is %s, want %s", got, test.then)
				}
				t.Logf("was %s", before.Status)
			})
		}
	})
}

// A background save is never cancelled: before QEMU 8.1 that would freeze the
// guest for good.
func TestQEMUPauseInABackgroundSave(t *testing.T) {
	eachGuardedQEMU(t, func(t *testing.T, m *guardedQEMU) {
		a := startPausingAgent(t, m.vm)
		a.do("arm 1m", slow, "stop")
		m.save(a, "background-snapshot")
		killed := time.Now()
		a.signal(unix.SIGKILL)
		m.wantInTime(m.awaitRunning(killed))
		a.awaitGuardEnd()
		m.await("saved", time.Now(), func() bool { return m.migration().Status == monitor.MigrationCompleted })
		m.wantStatus(monitor.RunStateRunning)
	})
}
