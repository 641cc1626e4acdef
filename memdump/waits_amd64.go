package memdump

import "golang.org/x/sys/unix"

// Calls that newer architectures do not have.
var idleCallsOfArch = []int{unix.SYS_POLL, unix.SYS_SELECT, unix.SYS_EPOLL_WAIT}
