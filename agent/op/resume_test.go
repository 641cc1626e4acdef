package op

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// unfinished is what a daemon that was killed leaves behind.
func unfinished(id string, s State, why *Failure) Record {
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	return Record{
		ID: id, Kind: KindSnapshot, VMID: "vm1", VMName: "web", State: s, Failure: why, Created: start, Started: start, Revision: 9,
		Steps: []Step{{Name: "preflight", Started: start, Ended: start}, {Name: "freeze", Started: start}},
	}
}

func TestResume(t *testing.T) {
	cancelled := &Failure{Kind: fault.Cancelled, Message: "operation was cancelled"}
	broken := &Failure{Kind: fault.NoSpace, Message: "full"}
	gaveUp := fault.New(fault.Cancelled, "interrupted after a cancel; reverted")
	interrupted := errors.New("interrupted; reverted")
	for name, tc := range map[string]struct {
		state  State
		why    *Failure
		result error
		want   State
		kind   fault.Kind
	}{
		"queued, reverted":            {Queued, nil, interrupted, Failed, fault.Failed},
		"running, adopted":            {Running, nil, nil, Succeeded, ""},
		"running, reverted":           {Running, nil, interrupted, Failed, fault.Failed},
		"running, nobody cancelled":   {Running, nil, gaveUp, Failed, fault.Failed},
		"cancelling, reverted":        {Cancelling, nil, gaveUp, Cancelled, fault.Cancelled},
		"cancelling, adopted":         {Cancelling, nil, nil, Succeeded, ""},
		"reverting a cancelled one":   {Reverting, cancelled, gaveUp, Cancelled, fault.Cancelled},
		"reverting a broken one":      {Reverting, broken, fault.New(fault.NoSpace, "full"), Failed, fault.NoSpace},
		"reverting, of its own cause": {Reverting, cancelled, interrupted, Failed, fault.Failed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				left := unfinished("0badcafe", tc.state, tc.why)
				ended := resumeAndEnd(t, left, tc.result)
				wantEnd(t, ended, tc.want, tc.kind)
				if s := ended.Steps; len(s) != 3 || s[0].Error != "" || s[1].Error != "interrupted" || s[1].Ended.IsZero() {
					t.Errorf("steps %+v", s)
				}
				if !ended.Started.Equal(left.Started) || ended.Revision <= left.Revision {
					t.Errorf("started %v, revision %d", ended.Started, ended.Revision)
				}
			})
		})
	}
}

// resumeAndEnd resumes an operation with a recovery that returns result.
func resumeAndEnd(t *testing.T, left Record, result error) Record {
	t.Helper()
	store := &memStore{ops: []Record{left}}
	r := newTestRunner(store)
	release := make(chan struct{})
	if err := r.Resume(left, func(ctx context.Context, o *Op) error {
		if o.ID() != left.ID {
			t.Errorf("it runs as %s", o.ID())
		}
		<-release
		if err := o.Step(ctx, "recover", func(context.Context) error { return nil }); err != nil {
			t.Errorf("step: %v", err)
		}
		return result
	}); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	rec, err := r.Cancel(t.Context(), left.ID)
	wantKind(t, "cancel", err, fault.TooLate)
	if rec.State != Running || rec.Failure != nil || store.stored(t, left.ID).State != Running {
		t.Errorf("resumed as %s, %+v", rec.State, rec.Failure)
	}
	_, err = r.Start(t.Context(), web, nil)
	wantKind(t, "start meanwhile", err, fault.Busy)
	wantKind(t, "resume again", r.Resume(left, nil), fault.Usage)
	other := left
	other.ID = "00000001"
	wantKind(t, "resume another one of the VM", r.Resume(other, nil), fault.Busy)
	close(release)
	ended := wait(t, r, left.ID)
	wantKind(t, "resume an ended one", r.Resume(ended, nil), fault.Usage)
	return ended
}

func TestResumeRunsEvenWhenTheStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		left := unfinished("0badcafe", Running, nil)
		store := &memStore{ops: []Record{left}, before: func(_ int, method string, _ Record) error {
			if method == "update" {
				return errFull
			}
			return nil
		}}
		r := newTestRunner(store)
		thawed := false
		if err := r.Resume(left, func(context.Context, *Op) error { thawed = true; return nil }); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, wait(t, r, left.ID), Succeeded, "")
		if !thawed {
			t.Error("the guest stays frozen because a disk is full")
		}
	})
}
