package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

func TestQEMUActiveMerge(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, c := range []struct {
			name, attach, format string
			layers               int
			restart              bool
		}{
			{"reopened", "drive", "qcow2", 1, false},
			{"reopened-twice", "drive", "qcow2", 2, false},
			{"raw", "drive", "raw", 1, false},
			{"started-again", "drive", "qcow2", 2, true},
			{"iothread-started-again", "iothread", "qcow2", 1, true},
			{"filter", "filter", "qcow2", 1, false},
			{"filter-started-again", "filter", "qcow2", 2, true},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := newStack(t, q, c.attach, c.format, "")
				s.reopens = c.attach != "iothread"
				s.write(write{1, 0, 64})
				for i := range c.layers {
					s.cover()
					s.write(write{2 + i, 16 * (i + 1), 40})
				}
				if c.restart {
					s.restart()
				}
				m := s.activeMerge()
				point, called := m.BeforePivot, 0
				m.BeforePivot = func(ctx context.Context) error {
					called++
					if j, err := blockdev.FindJob(ctx, s, m.ID); err != nil || j.Status != monitor.JobPending {
						t.Errorf("before the pivot the job is %+v, %v", j, err)
					}
					return point(ctx)
				}
				var last blockdev.JobState
				m.Watch = func(j blockdev.JobState) { last = j }
				if err := m.Run(s.ctx(), s); err != nil {
					t.Fatal(err)
				}
				if called != 1 || last.Status != monitor.JobConcluded || last.Kind != "commit" || last.Done != last.Total || last.Total < 40*64<<10 {
					t.Errorf("hook called %d times, last seen %+v", called, last)
				}
				s.merged("after the merge")
				if top := s.chain(s.graph(), "a")[0].Node; !c.restart && c.attach == "drive" && top.DetectZeroes != "on" {
					t.Errorf("the disk lost its detect-zeroes: %s", top.DetectZeroes)
				}
				s.write(write{9, 3, 2})
				s.restart()
				s.holds(len(s.layers)-1, "started again")
				if c.layers == 1 {
					return
				}
				if err := s.activeMerge().Run(s.ctx(), s); err != nil {
					t.Fatal(err)
				}
				s.merged("after the second merge")
			})
		}
	})
}

var errHook = errors.New("the directory cannot be synced")

func TestQEMUActiveMergeHookFails(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("restarted-%v", restart), func(t *testing.T) {
				s := newStack(t, q, "drive", "qcow2", "")
				s.write(write{1, 0, 64})
				s.cover()
				s.write(write{2, 32, 64})
				if restart {
					s.restart()
				}
				before := s.shape()
				m := s.activeMerge()
				point := m.BeforePivot
				m.BeforePivot = func(context.Context) error { return errHook }
				err := m.Run(s.ctx(), s)
				if !errors.Is(err, errHook) || !errors.Is(err, blockdev.ErrNotMerged) {
					t.Fatalf("a merge whose hook fails: %v", err)
				}
				if restart && q.Name == "7.2" {
					// It leaves a base writable that it has opened by itself.
					for name, node := range before {
						before[name] = strings.Replace(node, "read-only=true", "read-only=false", 1)
					}
				}
				s.sameShape(before, "after a hook that failed")
				s.noJob()
				s.write(write{3, 90, 8})
				s.leads(1, "after a hook that failed")
				s.holds(1, "after a hook that failed")
				m.BeforePivot = point
				if err := m.Run(s.ctx(), s); err != nil {
					t.Fatal(err)
				}
				s.merged("the second time")
			})
		}
	})
}

// slow makes a merge take as long as the test likes.
const slow = 1 << 20

// begun runs a merge and returns when its job copies. wait returns Run's error.
func begun(t *testing.T, ctx context.Context, s *stack, run func(context.Context, blockdev.Monitor) error, watch *func(blockdev.JobState)) (wait func() error) {
	t.Helper()
	running := make(chan struct{})
	var seen bool
	*watch = func(j blockdev.JobState) {
		if j.Status == monitor.JobRunning && !seen {
			seen = true
			close(running)
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, s) }()
	select {
	case <-running:
	case err := <-ended:
		t.Fatalf("the job ended before it ran: %v", err)
	case <-time.After(20 * time.Second):
		t.Fatal("the job does not run")
	}
	return func() error {
		select {
		case err := <-ended:
			return err
		case <-time.After(30 * time.Second):
			return errors.New("the merge does not end")
		}
	}
}

