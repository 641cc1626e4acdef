package testvm

import (
	"slices"
	"testing"
	"time"
)

func TestMissed(t *testing.T) {
	var w Writers
	w.Reset()
	at := func(ms int) time.Time { return w.heartbeat.last.Add(time.Duration(ms) * time.Millisecond) }
	start := w.heartbeat.last
	w.beat(at(1)) // each time is counted from the beat before
	w.beat(at(2))
	w.beat(at(3))
	w.beat(at(40))
	w.beat(at(1))
	want := []Gap{{start.Add(3 * time.Millisecond), start.Add(6 * time.Millisecond)}, {start.Add(6 * time.Millisecond), start.Add(46 * time.Millisecond)}}
	if got := w.Missed(); !slices.Equal(got, want) {
		t.Errorf("missed %v, want %v", got, want)
	}
	if got := w.heartbeat.longest; got != want[1] {
		t.Errorf("the longest is %v", got)
	}
	w.Reset()
	if got := w.Missed(); len(got) > 0 {
		t.Errorf("missed %v since a moment ago", got)
	}
}
