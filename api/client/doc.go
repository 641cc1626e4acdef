// Package client is the Go client of vmsnapd, for controllers and for the
// vmsnap command.
//
// A Client speaks to one daemon over its Unix socket. The services are reached
// by VMs, Snapshots, Operations, Schedules and Events; Wait and Follow stay with an
// operation to its end, WatchEvents with what happens on the host, over broken
// connections and restarts of the daemon.
// Long work is never bound to a connection: a caller that goes away loses
// nothing, and finds the operation again by its id, or by repeating the request
// with the same request_id.
//
// Every error says what the caller can act on: see ErrorOf.
//
// A Client is safe for concurrent use and multiplexes its calls over one
// connection. Each call lasts as long as its context permits.
package client
