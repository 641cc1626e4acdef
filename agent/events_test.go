package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// openAgent opens an agent that knows no VM and records its news.
func openAgent(t *testing.T) *Agent {
	t.Helper()
	a, err := Open(t.Context(), Config{StateDir: t.TempDir(), Logger: hclog.NewNullLogger()})
	if err != nil {
		t.Fatal(err)
	}
	go a.news.run()
	t.Cleanup(func() {
		a.news.close()
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

func addEvents(t *testing.T, a *Agent, kinds ...event.Kind) {
	t.Helper()
	for _, k := range kinds {
		if err := a.catalog.AddEvents(t.Context(), event.Event{Kind: k, Severity: event.Info, VMID: "v", VMName: "web"}); err != nil {
			t.Fatal(err)
		}
	}
}

func number(n uint64) *uint64 { return &n }

// watched watches until ctx ends and tells what comes, as words.
func watched(ctx context.Context, a *Agent, f EventFilter) <-chan string {
	seen := make(chan string, 10000)
	go func() {
		for n, err := range a.WatchEvents(ctx, f) {
			switch {
			case err != nil:
				seen <- "error: " + err.Error()
			case n.Stands:
				seen <- "stands"
			case n.Gap != nil:
				seen <- fmt.Sprintf("gap %d-%d", n.Gap.From, n.Gap.To)
			default:
				seen <- fmt.Sprint(n.Event.Seq)
			}
		}
		close(seen)
	}()
	return seen
}

func wantNext(t *testing.T, seen <-chan string, want ...string) {
	t.Helper()
	for _, w := range want {
		select {
		case got := <-seen:
			if got != w {
				t.Fatalf("saw %q; want %q", got, w)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%q does not come", w)
		}
	}
}

func TestWatchEvents(t *testing.T) {
	a := openAgent(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	addEvents(t, a, event.VMFound, event.VMStarted, event.VMStopped)
	now := watched(ctx, a, EventFilter{})
	all := watched(ctx, a, EventFilter{Since: number(0)})
	stopped := watched(ctx, a, EventFilter{Since: number(1), Kinds: []event.Kind{event.VMStopped}})
	wantNext(t, now, "stands")
	wantNext(t, all, "stands", "1", "2", "3")
	wantNext(t, stopped, "stands", "3")
	addEvents(t, a, event.VMStarted, event.VMStopped)
	wantNext(t, now, "4", "5")
	wantNext(t, all, "4", "5")
	wantNext(t, stopped, "5")
	addEvents(t, a, event.VMStarted, event.VMStarted)
	wantNext(t, all, "6", "7")
	wantNext(t, now, "6", "7")
	if err := a.catalog.PruneEvents(t.Context(), 1, 0, time.Time{}); err != nil {
		t.Fatal(err)
	}
	wantNext(t, watched(ctx, a, EventFilter{Since: number(2)}), "stands", "gap 3-6", "7")
	cancel(errors.New("enough"))
	for s := range all {
		if strings.HasPrefix(s, "error") && s != "error: enough" {
			t.Error(s)
		}
	}
	wantNext(t, watched(t.Context(), a, EventFilter{Since: number(1 << 50)}), "error: there is no event 1125899906842624 yet: the newest is "+
		fmt.Sprint(last(t, a)))
}

// TestFilteredEventsAreNoGap forgets events that a filter leaves out.
func TestFilteredEventsAreNoGap(t *testing.T) {
	a := openAgent(t)
	addEvents(t, a, event.VMStopped, event.VMStarted, event.VMStarted, event.VMStarted)
	f := event.Filter{Kinds: []event.Kind{event.VMStopped}, Limit: watchPage}
	news, err := a.eventsAfter(t.Context(), &f)
	if err != nil || len(news) != 1 || f.Since != 4 {
		t.Errorf("%+v, %d, %v", news, f.Since, err)
	}
	if err := a.catalog.PruneEvents(t.Context(), 1, 0, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if news, err := a.eventsAfter(t.Context(), &f); err != nil || len(news) != 0 {
		t.Errorf("%+v, %v", news, err)
	}
}

func last(t *testing.T, a *Agent) uint64 {
	t.Helper()
	b, err := a.catalog.EventBounds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b.Last
}

// TestWatchersMissNothing has watchers that come and go while events are added
// and forgotten: each event is seen once, in order, or is in a gap.
func TestWatchersMissNothing(t *testing.T) {
	a := openAgent(t)
	const total = 600
	go func() {
		for range total {
			a.news.tell(event.Event{Kind: event.VMStarted, Severity: event.Info})
		}
	}()
	var since uint64
	gaps := 0
	for since < total {
		ctx, cancel := context.WithCancel(t.Context())
		count := 0
		for n, err := range a.WatchEvents(ctx, EventFilter{Since: &since}) {
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case n.Stands:
				continue
			case n.Gap != nil && n.Gap.From != since+1, n.Gap == nil && n.Event.Seq != since+1:
				t.Fatalf("%+v after %d", n, since)
			case n.Gap != nil:
				since, gaps = n.Gap.To, gaps+1
			default:
				since = n.Event.Seq
			}
			if count++; count == 37 || since == total {
				break
			}
		}
		cancel()
		if since%5 == 0 {
			if err := a.catalog.PruneEvents(t.Context(), 50, 0, time.Time{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d gaps", gaps)
}

func TestListEvents(t *testing.T) {
	a := openAgent(t)
	addEvents(t, a, event.VMFound, event.VMStarted)
	list, err := a.Events(t.Context(), EventFilter{Limit: 1})
	if err != nil || len(list.Events) != 1 || list.Events[0].Seq != 2 || list.Bounds != (event.Bounds{First: 1, Last: 2}) {
		t.Errorf("%+v, %v", list, err)
	}
	// The VM is not known any more; what happened to it is.
	if list, err = a.Events(t.Context(), EventFilter{VM: "web", Since: number(1)}); err != nil || len(list.Events) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err = a.Events(t.Context(), EventFilter{VM: "wbe"}); fault.Of(err) != fault.NotFound {
		t.Errorf("a VM that never was: %v", err)
	}
}

// TestRefusedCalls has one caller who is refused again and again.
func TestRefusedCalls(t *testing.T) {
	a := openAgent(t)
	for range 100 {
		a.CallRefused(1000, 7, "VMService/ListVMs", "no role")
	}
	a.CallRefused(1001, 8, "VMService/ListVMs", "no role")
	var got []string
	for n, err := range a.WatchEvents(t.Context(), EventFilter{Since: number(0)}) {
		if err != nil {
			t.Fatal(err)
		}
		if n.Stands {
			continue
		}
		if got = append(got, n.Event.Message); len(got) == 2 {
			break
		}
	}
	want := []string{"VMService/ListVMs by uid 1000 (pid 7): no role", "VMService/ListVMs by uid 1001 (pid 8): no role"}
	if diff := cmp.Diff(want, got); diff != "" || last(t, a) != 2 {
		t.Errorf("%d events: %s", last(t, a), diff)
	}
}

// TestNewsSurvivesAFullQueue tells more than the queue holds while nothing is
// recorded: what is lost is counted.
func TestNewsSurvivesAFullQueue(t *testing.T) {
	c, err := catalog.Open(t.Context(), t.TempDir(), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	n := newNews(c, hclog.NewNullLogger())
	for range newsQueue + 3 {
		n.tell(event.Event{Kind: event.VMStarted, Severity: event.Info})
	}
	go n.run()
	n.close()
	all, err := c.Events(t.Context(), event.Filter{Kinds: []event.Kind{event.EventsLost}})
	if err != nil || len(all) != 1 || all[0].Message != "3 events could not be recorded" {
		t.Errorf("%+v, %v", all, err)
	}
	if b, err := c.EventBounds(t.Context()); err != nil || b.Last != newsQueue+1 {
		t.Errorf("%+v, %v", b, err)
	}
}
