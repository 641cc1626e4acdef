// Package freeze freezes a guest's file systems under a lease.
//
// A guest left frozen is an outage, and the agent that froze it may be killed,
// stopped or hung at any moment. So a freeze is held by a process of its own,
// the guard. It alone is connected to the guest agent, and it thaws
//
//   - when the agent asks for it;
//   - when its pipe to the agent closes, because the agent has died;
//   - when the lease ends, because the agent is stopped or hung.
//
// Once it has sent a freeze the guard does not end before the guest has
// answered thawed, or its QEMU process is gone. A freeze whose reply never came
// may still run later, so the guard resynchronises and thaws again and again;
// meanwhile the freeze is called unresolved.
//
// The order of things:
//
//  1. Start runs the guard, which leaves the agent's control group, connects,
//     resynchronises and reads what the guest can do. Nothing is frozen yet,
//     and nothing is started after this.
//  2. Freeze makes the guard write and fsync a lease file, and only then send
//     the freeze. From the guest's reply to the thaw there is nothing but
//     messages over a socket pair.
//  3. Thaw makes it ask the guest whether it is still frozen, and thaw. Only
//     the answer frozen, and as many file systems thawed as were frozen, make
//     the freeze verified.
//  4. The lease file is removed when the guest has answered thawed.
//
// Whatever kills agent and guard leaves the lease file. Recover ends what is
// left of the guard named in it, since the guest agent serves one client at a
// time, and puts a new one in its place that does nothing but thaw.
//
// A Guard may be used from several goroutines. It serves one freeze.
package freeze
