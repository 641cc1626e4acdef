// Package testvm runs real QEMU guests for tests, benchmarks and the demo.
//
// A guest boots Debian's cloud kernel and a small user space of our own, with
// the real qemu-ga, under TCG in about three seconds. What it needs is fetched
// and built by `make deps`. Each disk with a file system is mounted in the guest
// at /mnt/NAME. The host speaks to the guest over virtio-serial ports of
// testvm's own, so the monitor and the guest agent's socket are left to what is
// being tested, and the guest answers while its disks are frozen.
//
// In a test:
//
//	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
//		g := testvm.Start(t, testvm.Config{QEMU: q})
//		...
//	})
//
// Start ends the guest with the test and fails the test if a QEMU was left
// behind. Guests take cores and memory, so tests take turns, across all test
// binaries that share a cache directory (ForEachQEMU, Start).
//
// No QEMU that this package starts outlives its process, however that ends.
// Methods of Guest and Writers may be called from any goroutine, except that
// Kill, Restart and Shutdown are for one at a time.
//
// It imports nothing else of this module, so that it can judge all of it.
package testvm
