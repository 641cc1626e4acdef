package monitor_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
	"golang.org/x/sys/unix"
)

const testUUID = "2f8c1a52-6d0b-4c9e-8f43-0123456789ab"

// forEachQEMU runs the test on each version, one after the other: leaks are
// counted for the whole process, and these QEMUs are up within 50 ms.
func forEachQEMU(t *testing.T, test func(t *testing.T, q testvm.QEMU)) {
	t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range versions {
		t.Run(q.Name, func(t *testing.T) { test(t, q) })
	}
}

// machine is a QEMU whose guest has nothing to boot.
type machine struct {
	t      *testing.T
	dir    string
	socket string
	pid    int
	pidfd  int
}

// launch starts a QEMU that ends with the test. It listens when launch returns:
// the parent of a daemon leaves when the daemon is ready.
func launch(t *testing.T, q testvm.QEMU, args ...string) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "qemu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	m := &machine{t: t, dir: dir, socket: filepath.Join(dir, "qmp.sock")}
	pidfile := filepath.Join(dir, "pid")
	base := []string{
		"-name", "web", "-uuid", testUUID, "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none",
		"-S", "-daemonize", "-pidfile", pidfile, "-chardev", "null,id=log0",
	}
	if len(args) == 0 {
		args = []string{"-qmp", "unix:" + m.socket + ",server=on,wait=off"}
	}
	args = append(append(append([]string{}, q.Args...), base...), args...)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, q.Binary, args...).CombinedOutput(); err != nil {
		t.Fatalf("start QEMU: %v\n%s", err, out)
	}
	b, err := os.ReadFile(pidfile)
	if err != nil {
		t.Fatal(err)
	}
	if m.pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		t.Fatal(err)
	}
	if m.pidfd, err = unix.PidfdOpen(m.pid, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.kill()
		if err := unix.Close(m.pidfd); err != nil {
			t.Error(err)
		}
	})
	return m
}

// signal sends a signal to QEMU.
func (m *machine) signal(sig unix.Signal) {
	m.t.Helper()
	if err := unix.PidfdSendSignal(m.pidfd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		m.t.Errorf("%v: %v", sig, err)
	}
}

// kill ends QEMU, if it still runs, and waits until it is gone.
func (m *machine) kill() {
	m.t.Helper()
	m.signal(unix.SIGKILL)
	poll := []unix.PollFd{{Fd: int32(m.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(poll, 20_000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n != 1 {
			m.t.Errorf("QEMU does not end: %v", err)
		}
		return
	}
}

// freeze stops QEMU as a debugger would, and returns when it stands still.
func (m *machine) freeze() {
	m.t.Helper()
	m.signal(unix.SIGSTOP)
	for {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.pid))
		if err != nil {
			m.t.Fatal(err)
		}
		if _, after, _ := strings.Cut(string(b), ") "); strings.HasPrefix(after, "T") {
			return
		}
	}
}

func TestQEMUAnswers(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		m := launch(t, q)
		s := dial(t, m.socket)
		ctx := t.Context()

		if v := s.Version(); !strings.HasPrefix(v.String(), q.Name+".") || !s.AtLeast(7, 2) {
			t.Errorf("version %v of QEMU %s", v, q.Name)
		}
		if v, err := s.QueryVersion(ctx); err != nil || v != s.Version() {
			t.Errorf("query-version: %v, %v", v, err)
		}
		if st, err := s.QueryStatus(ctx); err != nil || st.Running || st.Status != monitor.RunStatePrelaunch {
			t.Errorf("query-status: %+v, %v", st, err)
		}
		if name, err := s.QueryName(ctx); err != nil || name != "web" {
			t.Errorf("query-name: %q, %v", name, err)
		}
		if uuid, err := s.QueryUUID(ctx); err != nil || uuid != testUUID {
			t.Errorf("query-uuid: %q, %v", uuid, err)
		}
		chardevs, err := s.QueryChardev(ctx)
		found := map[string]monitor.Chardev{}
		for _, c := range chardevs {
			found[c.Label] = c
		}
		if err != nil || found["log0"].Filename != "null" || found["log0"].FrontendOpen {
			t.Errorf("query-chardev: %+v, %v", chardevs, err)
		}
		cpus, err := s.QueryCPUsFast(ctx)
		if err != nil || len(cpus) != 1 || cpus[0].Target != "x86_64" || cpus[0].QOMPath == "" {
			t.Fatalf("query-cpus-fast: %+v, %v", cpus, err)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", m.pid, cpus[0].ThreadID)); err != nil {
			t.Error(err)
		}
		if mig, err := s.QueryMigrate(ctx); err != nil || mig.Status != "" {
			t.Errorf("query-migrate: %+v, %v", mig, err)
		}
	})
}

