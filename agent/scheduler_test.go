package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// scheduledHost is an agent whose snapshots are operations that take a while
// and record a snapshot.
type scheduledHost struct {
	*Agent
	t      *testing.T
	dir    string
	cancel context.CancelFunc
	ended  chan struct{}

	mu    sync.Mutex
	taken []string      // VM and name of the snapshots begun
	takes time.Duration // how long one takes
	ahead time.Duration // of the clock
}

// newScheduledHost has the VMs named, in a bubble of synctest.
func newScheduledHost(t *testing.T, dir string, vms ...string) *scheduledHost {
	t.Helper()
	a, err := Open(t.Context(), Config{StateDir: dir, Logger: hclog.NewNullLogger()})
	if err != nil {
		t.Fatal(err)
	}
	h := &scheduledHost{Agent: a, t: t, dir: dir, takes: time.Second, ended: make(chan struct{})}
	for _, name := range vms {
		if _, err := a.catalog.UpsertVM(t.Context(), catalog.VM{Name: name, Identity: "name:" + name, FirstSeen: time.Now().Add(-time.Hour), LastSeen: time.Now()}); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.loadCatalog(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.create = h.create
	a.clock = func() time.Time {
		h.mu.Lock()
		defer h.mu.Unlock()
		return time.Now().Add(h.ahead)
	}
	return h
}

// create is what takes snapshots here.
func (h *scheduledHost) create(ctx context.Context, req SnapshotRequest) (op.Record, error) {
	v, err := h.find(req.VM)
	if err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindSnapshot, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.UID}
	return h.ops.Start(ctx, spec, func(ctx context.Context, o *op.Op) error {
		h.mu.Lock()
		h.taken = append(h.taken, v.name()+"/"+req.Name)
		takes := h.takes
		h.mu.Unlock()
		select {
		case <-time.After(takes): // by the bubble's clock
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		o.SetSnapshot(o.ID())
		var expires time.Time
		if req.ExpireAfter > 0 {
			expires = h.clock().Add(req.ExpireAfter)
		}
		return h.catalog.CommitSnapshot(ctx, catalog.Commit{Snapshot: catalog.Snapshot{
			Expires: expires, ID: o.ID(), VMID: v.id, VMName: v.name(), Name: req.Name, Labels: req.Labels, Created: h.clock(), Operation: o.ID(),
		}})
	})
}

func (h *scheduledHost) start() {
	ctx, cancel := context.WithCancel(h.t.Context())
	h.cancel = cancel
	go h.news.run()
	go func() {
		h.followSchedules(ctx)
		h.group.Wait()
		close(h.ended)
	}()
}

// stop stops the agent as Run does.
func (h *scheduledHost) stop() {
	h.cancel()
	if err := h.ops.Shutdown(context.Background()); err != nil {
		h.t.Error(err)
	}
	<-h.ended
	h.news.close()
	if err := h.Close(); err != nil {
		h.t.Error(err)
	}
}

func (h *scheduledHost) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// names returns the snapshots begun so far.
func (h *scheduledHost) names() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.taken...)
}

func (h *scheduledHost) want(names ...string) {
	h.t.Helper()
	synctest.Wait()
	if diff := cmp.Diff(names, h.names()); diff != "" {
		h.t.Errorf("taken (-want +got):\n%s", diff)
	}
}

// events returns the messages of the events of a kind.
func (h *scheduledHost) told(kind event.Kind) (messages []string) {
	h.t.Helper()
	all, err := h.catalog.Events(h.t.Context(), event.Filter{Kinds: []event.Kind{kind}})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range all {
		messages = append(messages, e.VMName+": "+e.Message)
	}
	return messages
}

func (h *scheduledHost) make(s ScheduleSpec) ScheduleView {
	h.t.Helper()
	if s.Name == "" {
		s.Name = "s"
	}
	if s.NameTemplate == "" {
		s.NameTemplate = "{{.Time}}"
	}
	view, err := h.CreateSchedule(h.t.Context(), s, 7)
	if err != nil {
		h.t.Fatal(err)
	}
	return view
}

