// Package discover finds the QEMU processes of this host and describes them:
// who they are, where their monitor and guest-agent sockets stand, which files
// their command line opens, and which systemd unit holds them. It reads /proc
// and the kernel's process events only; it never talks to QEMU or to a guest.
//
// # What is a QEMU process
//
// A process whose executable is called qemu-system-*, qemu-kvm or kvm; where
// the executable may not be read, its task name decides. Three kinds of
// processes look like one and are left out: a QEMU that only answers a
// question (-version, -device help, libvirt's capability probe), the launcher
// that waits for its -daemonize child, and the short-lived children that QEMU
// forks for helper programs.
//
// # Identity
//
// A process is identified by its pid and its start time in clock ticks since
// boot; the pid alone is reused. [Same] answers whether both still name a live
// process, and callers ask it before every effect.
//
// # Trust
//
// A QEMU that its guest has taken over can rewrite its own command line. What
// is read here is therefore bounded in size, parsed without side effects, and
// never more than a claim of that process about itself.
//
// # Ordering
//
// [Watcher] delivers Started for every QEMU found at the start, then Listed
// once, then changes as they happen. For one process Started comes before
// Exited, and each comes once. A process that replaces itself by exec is
// reported as Exited and Started again, with the same pid and start time.
//
// # Concurrency
//
// Functions may be called from any goroutine. A Watcher runs one goroutine,
// which ends, with everything it holds, when the context given to [Watch] is
// done; the events channel is closed last.
package discover