func TestQEMUActiveMergeCancelledWhileItRuns(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "drive", "qcow2", "")
		s.write(write{1, 0, 64})
		s.cover()
		s.write(write{2, 32, 200})
		before := s.shape()
		m := s.activeMerge()
		m.Speed = slow
		why := errors.New("the operator does not want it any more")
		ctx, cancel := context.WithCancelCause(s.ctx())
		wait := begun(t, ctx, s, func(ctx context.Context, mon blockdev.Monitor) error { return m.Run(ctx, mon) }, &m.Watch)
		within(t, 2*time.Second, "cancelling", func() {
			cancel(why)
			if err := wait(); !errors.Is(err, why) || !errors.Is(err, blockdev.ErrNotMerged) {
				t.Errorf("a merge that was cancelled: %v", err)
			}
		})
		s.sameShape(before, "after a cancel")
		s.noJob()
		if l, err := blockdev.LockNoWriters(s.layers[0]); err != nil {
			t.Errorf("QEMU has the base open for writing: %v", err)
		} else {
			_ = l.Close()
		}
		s.flag(0, true)
		s.write(write{3, 300, 8})
		s.leads(1, "after a cancel")
		s.holds(1, "after a cancel")
		m = s.activeMerge()
		if err := m.Run(s.ctx(), s); err != nil {
			t.Fatal(err)
		}
		s.merged("the second time")
	})
}

// A ready job that somebody cancels ends as if it had succeeded.
func TestQEMUActiveMergeCancelledWhenReady(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "drive", "qcow2", "")
		s.write(write{1, 0, 64})
		s.cover()
		s.write(write{2, 32, 64})
		before := s.shape()
		m := s.activeMerge()
		cancelled := false
		var last blockdev.JobState
		m.Watch = func(j blockdev.JobState) {
			last = j
			if j.Status == monitor.JobReady && !cancelled {
				cancelled = true
				if err := s.Execute(s.ctx(), "block-job-cancel", map[string]any{"device": m.ID}, nil); err != nil {
					t.Error(err)
				}
			}
		}
		err := m.Run(s.ctx(), s)
		if !cancelled || last.Status != monitor.JobConcluded || last.Error != "" {
			t.Errorf("the job was last seen as %+v", last)
		}
		if !errors.Is(err, blockdev.ErrNotMerged) {
			t.Fatalf("a merge that did not pivot: %v", err)
		}
		s.point(1) // as Run's caller must
		s.sameShape(before, "after a cancel")
		s.noJob()
		s.write(write{3, 90, 8})
		s.holds(1, "after a cancel")
	})
}

// QEMU calls the base by the launch path, which leads to the overlay by now:
// opened for writing by that name, the overlay would be written into itself.
func TestQEMUActiveMergeRefusesAMisnamedBase(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "iothread", "qcow2", "")
		s.reopens = false
		s.write(write{1, 0, 64})
		s.cover()
		s.write(write{2, 32, 64})
		before := s.shape()
		base := s.chain(s.graph(), "a")[1].Node.Name
		s.flag(0, false)
		m := blockdev.ActiveMerge{
			Job: blockdev.Job{ID: "vmsnap-merge"}, Top: s.ids[1], Base: blockdev.Target{Node: base, File: s.fileID(s.layers[0])},
			PID: s.cmd.Process.Pid, BeforePivot: func(context.Context) error { return s.tryPoint(0) },
		}
		var misnamed *blockdev.MisnamedError
		if err := m.Run(s.ctx(), s); !errors.As(err, &misnamed) || misnamed.Node != base {
			t.Errorf("a merge into a layer that QEMU calls by another's name: %v", err)
		}
		s.sameShape(before, "after a refusal")
		s.noJob()
		s.leads(1, "after a refusal")
		s.holds(0, "after a refusal")
		s.holds(1, "after a refusal")
	})
}

// A covered overlay of a disk that runs in another thread is reopened there.
func TestQEMUActiveMergeInAnIOThread(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "iothread", "qcow2", "")
		s.reopens = false
		s.write(write{1, 0, 64})
		s.cover()
		s.write(write{2, 32, 64})
		s.cover()
		s.write(write{3, 64, 64})
		before := s.shape()
		m := s.activeMerge()
		point := m.BeforePivot
		m.BeforePivot = func(context.Context) error { return errHook }
		if err := m.Run(s.ctx(), s); !errors.Is(err, errHook) || !errors.Is(err, blockdev.ErrNotMerged) {
			t.Fatalf("a merge whose hook fails: %v", err)
		}
		if after := s.shape(); after["root"] != before["root"] {
			t.Errorf("the graph is %v", after)
		}
		s.write(write{4, 200, 8})
		s.holds(2, "after a hook that failed")
		m.BeforePivot = point
		if err := m.Run(s.ctx(), s); err != nil {
			t.Fatal(err)
		}
		s.merged("in an iothread")
		s.write(write{5, 300, 8})
		s.restart()
		s.holds(1, "started again")
	})
}

// Leaving a job that was told to end would leave the guest waiting for its disk.
func TestQEMUActiveMergeIsNotLeftPending(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "drive", "qcow2", "")
		s.write(write{1, 0, 64})
		s.cover()
		s.write(write{2, 32, 64})
		m := s.activeMerge()
		ctx, leave := context.WithCancelCause(s.ctx())
		m.Watch = func(j blockdev.JobState) {
			if j.Status == monitor.JobPending {
				leave(blockdev.ErrLeaveJob)
			}
		}
		if err := m.Run(ctx, s); err != nil {
			t.Fatalf("a merge that was to be left when it was pending: %v", err)
		}
		s.merged("left too late")
	})
}
