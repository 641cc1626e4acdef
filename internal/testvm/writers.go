package testvm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// Gap is a time in which nothing came from the guest.
type Gap struct {
	From, To time.Time
}

// Length is how long the gap was.
func (g Gap) Length() time.Duration { return g.To.Sub(g.From) }

// Gaps are the longest gaps since the writers were started or Reset, those that
// last still included.
type Gaps struct {
	// Heartbeat shows how long the guest's CPUs stood still. The guest sends a
	// byte each millisecond.
	Heartbeat Gap
	// Writes shows for each disk how long no write was completed. The guest
	// writes 4 KiB and waits for fdatasync, over and over.
	Writes map[string]Gap
}

// Writers watches a guest's heartbeat and writes from outside.
type Writers struct {
	guest *Guest
	conns []net.Conn
	read  sync.WaitGroup

	mu        sync.Mutex
	heartbeat track
	missed    []Gap // of the heartbeat, oldest first
	writes    map[string]*track
	completed map[string]uint64
	advanced  chan struct{} // closed at the next completed write
	err       error
}

// track is what is known of one stream of events.
type track struct {
	last    time.Time
	longest Gap
}

func (t *track) event(now time.Time) {
	t.longest = t.until(now)
	t.last = now
}

// until returns the longest gap, that which lasts still included.
func (t *track) until(now time.Time) Gap {
	if now.Sub(t.last) > t.longest.Length() {
		return Gap{t.last, now}
	}
	return t.longest
}

// StartWriters starts the heartbeat and a writer on each mounted file system, and
// returns when each of them has been heard of. Writers go on with the sequence
// that their file system holds. They end with Stop or with the guest.
func (g *Guest) StartWriters(ctx context.Context) (*Writers, error) {
	p, _ := g.current()
	w := &Writers{
		guest:     g,
		writes:    map[string]*track{},
		completed: map[string]uint64{},
		advanced:  make(chan struct{}),
	}
	for _, s := range []struct {
		socket string
		read   func(net.Conn) error
	}{{heartbeatSocket, w.readHeartbeat}, {writesSocket, w.readWrites}} {
		conn, err := dial(ctx, p, g.path(s.socket))
		if err != nil {
			w.close()
			return nil, err
		}
		w.conns = append(w.conns, conn)
		w.read.Go(func() {
			if err := s.read(conn); err != nil && !errors.Is(err, net.ErrClosed) {
				w.fail(err)
			}
		})
	}
	if _, err := g.call(ctx, wire.Request{Op: wire.OpStartWriters}); err != nil {
		w.close()
		return nil, err
	}
	if err := w.AwaitWrites(ctx, 1); err != nil {
		w.close()
		return nil, err
	}
	w.Reset()
	return w, nil
}

func (w *Writers) readHeartbeat(conn net.Conn) error {
	b := make([]byte, 256)
	for {
		_, err := conn.Read(b)
		if err != nil {
			return fmt.Errorf("heartbeat: %w", err)
		}
		w.beat(time.Now())
	}
}

func (w *Writers) beat(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if gap := (Gap{w.heartbeat.last, now}); gap.Length() >= missedBeats {
		w.missed = append(w.missed, gap)
	}
	w.heartbeat.event(now)
}

// missedBeats is the shortest gap that Missed tells of.
const missedBeats = 3 * time.Millisecond

// Missed returns all gaps of the heartbeat since the writers were started or
// Reset in which more than two beats were missed, oldest first.
func (w *Writers) Missed() []Gap {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.missed)
}

func (w *Writers) readWrites(conn net.Conn) error {
	lines := bufio.NewReader(conn)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return fmt.Errorf("writes: %w", err)
		}
		disk, number, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			return fmt.Errorf("writes: unexpected line %q", line)
		}
		if err := w.complete(disk, n); err != nil {
			return err
		}
	}
}

// complete notes that record n of a disk is durable.
func (w *Writers) complete(disk string, n uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	t, seen := w.writes[disk]
	if !seen {
		t = &track{last: now}
		w.writes[disk] = t
	} else if n != w.completed[disk]+1 {
		return fmt.Errorf("writes: disk %s completed %d after %d", disk, n, w.completed[disk])
	}
	t.event(now)
	w.completed[disk] = n
	close(w.advanced)
	w.advanced = make(chan struct{})
	return nil
}

func (w *Writers) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
		close(w.advanced)
		w.advanced = make(chan struct{})
	}
}

// Gaps returns the longest gaps.
func (w *Writers) Gaps() Gaps {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	gaps := Gaps{Heartbeat: w.heartbeat.until(now), Writes: map[string]Gap{}}
	for disk, t := range w.writes {
		gaps.Writes[disk] = t.until(now)
	}
	return gaps
}

// Reset forgets the gaps so far.
func (w *Writers) Reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.heartbeat, w.missed = track{last: now}, nil
	for disk := range w.writes {
		w.writes[disk] = &track{last: now}
	}
}

// Completed returns the sequence number of the last durable write of each disk
// that was heard of. What a disk holds is never older (Guest.LastWrite).
func (w *Writers) Completed() map[string]uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.completed)
}

// AwaitWrites returns when each disk has completed n more writes. It fails if
// the guest is lost.
func (w *Writers) AwaitWrites(ctx context.Context, n uint64) error {
	before := w.Completed()
	for {
		w.mu.Lock()
		err, advanced := w.err, w.advanced
		done := true
		for _, d := range w.guest.config.Disks {
			if d.NoFilesystem {
				continue
			}
			first, seen := before[d.Name]
			now, heard := w.completed[d.Name]
			if !seen && heard {
				// The first report of a disk tells where its sequence stands.
				before[d.Name], first = now-1, now-1
			}
			done = done && heard && now >= first+n
		}
		w.mu.Unlock()
		if done || err != nil {
			return err
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return fmt.Errorf("wait for %d writes of guest %s: %w", n, w.guest.Name, ctx.Err())
		}
	}
}

// Stop ends the writers, and returns when the guest has completed the last write
// of each. It waits while a file system is frozen.
func (w *Writers) Stop(ctx context.Context) error {
	_, err := w.guest.call(ctx, wire.Request{Op: wire.OpStopWriters})
	w.close()
	return err
}

func (w *Writers) close() {
	for _, conn := range w.conns {
		_ = conn.Close()
	}
	w.read.Wait()
}

// LastWrite returns the sequence number of the last write that a disk's file
// system holds, 0 for none. It fails if a write before that is lost or torn.
func (g *Guest) LastWrite(ctx context.Context, disk string) (uint64, error) {
	reply, err := g.call(ctx, wire.Request{Op: wire.OpScan, Path: disk})
	return reply.Sequence, err
}
