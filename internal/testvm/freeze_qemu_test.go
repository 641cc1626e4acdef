package testvm_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// agentConn speaks the guest agent's protocol as simply as it can be done, so
// that these tests depend on nothing but the guest.
type agentConn struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

func dialAgent(t *testing.T, g *testvm.Guest) *agentConn {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(soon(t), "unix", g.AgentSocket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &agentConn{t, conn, bufio.NewReader(conn)}
}

// call sends a command and returns its reply, as JSON.
func (a *agentConn) call(command string) string {
	a.t.Helper()
	deadline, _ := soon(a.t).Deadline()
	if err := a.conn.SetDeadline(deadline); err != nil {
		a.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(a.conn, `{"execute":%q}`+"\n", command); err != nil {
		a.t.Fatal(err)
	}
	line, err := a.in.ReadBytes('\n')
	if err != nil {
		a.t.Fatalf("%s: %v", command, err)
	}
	var reply map[string]json.RawMessage
	if err := json.Unmarshal(bytes.TrimLeft(line, "\xff"), &reply); err != nil {
		a.t.Fatalf("%s: %v", command, err)
	}
	if reply["return"] == nil {
		return string(reply["error"])
	}
	return string(reply["return"])
}

func TestQEMUFreezeStopsWritesAndNothingElse(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q})
		agent := dialAgent(t, g)
		if got := agent.call("guest-ping"); got != "{}" {
			t.Fatalf("guest-ping = %s", got)
		}
		w, err := g.StartWriters(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if got := agent.call("guest-fsfreeze-freeze"); got != "2" {
			t.Fatalf("guest-fsfreeze-freeze = %s, want both file systems", got)
		}
		frozen := time.Now()
		if _, err := g.Exec(soon(t), "sleep 1"); err != nil {
			t.Errorf("a frozen guest does not run commands: %v", err)
		}
		if got := agent.call("guest-fsfreeze-status"); got != `"frozen"` {
			t.Errorf("guest-fsfreeze-status = %s", got)
		}
		window := time.Since(frozen)
		if got := agent.call("guest-fsfreeze-thaw"); got != "2" {
			t.Fatalf("guest-fsfreeze-thaw = %s", got)
		}
		if err := w.AwaitWrites(soon(t), 10); err != nil {
			t.Fatal(err)
		}
		gaps := w.Gaps()
		for _, d := range g.Disks() {
			if gap := gaps.Writes[d.Name].Length(); gap < window {
				t.Errorf("the freeze took %v, but the longest gap of writes on %s is %v", window, d.Name, gap)
			}
		}
		if gap := gaps.Heartbeat.Length(); gap <= 0 || gap > window/2 {
			t.Errorf("the heartbeat's longest gap in a freeze of %v is %v", window, gap)
		}
		stopAndCheck(t, g, w)
	})
}

// stopAndCheck stops the writers and checks that each disk holds what was
// reported of it.
func stopAndCheck(t *testing.T, g *testvm.Guest, w *testvm.Writers) {
	t.Helper()
	if err := w.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	for disk, n := range w.Completed() {
		last, err := g.LastWrite(soon(t), disk)
		if err != nil || last < n {
			t.Errorf("disk %s completed write %d and holds %d: %v", disk, n, last, err)
		}
	}
}

func TestQEMUPauseStopsTheHeartbeat(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q})
		w, err := g.StartWriters(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		qmp := dialQMP(t, g.QMPSocket())
		qmp.call("stop")
		stopped := time.Now()
		qmp.awaitEvent("STOP")
		<-time.After(300 * time.Millisecond) // the pause to be seen
		pause := time.Since(stopped)
		if gap := w.Gaps().Heartbeat; gap.Length() < pause/2 {
			t.Errorf("a pause that lasts %v shows as a gap of %v", pause, gap.Length())
		}
		qmp.call("cont")
		if err := w.AwaitWrites(soon(t), 10); err != nil {
			t.Fatal(err)
		}
		gaps := w.Gaps()
		if gap := gaps.Heartbeat.Length(); gap < pause {
			t.Errorf("the pause took %v, but the heartbeat's longest gap is %v", pause, gap)
		}
		for disk, gap := range gaps.Writes {
			if gap.Length() < pause {
				t.Errorf("the pause took %v, but the longest gap of writes on %s is %v", pause, disk, gap.Length())
			}
		}
		stopAndCheck(t, g, w)
	})
}