func TestQEMURefuses(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		s := dial(t, launch(t, q).socket)
		for command, class := range map[string]string{
			"no-such-command": monitor.ClassCommandNotFound,
			"blockdev-del":    monitor.ClassGeneric,
		} {
			err := s.Execute(t.Context(), command, map[string]string{"node-name": "none"}, nil)
			var ce *monitor.CommandError
			if !errors.As(err, &ce) || ce.Class != class || ce.Desc == "" || ce.Command != command {
				t.Errorf("%s: %v", command, err)
			}
		}
	})
}

func TestQEMURunControlAndItsEvents(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		s := dial(t, launch(t, q).socket)
		sub := s.Subscribe(10, "STOP", "RESUME", "RESET")
		began := time.Now().Truncate(time.Microsecond)
		for _, step := range []struct {
			run   func(context.Context) error
			event string
			state monitor.RunState
		}{
			{s.Cont, "RESUME", monitor.RunStateRunning},
			{s.Stop, "STOP", monitor.RunStatePaused},
			{s.SystemReset, "RESET", monitor.RunStatePrelaunch}, // no longer paused: QEMU counts as never started
			{s.Cont, "RESUME", monitor.RunStateRunning},
		} {
			if err := step.run(t.Context()); err != nil {
				t.Fatal(err)
			}
			e := next(t, sub)
			if e.Name != step.event || e.Timestamp.Before(began) || time.Since(e.Timestamp) > time.Minute {
				t.Errorf("event %s at %v, want %s", e.Name, e.Timestamp, step.event)
			}
			st, err := s.QueryStatus(t.Context())
			if err != nil || st.Status != step.state || st.Running != (step.state == monitor.RunStateRunning) {
				t.Errorf("after %s: %+v, %v", step.event, st, err)
			}
		}
	})
}

func TestQEMUJob(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		m := launch(t, q)
		s := dial(t, m.socket)
		sub := s.Subscribe(20, "JOB_STATUS_CHANGE")
		for id, file := range map[string]string{"good": filepath.Join(m.dir, "image"), "bad": filepath.Join(m.dir, "none", "image")} {
			args := map[string]any{"job-id": id, "options": map[string]any{"driver": "file", "filename": file, "size": 0}}
			if err := s.Execute(t.Context(), "blockdev-create", args, nil); err != nil {
				t.Fatal(err)
			}
			var change struct {
				ID     string
				Status monitor.JobStatus
			}
			for change.Status != monitor.JobConcluded {
				if err := next(t, sub).Decode(&change); err != nil || change.ID != id {
					t.Fatalf("%+v, %v", change, err)
				}
			}
			jobs, err := s.QueryJobs(t.Context())
			if err != nil || len(jobs) != 1 || jobs[0].ID != id || jobs[0].Type != "create" ||
				jobs[0].Status != monitor.JobConcluded || (jobs[0].Error != "") != (id == "bad") {
				t.Errorf("query-jobs: %+v, %v", jobs, err)
			}
			if err := s.Execute(t.Context(), "job-dismiss", map[string]string{"id": id}, nil); err != nil {
				t.Error(err)
			}
			if err := next(t, sub).Decode(&change); err != nil || change.Status != monitor.JobNull {
				t.Errorf("%+v, %v", change, err)
			}
		}
	})
}

// TestQEMULargeRepliesInAFloodOfEvents asks for the schema again and again,
// from several sides, while QEMU reports each stop and cont of another.
func TestQEMULargeRepliesInAFloodOfEvents(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		const rounds, sides = 20, 3
		s := dial(t, launch(t, q).socket)
		idle := s.Subscribe(1)
		sub := s.Subscribe(2*50*rounds, "STOP", "RESUME")
		var want json.RawMessage
		if err := s.Execute(t.Context(), "query-qmp-schema", nil, &want); err != nil || len(want) < 150<<10 {
			t.Fatalf("schema of %d bytes, %v", len(want), err)
		}
		var all sync.WaitGroup
		for range sides {
			all.Go(func() {
				for range rounds {
					var got json.RawMessage
					if err := s.Execute(t.Context(), "query-qmp-schema", nil, &got); err != nil || string(got) != string(want) {
						t.Errorf("schema of %d bytes, want %d, %v", len(got), len(want), err)
					}
				}
			})
		}
		all.Go(func() {
			for range 50 * rounds {
				if err := errors.Join(s.Cont(t.Context()), s.Stop(t.Context())); err != nil {
					t.Error(err)
				}
			}
		})
		all.Wait()
		for range 50 * rounds {
			for _, name := range []string{"RESUME", "STOP"} {
				if e := next(t, sub); e.Name != name {
					t.Fatalf("event %s, want %s", e.Name, name)
				}
			}
		}
		if sub.Lost() != 0 || idle.Lost() == 0 {
			t.Errorf("lost %d, the idle one %d", sub.Lost(), idle.Lost())
		}
	})
}

func TestQEMUPretty(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		socket := filepath.Join(t.TempDir(), "pretty")
		launch(t, q, "-qmp-pretty", "unix:"+socket+",server=on,wait=off")
		s := dial(t, socket)
		sub := s.Subscribe(1, "RESUME")
		if err := s.Cont(t.Context()); err != nil {
			t.Error(err)
		}
		next(t, sub)
		var schema []struct{ Name string }
		if err := s.Execute(t.Context(), "query-qmp-schema", nil, &schema); err != nil || len(schema) < 500 {
			t.Errorf("schema of %d entries, %v", len(schema), err)
		}
	})
}

