package blockdev_test

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// tmpfs mounts a file system of a size.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("vmsnap", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestQEMUActiveMergeWithoutSpace(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		dir := tmpfs(t, "6m")
		s := newStack(t, q, "drive", "qcow2", dir)
		s.write(write{1, 0, 32})
		s.cover()
		s.write(write{2, 16, 160})
		before := s.shape()
		full := func(what string) (m *blockdev.ActiveMerge, cancel context.CancelCauseFunc, ended chan error) {
			merge := s.activeMerge()
			stopped := make(chan blockdev.JobState, 1)
			merge.Watch = func(j blockdev.JobState) {
				if j.Stopped != blockdev.NotStopped {
					select {
					case stopped <- j:
					default:
					}
				}
			}
			ctx, cancel := context.WithCancelCause(s.ctx())
			ended = make(chan error, 1)
			go func() { ended <- merge.Run(ctx, s) }()
			select {
			case j := <-stopped:
				if j.Stopped != blockdev.StopNoSpace || j.Status == monitor.JobConcluded || j.Done >= j.Total {
					t.Errorf("%s: %+v", what, j)
				}
			case err := <-ended:
				t.Fatalf("%s: the merge ended: %v", what, err)
			case <-time.After(20 * time.Second):
				t.Fatalf("%s: the merge does not stop", what)
			}
			return &merge, cancel, ended
		}
		why := errors.New("there will not be more space")
		_, cancel, ended := full("to be cancelled")
		cancel(why)
		if err := <-ended; !errors.Is(err, why) || !errors.Is(err, blockdev.ErrNotMerged) {
			t.Errorf("cancelled without space: %v", err)
		}
		s.sameShape(before, "cancelled without space")
		s.holds(1, "cancelled without space")

		m, _, ended := full("to be resumed")
		if err := blockdev.ResumeJob(s.ctx(), s, m.ID); err != nil { // there is no space yet
			t.Fatal(err)
		}
		if err := syscall.Mount("vmsnap", dir, "tmpfs", syscall.MS_REMOUNT, "size=64m"); err != nil {
			t.Fatal(err)
		}
		deadline := time.After(20 * time.Second)
		for done := false; !done; {
			// It may stop once more, for a write that failed before there was space.
			err := blockdev.ResumeJob(s.ctx(), s, m.ID)
			var refused *monitor.CommandError
			if err != nil && !errors.As(err, &refused) {
				t.Fatal(err)
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Fatal(err)
				}
				done = true
			case <-time.After(50 * time.Millisecond):
			case <-deadline:
				t.Fatal("the merge does not go on")
			}
		}
		s.merged("with enough space")
	})
}

// The overlay cannot be read any more.
func TestQEMUActiveMergeIOError(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "drive", "qcow2", "")
		s.reopens = false
		s.write(write{1, 0, 32})
		s.cover()
		s.write(write{2, 16, 100})
		// A layer above it, which QEMU reads by way of a broken disk.
		bad := s.path("bad.qcow2")
		s.img("create", "-q", "-f", "qcow2", "-u", "-b", s.layers[1], "-F", "qcow2", bad, "64M")
		for _, node := range []map[string]any{
			{"driver": "file", "filename": bad, "node-name": "bad-disk"},
			{"driver": "blkdebug", "image": "bad-disk", "node-name": "bad-file",
				"inject-error": []any{map[string]any{"event": "read_aio", "errno": int(syscall.EIO), "sector": -1, "once": true}}},
			{"driver": "qcow2", "file": "bad-file", "node-name": "bad", "backing": nil},
		} {
			if err := s.Execute(s.ctx(), "blockdev-add", node, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := blockdev.Cut(s.ctx(), s, []blockdev.Pair{{Base: s.ids[1], Overlay: "bad"}}); err != nil {
			t.Fatal(err)
		}
		s.layers, s.ids = append(s.layers, bad), append(s.ids, "bad")
		s.patterns = append(s.patterns, append([]write(nil), s.patterns[1]...))
		s.write(write{3, 32, 64})
		before := s.shape()
		m := blockdev.ActiveMerge{
			Job: blockdev.Job{ID: "vmsnap-merge"}, Top: "bad", Base: s.target(1), PID: s.cmd.Process.Pid,
			BeforePivot: func(context.Context) error { return s.tryPoint(1) },
		}
		errorsSeen := s.Subscribe(16, "BLOCK_JOB_ERROR")
		defer errorsSeen.Close()
		var job *blockdev.JobError
		err := m.Run(s.ctx(), s)
		if !errors.As(err, &job) || !errors.Is(err, syscall.EIO) || !errors.Is(err, blockdev.ErrNotMerged) {
			t.Fatalf("a merge of a layer that cannot be read: %v", err)
		}
		if n := len(errorsSeen.C); n != 1 {
			t.Errorf("%d errors: it was tried again", n)
		}
		// The layer below was made writable when it was covered by the test, and not read-only.
		after := s.shape()
		if after["root"] != before["root"] || after["bad"] != before["bad"] {
			t.Errorf("the graph is %v", after)
		}
		s.noJob()
		s.holds(2, "after an I/O error")
	})
}