// In a bubble time begins at midnight of 2000-01-01.
func hourly() schedule.Timing { return schedule.Timing{Kind: schedule.Hourly, Minute: 30} }

func TestScheduleRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newScheduledHost(t, t.TempDir(), "web", "db")
		h.start()
		h.make(ScheduleSpec{VM: "web", Timing: hourly()})
		h.make(ScheduleSpec{Name: "all", Selector: "*", Timing: schedule.Timing{Kind: schedule.Daily, Hour: 1}, NameTemplate: "{{.Schedule}}-{{.VM}}-{{.Date}}"})
		time.Sleep(29 * time.Minute) // by the bubble's clock
		h.want()
		time.Sleep(91*time.Minute + time.Second) // by the bubble's clock
		h.stop()
		got := h.names()
		want := []string{"web/20000101T003000Z", "all", "all", "web/20000101T013000Z"}
		if len(got) != 4 || got[0] != want[0] || got[3] != want[3] || !strings.Contains(fmt.Sprint(got), "db/all-db-2000-01-01") {
			t.Errorf("got %v", got)
		}
	})
}

// TestScheduleAfterAStop has runs missed while no agent runs, and a run that was
// decided on but not begun.
func TestScheduleAfterAStop(t *testing.T) {
	for _, c := range []struct {
		missed schedule.Missed
		want   []string
	}{
		{schedule.CatchUp, []string{"web/20000101T023000Z", "web/20000101T033000Z"}},
		{schedule.Skip, []string{"web/20000101T033000Z"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			dir := t.TempDir()
			h := newScheduledHost(t, dir, "web")
			h.start()
			h.make(ScheduleSpec{VM: "web", Timing: hourly(), Missed: c.missed})
			time.Sleep(31 * time.Minute) // by the bubble's clock
			h.want("web/20000101T003000Z")
			h.stop()
			time.Sleep(2*time.Hour + 20*time.Minute) // by the bubble's clock
			h = newScheduledHost(t, dir, "web")
			h.start()
			time.Sleep(time.Hour) // by the bubble's clock
			h.want(c.want...)
			if told := h.told(event.ScheduleMissed); len(told) != 1 {
				t.Errorf("told %v", told)
			}
			h.stop()
		})
	}
}

// TestScheduleGoesOnWithARunThatWasDue stops the agent between the decision and
// the beginning of a run.
func TestScheduleGoesOnWithARunThatWasDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		h := newScheduledHost(t, dir, "web")
		began := make(chan struct{}, 1)
		h.Agent.create = func(ctx context.Context, req SnapshotRequest) (op.Record, error) {
			began <- struct{}{}
			<-ctx.Done()
			return op.Record{}, context.Cause(ctx)
		}
		h.start()
		h.make(ScheduleSpec{VM: "web", Timing: hourly()})
		<-began
		h.stop()
		h = newScheduledHost(t, dir, "web")
		h.start()
		time.Sleep(time.Minute) // by the bubble's clock
		h.want("web/20000101T003000Z")
		h.stop()
		h = newScheduledHost(t, dir, "web")
		h.start()
		time.Sleep(time.Minute) // by the bubble's clock
		h.want()
		h.stop()
	})
}

// TestScheduleOverClockJumps sets the clock forth and back.
func TestScheduleOverClockJumps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newScheduledHost(t, t.TempDir(), "web")
		h.start()
		h.make(ScheduleSpec{VM: "web", Timing: hourly()})
		time.Sleep(31 * time.Minute)                  // by the bubble's clock
		h.set(func() { h.ahead = -10 * time.Minute }) // over the run
		time.Sleep(20 * time.Minute)                  // by the bubble's clock
		h.want("web/20000101T003000Z")
		h.set(func() { h.ahead = 10 * 365 * 24 * time.Hour })
		time.Sleep(time.Minute) // by the bubble's clock
		h.set(func() { h.ahead = 0 })
		time.Sleep(70 * time.Minute) // by the bubble's clock
		got := h.names()
		if len(got) != 3 || !strings.HasPrefix(got[1], "web/2009") || got[2] != "web/20000101T013000Z" {
			t.Errorf("got %v", got)
		}
		h.stop()
	})
}

