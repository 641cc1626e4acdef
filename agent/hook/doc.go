// Package hook runs the host's own programs at the phases of an operation.
//
// A hook is an executable file HOOKS-DIR/PHASE/NN-name. List finds those of a
// phase, in the order of their names; Hook.Run runs one.
//
// # What is run
//
// A hook runs as the daemon's user, so whoever could change one could do what
// the daemon can. List refuses a directory or a file that anybody but root and
// the daemon's user owns or may write to, and so does it for each directory on
// the way to them. It looks at the phase when that is about to run, so hooks
// come and go without a restart.
//
// A hook has an environment of its own and nothing of the daemon's; what is not
// fit for an environment, such as words of a guest, comes as JSON on standard
// input only.
//
// # When it ends
//
// Each hook has a process group. At its time limit, when the context ends, and
// when the hook itself has ended, what is left of the group is ended too. Run
// returns then, also while a program that left the group holds the output open.
// A hook dies with the daemon.
//
// # Concurrency
//
// All functions may be called from any goroutine. Each running hook keeps a
// thread of the operating system to itself.
package hook