// TestQEMUIsBusyForOthers: more wait than the backlog holds, and when all have
// given up and the holder has left, the next client is greeted.
func TestQEMUIsBusyForOthers(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		m := launch(t, q)
		first := dial(t, m.socket)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var waiting sync.WaitGroup
		for range 8 {
			waiting.Go(func() {
				_, err := monitor.Dial(ctx, m.socket, monitor.WithGreetingDeadline(300*time.Millisecond))
				wantError(t, err, []error{monitor.ErrBusy}, []error{monitor.ErrGone})
			})
		}
		waiting.Wait()
		if _, err := first.QueryStatus(t.Context()); err != nil {
			t.Error(err)
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		if _, err := dial(t, m.socket).QueryStatus(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestQEMUStopped(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		m := launch(t, q)
		m.freeze()
		_, err := monitor.Dial(t.Context(), m.socket, monitor.WithGreetingDeadline(200*time.Millisecond))
		wantError(t, err, []error{monitor.ErrBusy}, nil)
		m.signal(unix.SIGCONT)

		s := dial(t, m.socket)
		sub := s.Subscribe(10, "RESUME")
		m.freeze()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err = s.QueryStatus(ctx)
		wantError(t, err, []error{monitor.ErrUnresponsive, context.DeadlineExceeded}, []error{monitor.ErrOutcomeUnknown})
		cut, cancel := context.WithTimeout(t.Context(), later)
		defer cancel()
		wantError(t, s.Cont(cut), []error{monitor.ErrOutcomeUnknown, context.DeadlineExceeded}, []error{monitor.ErrUnresponsive})

		// Unknown it was: QEMU does it now.
		m.signal(unix.SIGCONT)
		next(t, sub)
		if st, err := s.QueryStatus(t.Context()); err != nil || !st.Running {
			t.Errorf("%+v, %v", st, err)
		}
	})
}

func TestQEMUKilledInMidCommand(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		m := launch(t, q)
		s := dial(t, m.socket)
		sub := s.Subscribe(1)
		m.freeze() // so that the commands are surely under way
		var sent sync.WaitGroup
		for _, command := range []string{"cont", "query-status"} {
			sent.Go(func() {
				err := s.Execute(t.Context(), command, nil, nil)
				unknown := errors.Is(err, monitor.ErrOutcomeUnknown)
				if !errors.Is(err, monitor.ErrGone) || unknown != (command == "cont") {
					t.Errorf("%s: %v", command, err)
				}
			})
		}
		for strings.Count(ours(), "monitor.(*Session).await(") < 2 {
			runtime.Gosched()
		}
		m.kill()
		sent.Wait()
		awaitEnd(t, s)
		wantError(t, s.Err(), []error{monitor.ErrGone}, nil)
		if e, ok := <-sub.C; ok {
			t.Errorf("event %v", e)
		}
		_, err := monitor.Dial(t.Context(), m.socket)
		wantError(t, err, []error{monitor.ErrGone, unix.ECONNREFUSED}, nil)
	})
}

func TestQEMUQuits(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		s := dial(t, launch(t, q).socket)
		sub := s.Subscribe(10, "SHUTDOWN")
		if err := s.Execute(t.Context(), "quit", nil, nil); err != nil {
			t.Error(err)
		}
		next(t, sub)
		awaitEnd(t, s)
		wantError(t, s.Err(), []error{monitor.ErrGone}, nil)
	})
}

// TestQEMUTakesFiles passes files from several sides at once, and looks at what
// QEMU made of them.
func TestQEMUTakesFiles(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		checkLeaks(t)
		m := launch(t, q)
		s := dial(t, m.socket)
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				f, err := os.Create(filepath.Join(m.dir, fmt.Sprint("file", i)))
				if err != nil {
					t.Error(err)
					return
				}
				defer func() { _ = f.Close() }()
				if err := s.ExecuteWithFile(t.Context(), "getfd", map[string]string{"fdname": f.Name()}, nil, f); err != nil {
					t.Error(err)
				}
				var added struct {
					FD int `json:"fd"`
				}
				if err := s.ExecuteWithFile(t.Context(), "add-fd", nil, &added, f); err != nil {
					t.Error(err)
					return
				}
				if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", m.pid, added.FD)); err != nil || to != f.Name() {
					t.Errorf("QEMU has %s, %v; want %s", to, err, f.Name())
				}
				if err := s.Execute(t.Context(), "closefd", map[string]string{"fdname": f.Name()}, nil); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		var ce *monitor.CommandError
		if err := s.Execute(t.Context(), "getfd", map[string]string{"fdname": "none"}, nil); !errors.As(err, &ce) {
			t.Errorf("getfd without a file: %v", err)
		}
	})
}
