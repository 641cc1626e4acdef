package blockdev_test

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

func TestQEMUJobControl(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "drive", "qcow2", "")
		s.write(write{1, 0, 64})
		s.cover()
		s.write(write{2, 32, 900}) // it copies 16 MiB and rests, on the average at the speed
		m := s.activeMerge()
		m.Speed = slow
		states := make(chan blockdev.JobState, 1000)
		m.Watch = func(j blockdev.JobState) { states <- j }
		ended := make(chan error, 1)
		go func() { ended <- m.Run(s.ctx(), s) }()
		await := func(what string, is func(blockdev.JobState) bool) blockdev.JobState {
			t.Helper()
			for deadline := time.After(20 * time.Second); ; {
				select {
				case j := <-states:
					if is(j) {
						return j
					}
				case <-deadline:
					t.Fatalf("%s: not seen", what)
				}
			}
		}
		await("speed at the start", func(j blockdev.JobState) bool { return j.Status == monitor.JobRunning && j.Speed == slow })
		if err := blockdev.SetJobSpeed(s.ctx(), s, m.ID, 2<<20); err != nil {
			t.Fatal(err)
		}
		await("changed speed", func(j blockdev.JobState) bool { return j.Speed == 2<<20 })
		begun := await("progress", func(j blockdev.JobState) bool { return j.Done > 0 && j.Done < j.Total })
		if err := blockdev.PauseJob(s.ctx(), s, m.ID); err != nil {
			t.Fatal(err)
		}
		paused := await("pause", func(j blockdev.JobState) bool { return j.Status == monitor.JobPaused })
		if paused.Stopped != blockdev.NotStopped || paused.Done < begun.Done {
			t.Errorf("paused: %+v", paused)
		}
		if err := blockdev.SetJobSpeed(s.ctx(), s, m.ID, 0); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			t.Fatalf("a merge that is paused ended: %v", err)
		case <-time.After(time.Second): // what it would take to end many times over
		}
		if err := blockdev.ResumeJob(s.ctx(), s, m.ID); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		s.merged("after a pause")
	})
}

// Whatever the guest writes from the hook on waits for the pivot, so that at the
// hook's time both layers hold the same.
func TestQEMUWritesWaitForThePivot(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s := newStack(t, q, "drive", "qcow2", "")
		s.write(write{1, 0, 64})
		s.cover()
		s.write(write{2, 32, 64})
		for _, c := range []struct {
			command string
			args    map[string]any
		}{
			{"nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": s.path("nbd")}}}},
			{"block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": s.ids[1], "name": "disk", "writable": true}},
		} {
			if err := s.Execute(s.ctx(), c.command, c.args, nil); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command(filepath.Join(s.tools, "qemu-io"), "-f", "raw", "nbd+unix:///disk?socket="+s.path("nbd"))
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		answers := make(chan string, 16)
		go func() {
			defer close(answers)
			for r := bufio.NewScanner(out); r.Scan(); {
				if strings.Contains(r.Text(), "wrote") {
					answers <- r.Text()
				}
			}
		}()
		t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
		// One command at a time: qemu-io does not look for a second one in its buffer.
		send := func(w write) {
			if _, err := fmt.Fprintf(in, "write -f -P %d %dk %dk\n", w.value, w.at*64, w.length*64); err != nil {
				t.Error(err)
			}
			s.patterns[1] = append(s.patterns[1], w)
		}
		answered := func(d time.Duration) bool {
			select {
			case <-answers:
				return true
			case <-time.After(d):
				return false
			}
		}
		send(write{3, 200, 4})
		if !answered(10 * time.Second) {
			t.Fatal("no write goes through")
		}
		m := s.activeMerge()
		point := m.BeforePivot
		m.BeforePivot = func(ctx context.Context) error {
			both := s.patterns[1]
			send(write{4, 202, 4})
			if answered(500 * time.Millisecond) {
				t.Error("a write went through before the pivot")
			}
			s.fileHolds(s.layers[0], "qcow2", both, "before the pivot")
			s.fileHolds(s.layers[1], "qcow2", both, "before the pivot")
			return point(ctx)
		}
		if err := m.Run(s.ctx(), s); err != nil {
			t.Fatal(err)
		}
		if !answered(10 * time.Second) {
			t.Error("a write was lost in the pivot")
		}
		s.merged("after the pivot")
	})
}
