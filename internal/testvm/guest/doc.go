// Command guest is the user space of a test guest: its init, and the server
// that does what the host asks over the control port.
//
// It runs twice. As process 1 it mounts the kernel's file systems, loads the
// modules and then only collects dead processes, whoever left them. The server
// is its one child; when it ends, process 1 turns the machine off.
//
// The root file system is in memory, so the control port keeps answering while
// the disks are frozen.
package main
