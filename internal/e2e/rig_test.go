package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// rig is a file system on a disk whose writes and flushes are on record, in
// order, so that it can be put together again as a power cut would leave it.
type rig struct {
	t       *testing.T
	dir     string // where it keeps its images
	mounted string // where the file system is mounted; "" when it is not
	daemon  *exec.Cmd
}

const rigSize = 96 << 20

// newRig mounts an empty file system on a directory.
func newRig(t *testing.T, q testvm.QEMU, on string) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir()}
	for name, size := range map[string]int64{"disk": rigSize, "log": 0, "recorded": 0} {
		if err := errors.Join(os.WriteFile(r.path(name), nil, 0o600), os.Truncate(r.path(name), size)); err != nil {
			t.Fatal(err)
		}
	}
	r.daemon = exec.Command(q.Tool("qemu-storage-daemon"),
		"--blockdev", "driver=file,node-name=disk,cache.no-flush=on,filename="+r.path("disk"),
		"--blockdev", "driver=file,node-name=log,cache.no-flush=on,filename="+r.path("log"),
		"--blockdev", "driver=blklogwrites,node-name=recorded,file=disk,log=log,log-sector-size=512",
		"--export", "type=fuse,id=export,node-name=recorded,writable=on,mountpoint="+r.path("recorded"),
		"--pidfile", r.path("pid"))
	if err := r.daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.unmount()
		_ = r.daemon.Process.Kill()
		_ = r.daemon.Wait()
		_ = exec.Command("umount", "--lazy", r.path("recorded")).Run() // when it was killed
	})
	awaitFile(t, r.path("pid"))
	// The kernel is not to zero inode tables later: QEMU puts a "write zeroes" on
	// record in two steps, and what is written meanwhile lands in between.
	sh(t, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", r.path("recorded"))
	r.mount("recorded", on)
	return r
}

// awaitFile waits until a program has written a file that it tells by.
func awaitFile(t *testing.T, path string) {
	t.Helper()
	h := &host{t: t}
	h.eventually(eventLimit, path+" is there", func() error {
		fi, err := os.Stat(path)
		if err == nil && fi.Size() == 0 {
			err = errors.New("empty")
		}
		return err
	})
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) mount(image, on string) {
	r.t.Helper()
	sh(r.t, "mount", "-o", "loop", r.path(image), on)
	r.mounted = on
}

func (r *rig) unmount() {
	r.t.Helper()
	if r.mounted != "" {
		sh(r.t, "umount", r.mounted)
		r.mounted = ""
	}
}

// position is how far the record goes: what was acknowledged before is in it.
func (r *rig) position() int64 {
	r.t.Helper()
	fi, err := os.Stat(r.path("log"))
	if err != nil {
		r.t.Fatal(err)
	}
	return fi.Size()
}

// diskWrite is an entry of the record (block/blklogwrites.c; the format is that
// of dm-log-writes).
type diskWrite struct {
	end   int64 // of the entry in the record
	at    int64 // on the disk
	flags uint64
	data  []byte
}

const (
	logSector  = 512
	logFlush   = 1
	logFUA     = 2
	logDiscard = 4
)

// record reads all entries.
func (r *rig) record() (entries []diskWrite) {
	r.t.Helper()
	log, err := os.ReadFile(r.path("log"))
	if err != nil || len(log) < logSector {
		r.t.Fatalf("a record of %d bytes: %v", len(log), err)
	}
	le := binary.LittleEndian
	for n, at := le.Uint64(log[16:]), int64(logSector); n > 0; n-- {
		if at+logSector > int64(len(log)) {
			r.t.Fatalf("the record ends %d entries too early", n)
		}
		head := log[at:]
		e := diskWrite{at: int64(le.Uint64(head)) * logSector, flags: le.Uint64(head[16:])}
		size := int64(le.Uint64(head[8:])) * logSector
		if size == 0 && e.flags == 0 {
			r.t.Fatalf("the record is torn: its entry %d, at %d, is empty", len(entries), at)
		}
		at += logSector
		if e.flags&logDiscard == 0 {
			if at+size > int64(len(log)) {
				r.t.Fatalf("the record ends %d entries too early", n)
			}
			e.data = log[at : at+size]
			at += size
		}
		e.end = at
		entries = append(entries, e)
	}
	return entries
}

// cutter puts the disk together at ever later moments.
type cutter struct {
	*rig
	entries []diskWrite
	next    int         // the first entry that is not looked at
	pending []diskWrite // that nothing has flushed
	stable  *os.File
}

func (r *rig) cutter() *cutter {
	r.t.Helper()
	f, err := os.Create(r.path("stable"))
	if err == nil {
		err = f.Truncate(rigSize)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = f.Close() })
	return &cutter{rig: r, entries: r.record(), stable: f}
}

// cut makes the image "cut": the disk when the power went at an entry. What was
// flushed is there; of the rest nothing, all, or any part, down to a sector.
func (c *cutter) cut(at int, random *rand.Rand) {
	c.t.Helper()
	for ; c.next <= at; c.next++ {
		e := c.entries[c.next]
		if e.flags&logFUA != 0 {
			c.put(c.stable, e.data, e.at)
		} else if len(e.data) > 0 {
			c.pending = append(c.pending, e)
		}
		if e.flags&logFlush != 0 {
			for _, w := range c.pending {
				c.put(c.stable, w.data, w.at)
			}
			c.pending = nil
		}
	}
	sh(c.t, "cp", "--sparse=always", c.path("stable"), c.path("cut"))
	image, err := os.OpenFile(c.path("cut"), os.O_WRONLY, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = image.Close() }()
	much := random.IntN(3) // of two
	for _, w := range c.pending {
		if random.IntN(2) >= much {
			continue
		}
		if random.IntN(4) == 0 {
			w.data = w.data[:random.IntN(len(w.data)/logSector+1)*logSector]
		}
		c.put(image, w.data, w.at)
	}
}

func (c *cutter) put(f io.WriterAt, data []byte, at int64) {
	c.t.Helper()
	if _, err := f.WriteAt(data, at); err != nil {
		c.t.Fatal(fmt.Errorf("write at %d: %w", at, err))
	}
}
