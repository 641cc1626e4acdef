package client_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// watchEvents passes on the numbers that it sees, and gaps as 1000*from+to.
func watchEvents(ctx context.Context, t *testing.T, socket string, since *uint64, seen chan<- uint64) <-chan error {
	t.Helper()
	ended := make(chan error, 1)
	c := connected(t, socket)
	go func() {
		ended <- c.WatchEvents(ctx, &vmsnapv1.WatchEventsRequest{Since: since}, func(news *vmsnapv1.WatchEventsResponse) error {
			if gap := news.GetGap(); gap != nil {
				seen <- 1000*gap.GetFromSeq() + gap.GetToSeq()
			} else {
				seen <- news.GetEvent().GetSeq()
			}
			return nil
		})
	}()
	return ended
}

func add(b *rpctest.Backend, n int) {
	for range n {
		b.AddEvent(event.Event{Kind: event.VMStarted, Severity: event.Info, Time: rpctest.Now})
	}
}

func wantSeen(t *testing.T, seen <-chan uint64, want ...uint64) {
	t.Helper()
	for _, w := range want {
		select {
		case got := <-seen:
			if got != w {
				t.Fatalf("saw %d; want %d", got, w)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%d does not come", w)
		}
	}
}

// TestWatchEventsOverRestarts restarts the daemon, and breaks the connection
// without a word, while events are added; each is seen once.
func TestWatchEventsOverRestarts(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	b := rpctest.NewBackend()
	add(b, 2)
	socket := filepath.Join(t.TempDir(), "d.sock")
	stop := rpctest.ServeAt(t, socket, b, options(t))
	front, cut := cuttable(t, socket)
	seen := make(chan uint64, 100)
	ended := watchEvents(ctx, t, front, proto.Uint64(0), seen)
	wantSeen(t, seen, 1, 2)
	add(b, 2)
	wantSeen(t, seen, 3, 4)
	stop()
	add(b, 2)
	stop = rpctest.ServeAt(t, socket, b, options(t))
	wantSeen(t, seen, 5, 6)
	cut()
	add(b, 1)
	wantSeen(t, seen, 7)
	stop()
	add(b, 3)
	b.ForgetEvents(10)
	rpctest.ServeAt(t, socket, b, options(t))
	wantSeen(t, seen, 8009, 10)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if len(seen) > 0 {
		t.Errorf("seen once more: %d", <-seen)
	}
}

func TestWatchEventsEnds(t *testing.T) {
	b := rpctest.NewBackend()
	add(b, 1)
	c := connected(t, rpctest.Serve(t, b, options(t)))
	enough := errors.New("enough")
	err := c.WatchEvents(t.Context(), &vmsnapv1.WatchEventsRequest{Since: proto.Uint64(0)}, func(*vmsnapv1.WatchEventsResponse) error { return enough })
	if !errors.Is(err, enough) {
		t.Error(err)
	}
	err = c.WatchEvents(t.Context(), &vmsnapv1.WatchEventsRequest{Since: proto.Uint64(7)}, func(*vmsnapv1.WatchEventsResponse) error { return nil })
	if err == nil {
		t.Error("a number that there is not yet is taken")
	}
}
