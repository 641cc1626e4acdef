package monitor_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// TestOutcomesAreToldApart stops QEMU from reading, sends more than the socket
// holds, and lets QEMU go on: exactly the commands whose outcome was called
// unknown are executed.
func TestOutcomesAreToldApart(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	awake := make(chan struct{})
	srv.Handle("query-hang", func(r monitortest.Request) monitortest.Reply {
		<-awake
		return monitortest.Silence()
	})
	srv.HandleReturn("job-pause", nil)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	hung, cancel := context.WithCancel(t.Context())
	go func() { _ = s.Execute(hung, "query-hang", nil, nil) }()
	srv.Await("query-hang")
	cancel()

	var unknown, unsent atomic.Int64
	var all sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), later)
	defer cancel()
	for range 1000 {
		all.Go(func() {
			err := s.Execute(ctx, "job-pause", nil, nil)
			switch {
			case errors.Is(err, monitor.ErrOutcomeUnknown):
				unknown.Add(1)
			case errors.Is(err, monitor.ErrUnresponsive):
				unsent.Add(1)
			default:
				t.Errorf("error %v", err)
			}
		})
	}
	all.Wait()
	close(awake)
	wantEcho(t, s, 1) // answered after all that was sent before
	executed := 0
	for _, c := range srv.Commands() {
		if c == "job-pause" {
			executed++
		}
	}
	if int64(executed) != unknown.Load() || executed == 0 || unsent.Load() == 0 {
		t.Errorf("%d were executed, %d called unknown, %d called unsent", executed, unknown.Load(), unsent.Load())
	}
}

// TestACommandTakenInPartEndsTheSession: what would follow it could not be told
// from its rest.
func TestACommandTakenInPartEndsTheSession(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-hang", monitortest.Hang)
	s := dial(t, srv.Path())
	hung := make(chan error, 1)
	go func() { hung <- s.Execute(t.Context(), "query-hang", nil, nil) }()
	srv.Await("query-hang")
	ctx, cancel := context.WithTimeout(t.Context(), later) // enough to have begun writing
	defer cancel()
	big := map[string]string{"x": strings.Repeat("x", 4<<20)}
	wantError(t, s.Execute(ctx, "transaction", big, nil),
		[]error{monitor.ErrUnresponsive, context.DeadlineExceeded}, []error{monitor.ErrOutcomeUnknown})
	awaitEnd(t, s)
	wantError(t, s.Err(), []error{monitor.ErrUnresponsive}, nil)
	wantError(t, <-hung, []error{monitor.ErrUnresponsive}, nil)
}

func TestCloseInterruptsWriting(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-hang", monitortest.Hang)
	s := dial(t, srv.Path())
	results := make(chan error, 3)
	go func() { results <- s.Execute(t.Context(), "query-hang", nil, nil) }()
	srv.Await("query-hang")
	big := map[string]string{"x": strings.Repeat("x", 4<<20)}
	for range 2 { // one writes, one waits to
		go func() { results <- s.Execute(t.Context(), "transaction", big, nil) }()
	}
	for !strings.Contains(ours(), "net.(*conn).Write(") {
		runtime.Gosched()
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for range cap(results) {
		wantError(t, <-results, []error{monitor.ErrClosed}, []error{monitor.ErrOutcomeUnknown})
	}
}

func TestLargeCommand(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.HandleReturn("transaction", nil)
	s := dial(t, srv.Path())
	want := strings.Repeat("x", 4<<20)
	if err := s.Execute(t.Context(), "transaction", map[string]string{"x": want}, nil); err != nil {
		t.Fatal(err)
	}
	var args struct{ X string }
	if err := srv.Await("transaction").Decode(&args); err != nil || args.X != want {
		t.Errorf("%d bytes arrived, %v", len(args.X), err)
	}
}

func TestExecuteWithFile(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.HandleReturn("getfd", nil)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	var all sync.WaitGroup
	for _, name := range []string{"a", "b", "c", "d"} {
		all.Go(func() {
			path := filepath.Join(t.TempDir(), name)
			if err := os.WriteFile(path, []byte("content of "+name), 0o600); err != nil {
				t.Error(err)
				return
			}
			f, err := os.Open(path)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = f.Close() }()
			wantEcho(t, s, 1)
			if err := s.ExecuteWithFile(t.Context(), "getfd", map[string]string{"fdname": name}, nil, f); err != nil {
				t.Error(err)
			}
			wantEcho(t, s, 2)
		})
	}
	all.Wait()
	for _, r := range srv.Requests() {
		if r.Command != "getfd" {
			if len(r.Files) != 0 {
				t.Errorf("%s came with %d files", r.Command, len(r.Files))
			}
			continue
		}
		var args struct{ Fdname string }
		if err := r.Decode(&args); err != nil || len(r.Files) != 1 {
			t.Fatalf("getfd came with %d files, %v", len(r.Files), err)
		}
		got, err := io.ReadAll(r.Files[0])
		if err != nil || string(got) != "content of "+args.Fdname {
			t.Errorf("file %s: %q, %v", args.Fdname, got, err)
		}
	}
}

func TestExecuteWithAClosedFile(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	err = s.ExecuteWithFile(t.Context(), "getfd", nil, nil, f)
	if err == nil {
		t.Error("a closed file was passed")
	}
	wantError(t, err, nil, []error{monitor.ErrOutcomeUnknown, monitor.ErrClosed})
	wantEcho(t, s, 1)
}
