// Package qga speaks the QEMU guest agent's protocol to one guest.
//
// A Client owns one connection to the Unix socket behind the guest's
// org.qemu.guest_agent.0 port. The port has no greeting and no message
// boundaries that survive a reader that gave up: the reply to a command that
// timed out arrives later, in front of the next one. So a Client is either in
// step with the guest or not. A new Client is not; every timeout, oversized or
// malformed reply makes it so; and each command of a Client that is out of step
// first resynchronises by guest-sync-delimited with a random id, throwing away
// all that comes before the answer (QEMU, docs/interop/qemu-ga-ref).
//
// The guest is hostile. Replies are bounded in bytes, nesting, list length and
// time, whatever the pace at which they come; texts are stripped of what could
// confuse a terminal or a log, and counts are clamped. What a guest says is
// never trusted beyond what it may claim about itself.
//
// Commands of one Client run one at a time, in the order in which they got
// hold of it, and each may be called from any goroutine. Close interrupts a
// command that is waiting.
package qga
