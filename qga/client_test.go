package qga_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/qga"
	"github.com/vmsnap/vmsnap/qga/qgatest"
)

// within is ample for anything that should happen.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func dial(t *testing.T, s *qgatest.Server, lim qga.Limits) *qga.Client {
	t.Helper()
	c, err := qga.Dial(within(t), s.Path(), lim)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestCommands(t *testing.T) {
	s := qgatest.New(t)
	c := dial(t, s, qga.Limits{})
	ctx := within(t)
	if err := c.Ping(ctx); err != nil {
		t.Error(err)
	}
	info, err := c.Info(ctx)
	if err != nil || info.Version != "7.2.22" || !info.CanFreeze() || !info.CanFreezeList() {
		t.Errorf("info %+v, error %v", info, err)
	}
	system, err := c.OSInfo(ctx)
	if want := (qga.OSInfo{ID: "test", Name: "Test Guest", KernelRelease: "6.1.0"}); err != nil || system != want {
		t.Errorf("os %+v, error %v, want %+v", system, err, want)
	}
	mounts, err := c.Filesystems(ctx)
	want := []qga.Filesystem{{Name: "vda", Mountpoint: "/", Type: "ext4"}, {Name: "vdb", Mountpoint: "/data", Type: "ext4"}}
	if diff := cmp.Diff(want, mounts); err != nil || diff != "" {
		t.Errorf("error %v, file systems (-want +got):\n%s", err, diff)
	}
	if n := s.Count(qgatest.Sync); n != 1 {
		t.Errorf("synchronised %d times, want once", n)
	}
}

func TestFreezeAndThaw(t *testing.T) {
	tests := []struct {
		name        string
		mountpoints []string
		count       int
	}{
		{"all", nil, 2},
		{"one", []string{"/data"}, 1},
		{"none that is mounted", []string{"/srv"}, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := qgatest.New(t)
			c := dial(t, s, qga.Limits{})
			ctx := within(t)
			n, err := c.Freeze(ctx, test.mountpoints)
			if err != nil || n != test.count {
				t.Fatalf("froze %d, error %v, want %d", n, err, test.count)
			}
			state, err := c.FreezeStatus(ctx)
			if err != nil || (state == qga.Frozen) != (n > 0) {
				t.Errorf("state %s, error %v", state, err)
			}
			if n > 0 {
				_, err = c.Freeze(ctx, nil)
				var refused *qga.CommandError
				if !errors.As(err, &refused) || refused.Class != qga.ClassCommandNotFound {
					t.Errorf("second freeze: %v, want %s", err, qga.ClassCommandNotFound)
				}
			}
			if n, err = c.Thaw(ctx); err != nil || n != test.count {
				t.Errorf("thawed %d, error %v, want %d", n, err, test.count)
			}
			if s.Frozen() {
				t.Error("still frozen")
			}
		})
	}
}

// Each bad answer fails in its own way, and the client gets back in step by
// itself.
func TestEndFreeze(t *testing.T) {
	frozen := func(s *qgatest.Server) { s.SetFrozen(true) }
	tests := []struct {
		name      string
		given     func(*qgatest.Server)
		was       qga.FreezeState
		count     int
		statusErr error
		refused   bool // the thaw
	}{
		{"frozen", frozen, qga.Frozen, 2, nil, false},
		{"thawed before", func(*qgatest.Server) {}, qga.Thawed, 0, nil, false},
		{"thaw refused", func(s *qgatest.Server) {
			frozen(s)
			s.Once(qgatest.Thaw, qgatest.Refuse("GenericError", "limited up to 10 seconds"))
		}, qga.Frozen, 0, nil, true},
		{"nonsense about the state", func(s *qgatest.Server) {
			frozen(s)
			s.Once(qgatest.Status, qgatest.Return("melting"))
		}, "", 0, qga.ErrMalformed, false}, // thawed by the time it was asked again
		{"silence about the state", func(s *qgatest.Server) {
			frozen(s)
			s.Once(qgatest.Status, qgatest.Silent)
		}, "", 0, qga.ErrMalformed, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := qgatest.New(t)
			c := dial(t, s, qga.Limits{})
			ctx := within(t)
			test.given(s)
			got := c.EndFreeze(ctx)
			var refused *qga.CommandError
			if got.Was != test.was || got.Count != test.count || !errors.Is(got.StatusErr, test.statusErr) || errors.As(got.ThawErr, &refused) != test.refused {
				t.Errorf("got %+v", got)
			}
			if !test.refused && (got.ThawErr != nil || s.Frozen()) {
				t.Errorf("not thawed: %v", got.ThawErr)
			}
			if state, err := c.FreezeStatus(ctx); err != nil || test.refused != (state == qga.Frozen) {
				t.Errorf("afterwards: %q, error %v", state, err)
			}
		})
	}
}

