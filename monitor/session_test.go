package monitor_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// echo returns the argument "n".
func echo(r monitortest.Request) monitortest.Reply {
	var args struct{ N int }
	if err := r.Decode(&args); err != nil {
		return monitortest.Fail("GenericError", err.Error())
	}
	return monitortest.Return(args.N)
}

// awaitEnd waits until the session has ended.
func awaitEnd(t *testing.T, s *monitor.Session) {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the session goes on")
	}
}

type number struct {
	N int `json:"n"`
}

// wantEcho executes query-echo and checks that the reply is its own.
func wantEcho(t *testing.T, s *monitor.Session, n int) {
	t.Helper()
	got := -1
	if err := s.Execute(t.Context(), "query-echo", number{n}, &got); err != nil || got != n {
		t.Errorf("echo %d: %d, %v", n, got, err)
	}
}

func TestExecute(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.HandleReturn("job-dismiss", nil)
	srv.HandleReturn("query-list", []string{"a<b>", "ü"})
	s := dial(t, srv.Path())

	if err := s.Execute(t.Context(), "job-dismiss", map[string]string{"id": "a<b>&ü"}, nil); err != nil {
		t.Error(err)
	}
	var args map[string]string
	if err := srv.Await("job-dismiss").Decode(&args); err != nil || args["id"] != "a<b>&ü" {
		t.Errorf("arguments %v, %v", args, err)
	}
	var list []string
	if err := s.Execute(t.Context(), "query-list", nil, &list); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"a<b>", "ü"}, list); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if r := srv.Await("query-list"); r.Arguments != nil {
		t.Errorf("arguments %s of a command without", r.Arguments)
	}
}

func TestCommandError(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("blockdev-add", func(monitortest.Request) monitortest.Reply {
		return monitortest.Fail("GenericError", "Could not open 'x'")
	})
	s := dial(t, srv.Path())
	for command, want := range map[string]struct {
		err  monitor.CommandError
		text string
	}{
		"blockdev-add": {
			monitor.CommandError{Command: "blockdev-add", Class: monitor.ClassGeneric, Desc: "Could not open 'x'"},
			"qmp blockdev-add: Could not open 'x'",
		},
		"nonsense": {
			monitor.CommandError{Command: "nonsense", Class: monitor.ClassCommandNotFound, Desc: "The command nonsense has not been found"},
			"qmp nonsense: The command nonsense has not been found (CommandNotFound)",
		},
	} {
		err := s.Execute(t.Context(), command, nil, nil)
		var ce *monitor.CommandError
		if !errors.As(err, &ce) {
			t.Fatalf("%s: %v", command, err)
		}
		if diff := cmp.Diff(want.err, *ce); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		if err.Error() != want.text {
			t.Errorf("text %q, want %q", err, want.text)
		}
		wantError(t, err, nil, []error{monitor.ErrOutcomeUnknown})
	}
	if err := s.Err(); err != nil {
		t.Errorf("session ended: %v", err)
	}
}