func TestScheduleOverlaps(t *testing.T) {
	for _, c := range []struct {
		overlap catalog.Overlap
		want    []string
		skipped string
	}{
		{catalog.OverlapSkip, []string{"web/20000101T003000Z", "web/20000101T033000Z"}, "busy"},
		// The second waits for the first, the third finds it waiting.
		{catalog.OverlapWait, []string{"web/20000101T003000Z", "web/20000101T013000Z"}, "the run before it still waits for the VM"},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := newScheduledHost(t, t.TempDir(), "web")
			h.takes = 150 * time.Minute
			h.start()
			h.make(ScheduleSpec{VM: "web", Timing: hourly(), Overlap: c.overlap})
			time.Sleep(3*time.Hour + 45*time.Minute) // by the bubble's clock
			h.want(c.want...)
			told := fmt.Sprint(h.told(event.ScheduleSkipped))
			if !strings.Contains(told, "the run of 2000-01-01 02:30:00 UTC is skipped") || !strings.Contains(told, c.skipped) {
				t.Errorf("told %s", told)
			}
			h.stop()
		})
	}
}

func TestSchedulePauseEditDelete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		h := newScheduledHost(t, t.TempDir(), "web")
		h.start()
		view := h.make(ScheduleSpec{VM: "web", Timing: hourly()})
		if next := view.VMs[0].Next; !next.Equal(time.Date(2000, 1, 1, 0, 30, 0, 0, time.UTC)) {
			t.Errorf("the next is %s", next)
		}
		if _, err := h.PauseSchedule(ctx, "s", true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Minute) // by the bubble's clock
		view, err := h.PauseSchedule(ctx, "s", false)
		if err != nil || view.Paused {
			t.Fatal(view, err)
		}
		time.Sleep(10 * time.Minute) // by the bubble's clock
		h.want()                     // nothing is caught up
		spec := view.Spec
		spec.Timing.Minute = 55
		if _, err = h.EditSchedule(ctx, "s", spec, view.Revision-1); fault.Of(err) != fault.Busy {
			t.Errorf("an older revision: %v", err)
		}
		if _, err = h.EditSchedule(ctx, "s", spec, view.Revision); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute) // by the bubble's clock
		h.want("web/20000101T015500Z")
		if err := h.DeleteSchedule(ctx, view.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour) // by the bubble's clock
		h.want("web/20000101T015500Z")
		want := []string{
			"web: schedule s: made: hourly at :30, UTC", "web: schedule s: paused", "web: schedule s: resumed", "web: schedule s: edited: hourly at :55, UTC",
			"web: schedule s: deleted",
		}
		if diff := cmp.Diff(want, h.told(event.ScheduleChanged)); diff != "" {
			t.Error(diff)
		}
		h.stop()
	})
}

// TestScheduleJitter spreads the VMs of a schedule over an hour.
func TestScheduleJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var vms []string
		for i := range 20 {
			vms = append(vms, fmt.Sprint("vm", i))
		}
		h := newScheduledHost(t, t.TempDir(), vms...)
		h.start()
		view := h.make(ScheduleSpec{Selector: "vm*", Timing: schedule.Timing{Kind: schedule.Daily, Hour: 2}, Jitter: time.Hour})
		minutes := map[int]bool{}
		for _, v := range view.VMs {
			minutes[v.Next.Minute()] = true
			if at := v.Next.Hour(); at != 2 {
				t.Errorf("%s runs at %s", v.Name, v.Next)
			}
		}
		if len(minutes) < 10 {
			t.Errorf("20 VMs run in %d minutes", len(minutes))
		}
		time.Sleep(3*time.Hour + time.Minute) // by the bubble's clock
		synctest.Wait()
		if got := h.names(); len(got) != 20 {
			t.Errorf("%d are taken", len(got))
		}
		h.stop()
	})
}

