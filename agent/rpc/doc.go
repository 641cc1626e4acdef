// Package rpc serves the agent's API over Connect: gRPC, gRPC-Web and plain
// HTTP with JSON reach the same handlers on one Unix socket.
//
// A connection's peer is identified once, by SO_PEERCRED, when it is accepted.
// Each call then passes, in this order: the gate, which compares the peer's
// role with the one that the procedure needs before a byte of the request is
// read; decoding, bounded in size; the scope, which compares the VMs that the
// request is about with those that the role is for; the interceptor, which logs
// the call, recovers panics and turns errors into their form on the wire; the
// handler, which checks the structure of the request and calls the Backend.
//
// Two tables rule what a caller sees: needed (roles.go) says which role a
// procedure needs and for which VMs, wire (errors.go) how a kind of failure is
// told.
//
// Everything here is safe for concurrent use.
package rpc
