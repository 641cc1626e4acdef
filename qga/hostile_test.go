package qga_test

import (
	"context"
	"runtime"
	"runtime/metrics"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/vmsnap/vmsnap/qga"
	"github.com/vmsnap/vmsnap/qga/qgatest"
)

// What a hostile guest may cost: memory, and time after a deadline.
const (
	mostMemory = 32 << 20
	mostDelay  = time.Second
)

// TestHostileGuestCostsLittle has guests that answer a question with as much, or
// as slowly, as they can.
func TestHostileGuestCostsLittle(t *testing.T) {
	sync := func(b qgatest.Behaviour) func(*qgatest.Server) {
		return func(s *qgatest.Server) { s.Always(qgatest.Sync, b) }
	}
	answer := func(b qgatest.Behaviour) func(*qgatest.Server) {
		return func(s *qgatest.Server) { s.Always(qgatest.FSInfo, b) }
	}
	for name, script := range map[string]func(*qgatest.Server){
		"an answer without end":             answer(qgatest.Endless("x")),
		"1 GiB of JSON":                     answer(qgatest.Flood(1 << 30)),
		"file systems without end":          answer(qgatest.Then(qgatest.Raw(`{"return":[{}`), qgatest.Endless(`,{"name":"a","mountpoint":"/","type":"ext4"}`))),
		"short answers without end":         answer(qgatest.Endless("{\"return\":[]}\n")),
		"blank lines without end":           answer(qgatest.Endless("\n")),
		"lists in lists":                    answer(qgatest.Deep(1 << 20)),
		"objects in objects without end":    answer(qgatest.Endless(`{"return":`)),
		"one byte a second":                 answer(qgatest.Drip(time.Second)),
		"numbers of no end":                 answer(qgatest.Then(qgatest.Raw(`{"return":`), qgatest.Endless("9"))),
		"synchronisations without end":      sync(qgatest.Endless("\xff{\"return\":1}\n")),
		"delimiters without end":            sync(qgatest.Endless("\xff")),
		"a synchronisation that never ends": sync(qgatest.Then(qgatest.Raw("\xff"), qgatest.Endless("{"))),
		"one byte of a synchronisation":     sync(qgatest.Drip(time.Second)),
	} {
		t.Run(name, func(t *testing.T) {
			s := qgatest.New(t)
			script(s)
			c := dial(t, s, qga.Limits{})
			const deadline = 200 * time.Millisecond
			took, grew := cost(func() {
				ctx, cancel := context.WithTimeout(t.Context(), deadline)
				defer cancel()
				// Short answers are answers; what comes behind them is noticed next.
				_, first := c.Filesystems(ctx)
				_, second := c.Filesystems(ctx)
				if first == nil && second == nil {
					t.Error("both questions were answered")
				}
			})
			if took > deadline+mostDelay {
				t.Errorf("took %s, with a deadline of %s", took, deadline)
			}
			if grew > mostMemory {
				t.Errorf("the heap grew by %d MiB", grew>>20)
			}
		})
	}
}

// cost returns how long f takes, and by how much the heap is larger meanwhile
// than it was before.
func cost(f func()) (took time.Duration, grew uint64) {
	runtime.GC()
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	read := func() uint64 {
		metrics.Read(heap)
		return heap[0].Value.Uint64()
	}
	before := read()
	peak, stop, stopped := before, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			peak = max(peak, read())
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	began := time.Now()
	f()
	took = time.Since(began)
	close(stop)
	<-stopped
	return took, max(peak, before) - before
}

// TestHostileText has a guest name a file system by what would harm a terminal,
// at length.
func TestHostileText(t *testing.T) {
	s := qgatest.New(t)
	s.Once(qgatest.FSInfo, qgatest.Raw("{\"return\":[{\"name\":\""+strings.Repeat("\xc3\x28\xed\xa0\x80", 1<<16)+`","mountpoint":"/\u001b[31m\u202e","type":"ext4"}]}`+"\n"))
	list, err := dial(t, s, qga.Limits{}).Filesystems(within(t))
	if err != nil || len(list) != 1 {
		t.Fatalf("%d file systems, error %v", len(list), err)
	}
	for _, text := range []string{list[0].Name, list[0].Mountpoint} {
		if len(text) > qga.DefaultLimits.TextBytes || !utf8.ValidString(text) || strings.ContainsAny(text, "\x1b\u202e") {
			t.Errorf("a text of %d bytes: %.40q", len(text), text)
		}
	}
}
