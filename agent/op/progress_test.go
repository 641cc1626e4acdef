package op

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestMeter(t *testing.T) {
	start := time.Now()
	type report struct {
		at   time.Duration
		done uint64
		unit string
	}
	for name, tc := range map[string]struct {
		reports []report
		total   uint64
		want    Progress
	}{
		"one report":     {[]report{{0, 10, "bytes"}}, 100, Progress{Done: 10, Total: 100, Unit: "bytes"}},
		"steady":         {[]report{{0, 0, "bytes"}, {time.Second, 10, "bytes"}, {2 * time.Second, 20, "bytes"}}, 100, Progress{20, 100, "bytes", 10, 8 * time.Second, 0}},
		"total unknown":  {[]report{{0, 0, "bytes"}, {time.Second, 10, "bytes"}}, 0, Progress{10, 0, "bytes", 10, 0, 0}},
		"over the total": {[]report{{0, 0, "bytes"}, {time.Second, 10, "bytes"}}, 5, Progress{10, 5, "bytes", 10, 0, 0}},
		"the last seconds count": {
			[]report{{0, 0, "bytes"}, {10 * time.Second, 1000, "bytes"}, {15 * time.Second, 1010, "bytes"}}, 2000,
			Progress{1010, 2000, "bytes", 2, 495 * time.Second, 0},
		},
		"it stalls":       {[]report{{0, 0, "bytes"}, {time.Second, 10, "bytes"}, {10 * time.Second, 10, "bytes"}}, 100, Progress{Done: 10, Total: 100, Unit: "bytes", Rate: 0}},
		"it starts over":  {[]report{{0, 90, "bytes"}, {time.Second, 5, "bytes"}, {2 * time.Second, 10, "bytes"}}, 100, Progress{10, 100, "bytes", 5, 18 * time.Second, 0}},
		"another unit":    {[]report{{0, 90, "bytes"}, {time.Second, 91, "blocks"}}, 100, Progress{Done: 91, Total: 100, Unit: "blocks"}},
		"never to finish": {[]report{{0, 0, "bytes"}, {5 * time.Second, 1, "bytes"}}, 1 << 63, Progress{Done: 1, Total: 1 << 63, Unit: "bytes", Rate: 0.2}},
	} {
		var m meter
		var got Progress
		for _, r := range tc.reports {
			got = m.progress(start.Add(r.at), r.done, tc.total, r.unit)
		}
		if got != tc.want {
			t.Errorf("%s: %+v, want %+v", name, got, tc.want)
		}
	}
}

func TestMeterKeepsFewSamples(t *testing.T) {
	var m meter
	at := time.Now()
	for i := range uint64(100000) {
		at = at.Add(time.Millisecond)
		m.progress(at, i, 0, "bytes")
	}
	if n := len(m.samples); n > int(rateWindow/rateSample)+2 {
		t.Errorf("%d samples", n)
	}
}

func TestProgressOfAStepWithinAPlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRunner(&memStore{})
		rec := mustStart(t, r, web, func(ctx context.Context, o *Op) error {
			o.Plan(3)
			for range 2 {
				if err := o.Step(ctx, "save", func(context.Context) error {
					o.Progress(5, 10, "bytes")
					if p := o.record().Progress; p.Done != 5 || p.Total != 10 || p.Unit != "bytes" {
						t.Errorf("within the step: %+v", p)
					}
					return nil
				}); err != nil {
					return err
				}
			}
			return errors.New("enough")
		})
		if p := wait(t, r, rec.ID).Progress; p != (Progress{Done: 2, Total: 3, Unit: "steps"}) {
			t.Errorf("after the steps: %+v", p)
		}
	})
}

func TestReportsAfterTheEndAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		r := newTestRunner(store)
		var stray *Op
		rec := mustStart(t, r, web, func(_ context.Context, o *Op) error { stray = o; return nil })
		ended := wait(t, r, rec.ID)
		stray.Progress(1, 2, "bytes")
		stray.Warn(Warning{Code: "late"})
		_ = stray.Step(t.Context(), "late", func(context.Context) error { return nil })
		time.Sleep(time.Minute) // by the bubble's clock
		writes := store.count("update")
		stray.saveNow() // as a timer that was late would
		if n := store.count("update"); n != writes {
			t.Error("it was written after its end")
		}
		if now := stray.record(); now.Revision != ended.Revision || len(now.Steps)+len(now.Warnings) > 0 {
			t.Errorf("it changed after its end: %+v", now)
		}
		if s := store.stored(t, rec.ID); s.State != Succeeded || s.Revision != ended.Revision {
			t.Errorf("the store has %+v", s)
		}
	})
}