// deletes deletes snapshots from the catalog.
type deletes struct{ *scheduledHost }

func (d deletes) DeleteSnapshot(ctx context.Context, id string, uid uint32) (op.Record, error) {
	s, err := d.catalog.Snapshot(ctx, id)
	if err != nil {
		return op.Record{}, err
	}
	return d.ops.Start(ctx, op.Spec{Kind: "delete", VMID: s.VMID, UID: uid}, func(ctx context.Context, _ *op.Op) error {
		return d.catalog.DeleteSnapshot(ctx, id)
	})
}

func TestScheduleRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newScheduledHost(t, t.TempDir(), "web")
		h.deleter = deletes{h}
		h.start()
		h.make(ScheduleSpec{VM: "web", Timing: hourly(), Retention: schedule.Retention{Last: 3}})
		h.make(ScheduleSpec{Name: "kept", VM: "web", Timing: schedule.Timing{Kind: schedule.Hourly, Minute: 10}, Snapshot: SnapshotRequest{Labels: map[string]string{"keep": "yes"}}, Retention: schedule.Retention{Last: 1}})
		time.Sleep(5 * time.Hour) // by the bubble's clock
		synctest.Wait()
		all, err := h.catalog.Snapshots(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range all {
			names = append(names, s.Name)
		}
		want := []string{
			"20000101T043000Z", "20000101T041000Z", "20000101T033000Z", "20000101T031000Z", "20000101T023000Z",
			"20000101T021000Z", "20000101T011000Z", "20000101T001000Z",
		}
		if diff := cmp.Diff(want, names); diff != "" {
			t.Error(diff)
		}
		spec := ScheduleSpec{Name: "s", VM: "web", Timing: hourly(), Retention: schedule.Retention{Last: 1}}
		planned, err := h.PlanSchedule(t.Context(), "s", spec)
		if err != nil {
			t.Fatal(err)
		}
		var stays []string
		for _, v := range planned.VMs[0].Verdicts {
			stays = append(stays, fmt.Sprintf("%s %v %d", v.Name, v.Stays, len(v.Reasons)))
		}
		if diff := cmp.Diff([]string{"20000101T043000Z true 1", "20000101T033000Z false 1", "20000101T023000Z false 1"}, stays); diff != "" {
			t.Error(diff)
		}
		if now, err := h.Schedule(t.Context(), "s"); err != nil || now.Spec.Retention.Last != 3 {
			t.Errorf("the plan has changed it: %+v, %v", now, err)
		}
		if _, err := h.PlanSchedule(t.Context(), "", spec); fault.Of(err) != fault.Exists {
			t.Errorf("a second one of the name: %v", err)
		}
		spec.Name = "another"
		if planned, err = h.PlanSchedule(t.Context(), "", spec); err != nil || planned.ID != "" || len(planned.VMs) != 1 || planned.VMs[0].Next.IsZero() {
			t.Errorf("%+v, %v", planned, err)
		}
		if _, err := h.Schedule(t.Context(), "another"); fault.Of(err) != fault.NotFound {
			t.Errorf("the plan has made it: %v", err)
		}
		view, err := h.Schedule(t.Context(), "kept")
		if err != nil || len(view.VMs[0].Verdicts) != 5 || view.VMs[0].Verdicts[4].Reasons[0] != "it has the label keep" {
			t.Errorf("%+v, %v", view, err)
		}
		h.stop()
	})
}

// refusesOnce refuses the first deletion of each snapshot.
type refusesOnce struct {
	deletes
	mu  sync.Mutex
	ids map[string][]time.Time
}

// asked returns when each was to be deleted.
func (r *refusesOnce) asked() map[string][]time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.ids)
}