// TestNoReply pins down which error a command without a reply gets.
func TestNoReply(t *testing.T) {
	// What happens once the command has arrived.
	type act func(*monitortest.Server, *monitor.Session, context.CancelFunc)
	var nothing act = func(*monitortest.Server, *monitor.Session, context.CancelFunc) {}
	var cancelled act = func(_ *monitortest.Server, _ *monitor.Session, cancel context.CancelFunc) { cancel() }
	var hangUp act = func(srv *monitortest.Server, _ *monitor.Session, _ context.CancelFunc) { srv.HangUp() }
	var closed act = func(_ *monitortest.Server, s *monitor.Session, _ context.CancelFunc) { _ = s.Close() }
	var garbage act = func(srv *monitortest.Server, _ *monitor.Session, _ context.CancelFunc) { srv.Write([]byte("(qemu) ")) }

	unknown, unresponsive := monitor.ErrOutcomeUnknown, monitor.ErrUnresponsive
	tests := map[string]struct {
		command string
		act     act
		is, not []error
	}{
		"query, deadline":   {"query-jobs", nothing, []error{unresponsive, context.DeadlineExceeded}, []error{unknown}},
		"effect, deadline":  {"transaction", nothing, []error{unknown, context.DeadlineExceeded}, []error{unresponsive}},
		"query, cancelled":  {"query-jobs", cancelled, []error{context.Canceled}, []error{unknown, unresponsive}},
		"effect, cancelled": {"transaction", cancelled, []error{unknown, context.Canceled}, []error{unresponsive}},
		"query, gone":       {"query-jobs", hangUp, []error{monitor.ErrGone}, []error{unknown, unresponsive}},
		"effect, gone":      {"transaction", hangUp, []error{unknown, monitor.ErrGone}, []error{unresponsive}},
		"query, closed":     {"query-jobs", closed, []error{monitor.ErrClosed}, []error{unknown, unresponsive}},
		"effect, closed":    {"transaction", closed, []error{unknown, monitor.ErrClosed}, []error{unresponsive}},
		"effect, garbage":   {"transaction", garbage, []error{unknown}, []error{unresponsive, monitor.ErrGone}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t)
			s := dial(t, srv.Path())
			within := 20 * time.Second
			if slices.Contains(tt.is, context.DeadlineExceeded) {
				within = later
			}
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			srv.Handle(tt.command, func(monitortest.Request) monitortest.Reply {
				tt.act(srv, s, cancel)
				return monitortest.Silence()
			})
			err := s.Execute(ctx, tt.command, nil, nil)
			wantError(t, err, tt.is, tt.not)
			var op *monitor.OpError
			if !errors.As(err, &op) || op.Op != tt.command || !strings.HasPrefix(err.Error(), "qmp "+tt.command+": ") {
				t.Errorf("error %v does not name the command", err)
			}
		})
	}
}

func TestNothingIsSentAfterTheContextOrSessionEnded(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.HandleReturn("transaction", nil)
	s := dial(t, srv.Path())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantError(t, s.Execute(ctx, "transaction", nil, nil), []error{context.Canceled}, []error{monitor.ErrOutcomeUnknown})
	past, cancel := context.WithTimeout(t.Context(), -time.Second)
	defer cancel()
	wantError(t, s.Execute(past, "transaction", nil, nil),
		[]error{monitor.ErrUnresponsive, context.DeadlineExceeded}, []error{monitor.ErrOutcomeUnknown})
	if err := s.Execute(t.Context(), "transaction", make(chan int), nil); err == nil {
		t.Error("arguments that are no JSON were sent")
	}
	_ = s.Close()
	wantError(t, s.Execute(t.Context(), "transaction", nil, nil), []error{monitor.ErrClosed}, []error{monitor.ErrOutcomeUnknown})
	if c := srv.Commands(); len(c) != 1 {
		t.Errorf("the server got %v", c)
	}
}

func TestLateReplyIsDropped(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	late := make(chan struct{})
	srv.Handle("query-late", func(monitortest.Request) monitortest.Reply { return monitortest.Return("late").After(late) })
	srv.Handle("query-echo", echo)
	srv.HandleReturn("query-marker", "marker")
	s := dial(t, srv.Path())
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	var out string
	wantError(t, s.Execute(ctx, "query-late", nil, &out), []error{monitor.ErrUnresponsive}, nil)
	close(late)
	for i := range 20 {
		wantEcho(t, s, i)
	}
	if out != "" {
		t.Errorf("an abandoned command's result became %q", out)
	}
}

