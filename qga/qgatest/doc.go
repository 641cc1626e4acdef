// Package qgatest is a guest agent on a real Unix socket, for tests.
//
// A Server behaves as qemu-ga behind QEMU's socket does: it serves one client
// at a time and lets others wait; it takes one command after another, and goes
// on with a command whose client has left; replies for which there is no client
// are lost; and while the guest is frozen it knows only the commands that
// qemu-ga serves then. Any command can be given other Behaviours, once or for
// good: to be silent, late, slow, wrong, endless or a lie.
//
// All methods may be called from any goroutine.
package qgatest