func TestBadAnswers(t *testing.T) {
	lim := qga.Limits{ReplyBytes: 64 << 10, Depth: 8, DiscardBytes: 1 << 20, Items: 4}
	tests := []struct {
		name string
		bad  qgatest.Behaviour
		want error
	}{
		{"too large", qgatest.Flood(128 << 10), qga.ErrTooLarge},
		{"too deep", qgatest.Deep(9), qga.ErrTooDeep},
		{"very deep", qgatest.Deep(30000), qga.ErrTooDeep},
		{"no JSON", qgatest.Raw("hello\n"), qga.ErrMalformed},
		{"two values", qgatest.Raw(`{"return":{}} {"return":{}}` + "\n"), qga.ErrMalformed},
		{"result and error", qgatest.Raw(`{"return":{},"error":{"class":"x","desc":"y"}}` + "\n"), qga.ErrMalformed},
		{"neither", qgatest.Raw("{}\n"), qga.ErrMalformed},
		{"empty error", qgatest.Raw(`{"error":null}` + "\n"), qga.ErrMalformed},
		{"wrong shape", qgatest.Return("frozen"), qga.ErrMalformed},
		{"list too long", qgatest.Return(make([]int, 5)), qga.ErrMalformed}, // numbers are no file systems
		{"many items", qgatest.Return(make([]struct{}, 5)), qga.ErrTooLarge},
		{"nothing", qgatest.Return(nil), qga.ErrMalformed},
		{"stray sync", qgatest.Raw("\xff{\"return\":1}\n"), qga.ErrMalformed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := qgatest.New(t)
			s.Once(qgatest.FSInfo, test.bad)
			c := dial(t, s, lim)
			ctx := within(t)
			_, err := c.Filesystems(ctx)
			if !errors.Is(err, test.want) {
				t.Fatalf("error %v, want %v", err, test.want)
			}
			var op *qga.OpError
			if !errors.As(err, &op) || op.Command != qgatest.FSInfo || !op.Sent {
				t.Errorf("error %#v does not tell the command, or that it was sent", err)
			}
			if list, err := c.Filesystems(ctx); err != nil || len(list) != 2 {
				t.Errorf("afterwards: %v, error %v", list, err)
			}
		})
	}
}

func TestCountsAreClamped(t *testing.T) {
	tests := []struct {
		reply string
		count int
		want  error
	}{
		{`{"return":-1}`, 0, nil},
		{`{"return":9000000000000}`, 65536, nil},
		{`{"return":0}`, 0, nil},
		{`{"return":1.5}`, 0, qga.ErrMalformed},
		{`{"return":1e400}`, 0, qga.ErrMalformed},
		{`{"return":null}`, 0, qga.ErrMalformed},
		{`{"return":"2"}`, 0, qga.ErrMalformed},
		{`{"return":{}}`, 0, qga.ErrMalformed},
	}
	for _, test := range tests {
		t.Run(test.reply, func(t *testing.T) {
			s := qgatest.New(t)
			s.Once(qgatest.Freeze, qgatest.Raw(test.reply+"\n"))
			n, err := dial(t, s, qga.Limits{}).Freeze(within(t), nil)
			if n != test.count || !errors.Is(err, test.want) {
				t.Errorf("count %d, error %v, want %d and %v", n, err, test.count, test.want)
			}
		})
	}
}