func TestWrongIDs(t *testing.T) {
	for name, reply := range map[string]monitortest.Reply{
		"another":      monitortest.Return(1).WithID(`"someone-else"`),
		"a number":     monitortest.Return(1).WithID(`1`),
		"an object":    monitortest.Return(1).WithID(`{"a":[1]}`),
		"none":         monitortest.Return(1).WithID(``),
		"none, failed": monitortest.Fail("GenericError", "JSON parse error").WithID(``),
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t)
			srv.Handle("query-lie", func(monitortest.Request) monitortest.Reply { return reply })
			srv.Handle("query-echo", echo)
			s := dial(t, srv.Path())
			ctx, cancel := context.WithTimeout(t.Context(), soon)
			defer cancel()
			wantError(t, s.Execute(ctx, "query-lie", nil, nil), []error{monitor.ErrUnresponsive}, nil)
			wantEcho(t, s, 7)
		})
	}
}

// TestRepliesToAFormerClient: QEMU may send what a former client asked for to
// the next one.
func TestRepliesToAFormerClient(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.HandleReturn("stop", nil)
	if err := dial(t, srv.Path()).Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	former := srv.Await("stop").ID
	srv.HangUp()
	s := dial(t, srv.Path())
	srv.Handle("stop", func(monitortest.Request) monitortest.Reply {
		return monitortest.Return(nil).WithID(string(former))
	})
	ctx, cancel := context.WithTimeout(t.Context(), later)
	defer cancel()
	wantError(t, s.Stop(ctx), []error{monitor.ErrOutcomeUnknown}, nil)
}

func TestRepliesThatMakeNoSense(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	answer := func(line string) func(monitortest.Request) monitortest.Reply {
		return func(r monitortest.Request) monitortest.Reply {
			return monitortest.Raw(fmt.Appendf(nil, line, r.ID))
		}
	}
	srv.Handle("stop", answer(`{"id": %s}`+"\r\n"))
	srv.Handle("query-jobs", answer(`{"id": %s}`+"\r\n"))
	srv.HandleReturn("cont", "a string")
	srv.HandleReturn("query-status", "a string")
	s := dial(t, srv.Path())
	var out struct{}
	wantError(t, s.Execute(t.Context(), "stop", nil, nil), []error{monitor.ErrOutcomeUnknown}, nil)
	wantError(t, s.Execute(t.Context(), "cont", nil, &out), []error{monitor.ErrOutcomeUnknown}, nil)
	for _, command := range []string{"query-jobs", "query-status"} {
		err := s.Execute(t.Context(), command, nil, &out)
		if err == nil {
			t.Errorf("%s succeeded", command)
		}
		wantError(t, err, nil, []error{monitor.ErrOutcomeUnknown, monitor.ErrUnresponsive})
	}
	if err := s.Err(); err != nil {
		t.Errorf("session ended: %v", err)
	}
}

func TestPipelined(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	var all sync.WaitGroup
	for g := range 20 {
		all.Go(func() {
			for i := range 50 {
				wantEcho(t, s, g*1000+i)
			}
		})
	}
	all.Wait()
}

func TestRepliesOutOfOrder(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	release := make(map[int]chan struct{})
	for i := range 5 {
		release[i] = make(chan struct{})
	}
	srv.Handle("query-echo", func(r monitortest.Request) monitortest.Reply {
		var args number
		if err := r.Decode(&args); err != nil {
			t.Error(err)
		}
		return monitortest.Return(args.N).After(release[args.N])
	})
	s := dial(t, srv.Path())
	var done [5]chan struct{}
	for i := range done {
		done[i] = make(chan struct{})
		go func() {
			defer close(done[i])
			wantEcho(t, s, i)
		}()
	}
	for range done {
		srv.Await("query-echo")
	}
	for i := len(done) - 1; i >= 0; i-- {
		close(release[i])
		<-done[i]
	}
}

