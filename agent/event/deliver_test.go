package event

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
)

// kept is a source in memory.
type kept struct {
	mu       sync.Mutex
	events   []Event
	first    uint64
	added    chan struct{}
	position map[string]uint64
	fail     error // of reading
}

func newKept() *kept {
	return &kept{first: 1, added: make(chan struct{}), position: map[string]uint64{}}
}

func (k *kept) add(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for range n {
		k.events = append(k.events, Event{Seq: k.first + uint64(len(k.events))})
	}
	close(k.added)
	k.added = make(chan struct{})
}

func (k *kept) Events(_ context.Context, f Filter) (all []Event, _ error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, e := range k.events {
		if e.Seq > f.Since && (f.Limit == 0 || len(all) < f.Limit) {
			all = append(all, e)
		}
	}
	return all, k.fail
}

func (k *kept) EventBounds(context.Context) (Bounds, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return Bounds{k.first, k.first + uint64(len(k.events)) - 1}, nil
}

func (k *kept) EventsAdded() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.added
}

func (k *kept) SinkPosition(_ context.Context, sink string) (uint64, bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n, known := k.position[sink]
	return n, known, nil
}

func (k *kept) SetSinkPosition(_ context.Context, sink string, seq uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.position[sink] = seq
	return nil
}

// taker is a sink that fails as it is told.
type taker struct {
	mu   sync.Mutex
	got  []uint64
	fail func(attempt int, e Event) error
	n    int
}

func (*taker) Name() string { return "taker" }

func (s *taker) Send(_ context.Context, e Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	if s.fail != nil {
		if err := s.fail(s.n, e); err != nil {
			return err
		}
	}
	s.got = append(s.got, e.Seq)
	return nil
}

func (s *taker) seen() []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]uint64(nil), s.got...)
}

func deliver(t *testing.T, source Source, sink Sink) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { Deliver(ctx, source, sink, hclog.NewNullLogger()); close(ended) }()
	return func() { cancel(); <-ended }
}

func TestDeliver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source, sink := newKept(), &taker{}
		source.add(3)
		stop := deliver(t, source, sink)
		synctest.Wait()
		if got := sink.seen(); len(got) > 0 {
			t.Errorf("a new sink got the past: %v", got)
		}
		source.add(2)
		synctest.Wait()
		stop()
		source.add(250)
		defer deliver(t, source, sink)()
		synctest.Wait()
		got := sink.seen()
		if len(got) != 252 || got[0] != 4 || got[251] != 255 {
			t.Errorf("got %v", got)
		}
		for i := range got {
			if got[i] != uint64(4+i) {
				t.Fatalf("got %v", got)
			}
		}
	})
}

// TestDeliverLater has a receiver that is away for a day.
func TestDeliverLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		back := time.Now().Add(24 * time.Hour)
		source, sink := newKept(), &taker{}
		sink.fail = func(int, Event) error {
			if time.Now().Before(back) {
				return errors.New("away")
			}
			return nil
		}
		source.position["taker"] = 0
		source.add(5)
		defer deliver(t, source, sink)()
		time.Sleep(time.Until(back) + retryLast) // by the bubble's clock
		synctest.Wait()
		if diff := cmp.Diff([]uint64{1, 2, 3, 4, 5}, sink.seen()); diff != "" {
			t.Error(diff)
		}
		if sink.n < 200 || sink.n > 400 {
			t.Errorf("%d attempts in a day", sink.n)
		}
	})
}

func TestDeliverRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source, sink := newKept(), &taker{}
		sink.fail = func(_ int, e Event) error {
			if e.Seq == 2 {
				return fmt.Errorf("%w: not this one", ErrRefused)
			}
			return nil
		}
		source.position["taker"] = 0
		source.add(3)
		defer deliver(t, source, sink)()
		synctest.Wait()
		if diff := cmp.Diff([]uint64{1, 3}, sink.seen()); diff != "" {
			t.Error(diff)
		}
	})
}

// TestDeliverAnotherHistory has a position from a catalog that was lost, and one
// from before the history.
func TestDeliverAnotherHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, position := range []uint64{999, 3} {
			source, sink := newKept(), &taker{}
			source.first, source.position["taker"] = 10, position
			if position == 3 {
				source.add(1)
			}
			stop := deliver(t, source, sink)
			synctest.Wait()
			source.add(1)
			synctest.Wait()
			stop()
			if got := sink.seen(); len(got) == 0 || got[0] != 10 {
				t.Errorf("from %d: got %v", position, got)
			}
		}
	})
}

