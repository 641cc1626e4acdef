// Package e2e holds the tests of the built programs, vmsnapd and vmsnap, on
// real QEMU guests. Each test has a host of its own: a daemon with its own
// state directory and socket that manages the test's guests only, so that tests
// run side by side.
package e2e