func TestQEMUWritersGoOnAfterAKill(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q})
		w, err := g.StartWriters(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.AwaitWrites(soon(t), 300); err != nil { // more than once around the ring
			t.Fatal(err)
		}
		g.Kill()
		completed := w.Completed()
		if err := g.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		for disk, n := range completed {
			last, err := g.LastWrite(soon(t), disk)
			if err != nil || last < n {
				t.Errorf("disk %s had completed write %d when QEMU was killed and holds %d: %v", disk, n, last, err)
			}
		}
		again, err := g.StartWriters(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		for disk, n := range again.Completed() {
			if n <= completed[disk] {
				t.Errorf("disk %s: the sequence went from %d back to %d", disk, completed[disk], n)
			}
		}
		stopAndCheck(t, g, again)
	})
}

func TestQEMUFreezeHook(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, FreezeHook: "#!/bin/sh\necho \"$1\" >>/run/hook.log\n"})
		agent := dialAgent(t, g)
		agent.call("guest-fsfreeze-freeze")
		agent.call("guest-fsfreeze-thaw")
		if out, err := g.Exec(soon(t), "cat /run/hook.log"); err != nil || out != "freeze\nthaw\n" {
			t.Errorf("the hook was called with %q, %v", out, err)
		}
	})
}

func TestQEMUAgentStoppedKilledRestarted(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q})
		agent := dialAgent(t, g)
		if got := agent.call("guest-fsfreeze-freeze"); got != "2" {
			t.Fatalf("guest-fsfreeze-freeze = %s", got)
		}
		for _, signal := range []string{"STOP", "CONT"} {
			if err := g.SignalAgent(soon(t), signal); err != nil {
				t.Fatal(err)
			}
		}
		if got := agent.call("guest-fsfreeze-status"); got != `"frozen"` {
			t.Errorf("guest-fsfreeze-status = %s", got)
		}
		if err := g.SignalAgent(soon(t), "KILL"); err != nil {
			t.Fatal(err)
		}
		awaitAgent(t, g, false)
		if err := g.RestartAgent(soon(t)); err != nil {
			t.Fatal(err)
		}
		awaitAgent(t, g, true)
		if got := agent.call("guest-fsfreeze-status"); got != `"frozen"` {
			t.Errorf("guest-fsfreeze-status after the agent's restart = %s", got)
		}
		agent.call("guest-fsfreeze-thaw")
		if got := agent.call("guest-fsfreeze-status"); got != `"thawed"` {
			t.Errorf("guest-fsfreeze-status after thaw = %s", got)
		}
	})
}

// awaitAgent waits until there is a qemu-ga in the guest, or none.
func awaitAgent(t *testing.T, g *testvm.Guest, want bool) {
	t.Helper()
	for {
		running, err := g.AgentRunning(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if running == want {
			return
		}
	}
}

// qmpConn is a QMP session, as simple as agentConn.
type qmpConn struct {
	t      *testing.T
	conn   net.Conn
	in     *bufio.Reader
	events []string
}

func dialQMP(t *testing.T, path string) *qmpConn {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(soon(t), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	q := &qmpConn{t: t, conn: conn, in: bufio.NewReader(conn)}
	if greeting := q.read(); greeting["QMP"] == nil {
		t.Fatalf("no greeting on %s: %s", path, greeting)
	}
	q.call("qmp_capabilities")
	return q
}

func (q *qmpConn) read() map[string]json.RawMessage {
	q.t.Helper()
	deadline, _ := soon(q.t).Deadline()
	if err := q.conn.SetDeadline(deadline); err != nil {
		q.t.Fatal(err)
	}
	line, err := q.in.ReadBytes('\n')
	if err != nil {
		q.t.Fatalf("QMP: %v", err)
	}
	var message map[string]json.RawMessage
	if err := json.Unmarshal(line, &message); err != nil {
		q.t.Fatalf("QMP: %v", err)
	}
	if event := message["event"]; event != nil {
		q.events = append(q.events, strings.Trim(string(event), `"`))
	}
	return message
}

func (q *qmpConn) call(command string) {
	q.t.Helper()
	if _, err := fmt.Fprintf(q.conn, `{"execute":%q}`+"\n", command); err != nil {
		q.t.Fatal(err)
	}
	for {
		message := q.read()
		if message["error"] != nil {
			q.t.Fatalf("%s: %s", command, message["error"])
		}
		if message["return"] != nil {
			return
		}
	}
}

func (q *qmpConn) awaitEvent(name string) {
	q.t.Helper()
	for !slices.Contains(q.events, name) {
		q.read()
	}
}
