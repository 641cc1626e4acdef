// Package event is what happened on this host: every change and every warning,
// as an event with a number.
//
// The catalog keeps events. Their numbers grow by one and are never used again,
// so that whoever knows the last number that it has seen can ask for what came
// after it and miss nothing. What belongs to a change of the catalog (the
// beginning and the end of an operation, its warnings) is recorded in the same
// transaction as the change.
//
// # Sinks
//
// A Sink passes events on: Webhook to an HTTP server, Journal to systemd's
// journal. Deliver reads events from the catalog in their order, keeps the
// number of the last one that was passed on there, and so delivers each at
// least once, over restarts too. What a sink refuses for good is left out; what
// it cannot take now is tried again until it does, and what comes after it waits.
//
// # Concurrency
//
// Events are values. A Sink is used by one goroutine at a time.
package event
