package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// measureFloors measures what a save cannot be faster than, on the guest that
// was just saved: QEMU with a target that takes everything at once, the disk
// without QEMU, and QEMU with a file and nobody beside it.
func (runs *memoryRuns) measureFloors(ctx context.Context, s *scene, plan memoryPlan, w spender) error {
	ctx, cancel := context.WithTimeout(ctx, saveDeadline)
	defer cancel()
	qmp, err := dialQMP(ctx, s.guest.ExtraQMPSockets()[0])
	if err != nil {
		return err
	}
	defer qmp.close()
	for range plan.floors {
		null, err := migrateToNull(ctx, qmp, true)
		if err != nil {
			return fmt.Errorf("save to the null device: %w", err)
		}
		reader, err := migrateToReader(ctx, qmp)
		if err != nil {
			return fmt.Errorf("save to a reader: %w", err)
		}
		before, err := w.spent()
		if err != nil {
			return err
		}
		path := filepath.Join(s.dir, "bare-memory")
		file, err := migrateToFile(ctx, qmp, path, int64(plan.memoryMiB)<<20)
		if err != nil {
			return fmt.Errorf("save to a file: %w", err)
		}
		after, err := w.spent()
		if err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
		runs.fileCPU = append(runs.fileCPU, after.qemu-before.qemu)
		disk, err := diskRate(s.dir, null.bytes)
		if err != nil {
			return err
		}
		runs.null, runs.reader = append(runs.null, null), append(runs.reader, reader)
		runs.file, runs.disk = append(runs.file, file), append(runs.disk, disk)
	}
	if runs.rate > 0 {
		return nil // a plain migration need not come to an end
	}
	for range plan.floors {
		plain, err := migrateToNull(ctx, qmp, false)
		if err != nil {
			return fmt.Errorf("migrate to the null device: %w", err)
		}
		runs.plain = append(runs.plain, plain)
	}
	return nil
}

// migrateToNull has QEMU write the guest's memory to the null device, with write
// tracking as vmsnapd has it, or as a migration, after which the guest is let
// run again.
func migrateToNull(ctx context.Context, qmp *wire, tracked bool) (_ rate, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return rate{}, err
	}
	defer func() { _ = null.Close() }()
	r, err := migrate(ctx, qmp, null, tracked)
	if err == nil && !tracked {
		err = qmp.call("cont", object{}, nil)
	}
	return r, err
}

// readerBuffer is as much as the kernel lets anybody have in a pipe.
const readerBuffer = 1 << 20

// migrateToReader has QEMU save the guest's memory, tracking writes, to somebody
// who reads it and throws it away.
func migrateToReader(ctx context.Context, qmp *wire) (rate, error) {
	from, to, err := os.Pipe()
	if err != nil {
		return rate{}, err
	}
	defer func() { _, _ = from.Close(), to.Close() }()
	if _, err := unix.FcntlInt(from.Fd(), unix.F_SETPIPE_SZ, readerBuffer); err != nil {
		return rate{}, fmt.Errorf("enlarge a pipe: %w", err)
	}
	end := make(chan error, 1)
	go func() {
		buf := make([]byte, readerBuffer)
		for {
			if _, err := from.Read(buf); err != nil {
				end <- err
				return
			}
		}
	}()
	r, err := migrate(ctx, qmp, to, true)
	if err != nil {
		return rate{}, err
	}
	if err := to.Close(); err != nil {
		return rate{}, err
	}
	if err := <-end; !errors.Is(err, io.EOF) {
		return rate{}, err
	}
	return r, nil
}

// migrateToFile has QEMU save the guest's memory into a file with its space set
// aside, as vmsnapd has it, and makes that durable.
func migrateToFile(ctx context.Context, qmp *wire, path string, reserve int64) (_ rate, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return rate{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// A guest must never be left with a save that fails for want of space.
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, reserve+reserve/64); err != nil {
		return rate{}, err
	}
	began := time.Now()
	r, err := migrate(ctx, qmp, f, true)
	if err == nil {
		err = f.Sync()
	}
	return rate{r.bytes, time.Since(began)}, err
}