func (r *refusesOnce) DeleteSnapshot(ctx context.Context, id string, uid uint32) (op.Record, error) {
	r.mu.Lock()
	r.ids[id] = append(r.ids[id], time.Now())
	first := len(r.ids[id]) == 1
	r.mu.Unlock()
	if first {
		return op.Record{}, fault.New(fault.HasDependants, "clones lie on it")
	}
	return r.deletes.DeleteSnapshot(ctx, id, uid)
}

// TestExpiry has snapshots that are deleted by themselves: one whose time comes,
// one that is kept by its label, and one whose time is years off. The first
// attempt fails.
func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newScheduledHost(t, t.TempDir(), "web")
		deleter := &refusesOnce{deletes: deletes{h}, ids: map[string][]time.Time{}}
		h.deleter = deleter
		h.start()
		for name, req := range map[string]SnapshotRequest{
			"hour":  {ExpireAfter: time.Hour},
			"kept":  {ExpireAfter: time.Hour, Labels: map[string]string{"keep": ""}},
			"years": {ExpireAfter: 5 * 365 * 24 * time.Hour},
			"never": {},
		} {
			req.VM, req.Name = "web", name
			rec, err := h.create(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := h.ops.Wait(t.Context(), rec.ID); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		names := func() (all []string) {
			snapshots, err := h.catalog.Snapshots(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range snapshots {
				all = append(all, s.Name)
			}
			slices.Sort(all)
			return all
		}
		time.Sleep(59 * time.Minute) // by the bubble's clock
		synctest.Wait()
		if len(names()) != 4 || len(deleter.asked()) > 0 {
			t.Errorf("too early: %q", names())
		}
		time.Sleep(15 * time.Minute) // by the bubble's clock
		synctest.Wait()
		if diff := cmp.Diff([]string{"kept", "never", "years"}, names()); diff != "" {
			t.Error(diff)
		}
		for id, asked := range deleter.asked() {
			first, second := asked[0].Sub(began), asked[1].Sub(asked[0])
			if len(asked) != 2 || first > time.Hour+lookInterval || second < expiryRetry || second > expiryRetry+lookInterval {
				t.Errorf("%s: asked after %s, and %s later", id, first, second)
			}
		}
		if len(deleter.asked()) != 1 {
			t.Errorf("%d were to be deleted", len(deleter.asked()))
		}
		h.stop()
	})
}

func TestTakenAndComingRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newScheduledHost(t, t.TempDir(), "web", "db")
		h.start()
		h.make(ScheduleSpec{Selector: "*", Timing: hourly()})
		time.Sleep(95 * time.Minute) // by the bubble's clock
		synctest.Wait()
		taken, err := h.TakenRuns(t.Context(), RunFilter{VM: "web", Schedule: "s"})
		if err != nil || len(taken) != 2 || taken[0].Name != "20000101T013000Z" || taken[0].Result != op.Succeeded || taken[0].State != catalog.RunBegun {
			t.Errorf("%+v, %v", taken, err)
		}
		coming, err := h.ComingRuns(t.Context(), RunFilter{Limit: 3})
		if err != nil || len(coming) != 3 || coming[0].VMName != "db" || coming[1].VMName != "web" ||
			!coming[2].Begins.Equal(time.Date(2000, 1, 1, 3, 30, 0, 0, time.UTC)) {
			t.Errorf("%+v, %v", coming, err)
		}
		for _, f := range []RunFilter{{VM: "nope"}, {Schedule: "nope"}} {
			_, one := h.TakenRuns(t.Context(), f)
			_, other := h.ComingRuns(t.Context(), f)
			if fault.Of(one) != fault.NotFound || fault.Of(other) != fault.NotFound {
				t.Errorf("%+v: %v, %v", f, one, other)
			}
		}
		if none, err := h.ComingRuns(t.Context(), RunFilter{Disk: "root"}); err != nil || len(none) != 0 {
			t.Errorf("%+v, %v", none, err)
		}
		h.stop()
	})
}