func TestRefusalsKeepTheClientInStep(t *testing.T) {
	s := qgatest.New(t)
	s.Once(qgatest.Thaw, qgatest.Refuse("GenericError", "limited\x1b[31m up to\u202e 10 \xff seconds"))
	c := dial(t, s, qga.Limits{})
	ctx := within(t)
	_, err := c.Thaw(ctx)
	var refused *qga.CommandError
	if !errors.As(err, &refused) {
		t.Fatalf("error %v, want a refusal", err)
	}
	want := &qga.CommandError{Command: qgatest.Thaw, Class: "GenericError", Desc: "limited\ufffd[31m up to\ufffd 10 \ufffd seconds"}
	if diff := cmp.Diff(want, refused); diff != "" {
		t.Errorf("refusal (-want +got):\n%s", diff)
	}
	if _, err := c.Thaw(ctx); err != nil {
		t.Error(err)
	}
	if n := s.Count(qgatest.Sync); n != 1 {
		t.Errorf("synchronised %d times, want once", n)
	}
}

// The reply that comes after its command has timed out is not taken for the
// answer to the next command.
func TestLateReply(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Freeze, gate.Hold)
	c := dial(t, s, qga.Limits{})
	ctx := within(t)
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err := c.Freeze(short, nil)
	var op *qga.OpError
	if !errors.Is(err, qga.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &op) || !op.Sent {
		t.Fatalf("error %v, want a timeout of a command that was sent", err)
	}
	synced := make(chan error, 1)
	go func() { synced <- c.Sync(ctx) }()
	if err := s.AwaitFrozen(ctx, false); err != nil {
		t.Fatal(err)
	}
	gate.Release()
	if err := <-synced; err != nil {
		t.Fatal(err)
	}
	state, err := c.FreezeStatus(ctx)
	if err != nil || state != qga.Frozen {
		t.Errorf("state %s, error %v: the late freeze was not seen", state, err)
	}
	if n, err := c.Thaw(ctx); err != nil || n != 2 {
		t.Errorf("thawed %d, error %v", n, err)
	}
}

// Nor when nobody has synchronised: the next command does.
func TestLateReplyWithoutSync(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Status, gate.Hold)
	c := dial(t, s, qga.Limits{})
	ctx := within(t)
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, time.Second) // by then it has been asked
	defer cancel()
	if _, err := c.FreezeStatus(short); !errors.Is(err, qga.ErrTimeout) {
		t.Fatalf("error %v, want a timeout", err)
	}
	<-gate.Entered()
	gate.Release() // thawed, says the late reply
	s.SetFrozen(true)
	s.Once(qgatest.Status, qgatest.Return("frozen"))
	if state, err := c.FreezeStatus(ctx); err != nil || state != qga.Frozen {
		t.Errorf("state %s, error %v: that was the answer to the question before", state, err)
	}
}

func TestCancelInterruptsAtOnce(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Ping, gate.Hold)
	c := dial(t, s, qga.Limits{})
	ctx, cancel := context.WithCancel(within(t))
	go func() {
		<-gate.Entered()
		cancel()
	}()
	if err := c.Ping(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, qga.ErrTimeout) {
		t.Errorf("error %v, want cancelled", err)
	}
	gate.Release()
	if err := c.Ping(within(t)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestCloseInterrupts(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Ping, gate.Hold)
	c := dial(t, s, qga.Limits{})
	go func() {
		<-gate.Entered()
		_ = c.Close()
	}()
	if err := c.Ping(within(t)); !errors.Is(err, qga.ErrGone) {
		t.Errorf("error %v, want %v", err, qga.ErrGone)
	}
}

func TestQEMUDies(t *testing.T) {
	s := qgatest.New(t)
	s.Once(qgatest.Ping, qgatest.Die)
	c := dial(t, s, qga.Limits{})
	if err := c.Ping(within(t)); !errors.Is(err, qga.ErrGone) {
		t.Errorf("error %v, want %v", err, qga.ErrGone)
	}
	if err := c.Ping(within(t)); !errors.Is(err, qga.ErrGone) {
		t.Errorf("afterwards: error %v, want %v", err, qga.ErrGone)
	}
}