// QEMU is killed at each point around the pivot, and started by its launch
// command: what was written last is there.
func TestQEMUKilledAroundThePivot(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, at := range []string{"running", "before-pointing", "after-pointing", "finalizing", "concluded"} {
			t.Run(at, func(t *testing.T) {
				s := newStack(t, q, "drive", "qcow2", "")
				s.write(write{1, 0, 64})
				s.cover()
				s.write(write{2, 32, 100})
				m := s.activeMerge()
				kill := func(here string) {
					if here == at {
						_ = s.cmd.Process.Kill()
						<-s.ended
					}
				}
				if at == "running" {
					m.Speed = 1 << 20
				}
				m.Watch = func(j blockdev.JobState) {
					if j.Done > 0 || j.Status == monitor.JobConcluded {
						kill(string(j.Status))
					}
				}
				m.BeforePivot = func(context.Context) error {
					if active := s.chain(s.graph(), "a")[0].Node.Name; active != s.ids[1] {
						t.Errorf("the disk runs on %s already, and the launch path does not lead there", active)
					}
					if kill("before-pointing"); at == "before-pointing" {
						return errors.New("as if the host had died")
					}
					err := s.tryPoint(0)
					kill("after-pointing")
					if at == "finalizing" {
						time.AfterFunc(time.Millisecond, func() { _ = s.cmd.Process.Kill() })
					}
					return err
				}
				err := m.Run(s.ctx(), s)
				if err == nil && at != "finalizing" {
					t.Fatal("a merge in a QEMU that was killed went well")
				}
				if at != "finalizing" && !errors.Is(err, blockdev.ErrJobUnfinished) {
					t.Errorf("QEMU killed: %v", err)
				}
				<-s.ended
				launch := s.launchPath("qcow2")
				s.fileHolds(launch, "qcow2", s.patterns[1], "after the kill")
				s.start()
				if at == "running" || at == "before-pointing" {
					s.leads(1, "after the kill")
					m := s.activeMerge()
					if err := m.Run(s.ctx(), s); err != nil {
						t.Fatal(err)
					}
				}
				s.merged("in the end")
			})
		}
	})
}

// The merge goes on in a new session, whatever state the job was left in.
func TestQEMUActiveMergeAdopted(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, left := range []string{"running", "ready", "pending", "pivoted", "dismissed", "cancelled"} {
			t.Run(left, func(t *testing.T) {
				s := newStack(t, q, "drive", "qcow2", "")
				s.write(write{1, 0, 64})
				s.cover()
				s.write(write{2, 32, 100})
				before := s.shape()
				m := s.activeMerge()
				s.leaveMerge(&m, left)
				session, err := monitor.Dial(s.ctx(), s.path("q"))
				if err != nil {
					t.Fatal(err)
				}
				s.Session = session
				if left == "running" {
					j, err := blockdev.FindJob(s.ctx(), s, m.ID)
					if err != nil || j.Kind != "commit" || j.Status != monitor.JobRunning {
						t.Fatalf("the job that was left: %+v, %v", j, err)
					}
					if err := blockdev.SetJobSpeed(s.ctx(), s, m.ID, 0); err != nil {
						t.Fatal(err)
					}
				}
				m.Speed = 0
				err = m.Run(s.ctx(), s)
				if left != "cancelled" {
					if err != nil {
						t.Fatal(err)
					}
					s.merged("adopted")
					return
				}
				if !errors.Is(err, blockdev.ErrNotMerged) || !errors.Is(err, syscall.ECANCELED) {
					t.Errorf("a job that was cancelled meanwhile: %v", err)
				}
				s.sameShape(before, "after a job that was cancelled meanwhile")
				s.holds(1, "after a job that was cancelled meanwhile")
			})
		}
	})
}

