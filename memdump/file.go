package memdump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// File is a memory file that is being written. QEMU writes the stream straight
// into it: there is nothing in between that could hold QEMU up.
//
// Follow and Finish exclude each other. Close and Discard come last; Target and
// Written may be called at any time before them.
type File struct {
	dir    *os.Root
	name   string
	record record

	file   *os.File // ours: read, written back, finished
	target *os.File // QEMU's: write-only, with the offset it writes at

	turn     chan struct{} // holds a token while nobody follows or finishes
	follower *follower
}

// Create makes a memory file that does not exist yet, for a stream of at most
// reserve bytes, whose space is reserved unless reserve is 0. A stream that
// turns out longer takes free space like any file. The header is
// durable, and says that the stream is incomplete. name is a single path
// element.
//
// A file system that is too small is a [*SpaceError], one that cannot reserve
// is [ErrNoReserve]. After an error nothing is left behind.
func Create(dir *os.Root, name string, h Header, reserve uint64) (_ *File, err error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	block, err := record{Header: h}.encode()
	if err != nil {
		return nil, fmt.Errorf("memory file %s: %w", name, err)
	}
	file, err := dir.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create memory file %s: %w", name, err)
	}
	f := newFile(dir, name, record{Header: h}, file)
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Discard())
		}
	}()
	if err := file.Chmod(0o600); err != nil { // whatever the umask is
		return nil, fmt.Errorf("create memory file %s: %w", name, err)
	}
	if err := reserveSpace(file, name, reserve); err != nil {
		return nil, err
	}
	if _, err := file.WriteAt(block, 0); err != nil {
		return nil, spaceError(file, name, HeaderSize, fmt.Errorf("write header of memory file %s: %w", name, err))
	}
	if err := errors.Join(file.Sync(), syncDir(dir)); err != nil {
		return nil, fmt.Errorf("sync memory file %s: %w", name, err)
	}
	if f.target, err = openTarget(dir, name, file); err != nil {
		return nil, err
	}
	return f, nil
}

// Reopen opens a memory file that is incomplete, as after the death of the
// process that created it: QEMU may be writing to it still, and it can be
// followed, finished and discarded. It has no Target.
func Reopen(dir *os.Root, name string) (*File, error) {
	file, err := openRegular(dir, name, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	r, err := readRecord(file)
	if err == nil && r.Sum != nil {
		err = errors.New("the save that wrote this memory has finished")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("memory file %s: %w", name, err), file.Close())
	}
	return newFile(dir, name, r, file), nil
}

func newFile(dir *os.Root, name string, r record, file *os.File) *File {
	f := &File{
		dir: dir, name: name, record: r, file: file,
		turn: make(chan struct{}, 1), follower: newFollower(file),
	}
	f.turn <- struct{}{}
	return f
}

// Header returns what the file says about itself.
func (f *File) Header() Header { return f.record.Header }

// Target returns the file that QEMU is given, write-only and positioned at the
// stream's first byte. A descriptor that is passed on shares this position.
func (f *File) Target() *os.File { return f.target }

// Written returns how many bytes of the stream QEMU has written so far. It is
// the file's own size, since space is reserved without changing it; so it can
// be told without QEMU's descriptor.
func (f *File) Written() (uint64, error) {
	size, err := sizeOf(f.file)
	if err != nil {
		return 0, fmt.Errorf("memory file %s: %w", f.name, err)
	}
	return uint64(max(size-HeaderSize, 0)), nil
}

// Close lets go of the file and leaves it as it is. Closing twice is harmless.
func (f *File) Close() error {
	err := f.file.Close()
	if f.target != nil {
		err = errors.Join(err, f.target.Close())
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close memory file %s: %w", f.name, err)
	}
	return nil
}

// Discard closes the file and removes it, durably. Its space is free once QEMU
// has closed its descriptor too.
func (f *File) Discard() error { return errors.Join(f.Close(), Remove(f.dir, f.name)) }

// Remove removes a memory file and what an interrupted [Compress] or [Encrypt] of
// it left, durably. What was to be encrypted and is not is overwritten before;
// [ErrNotOverwritten] says that it is gone, but was not. It does not mind if there
// is none.
func Remove(dir *os.Root, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	exposed := destroy(dir, plainName(name))
	if isSecret(dir, name) {
		exposed = errors.Join(exposed, destroy(dir, name))
	}
	for _, n := range []string{name, compressName(name), encryptName(name), plainName(name)} {
		if err := dir.Remove(n); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove memory file %s: %w", name, err)
		}
	}
	if err := syncDir(dir); err != nil {
		return fmt.Errorf("remove memory file %s: %w", name, err)
	}
	return exposed
}

