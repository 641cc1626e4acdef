package freeze

import "time"

// Deadlines on what crosses a process boundary. Those of single guest-agent
// commands are in package qga; the freeze itself has Request.FreezeTimeout.
const (
	// helloTimeout: the agent sends the request at once.
	helloTimeout = 10 * time.Second
	// startTimeout: connecting (2 s), synchronising (5 s), two questions (5 s
	// and 2 s), the list of file systems (10 s), and exec under load.
	startTimeout = 30 * time.Second
	// leaseTimeout: an fsync on a disk that others keep busy.
	leaseTimeout = 30 * time.Second
	// syncTimeout: an idle guest agent answers in milliseconds.
	syncTimeout = 5 * time.Second
	// thawTimeout: a thaw takes milliseconds, but the guest's hooks run before
	// it answers.
	thawTimeout = 10 * time.Second
	// statusTimeout: package qga's own for the question, plus a
	// resynchronisation before it.
	statusTimeout = 7 * time.Second
	// guardGrace is what the agent adds to the guard's own deadlines before it
	// takes the guard for hung.
	guardGrace = 3 * time.Second
	// closeTimeout bounds Close: a thaw, its verification and the grace.
	closeTimeout = 2*statusTimeout + thawTimeout + guardGrace
	// overdue is how long after the lease's end a guard must have told that the
	// freeze is over, or is unresolved: one attempt, and the grace.
	overdue = firstPatience + thawTimeout + statusTimeout + guardGrace
	// sendTimeout: the agent's end of the pipe may be stopped, and nothing
	// that the guard tells it is worth waiting for.
	sendTimeout = 200 * time.Millisecond
	// endGrace is for a guard whose agent has died: it thaws and ends by
	// itself in milliseconds, which is better than being killed.
	endGrace = 2 * time.Second
	// killTimeout: a killed process ends when the kernel gets to it.
	killTimeout = 5 * time.Second
	// recoverTimeout is how long Recover waits for one guest before it calls
	// the freeze unresolved; the new guard goes on.
	recoverTimeout = 20 * time.Second
)

// Attempts to thaw a guest that does not answer. The first wait for an answer
// is short, so that the alarm is early; later ones are long, since a guest
// agent that comes back answers at once.
const (
	firstPatience = 1 * time.Second
	lastPatience  = 30 * time.Second
	firstPause    = 50 * time.Millisecond
	lastPause     = 5 * time.Second
)
