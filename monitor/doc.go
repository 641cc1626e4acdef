// Package monitor speaks QMP, the QEMU Machine Protocol, over one connection
// to one QEMU.
//
// [Dial] connects to a monitor's Unix socket, awaits QEMU's greeting and
// negotiates capabilities. The [Session] that it returns executes commands,
// passes file descriptors, and hands out events, until either side ends it.
// A session that has ended stays ended: dial again.
//
// A monitor serves one client at a time. While another client holds it, a
// connection is accepted by the kernel and no greeting comes, which looks the
// same as a QEMU that is stopped or hung: both are [ErrBusy].
//
// A connection can outlive its session: another process that was given a
// duplicate of it ([Session.File]) makes a session of its own from it ([Adopt])
// when the first one has died, or has let go of it ([Session.HandOver]).
//
// # Errors
//
// Every error of a command is a [*CommandError], which is QEMU's own refusal,
// or an [*OpError], which names the command and wraps the cause. For a command
// with effects every error but [ErrOutcomeUnknown] means that QEMU refused it
// or cannot have got it. ErrOutcomeUnknown means that it may have been carried
// out or may yet be, and must be reconciled by asking QEMU. The sentinels say
// when each is returned.
//
// # Deadlines
//
// A command runs under its caller's context; where that has no deadline, the
// command's own from the table in deadlines.go applies. Writing has a deadline
// of its own, since a stopped QEMU leaves the socket's buffer full.
//
// # Ordering
//
// QEMU answers commands in the order in which they were sent, and replies are
// matched by id, so that the late reply to an abandoned command is never taken
// for another's. Ids begin with a word chosen at random for each session: QEMU
// may send the reply to a former client's command to the next client. Events
// reach each [Subscription] in the order in which QEMU sent them. Between
// replies and events there is no order: subscribe, issue the command, then
// query.
//
// # Concurrency
//
// All methods may be called from any number of goroutines, and commands may be
// in flight together. Each session runs one goroutine, its reader, which never
// waits for a consumer: replies go to buffered channels, and events that a
// subscriber has no room for are counted and dropped. [Session.Close] ends
// whatever is waiting. An idle session holds a read buffer of 4 KiB, which
// grows for a large reply and is given back after it.
package monitor