func TestRepliesHoweverTheyArrive(t *testing.T) {
	pretty := func(r monitortest.Request) monitortest.Reply {
		b, err := json.MarshalIndent(map[string]any{"return": []string{"}", "\n", `"`}, "id": r.ID}, "", "    ")
		if err != nil {
			t.Error(err)
		}
		return monitortest.Raw(append(b, '\n'))
	}
	several := func(r monitortest.Request) monitortest.Reply {
		line := fmt.Sprintf(`{"return": ["}", "\n", "\""], "id": %s}`+"\r\n", r.ID)
		return monitortest.Raw([]byte(`{"event": "A", "timestamp": {}}` + line + line + `{"event": "B", "timestamp": {}}`))
	}
	for name, tt := range map[string]struct {
		opts   []monitortest.Option
		answer monitortest.Handler
	}{
		"byte by byte":         {[]monitortest.Option{monitortest.WithSplitWrites()}, pretty},
		"pretty":               {nil, pretty},
		"several, and doubled": {nil, several},
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t, tt.opts...)
			srv.Handle("query-it", tt.answer)
			s := dial(t, srv.Path())
			for range 20 {
				var got []string
				if err := s.Execute(t.Context(), "query-it", nil, &got); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff([]string{"}", "\n", `"`}, got); diff != "" {
					t.Fatalf("(-want +got)\n%s", diff)
				}
			}
		})
	}
}

func TestLargeReplies(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // with the race detector, on a loaded machine
	defer cancel()
	for _, n := range []int{300 << 10, 10, 20 << 20} {
		srv.Handle("query-huge", func(monitortest.Request) monitortest.Reply { return monitortest.Huge(n) })
		var got string
		if err := s.Execute(ctx, "query-huge", nil, &got); err != nil || len(got) != n || strings.Trim(got, "x") != "" {
			t.Errorf("%d bytes: got %d, %v", n, len(got), err)
		}
		wantEcho(t, s, n)
	}
}

func TestReplyOverTheLimitEndsTheSession(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("transaction", func(monitortest.Request) monitortest.Reply { return monitortest.Huge(200 << 10) })
	s := dial(t, srv.Path(), monitor.WithReplyLimit(100<<10))
	wantError(t, s.Execute(t.Context(), "transaction", nil, nil), []error{monitor.ErrOutcomeUnknown, monitor.ErrTooLarge}, nil)
	awaitEnd(t, s)
	wantError(t, s.Err(), []error{monitor.ErrTooLarge}, nil)
}

func TestDeathInMidReply(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("transaction", func(monitortest.Request) monitortest.Reply { return monitortest.Return(nil).Cut(10) })
	s := dial(t, srv.Path())
	wantError(t, s.Execute(t.Context(), "transaction", nil, nil), []error{monitor.ErrOutcomeUnknown, monitor.ErrGone}, nil)
	awaitEnd(t, s)
	wantError(t, s.Err(), []error{monitor.ErrGone}, nil)
}

func TestAReplyBeforeTheEndIsStillAReply(t *testing.T) {
	checkLeaks(t)
	for range 50 {
		srv := monitortest.NewServer(t)
		srv.Handle("transaction", func(monitortest.Request) monitortest.Reply {
			return monitortest.Return(nil).Cut(1 << 20) // all of it, then the end
		})
		s := dial(t, srv.Path())
		if err := s.Execute(t.Context(), "transaction", nil, nil); err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, s)
		_ = s.Close()
		srv.Close()
	}
}

func TestGarbageEndsTheSession(t *testing.T) {
	for _, garbage := range []string{"(qemu) ", "{]}", `{"event": 5}`, `{"return": {}, "id": 1e}`, "\x00"} {
		t.Run(garbage, func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t)
			s := dial(t, srv.Path())
			sub := s.Subscribe(1)
			srv.Write([]byte(garbage))
			awaitEnd(t, s)
			var pe *monitor.ProtocolError
			if err := s.Err(); !errors.As(err, &pe) {
				t.Errorf("ended by %v", err)
			}
			if e, ok := <-sub.C; ok {
				t.Errorf("event %v", e)
			}
		})
	}
}

func TestCloseIsIdempotent(t *testing.T) {
	checkLeaks(t)
	s := dial(t, monitortest.NewServer(t).Path())
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	wantError(t, s.Err(), []error{monitor.ErrClosed}, nil)
}