// Finish makes the file complete once QEMU has written all of the stream: it
// hashes and writes back what Follow has not, gives back the space reserved
// beyond the end, and records length and checksum, each step durable before the
// next. Then the file is closed. After an error it is still open and
// incomplete: Discard it.
func (f *File) Finish(ctx context.Context) (Sum, error) {
	if err := f.take(); err != nil {
		return Sum{}, err
	}
	defer f.give()
	sum, err := f.finish(ctx)
	if err != nil {
		return Sum{}, fmt.Errorf("finish memory file %s: %w", f.name, err)
	}
	return sum, f.Close()
}

func (f *File) finish(ctx context.Context) (Sum, error) {
	if err := f.follower.rest(ctx); err != nil {
		return Sum{}, err
	}
	if err := giveBack(f.file, f.follower.digested()); err != nil {
		return Sum{}, err
	}
	// The data first: a header that says "complete" must never be durable
	// before them.
	if err := unix.Fdatasync(int(f.file.Fd())); err != nil {
		return Sum{}, fmt.Errorf("sync: %w", err)
	}
	drop(f.file, 0, 0)
	length, check := uint64(f.follower.digested()-HeaderSize), f.follower.digest.String()
	sum := Sum{Length: length, Checksum: check, Stored: length, StoredChecksum: check}
	r := f.record
	r.Sum = &sum
	if err := writeRecord(f.file, r); err != nil {
		return Sum{}, err
	}
	return sum, syncDir(f.dir)
}

// take takes the turn to follow or finish.
func (f *File) take() error {
	select {
	case <-f.turn:
		return nil
	default:
		return fmt.Errorf("memory file %s: %w", f.name, ErrFileBusy)
	}
}

func (f *File) give() { f.turn <- struct{}{} }

// writeRecord replaces the header's block, durably.
func writeRecord(file *os.File, r record) error {
	block, err := r.encode()
	if err != nil {
		return err
	}
	if _, err := file.WriteAt(block, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	if err := file.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

func readRecord(file *os.File) (record, error) {
	block := make([]byte, HeaderSize)
	switch n, err := file.ReadAt(block, 0); {
	case errors.Is(err, io.EOF) && n >= len(headerMagic) && string(block[:len(headerMagic)]) == headerMagic:
		return record{}, ErrTruncated
	case err != nil && !errors.Is(err, io.EOF):
		return record{}, err
	}
	return parseHeader(block)
}

// openTarget opens the file again for QEMU, with no right to read it and an
// offset of its own. It must be the same file still.
func openTarget(dir *os.Root, name string, file *os.File) (*os.File, error) {
	target, err := dir.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open memory file for QEMU: %w", err)
	}
	if err := sameFile(file, target); err != nil {
		return nil, errors.Join(fmt.Errorf("memory file %s: %w", name, err), target.Close())
	}
	if _, err := target.Seek(HeaderSize, io.SeekStart); err != nil {
		return nil, errors.Join(fmt.Errorf("memory file %s: %w", name, err), target.Close())
	}
	return target, nil
}

// openRegular opens a file that is itself what the name names: no link, no
// device, nothing that could block.
func openRegular(dir *os.Root, name string, flag int) (*os.File, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	before, err := dir.Lstat(name)
	if err != nil {
		return nil, fmt.Errorf("memory file: %w", err)
	}
	if !before.Mode().IsRegular() {
		return nil, fmt.Errorf("memory file %s is no regular file but %s: %w", name, before.Mode().Type(), ErrNotMemory)
	}
	file, err := dir.OpenFile(name, flag|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("memory file: %w", err)
	}
	after, err := file.Stat()
	if err == nil && !os.SameFile(before, after) {
		err = errors.New("it was replaced while it was opened")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("memory file %s: %w", name, err), file.Close())
	}
	return file, nil
}

func sameFile(a, b *os.File) error {
	as, err := a.Stat()
	if err != nil {
		return err
	}
	bs, err := b.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(as, bs) {
		return errors.New("it was replaced")
	}
	return nil
}

// checkName refuses names that are more than one path element: what is synced
// is the directory itself.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || filepath.Base(name) != name {
		return fmt.Errorf("memory file %q: not a name within its directory", name)
	}
	return nil
}

func syncDir(dir *os.Root) error {
	d, err := dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func sizeOf(file *os.File) (int64, error) {
	fi, err := file.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}