func TestWebhook(t *testing.T) {
	uid := uint32(0)
	e := Event{
		Seq: 7, Time: time.Date(2026, 3, 1, 12, 0, 0, 5000, time.FixedZone("", 3600)), Kind: OperationEnded, Severity: Error,
		VMID: "v", VMName: "web", Operation: "o", UID: &uid, Code: "no-space", Result: "failed", Message: "snapshot failed: <full>",
	}
	const want = `{"host":"h1","seq":7,"time":"2026-03-01T11:00:00.000005Z","kind":"operation-ended","severity":"error",` +
		`"vm_id":"v","vm_name":"web","operation_id":"o","snapshot_id":"","schedule":"","uid":0,"disk":"","code":"no-space",` +
		`"result":"failed","message":"snapshot failed: \u003cfull\u003e"}`
	secret := []byte("s3cret")
	var status int
	var problem string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		at := r.Header.Get(TimeHeader)
		switch {
		case err != nil || string(body) != want:
			problem = fmt.Sprintf("body %s, %v", body, err)
		case r.Method != "POST" || r.Header.Get("Content-Type") != "application/json" || r.Header.Get(SeqHeader) != "7" || at == "":
			problem = fmt.Sprintf("%s with %v", r.Method, r.Header)
		case r.Header.Get(SignatureHeader) != "sha256="+Sign(secret, at, body):
			problem = "the signature is wrong"
		}
		if status == 302 {
			w.Header().Set("Location", "/elsewhere")
		}
		w.WriteHeader(status)
	}))
	defer server.Close()
	hook, err := NewWebhook(server.URL, secret, "h1")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		status         int
		taken, refused bool
	}{{200, true, false}, {204, true, false}, {302, false, false}, {400, false, true}, {404, false, true}, {408, false, false}, {429, false, false}, {503, false, false}} {
		status = c.status
		err := hook.Send(t.Context(), e)
		if (err == nil) != c.taken || errors.Is(err, ErrRefused) != c.refused || problem != "" {
			t.Errorf("%d: %v, %s", c.status, err, problem)
		}
	}
	server.Close()
	if err := hook.Send(t.Context(), e); err == nil || errors.Is(err, ErrRefused) {
		t.Errorf("without a server: %v", err)
	}
	for _, wrong := range []string{"", "example.org/x", "ftp://example.org", "http://", "://"} {
		if _, err := NewWebhook(wrong, nil, ""); err == nil {
			t.Errorf("%q is taken", wrong)
		}
	}
}

// TestSignature has a signature that was computed by:
// printf '1772366400.{}' | openssl dgst -sha256 -hmac s3cret
func TestSignature(t *testing.T) {
	const want = "8c4c72f19ce4284eb286f29128e842337529452bbf9e8e70b482f4d03c55cba2"
	if got := Sign([]byte("s3cret"), "1772366400", []byte("{}")); got != want {
		t.Errorf("%s", got)
	}
}

func TestJournal(t *testing.T) {
	uid := uint32(1000)
	var got []string
	j := &Journal{func(m string, p journal.Priority, f map[string]string) error {
		got = append(got, fmt.Sprint(p, " ", m, " ", f))
		return nil
	}}
	for _, e := range []Event{
		{Seq: 1, Kind: AgentStarted, Severity: Info, Message: "vmsnapd started"},
		{Seq: 2, Kind: OperationEnded, Severity: Error, VMName: "web", UID: &uid, Code: "no-space", Message: "full"},
	} {
		if err := j.Send(t.Context(), e); err != nil {
			t.Error(err)
		}
	}
	want := strings.Join([]string{
		"6 vmsnapd started map[SYSLOG_IDENTIFIER:vmsnapd VMSNAP_EVENT:agent-started VMSNAP_SEQ:1]",
		"3 VM web: full map[SYSLOG_IDENTIFIER:vmsnapd VMSNAP_CODE:no-space VMSNAP_EVENT:operation-ended VMSNAP_SEQ:2 VMSNAP_UID:1000 VMSNAP_VM:web]",
	}, "\n")
	if diff := cmp.Diff(want, strings.Join(got, "\n")); diff != "" {
		t.Error(diff)
	}
}
