package agent

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// self is this process, which does not end before the test.
func self(t *testing.T) discover.Process {
	t.Helper()
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	start, err := strconv.ParseUint(fields[19], 10, 64) // the 22nd of all
	if err != nil {
		t.Fatal(err)
	}
	return discover.Process{PID: os.Getpid(), StartTime: start}
}

// TestFollowDoesNotHammer has a QEMU that greets and then cannot say what is
// needed of it.
func TestFollowDoesNotHammer(t *testing.T) {
	srv := monitortest.NewServer(t)
	var asked atomic.Int32
	srv.Handle("query-status", func(monitortest.Request) monitortest.Reply {
		asked.Add(1)
		return monitortest.Return("no status")
	})
	p := self(t)
	p.QMP = []discover.Socket{{Path: srv.Path()}}
	a := &Agent{log: hclog.NewNullLogger()}
	r := newRun(p)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	a.follow(ctx, &vm{rec: catalog.VM{Name: "web"}}, r)
	// 20, 40, 80, 160 and 320 ms apart, so five attempts at most.
	if n := asked.Load(); n < 2 || n > 6 {
		t.Errorf("it was asked %d times", n)
	}
	if r.problem == nil || r.session != nil {
		t.Errorf("problem %+v", r.problem)
	}
}

// TestKnownWaitsForTheFirstAnswer asks for a VM right after it was found, while
// its monitor has yet to answer.
func TestKnownWaitsForTheFirstAnswer(t *testing.T) {
	srv := monitortest.NewServer(t)
	asked, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	srv.Handle("query-status", func(monitortest.Request) monitortest.Reply {
		once.Do(func() { close(asked) })
		<-answer
		return monitortest.Fail("GenericError", "no status")
	})
	p := self(t)
	p.QMP = []discover.Socket{{Path: srv.Path()}}
	a := &Agent{log: hclog.NewNullLogger()}
	r := newRun(p)
	v := &vm{rec: catalog.VM{Name: "web"}, runs: []*run{r}}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); <-r.ended })
	go a.follow(ctx, v, r)
	<-asked
	if _, err := v.monitorOf(r); err == nil || !strings.Contains(err.Error(), "has not answered yet") {
		t.Fatalf("its monitor is known: %v", err)
	}
	time.AfterFunc(20*time.Millisecond, func() { close(answer) })
	if got, err := v.known(t.Context()); err != nil || got != r {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := v.monitorOf(r); err == nil || strings.Contains(err.Error(), "has not answered yet") {
		t.Errorf("it is not known what is wrong with its monitor: %v", err)
	}
	cancelled, stop := context.WithCancel(t.Context())
	stop()
	if _, err := (&vm{runs: []*run{newRun(p)}}).known(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("it waits for a caller that is gone: %v", err)
	}
}

