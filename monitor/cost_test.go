package monitor

import (
	"bytes"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

// connected returns a session, and its peer's end.
func connected(t testing.TB) (*Session, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	s := newSession(conns[0], newDecoder(conns[0], DefaultReplyLimit), qmp.Version{})
	t.Cleanup(func() {
		_ = s.Close()
		_ = conns[1].Close()
	})
	return s, conns[1]
}

// answer plays a QEMU that returns the same value each time, without
// allocating.
func answer(peer *net.UnixConn, value string) {
	in := make([]byte, 0, 64<<10)
	out := make([]byte, 0, len(value)+128)
	for {
		n, err := peer.Read(in[len(in):cap(in)])
		if err != nil {
			return
		}
		in = in[:len(in)+n]
		for {
			end := bytes.IndexByte(in, '\n')
			if end < 0 {
				break
			}
			id := in[bytes.LastIndex(in[:end], []byte(`"id":`))+len(`"id":`) : end-1]
			out = append(out[:0], `{"return":`...)
			out = append(out, value...)
			out = append(out, `,"id":`...)
			out = append(out, id...)
			out = append(out, "}\r\n"...)
			if _, err := peer.Write(out); err != nil {
				return
			}
			in = in[:copy(in, in[end+1:])]
		}
	}
}

// TestIdleSessionsAreCheap: a host has hundreds of VMs, most of them idle, and
// each had a large reply once.
func TestIdleSessionsAreCheap(t *testing.T) {
	const n, budget = 200, 16 << 10 // bytes a session, its peer's end included
	memory := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse)
	}
	large := []byte(`{"return": "` + strings.Repeat("x", 300<<10) + `", "id": "late"}` + "\r\n")
	before, goroutines := memory(), runtime.NumGoroutine()
	sessions := make([]*Session, n)
	for i := range sessions {
		s, peer := connected(t)
		sub := s.Subscribe(1)
		if _, err := peer.Write(append(large, `{"event": "STOP", "timestamp": {}}`...)); err != nil {
			t.Fatal(err)
		}
		<-sub.C
		sub.Close()
		sessions[i] = s
	}
	each := (memory() - before) / n
	t.Logf("%d bytes a session", each)
	if each > budget {
		t.Errorf("an idle session takes %d bytes, over %d", each, budget)
	}
	if g := runtime.NumGoroutine() - goroutines; g > n {
		t.Errorf("%d goroutines for %d sessions", g, n)
	}
	runtime.KeepAlive(sessions)
}

// TestWriteDeadline: a context with all the time in the world does not let a
// stopped QEMU block whoever else wants to write.
func TestWriteDeadline(t *testing.T) {
	s, _ := connected(t)
	s.writeWithin = 50 * time.Millisecond
	err := s.Execute(t.Context(), "transaction", strings.Repeat("x", 4<<20), nil)
	for _, e := range []error{err, s.Err()} {
		if !errors.Is(e, ErrUnresponsive) || errors.Is(e, ErrOutcomeUnknown) {
			t.Errorf("error %v", e)
		}
	}
}

func BenchmarkExecute(b *testing.B) {
	for name, value := range map[string]string{
		"small":  `{}`,
		"300KiB": `[` + strings.Repeat(`{"name": "abcdefgh", "size": 12345},`, 8000) + `{}]`,
	} {
		b.Run(name, func(b *testing.B) {
			s, peer := connected(b)
			go answer(peer, value)
			b.ReportAllocs()
			for b.Loop() {
				if err := s.Execute(b.Context(), "query-status", nil, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The least that one message costs: what encoding/json takes for it, its copy,
// and the command's context and channel.
const (
	maxExecuteAllocs = 40
	maxEventAllocs   = 12
)

// TestAllocations holds the line on the two paths that every VM is served by: a
// command with its reply, and an event.
func TestAllocations(t *testing.T) {
	s, peer := connected(t)
	go answer(peer, `{"status": "running", "running": true}`)
	execute := func() {
		if _, err := s.QueryStatus(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(100, execute); n > maxExecuteAllocs {
		t.Errorf("a command allocates %g times, over %d", n, maxExecuteAllocs)
	}
	events, sub := newEvents(t)
	if n := testing.AllocsPerRun(100, func() { events.next(t, sub) }); n > maxEventAllocs {
		t.Errorf("an event allocates %g times, over %d", n, maxEventAllocs)
	}
}

// events is a QEMU that sends one event after the other.
type events struct{ peer *net.UnixConn }

var stopEvent = []byte(`{"timestamp": {"seconds": 1700000000, "microseconds": 12}, "event": "STOP", "data": {"reason": "test"}}` + "\r\n")

func newEvents(t testing.TB) (events, *Subscription) {
	s, peer := connected(t)
	sub := s.Subscribe(1, "STOP", "RESUME")
	t.Cleanup(sub.Close)
	return events{peer}, sub
}

// next sends an event and takes it in.
func (e events) next(t testing.TB, sub *Subscription) {
	if _, err := e.peer.Write(stopEvent); err != nil {
		t.Fatal(err)
	}
	if got := <-sub.C; got.Name != "STOP" {
		t.Fatalf("event %+v", got)
	}
}

func BenchmarkEvent(b *testing.B) {
	e, sub := newEvents(b)
	b.ReportAllocs()
	for b.Loop() {
		e.next(b, sub)
	}
}

// BenchmarkDecode cuts a block graph into its objects and decodes it, as the
// reader of a session does.
func BenchmarkDecode(b *testing.B) {
	graph := []byte(`{"return": [` + strings.Repeat(`{"node-name": "#block123", "file": "/srv/vm/web/root.7f3a0c11-0.qcow2", "ro": false, "image": {"virtual-size": 68719476736}},`, 400) + `{}], "id": "a.1"}` + "\r\n")
	b.SetBytes(int64(len(graph)))
	b.ReportAllocs()
	for b.Loop() {
		d := newDecoder(bytes.NewReader(graph), DefaultReplyLimit)
		if m, err := d.nextMessage(); err != nil || len(m.Return) == 0 {
			b.Fatal(err)
		}
	}
}
