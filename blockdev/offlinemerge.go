package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// Offline is a merge that qemu-img does while no QEMU has the images open.
//
// Locks are the image locks (LockNoWriters) that the caller holds on all files
// that are written or read, from before it looked at them until the launch path
// and the catalog are right again: a VM that starts meanwhile fails. qemu-img is
// told to take none on what it writes, keeps these for as long as it lives, and
// is killed when this process dies.
type Offline struct {
	Locks    []*Lock
	Cache    string                   // "none" to go past the page cache; empty is "writeback"
	Rate     uint64                   // bytes a second at most that are written (qemu-img 5.2); 0 is without a limit
	Progress func(done, total uint64) // in ten-thousandths; may be nil
	// Rests reports whether qemu-img is to stand still, and returns a channel that is
	// closed when that may have changed. It may be nil.
	Rests func() (rests bool, changed <-chan struct{})
}

// ErrNotLocked means that an offline merge was asked for without locks.
var ErrNotLocked = errors.New("the images are not locked")

// Commit copies what a qcow2 layer holds into the layer that it lies on, durably.
// The top stays as it is, header included. So when it is interrupted, by ctx or
// by a crash, the chain reads as before, and Commit can be done again; the base
// by itself is no restore point any more from the beginning.
func (o Offline) Commit(ctx context.Context, top, base, baseFormat string) error {
	below, err := imageOptions("backing.", base, baseFormat)
	if err != nil {
		return err
	}
	above, err := imageOptions("", top, "qcow2")
	if err != nil {
		return err
	}
	args := append([]string{"commit", "-p", "-d"}, o.cache()...)
	if o.Rate > 0 {
		args = append(args, "-r", strconv.FormatUint(o.Rate, 10))
	}
	if err := o.run(ctx, append(args, "--image-opts", above+","+below)...); err != nil {
		return err
	}
	return syncFile(ctx, base)
}

// Rebase makes a qcow2 layer lie on another one below, durably, and copies into
// it what it needs of the layers between: empty for none, when it takes all. The
// header changes last, so when it is interrupted the layer reads as before, with
// more data of its own, and Rebase can be done again. No other file is written to.
func (o Offline) Rebase(ctx context.Context, layer, backing, backingFormat string) error {
	written, err := imageOptions("", layer, "qcow2")
	if err != nil {
		return err
	}
	args := append([]string{"rebase", "-p"}, o.cache()...)
	if o.Rate > 0 { // which rebase has no option for
		args = append(args, "--object", fmt.Sprintf("throttle-group,id=rate,limits.bps-write=%d", o.Rate))
		written = strings.ReplaceAll(written, "file.", "file.file.") + ",file.driver=throttle,file.throttle-group=rate"
	}
	args = append(args, "-b", backing)
	if backing != "" {
		args = append(args, "-F", backingFormat)
	}
	if err := o.run(ctx, append(args, "--image-opts", written)...); err != nil {
		return err
	}
	return syncFile(ctx, layer)
}

func (o Offline) cache() []string {
	if o.Cache == "" {
		return nil
	}
	return []string{"-t", o.Cache}
}

// imageOptions describes an image to qemu-img, without locks.
func imageOptions(prefix, path, format string) (string, error) {
	info, err := StatPath(path)
	if err != nil {
		return "", err
	}
	driver := "file"
	if info.Device {
		driver = "host_device"
	}
	return fmt.Sprintf("%[1]sdriver=%[2]s,%[1]sfile.driver=%[3]s,%[1]sfile.locking=off,%[1]sfile.filename=%[4]s",
		prefix, format, driver, strings.ReplaceAll(path, ",", ",,")), nil
}

// run runs qemu-img with the locks.
func (o Offline) run(ctx context.Context, args ...string) error {
	if len(o.Locks) == 0 {
		return ErrNotLocked
	}
	files := make([]*os.File, len(o.Locks))
	for i, l := range o.Locks {
		files[i] = l.f
	}
	return runWith(ctx, files, o.Progress, o.Rests, args...)
}

// runWith runs qemu-img with files that it has open from the descriptor 3 on. It
// is killed when this process dies, and stands still while rests says so.
func runWith(ctx context.Context, files []*os.File, progress func(done, total uint64), rests func() (bool, <-chan struct{}), args ...string) error {
	// The kernel kills the child when the thread ends that has started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := imgCommand(ctx, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.ExtraFiles = files
	return runCommand(ctx, cmd, progress, rests)
}

// syncFile makes a file's content durable.
func syncFile(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(syncWithin(ctx, f), f.Close())
}