// TestDisksAreLookedAtAfterAnOperation has a VM come back while an operation
// changes its layers, whose process before has not been missed yet when it ends.
func TestDisksAreLookedAtAfterAnOperation(t *testing.T) {
	srv := monitortest.NewServer(t)
	looks := make(chan struct{}, 16)
	srv.HandleReturn("query-status", map[string]any{"status": "running", "running": true})
	srv.Handle("query-named-block-nodes", func(monitortest.Request) monitortest.Reply {
		looks <- struct{}{}
		return monitortest.Return([]any{})
	})
	for _, command := range []string{"query-block", "query-block-jobs"} {
		srv.HandleReturn(command, []any{})
	}
	srv.HandleReturn("x-debug-query-block-graph", map[string]any{"nodes": []any{}, "edges": []any{}})
	c, err := catalog.Open(t.Context(), t.TempDir(), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	session, err := monitor.Dial(t.Context(), srv.Path())
	if err != nil {
		t.Fatal(err)
	}
	a, r := &Agent{log: hclog.NewNullLogger(), catalog: c}, newRun(self(t))
	v := &vm{id: "1", rec: catalog.VM{ID: "1", Name: "web"}, runs: []*run{newRun(self(t)), r}}
	v.changing.Lock()
	if registered, err := a.refreshDisks(t.Context(), v, r, session); registered || err != nil {
		t.Fatalf("registered while an operation changes them: %t, %v", registered, err)
	}
	<-looks
	ended := make(chan struct{})
	go func() { a.registerLater(t.Context(), v, r, session); close(ended) }()
	v.changing.Unlock()
	<-ended
	select {
	case <-looks:
	default:
		t.Error("its disks were not looked at again")
	}
	if err := errors.Join(session.Close(), c.Close()); err != nil {
		t.Error(err)
	}
}

// TestStopReleasesWhatRecoveryDidNotReach has something wait for a VM whose
// recovery never began.
func TestStopReleasesWhatRecoveryDidNotReach(t *testing.T) {
	v := &vm{}
	v.unfinished.Store(true)
	v.changing.Lock()
	a := &Agent{vms: map[string]*vm{"1": v}}
	a.giveUpRecovery()
	a.giveUpRecovery() // recovery and the stop may both come to it
	if !v.changing.TryLock() {
		t.Error("the VM is still held")
	}
}

// TestLostEventsAreMadeUpFor has the event that a VM stands still lost among
// others.
func TestLostEventsAreMadeUpFor(t *testing.T) {
	srv := monitortest.NewServer(t)
	asked, answer := make(chan struct{}), make(chan struct{})
	var n atomic.Int32
	srv.Handle("query-status", func(monitortest.Request) monitortest.Reply {
		if n.Add(1) > 1 {
			return monitortest.Return(map[string]any{"status": "paused", "running": false})
		}
		close(asked)
		<-answer
		return monitortest.Return(map[string]any{"status": "running", "running": true})
	})
	s, err := monitor.Dial(t.Context(), srv.Path())
	if err != nil {
		t.Fatal(err)
	}
	sub := s.Subscribe(2, "RESUME", "VSERPORT_CHANGE", "STOP")
	a, r := &Agent{log: hclog.NewNullLogger()}, newRun(self(t))
	ended := make(chan struct{})
	go func() { a.followEvents(t.Context(), &vm{}, r, s, sub); close(ended) }()
	srv.Emit("RESUME", nil)
	<-asked
	r.mu.Lock()
	r.how = endedByShutdown
	r.mu.Unlock()
	srv.Flood("VSERPORT_CHANGE", 5)
	srv.Emit("STOP", nil)
	deadline := time.After(10 * time.Second)
	for sub.Lost() != 4 {
		select {
		case <-deadline:
			t.Fatalf("%d events are lost", sub.Lost())
		case <-time.After(time.Millisecond): // nothing announces a loss
		}
	}
	close(answer)
	for {
		r.mu.Lock()
		status, how := r.status, r.how
		r.mu.Unlock()
		if status == "paused" && how == "" {
			break
		}
		select {
		case <-deadline:
			t.Fatalf("shown as %q, its end as %q", status, how)
		case <-time.After(time.Millisecond):
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	<-ended
}

// TestWindowsAreNotAskedInto has QEMU tell of its run state while an operation keeps
// its guest waiting: it is asked what that means afterwards.
func TestWindowsAreNotAskedInto(t *testing.T) {
	srv := monitortest.NewServer(t)
	asked := make(chan time.Time, 16)
	srv.Handle("query-status", func(monitortest.Request) monitortest.Reply {
		asked <- time.Now()
		return monitortest.Return(monitor.Status{Status: monitor.RunStatePaused})
	})
	session, err := monitor.Dial(t.Context(), srv.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = session.Close() })
	a := &Agent{log: hclog.NewNullLogger()}
	r := newRun(self(t))
	events := session.Subscribe(16)
	followed := make(chan struct{})
	go func() { defer close(followed); a.followEvents(t.Context(), &vm{}, r, session, events) }()
	t.Cleanup(func() { events.Close(); <-followed })

	const window = 400 * time.Millisecond
	began := time.Now()
	r.hush(window)
	srv.Emit("STOP", nil)
	select {
	case at := <-asked:
		if at.Sub(began) < window {
			t.Errorf("it was asked after %s", at.Sub(began))
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it was never asked")
	}
}
