package agent

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/event"
)

const (
	// newsQueue is how many events may wait to be recorded.
	newsQueue = 4096
	// newsBatch is how many are recorded together.
	newsBatch = 256
	// newsRetry is the wait before the catalog is tried again. It refuses when
	// its disk is full.
	newsRetry = 5 * time.Second
	// newsTimeout bounds the last attempt, when the agent stops.
	newsTimeout = 5 * time.Second
)

// news records the events that belong to no change of the catalog. Telling one
// never waits for the disk.
type news struct {
	catalog *catalog.Catalog
	log     hclog.Logger
	queue   chan event.Event
	lost    atomic.Int64
	end     chan struct{}
	ended   chan struct{}

	mu      sync.Mutex
	refused map[refusal]*refusals
}

func newNews(c *catalog.Catalog, log hclog.Logger) *news {
	return &news{
		catalog: c, log: log, queue: make(chan event.Event, newsQueue), end: make(chan struct{}), ended: make(chan struct{}),
		refused: map[refusal]*refusals{},
	}
}

// tell records an event soon. One without a time happened now.
func (n *news) tell(e event.Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	select {
	case n.queue <- e:
	default:
		n.lost.Add(1)
	}
}

// run records what is told until close is called.
func (n *news) run() {
	defer close(n.ended)
	for {
		select {
		case e := <-n.queue:
			n.record(n.batch(e))
		case <-n.end:
			for len(n.queue) > 0 {
				n.record(n.batch(<-n.queue))
			}
			return
		}
	}
}

// close records what is left and ends run.
func (n *news) close() {
	close(n.end)
	<-n.ended
}

func (n *news) batch(first event.Event) []event.Event {
	batch := []event.Event{first}
	for len(batch) < newsBatch {
		select {
		case e := <-n.queue:
			batch = append(batch, e)
		default:
			return batch
		}
	}
	return batch
}

// record writes a batch, and again until it works or the agent stops.
func (n *news) record(batch []event.Event) {
	for told := false; ; told = true {
		lost := n.lost.Swap(0)
		if lost > 0 {
			batch = append(batch, event.Event{
				Kind: event.EventsLost, Severity: event.Error, Message: fmt.Sprintf("%d events could not be recorded", lost),
			})
		}
		ctx, cancel := context.WithTimeout(context.Background(), newsTimeout)
		err := n.catalog.AddEvents(ctx, batch...)
		cancel()
		if err == nil {
			return
		}
		if !told {
			n.log.Error("events are not recorded yet", "error", err)
		}
		select {
		case <-time.After(newsRetry):
		case <-n.end:
			n.log.Error("events are lost", "count", len(batch))
			return
		}
	}
}

// refusal is a kind of call that a user may not make.
type refusal struct {
	uid       uint32
	procedure string
}

// refusals are how often it was refused since it was last told.
type refusals struct {
	told  time.Time
	since int
}

const (
	// refusedInterval is how long refusals of a kind are told of as one, so that
	// a caller without a role cannot drive everything else out of the history.
	refusedInterval = time.Minute
	// maxRefused bounds the kinds that are told apart.
	maxRefused = 1000
)

// CallRefused records that a caller's role did not permit a call.
func (a *Agent) CallRefused(uid uint32, pid int32, procedure, reason string) {
	n := a.news
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	key := refusal{uid, procedure}
	r := n.refused[key]
	if r == nil {
		if len(n.refused) >= maxRefused {
			clear(n.refused)
		}
		r = &refusals{}
		n.refused[key] = r
	}
	if now.Sub(r.told) < refusedInterval {
		r.since++
		return
	}
	message := fmt.Sprintf("%s by uid %d (pid %d): %s", procedure, uid, pid, reason)
	if r.since > 0 {
		message += fmt.Sprintf(", and %d times before", r.since)
	}
	r.told, r.since = now, 0
	n.tell(event.Event{Kind: event.CallRefused, Severity: event.Warning, UID: &uid, Code: "denied", Message: message})
}