func TestRefusedSchedules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newScheduledHost(t, t.TempDir(), "web")
		h.start()
		good := ScheduleSpec{Name: "s", VM: "web", Timing: hourly()}
		for _, c := range []struct {
			change func(*ScheduleSpec)
			kind   fault.Kind
			want   string
		}{
			{func(s *ScheduleSpec) { s.Name = "" }, fault.Usage, "cannot be called"},
			{func(s *ScheduleSpec) { s.Name = "a b" }, fault.Usage, "cannot be called"},
			{func(s *ScheduleSpec) { s.Name = strings.Repeat("x", 49) }, fault.Usage, "cannot be called"},
			{func(s *ScheduleSpec) { s.VM = "" }, fault.Usage, "either a VM or a selector"},
			{func(s *ScheduleSpec) { s.Selector = "*" }, fault.Usage, "either a VM or a selector"},
			{func(s *ScheduleSpec) { s.VM, s.Selector = "", "[" }, fault.Usage, "is not a pattern"},
			{func(s *ScheduleSpec) { s.VM = "nope" }, fault.NotFound, "nope"},
			{func(s *ScheduleSpec) { s.Timing.Minute = 60 }, fault.Usage, "the minute 60"},
			{func(s *ScheduleSpec) { s.Timing = schedule.Timing{Kind: schedule.Once, At: time.Unix(1, 0)} }, fault.Usage, "is past"},
			{func(s *ScheduleSpec) { s.Missed = "later" }, fault.Usage, "missed runs are"},
			{func(s *ScheduleSpec) { s.Overlap = "later" }, fault.Usage, "overlaps are"},
			{func(s *ScheduleSpec) { s.Jitter = -1 }, fault.Usage, "the jitter"},
			{func(s *ScheduleSpec) { s.Jitter = 25 * time.Hour }, fault.Usage, "the jitter"},
			{func(s *ScheduleSpec) { s.NameTemplate = "{{.Date}}" }, fault.Usage, "the same name"},
			{func(s *ScheduleSpec) { s.NameTemplate = "a b {{.Time}}" }, fault.Usage, "contains"},
			{func(s *ScheduleSpec) { s.NameTemplate = "{{.Foo}}" }, fault.Usage, "is none of"},
			{func(s *ScheduleSpec) { s.Snapshot.Quiesce = "always" }, fault.Usage, "quiesce"},
			{func(s *ScheduleSpec) { s.Retention.Last = -1 }, fault.Usage, "keep-last"},
		} {
			s := good
			c.change(&s)
			if _, err := h.CreateSchedule(t.Context(), s, 0); fault.Of(err) != c.kind || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v: %v; want %s, %q", s, err, c.kind, c.want)
			}
		}
		h.deleter, h.cfg.ScheduleCaps = deletes{h}, ScheduleCaps{Keep: 5, MaxAge: 48 * time.Hour}
		for _, c := range []struct {
			r    schedule.Retention
			want bool
		}{
			{schedule.Retention{}, false}, {schedule.Retention{MaxAge: time.Hour}, false}, {schedule.Retention{Last: 5}, false},
			{schedule.Retention{Last: 4, Daily: 2, MaxAge: time.Hour}, false}, {schedule.Retention{Last: 5, MaxAge: 72 * time.Hour}, false},
			{schedule.Retention{Last: 4, Daily: 1, MaxAge: 48 * time.Hour}, true},
		} {
			s := good
			s.Retention = c.r
			_, err := h.CreateSchedule(t.Context(), s, 0)
			if (err == nil) != c.want || err != nil && fault.Of(err) != fault.Denied {
				t.Errorf("%+v: %v", c.r, err)
			}
		}
		if _, err := h.CreateSchedule(t.Context(), good, 0); !errors.As(err, new(*fault.Error)) {
			t.Error(err)
		}
		h.stop()
	})
}
