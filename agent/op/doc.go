// Package op runs operations: long pieces of work that have an id, steps,
// progress and an end, that can be cancelled, and that a crash does not lose.
//
// A Runner executes recipes. A recipe is a function that does the work and
// tells its Op about it: the steps, the journal, what to revert, the warnings.
// The Runner does the rest: it records the operation in a Store before
// anything happens, holds the VM for it, runs the reverts when the recipe
// fails, and tells watchers of every change.
//
// # Ordering
//
// Start returns once the operation is durable. It is durable as running before
// the recipe is called, and its end is durable before anyone sees it; the VM is
// free before anyone sees the end, so that whoever waited for it can go on at
// once. A journal entry is durable when Journal returns; the store drops the
// journal together with recording the end.
//
// Everything in between (steps, progress, warnings, the states cancelling and
// reverting) is visible at once and written in the background, at most once a
// second and never earlier than a second after the start. So a step costs a
// recipe no I/O, and a short operation writes nothing at all between its start
// and its end: what the journal does not hold, recovery must not need.
//
// When the store fails at the start, the recipe is not called. When it fails
// in a Journal call, the recipe fails and its reverts run. When it fails at the
// end, the end is shown with the warning "end-not-recorded", and no further
// operation starts until it was recorded: after a restart recovery finds the
// operation unfinished and asks the world what became of it.
//
// # Waiting
//
// A Runner has limits, and operations beyond them wait in the state queued. They
// hold their VM already, show where they stand, and can be cancelled. The store
// knows them from the start: when the daemon stops they stay queued there, and
// the next one takes them up in the same order with Requeue.
//
// # Cancelling
//
// Cancel answers at once and cancels the recipe's context. The recipe returns
// when it notices; its reverts then run on a context of their own. From
// PointOfNoReturn on Cancel answers fault.TooLate. Exactly one of the two wins.
//
// # Pausing
//
// A recipe that says so can be paused: it looks at Rests where it can stand still
// for long. That it is paused is recorded like its state, so that the next daemon
// knows it too. A cancel ends a rest.
//
// # Concurrency
//
// All methods of Runner and Op may be called from any goroutine. A Store must
// allow the same. Starts are serialised, since a store has one writer. Watchers
// never hold up an operation: a slow one misses changes in between, never the
// last.
package op