// migrate has QEMU write the guest's memory to a file.
func migrate(ctx context.Context, qmp *wire, target *os.File, tracked bool) (_ rate, err error) {
	if err := qmp.sendFile(target, encode("getfd", object{"fdname": "target"})); err != nil {
		return rate{}, err
	}
	if err := setTracking(qmp, tracked); err != nil {
		return rate{}, err
	}
	defer func() { err = errors.Join(err, setTracking(qmp, false)) }()
	if err := qmp.call("migrate-set-parameters", object{"max-bandwidth": 0}, nil); err != nil {
		return rate{}, err
	}
	began := time.Now()
	if err := qmp.call("migrate", object{"uri": "fd:target"}, nil); err != nil {
		return rate{}, err
	}
	return awaitMigration(ctx, qmp, began)
}

func setTracking(qmp *wire, on bool) error {
	return qmp.call("migrate-set-capabilities", object{"capabilities": []object{{"capability": "background-snapshot", "state": on}}}, nil)
}

// migrationInterval is the time between two looks at a migration: little beside
// the second that it takes.
const migrationInterval = 20 * time.Millisecond

func awaitMigration(ctx context.Context, qmp *wire, began time.Time) (rate, error) {
	for {
		var m struct {
			Status string `json:"status"`
			RAM    struct {
				Transferred int64 `json:"transferred"`
			} `json:"ram"`
		}
		if err := qmp.call("query-migrate", object{}, &m); err != nil {
			return rate{}, err
		}
		switch m.Status {
		case "completed":
			return rate{m.RAM.Transferred, time.Since(began)}, awaitCleanup(ctx, qmp)
		case "failed", "cancelled":
			return rate{}, fmt.Errorf("the migration is %s", m.Status)
		}
		select {
		case <-time.After(migrationInterval):
		case <-ctx.Done():
			return rate{}, ctx.Err()
		}
	}
}

// yankInstance is what can be told to give up its connection (qapi/yank.json).
type yankInstance struct {
	Type string `json:"type"`
}

// awaitCleanup waits until a migration that is complete has left nothing behind:
// before that QEMU refuses the next one ("duplicate yank instance").
func awaitCleanup(ctx context.Context, qmp *wire) error {
	for {
		var instances []yankInstance
		if err := qmp.call("query-yank", object{}, &instances); err != nil {
			return err
		}
		if !slices.Contains(instances, yankInstance{"migration"}) {
			return nil
		}
		select {
		case <-time.After(migrationInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sendFile sends a command together with a file (SCM_RIGHTS).
func (w *wire) sendFile(f *os.File, line []byte) error {
	conn, ok := w.conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("no file can be sent to %s", w.conn.RemoteAddr())
	}
	if _, _, err := conn.WriteMsgUnix(line, unix.UnixRights(int(f.Fd())), nil); err != nil {
		return err
	}
	_, err := w.reply()
	return err
}

// diskRate writes a file of so many bytes, in order, and returns how fast it was
// durable: the better of what `dd conv=fsync` and `dd oflag=direct conv=fsync`
// do.
func diskRate(dir string, bytes int64) (rate, error) {
	best := rate{bytes, time.Duration(1<<63 - 1)}
	for _, flag := range []int{0, unix.O_DIRECT} {
		took, err := writeFile(filepath.Join(dir, "disk-rate"), bytes, flag)
		if err != nil {
			return rate{}, fmt.Errorf("measure what the disk takes: %w", err)
		}
		best.took = min(best.took, took)
	}
	return best, nil
}

// diskBlock is what is written at a time.
const diskBlock = 1 << 20

func writeFile(path string, bytes int64, flag int) (_ time.Duration, err error) {
	block, err := unix.Mmap(-1, 0, diskBlock, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(block)) }()
	for i := range block {
		block[i] = byte(i * 7)
	}
	began := time.Now()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|flag, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	for at := int64(0); at < bytes; at += diskBlock {
		if _, err := f.Write(block); err != nil {
			return 0, err
		}
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	return time.Since(began), nil
}
