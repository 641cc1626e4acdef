package e2e

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// tally has the figures of the torture tests, with which `make torture` ends.
var tally figures

type figures struct {
	mu     sync.Mutex
	counts map[string]int
	most   map[string]time.Duration
}

// add counts something that was done, or was looked at and found right. What is
// found wrong fails the test.
func (f *figures) add(what string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.counts == nil {
		f.counts = map[string]int{}
	}
	f.counts[what] += n
}

// took keeps the longest of some times.
func (f *figures) took(what string, d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.most == nil {
		f.most = map[string]time.Duration{}
	}
	f.most[what] = max(f.most[what], d)
}

// print prints the figures at the end of a thorough run.
func (f *figures) print() {
	if !thorough() {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	fmt.Println("\ntorture, in figures:")
	for _, what := range slices.Sorted(maps.Keys(f.counts)) {
		fmt.Printf("%8d  %s\n", f.counts[what], what)
	}
	for _, what := range slices.Sorted(maps.Keys(f.most)) {
		fmt.Printf("%8s  %s, at the most\n", f.most[what].Round(time.Millisecond), what)
	}
}
