package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// dirtyEvery is the time between two bursts of changes.
const dirtyEvery = 5 * time.Millisecond

// dirtier changes memory at a steady rate: the words of each page, page after
// page of its working set, round and round. Each page holds the number of the
// round that changed it last, which finds out pages of different instants.
type dirtier struct {
	mu     sync.Mutex
	memory []byte
	rate   int64 // bytes per second
	at     int   // the page to change next, in bytes
	round  uint64
	runs   bool
	err    error // the first page that was not of the round it must be of
}

// set changes the working set and the rate, both in bytes. The working set is
// filled before it returns, so that all of it is resident. A rate of 0 leaves it
// as it is from then on; a size of 0 gives it back.
func (d *dirtier) set(size, rate int64) error {
	page := int64(os.Getpagesize())
	if size < 0 || rate < 0 || size == 0 && rate > 0 {
		return errors.New("a working set that is no size, or none to change")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	size = (size + page - 1) / page * page
	if err := d.resize(size); err != nil {
		return err
	}
	d.rate = rate
	if !d.runs {
		d.runs = true
		go d.run()
	}
	return nil
}

// resize is called with mu held.
func (d *dirtier) resize(size int64) error {
	if size == int64(len(d.memory)) {
		return nil
	}
	if d.memory != nil {
		if err := unix.Munmap(d.memory); err != nil {
			return err
		}
		d.memory = nil
	}
	d.at, d.round = 0, 1
	if size == 0 {
		return nil
	}
	memory, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	d.memory = memory
	d.change(len(memory))
	return nil
}

func (d *dirtier) run() {
	last := time.Now()
	for now := range time.Tick(dirtyEvery) {
		d.mu.Lock()
		// What was missed during a pause is not caught up with.
		took := min(now.Sub(last), 4*dirtyEvery)
		last = now
		if d.memory != nil {
			d.change(int(float64(d.rate) * took.Seconds()))
		}
		d.mu.Unlock()
	}
}

// verify returns an error if any page was ever found, or is now, of another
// round than it must be of.
func (d *dirtier) verify() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	page := os.Getpagesize()
	for at := 0; at < len(d.memory); at += page {
		want := d.round
		if at >= d.at {
			want--
		}
		d.check(at, want)
	}
	return d.err
}

// check is called with mu held.
func (d *dirtier) check(at int, want uint64) {
	got, not := word(d.memory[at:]), word(d.memory[at+8:])
	if d.err == nil && (got != want || not != ^want && want > 0) {
		d.err = fmt.Errorf("the page at %d of %d holds rounds %d and %d in round %d, at %d: memory is not of one instant",
			at, len(d.memory), got, ^not, d.round, d.at)
	}
}

// change changes so many bytes, by the page. It is called with mu held.
func (d *dirtier) change(bytes int) {
	page := os.Getpagesize()
	for ; bytes > 0; bytes -= page {
		d.check(d.at, d.round-1)
		// No page is ever of one repeated byte.
		binary.LittleEndian.PutUint64(d.memory[d.at:], d.round)
		binary.LittleEndian.PutUint64(d.memory[d.at+8:], ^d.round)
		if d.at += page; d.at >= len(d.memory) {
			d.at = 0
			d.round++
		}
	}
}
