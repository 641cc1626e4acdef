package op

import (
	"sync"
	"time"
)

// throttle calls a function after it was touched, in a goroutine of its own and
// at most once an interval. A touch is never lost: the call comes after it.
// While nothing touches it, it costs nothing.
type throttle struct {
	every time.Duration
	f     func()

	mu      sync.Mutex
	last    time.Time // when f was called, or the throttle made
	timer   *time.Timer
	armed   bool
	stopped bool
}

func newThrottle(every time.Duration, f func()) *throttle {
	return &throttle{every: every, f: f, last: time.Now()}
}

// touch asks for a call.
func (t *throttle) touch() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.armed || t.stopped {
		return
	}
	t.armed = true
	t.timer = time.AfterFunc(time.Until(t.last.Add(t.every)), t.fire)
}

func (t *throttle) fire() {
	t.mu.Lock()
	t.armed = false
	t.last = time.Now()
	stopped := t.stopped
	t.mu.Unlock()
	if !stopped {
		t.f()
	}
}

// stop prevents further calls. One that is under way goes on.
func (t *throttle) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	if t.timer != nil {
		t.timer.Stop()
	}
}
