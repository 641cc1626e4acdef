package event

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// counter is a sink that tells when it has had all events.
type counter struct {
	left int
	done context.CancelFunc
}

func (*counter) Name() string { return "counter" }

func (c *counter) Send(context.Context, Event) error {
	if c.left--; c.left == 0 {
		c.done()
	}
	return nil
}

// pages are events that have a page of the same in every place.
type pages struct {
	*kept
	page []Event
	last uint64
}

func newPages(n int) *pages {
	p := &pages{kept: newKept(), last: uint64(n)}
	p.position["counter"] = 0
	for i := range page {
		p.page = append(p.page, Event{Time: time.Unix(int64(i), 0), Kind: VMStarted, Severity: Info, VMID: "5f0c1a2b", VMName: "web", Message: "started"})
	}
	return p
}

func (p *pages) EventBounds(context.Context) (Bounds, error) { return Bounds{1, p.last}, nil }

func (p *pages) Events(_ context.Context, f Filter) ([]Event, error) {
	n := min(uint64(page), p.last-f.Since)
	for i := range n {
		p.page[i].Seq = f.Since + 1 + i
	}
	return p.page[:n], nil
}

// delivers delivers so many events.
func delivers(t testing.TB, n int) {
	ctx, cancel := context.WithCancel(t.Context())
	sink := &counter{left: n, done: cancel}
	Deliver(ctx, newPages(n), sink, hclog.NewNullLogger())
	if sink.left != 0 {
		t.Fatalf("%d events were not delivered", sink.left)
	}
}

// TestDeliveryAllocates next to nothing of its own for an event: what a sink and
// the catalog need comes on top.
func TestDeliveryAllocates(t *testing.T) {
	const many = 10 * page
	few := testing.AllocsPerRun(10, func() { delivers(t, page) })
	more := testing.AllocsPerRun(10, func() { delivers(t, many) })
	if each := (more - few) / (many - page); each > 0.1 {
		t.Errorf("each event allocates %g times", each)
	}
}

func BenchmarkDeliver(b *testing.B) {
	for _, n := range []int{page, 10 * page} {
		b.Run(fmt.Sprintf("events=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				delivers(b, n)
			}
		})
	}
}
