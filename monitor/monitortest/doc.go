// Package monitortest is a scripted QMP server on a real Unix socket, for
// tests of whatever speaks QMP.
//
// A [Server] greets, negotiates and answers query-version as QEMU does, serves
// one client at a time while others wait in the socket's backlog, executes
// commands one after the other, and answers CommandNotFound to those that have
// no [Handler]:
//
//	srv := monitortest.NewServer(t)
//	srv.Handle("query-status", func(monitortest.Request) monitortest.Reply {
//		return monitortest.Return(map[string]any{"running": true, "status": "running"})
//	})
//	session, err := monitor.Dial(ctx, srv.Path())
//
// It can also do what QEMU does on a bad day. A handler that blocks is a hung
// main loop: nothing more is read. A [Reply] can come late, under a wrong id,
// in pieces, not at all, or with the connection's end in its middle. The
// greeting can be withheld, every byte sent by itself, and events sent in any
// number at any time.
//
// All methods may be called from any goroutine. [Server.Await] and
// [Server.AwaitClient] fail the test after a while; from a goroutine that is
// not the test's, that ends only the goroutine. Everything ends with the test.
package monitortest