// leaveMerge begins a merge as an agent does that dies, and ends the session.
func (s *stack) leaveMerge(m *blockdev.ActiveMerge, state string) {
	s.t.Helper()
	m.Speed = slow
	ctx, leave := context.WithCancelCause(s.ctx())
	wait := begun(s.t, ctx, s, func(ctx context.Context, mon blockdev.Monitor) error { return m.Run(ctx, mon) }, &m.Watch)
	leave(blockdev.ErrLeaveJob)
	if err := wait(); !errors.Is(err, blockdev.ErrJobUnfinished) {
		s.t.Fatalf("leaving: %v", err)
	}
	m.Watch = nil
	defer func() { _ = s.Close() }()
	if state == "running" {
		return
	}
	for _, step := range []struct {
		until   monitor.JobStatus
		command string
		as      []string // where the agent was left before this command
	}{
		{monitor.JobRunning, "block-job-set-speed", nil},
		{monitor.JobReady, "job-complete", []string{"ready", "cancelled"}},
		{monitor.JobPending, "job-finalize", []string{"pending"}},
		{monitor.JobConcluded, "job-dismiss", []string{"pivoted"}},
	} {
		s.awaitJob(m.ID, step.until)
		for _, as := range step.as {
			if as == state {
				if state == "cancelled" {
					s.command("job-cancel", m.ID)
					s.awaitJob(m.ID, monitor.JobConcluded)
				}
				return
			}
		}
		s.command(step.command, m.ID)
	}
}

func (s *stack) command(command, job string) {
	s.t.Helper()
	args := map[string]any{"id": job}
	if command == "block-job-set-speed" {
		args = map[string]any{"device": job, "speed": 0}
	}
	if err := s.Execute(s.ctx(), command, args, nil); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) awaitJob(id string, status monitor.JobStatus) {
	s.t.Helper()
	sub := s.Subscribe(16, "JOB_STATUS_CHANGE")
	defer sub.Close()
	for ctx := s.ctx(); ; {
		j, err := blockdev.FindJob(ctx, s, id)
		if err != nil {
			s.t.Fatal(err)
		}
		if j.Status == status {
			return
		}
		select {
		case <-sub.C:
		case <-ctx.Done():
			s.t.Fatalf("job %s is %s and not %s", id, j.Status, status)
		}
	}
}

func TestQEMUActiveMergeAbandoned(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, left := range []string{"running", "pending", "dismissed"} {
			t.Run(left, func(t *testing.T) {
				s := newStack(t, q, "drive", "qcow2", "")
				s.write(write{1, 0, 64})
				s.cover()
				s.write(write{2, 32, 100})
				before := s.shape()
				m := s.activeMerge()
				s.leaveMerge(&m, left)
				session, err := monitor.Dial(s.ctx(), s.path("q"))
				if err != nil {
					t.Fatal(err)
				}
				s.Session = session
				merged, err := m.Abandon(s.ctx(), s)
				if err != nil || merged != (left == "dismissed") {
					t.Fatalf("abandoned: merged %v, %v", merged, err)
				}
				if merged {
					s.merged("too late")
					return
				}
				s.sameShape(before, "abandoned")
				s.noJob()
				s.leads(1, "abandoned")
				s.holds(1, "abandoned")
			})
		}
	})
}
