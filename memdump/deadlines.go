package memdump

import "time"

// Deadlines on what crosses a process boundary while memory is saved. Single
// commands have those of package monitor, unless they say otherwise here.
const (
	// backgroundPause bounds the pause of a background save, which takes tens
	// of milliseconds. The longest part by far is what stop waits for: the
	// guest's requests in flight, and a flush of each image.
	backgroundPause = 10 * time.Second
	// precopyPause bounds the last pass, of a length that QEMU was told, with
	// the cut in its middle and the devices' state at its end.
	precopyPause = 30 * time.Second
	// stoppedPause and stoppedRate bound a whole save with the guest paused: a
	// slower target than that, in bytes per second, is taken for a hung one.
	stoppedPause = time.Minute
	stoppedRate  = 20 << 20
	// guardGrace is what the guard leaves this process to end a pause by itself
	// after its own deadline, before it acts.
	guardGrace = 3 * time.Second
	// beforePause is the guard's limit while precopy has not paused the guest
	// yet, which may take any time: only this process's death counts.
	beforePause = 30 * 24 * time.Hour
	// resumeWithin bounds the attempts to end a pause that went wrong; after it
	// the guard goes on alone.
	resumeWithin = 30 * time.Second
	// queryWithin bounds a query about a save that the guest does not wait for:
	// writing images can hold QEMU's main loop up for long on a loaded host.
	queryWithin = time.Minute
	// cancelWithin bounds the end of a cancelled save: QEMU finishes the write
	// that it is in.
	cancelWithin = time.Minute
	// loadStalls is how long a load may take nothing from its file: the disk that
	// it is read from may be slow, or QEMU may wait for memory of the host.
	loadStalls = time.Minute
	// loadWithin bounds the answer of a QEMU that loads a plain file, which it
	// gives when it has loaded all; loadStalls ends the wait much earlier.
	loadWithin = 24 * time.Hour
	// quitWithin bounds the reply to quit, which QEMU gives before it ends.
	quitWithin = 5 * time.Second
	// measureWithin bounds the measuring of the dirty rate, which takes as long
	// as it was asked to, and less than a second more.
	measureWithin = 5 * time.Second
	// stuckAsk bounds the question whether a save goes on: a main loop that is
	// stuck itself never answers.
	stuckAsk = 2 * time.Second
	// stuckSilent is how long a QEMU is watched that does not answer. A save
	// that goes on serves who waits for it between any two pages.
	stuckSilent = 3 * time.Second
)

// Between two looks at a save. QEMU reports changes of its state as events,
// and nothing else.
const (
	progressEvery = 250 * time.Millisecond
	// loadPoll lies between two looks at a load, whose end comes as an event.
	loadPoll = 50 * time.Millisecond
	// pausePoll follows pausePollSpins looks without a rest: usually all is
	// seen by then, and each look takes QEMU's main loop from other work.
	pausePollSpins = 50
	pausePoll      = 200 * time.Microsecond
	// measureTime is how long the dirty rate is measured for, where that may be
	// less than a second: long beside the reading of the samples.
	measureTime = 300 * time.Millisecond
	// measurePoll is short beside what is measured.
	measurePoll = 20 * time.Millisecond
	// stuckSettle lies between two looks at a QEMU that says that its save has
	// ended: from 8.1 on it says so an instant before it lifts the protection.
	stuckSettle = 500 * time.Millisecond
	// stuckEvery lies between two looks at the threads of a QEMU that does not
	// answer.
	stuckEvery = 250 * time.Millisecond
)
