package monitor_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// next returns the next event of a subscription.
func next(t *testing.T, sub *monitor.Subscription) monitor.Event {
	t.Helper()
	select {
	case e, ok := <-sub.C:
		if !ok {
			t.Fatal("subscription ended")
		}
		return e
	case <-time.After(20 * time.Second):
		t.Fatal("no event")
	}
	panic("unreachable")
}

func TestEventsReachTheirSubscribers(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	s := dial(t, srv.Path())
	all := s.Subscribe(10)
	jobs := s.Subscribe(10, "JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED")
	before := time.Now().Truncate(time.Microsecond)
	srv.Emit("STOP", nil)
	srv.Emit("JOB_STATUS_CHANGE", map[string]string{"id": `}"{\é😀`, "status": "running"})
	srv.Emit("RESUME", nil)

	var names []string
	for range 3 {
		e := next(t, all)
		names = append(names, e.Name)
		if e.Timestamp.Before(before) || e.Timestamp.After(time.Now()) {
			t.Errorf("%s at %v", e.Name, e.Timestamp)
		}
	}
	if diff := cmp.Diff([]string{"STOP", "JOB_STATUS_CHANGE", "RESUME"}, names); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	var data struct{ ID, Status string }
	if err := next(t, jobs).Decode(&data); err != nil || data.ID != `}"{\é😀` || data.Status != "running" {
		t.Errorf("data %+v, %v", data, err)
	}
	if n := len(jobs.C); n != 0 {
		t.Errorf("%d events that were not asked for", n)
	}
}

func TestEventWithoutTimeOrData(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	s := dial(t, srv.Path())
	sub := s.Subscribe(1)
	srv.Write([]byte(`{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}` + "\r\n"))
	e := next(t, sub)
	kept := 1
	if err := e.Decode(&kept); err != nil || kept != 1 || !e.Timestamp.IsZero() {
		t.Errorf("%+v, decoded %d, %v", e, kept, err)
	}
	srv.Emit("STOP", "no object")
	if err := next(t, sub).Decode(&struct{}{}); err == nil {
		t.Error("decoded a string to a struct")
	}
}

// TestIdleSubscriberBlocksNothing floods a subscriber that does not read,
// beside one that does, beside commands.
func TestIdleSubscriberBlocksNothing(t *testing.T) {
	checkLeaks(t)
	const n, room = 5000, 8
	srv := monitortest.NewServer(t)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	idle := s.Subscribe(room)
	awake := s.Subscribe(n)
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		srv.Flood("FLOOD", n)
	}()
	for i := range 200 {
		wantEcho(t, s, i)
	}
	<-flooded
	for want := range n {
		var data number
		if err := next(t, awake).Decode(&data); err != nil || data.N != want {
			t.Fatalf("event %d: %+v, %v", want, data, err)
		}
	}
	if awake.Lost() != 0 || idle.Lost() != n-room || len(idle.C) != room {
		t.Errorf("awake lost %d, idle lost %d and has %d", awake.Lost(), idle.Lost(), len(idle.C))
	}
}

func TestEventsBeforeAReplyAreThereWithIt(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("stop", func(monitortest.Request) monitortest.Reply {
		return monitortest.Return(nil).AfterEvents(monitortest.Event{Name: "STOP"})
	})
	s := dial(t, srv.Path())
	sub := s.Subscribe(1, "STOP")
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(sub.C) != 1 {
		t.Error("the event came after the reply that it preceded")
	}
}

func TestSubscriptionEnds(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	closed, gone := s.Subscribe(1), s.Subscribe(0)
	closed.Close()
	closed.Close()
	srv.Emit("STOP", nil)
	wantEcho(t, s, 1)
	if e, ok := <-closed.C; ok {
		t.Errorf("event %v after Close", e)
	}
	next(t, gone)
	srv.HangUp()
	if e, ok := <-gone.C; ok {
		t.Errorf("event %v after the end", e)
	}
	gone.Close()
	if _, ok := <-s.Subscribe(1).C; ok {
		t.Error("event on an ended session")
	}
}

func TestGoQEMUEvents(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	s := dial(t, srv.Path())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events, err := s.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	srv.Emit("JOB_STATUS_CHANGE", map[string]string{"id": "j"})
	e := <-events
	if e.Event != "JOB_STATUS_CHANGE" || e.Data["id"] != "j" || e.Timestamp.Seconds == 0 {
		t.Errorf("%+v", e)
	}
	srv.Flood("UNREAD", 3)
	cancel()
	for range events {
		// until it is closed
	}
	unread, err := s.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	srv.Flood("UNREAD", 3)
	_ = s.Close()
	for range unread {
		// until it is closed
	}
	if _, err := s.Events(t.Context()); !errors.Is(err, monitor.ErrClosed) {
		t.Errorf("events of a closed session: %v", err)
	}
}