// However slowly the bytes come, the command ends at its deadline.
func TestOneByteAtATime(t *testing.T) {
	s := qgatest.New(t)
	c := dial(t, s, qga.Limits{})
	ctx := within(t)
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	s.Once(qgatest.Ping, qgatest.Drip(20*time.Millisecond))
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := c.Ping(short); !errors.Is(err, qga.ErrTimeout) {
		t.Errorf("error %v, want a timeout", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	s.Once(qgatest.Ping, qgatest.Drip(time.Microsecond))
	if err := c.Ping(ctx); err != nil {
		t.Errorf("a slow but complete reply: %v", err)
	}
}

func TestSyncAgainstForgery(t *testing.T) {
	lim := qga.Limits{DiscardBytes: 256 << 10}
	tests := []struct {
		name string
		sync qgatest.Behaviour
		want error
	}{
		{"forged id first", qgatest.Then(qgatest.Raw("\xff{\"return\":1}\n\xff{\"return\":-5}\n"), (*qgatest.Turn).Behave), nil},
		{"delimiters galore", qgatest.Then(qgatest.Raw("\xff\xff\xff{\xff"), (*qgatest.Turn).Behave), nil},
		{"garbage first", qgatest.Then(qgatest.Flood(128<<10), (*qgatest.Turn).Behave), nil},
		{"endless frame first", qgatest.Then(qgatest.Raw("\xff"), qgatest.Flood(64<<10), (*qgatest.Turn).Behave), nil},
		{"flood", qgatest.Flood(384 << 10), qga.ErrTooLarge},
		{"answer without delimiter", func(t *qgatest.Turn) { t.Write([]byte("{\"return\":1}\n")) }, qga.ErrTimeout},
		{"silence", qgatest.Silent, qga.ErrTimeout},
		{"wrong id only", qgatest.Raw("\xff{\"return\":7}\n"), qga.ErrTimeout},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := qgatest.New(t)
			s.Once(qgatest.Sync, test.sync)
			c := dial(t, s, lim)
			ctx, cancel := context.WithTimeout(within(t), time.Second)
			defer cancel()
			err := c.Sync(ctx)
			if !errors.Is(err, test.want) {
				t.Fatalf("error %v, want %v", err, test.want)
			}
			if _, err := c.Freeze(within(t), nil); err != nil {
				t.Fatalf("afterwards: %v", err)
			}
			if state, err := c.FreezeStatus(within(t)); err != nil || state != qga.Frozen {
				t.Errorf("afterwards: %s, error %v, want frozen", state, err)
			}
		})
	}
}

// An answer to a sync of an earlier client, replayed, is not taken for ours.
func TestReplayedSync(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Sync, gate.Hold)
	first := dial(t, s, qga.Limits{})
	short, cancel := context.WithTimeout(within(t), 50*time.Millisecond)
	defer cancel()
	if err := first.Sync(short); !errors.Is(err, qga.ErrTimeout) {
		t.Fatalf("error %v, want a timeout", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	s.Once(qgatest.Status, qgatest.Return("frozen"))
	second := dial(t, s, qga.Limits{})
	go gate.Release()
	state, err := second.FreezeStatus(within(t))
	if err != nil || state != qga.Frozen {
		t.Errorf("state %s, error %v", state, err)
	}
}

// A guest agent that answers no sync lets no command through.
func TestNothingIsSentOutOfStep(t *testing.T) {
	s := qgatest.New(t)
	s.Always(qgatest.Sync, qgatest.Silent)
	c := dial(t, s, qga.Limits{})
	ctx, cancel := context.WithTimeout(within(t), 200*time.Millisecond)
	defer cancel()
	_, err := c.Freeze(ctx, nil)
	var op *qga.OpError
	if !errors.Is(err, qga.ErrTimeout) || !errors.As(err, &op) || op.Sent {
		t.Errorf("error %#v, want a timeout of a command that was not sent", err)
	}
	if n := s.Count(qgatest.Freeze); n != 0 || s.Frozen() {
		t.Errorf("%d freezes were sent", n)
	}
}

func TestDialPaths(t *testing.T) {
	s := qgatest.New(t)
	long := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	linked := filepath.Join(long, "qga.sock")
	if err := os.Link(s.Path(), linked); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	root := "/proc/" + strconv.Itoa(os.Getpid()) + "/root"
	tests := []struct {
		name, path string
		ok         bool
	}{
		{"plain", s.Path(), true},
		{"longer than an address", linked, true},
		{"in a process's root", root + s.Path(), true},
		{"climbing in a process's root", root + "/../.." + s.Path(), true},
		{"absent", s.Path() + ".no", false},
		{"no socket", file, false},
		{"gone process", "/proc/4194999/root" + s.Path(), false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c, err := qga.Dial(within(t), test.path, qga.Limits{})
			if (err == nil) != test.ok {
				t.Fatalf("error %v", err)
			}
			if err != nil {
				return
			}
			if err := c.Ping(within(t)); err != nil {
				t.Error(err)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
