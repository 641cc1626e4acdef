package discover

import "time"

// The times of this package, each with its reason.
const (
	// defaultScanInterval is how late a start is noticed by scanning. One scan
	// costs a readlink for each process of the host, some milliseconds for a
	// thousand.
	defaultScanInterval = 2 * time.Second

	// auditInterval is the time between scans while the process connector
	// works. It finds the child of a -daemonize launcher that takes long to
	// be ready, and a process that could not be read when it started.
	auditInterval = 30 * time.Second

	// ackDeadline is how long the kernel may take to acknowledge the
	// subscription. It does so before send returns, or, outside the initial
	// namespaces, never.
	ackDeadline = time.Second
)
