package blockdev

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Dir is a directory that holds layers. All its names are single path
// elements, resolved below the directory handle (os.Root), so that neither a
// symbolic link nor a ".." leads out of it.
type Dir struct {
	path   string // as QEMU names it
	prefix string // before path, where QEMU has another file system tree
	root   *os.Root
}

// OpenDir opens a directory. path is what QEMU calls it; prefix is "" or the
// "/proc/PID/root" through which a QEMU's other mount namespace is reached.
func OpenDir(path, prefix string) (*Dir, error) {
	root, err := os.OpenRoot(prefix + path)
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", path, err)
	}
	return &Dir{path: path, prefix: prefix, root: root}, nil
}

// Close releases the handle.
func (d *Dir) Close() error { return d.root.Close() }

// Path returns the full path of a name, as QEMU opens it.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

// Root returns the handle, for files that are not layers.
func (d *Dir) Root() *os.Root { return d.root }

// FileID says which file a name leads to: one of all that are there at a time. A
// block device is known by its number, with a Dev of 0, which no file has.
type FileID struct{ Dev, Ino uint64 }

// Info describes a layer's file.
type Info struct {
	FileID
	Links     uint64
	Size      int64
	Allocated uint64 // bytes on the file system
	Regular   bool
	Device    bool // a block device
}

// Stat describes a name without following a link.
func (d *Dir) Stat(name string) (Info, error) {
	fi, err := d.root.Lstat(name)
	if err != nil {
		return Info{}, err
	}
	return infoOf(fi), nil
}

func infoOf(fi fs.FileInfo) Info { return infoOfStat(fi.Sys().(*syscall.Stat_t)) }

func infoOfStat(st *syscall.Stat_t) Info {
	kind := st.Mode & syscall.S_IFMT
	if kind == syscall.S_IFBLK {
		return Info{FileID: FileID{0, st.Rdev}, Links: st.Nlink, Device: true}
	}
	return Info{
		FileID: FileID{st.Dev, st.Ino}, Links: st.Nlink, Size: st.Size,
		Allocated: uint64(st.Blocks) * 512, Regular: kind == syscall.S_IFREG,
	}
}

// StatPath describes the file that a path leads to, following links. All layers of
// a host are looked at for each list of its VMs, so it makes no garbage.
func StatPath(path string) (Info, error) {
	var st syscall.Stat_t
	for {
		switch err := syscall.Stat(path, &st); err {
		case nil:
			return infoOfStat(&st), nil
		case syscall.EINTR: // a network file system was interrupted
		default:
			return Info{}, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
	}
}

// CreateFile makes an empty file with the owner and mode of the layer that it
// will cover, so that the QEMU that opened that one can open this one. It
// fails with fs.ErrExist rather than touch an existing file.
func (d *Dir) CreateFile(name string, like string) error {
	fi, err := os.Stat(like)
	if err != nil {
		return fmt.Errorf("create overlay %s: %w", d.Path(name), err)
	}
	f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("create overlay %s: %w", d.Path(name), err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	err = errors.Join(f.Chown(int(st.Uid), int(st.Gid)), f.Chmod(fi.Mode().Perm()|0o600), f.Sync(), f.Close())
	if err != nil {
		return errors.Join(fmt.Errorf("create overlay %s: %w", d.Path(name), err), d.root.Remove(name))
	}
	return nil
}

// Remove deletes a name and is content when there is none.
func (d *Dir) Remove(name string) error {
	if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Sync makes the names in the directory durable.
func (d *Dir) Sync() error {
	f, err := d.root.Open(".")
	if err != nil {
		return fmt.Errorf("sync directory %s: %w", d.path, err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", d.path, err)
	}
	return nil
}

// SyncFile makes a file's content durable.
func (d *Dir) SyncFile(name string) error {
	f, err := d.root.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// openEmpty opens a file that CreateFile has made. What holds anything, as a link in
// its place may lead to, is another's.
func (d *Dir) openEmpty(name string) (*os.File, error) {
	f, err := d.root.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && (!fi.Mode().IsRegular() || fi.Size() > 0) {
		err = fmt.Errorf("%s is not the empty file that was made", d.Path(name))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Free returns the bytes that an unprivileged process can still write there.
func (d *Dir) Free() (uint64, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", d.path, err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// WriteFile writes a small file into a sub-directory that only root may read,
// made when it is not there: whoever opens the name gets all of the old content
// or all of the new one, also after a power cut.
func (d *Dir) WriteFile(sub, name string, data []byte) (err error) {
	if err := d.root.Mkdir(sub, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	dir, err := d.root.OpenRoot(sub)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	tmp := name + ".tmp"
	// What an earlier process has left, or somebody put there: opening a FIFO
	// would wait.
	if err := dir.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := dir.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", d.Path(filepath.Join(sub, name)), err), dir.Remove(tmp))
	}
	if err := dir.Rename(tmp, name); err != nil {
		return err
	}
	return (&Dir{path: d.Path(sub), root: dir}).Sync()
}

// ReadFile reads a file of a subdirectory that WriteFile has written, of at most
// limit bytes. What cannot be one, such as a link, a FIFO or a file that is larger,
// is as good as empty.
func (d *Dir) ReadFile(sub, name string, limit int64) (data []byte, err error) {
	path := filepath.Join(sub, name)
	if fi, err := d.root.Lstat(path); err != nil || !fi.Mode().IsRegular() {
		return nil, err
	}
	f, err := d.root.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() > limit {
		return nil, err // it was replaced meanwhile
	}
	data, err = io.ReadAll(io.LimitReader(f, limit+1))
	if int64(len(data)) > limit { // it grows
		return nil, err
	}
	return data, err
}

// ErrNoImmutable is returned where the file system has no immutable flag or
// the process may not set it.
var ErrNoImmutable = errors.New("the file system does not take the immutable flag")

// fsImmutable is FS_IMMUTABLE_FL (linux/fs.h): no open for writing, no rename,
// no link and no unlink, not even by root.
const fsImmutable = 0x10

// SetImmutable sets or lifts the immutable flag. Setting what is set is no
// error.
func (d *Dir) SetImmutable(name string, on bool) error {
	f, err := d.root.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return immutableError(d.Path(name), err)
	}
	want := flags &^ fsImmutable
	if on {
		want = flags | fsImmutable
	}
	if want == flags {
		return nil
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(want)); err != nil {
		return immutableError(d.Path(name), err)
	}
	return nil
}

// Immutable reports whether the flag is set.
func (d *Dir) Immutable(name string) (bool, error) {
	f, err := d.root.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return false, immutableError(d.Path(name), err)
	}
	return flags&fsImmutable != 0, nil
}

func immutableError(path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%s: %w: %w", path, ErrNoImmutable, err)
	default:
		return fmt.Errorf("%s: immutable flag: %w", path, err)
	}
}

// LayerName returns the permanent name of a layer: the stem of the launch
// path's name, an id, and the format as extension.
func LayerName(launch, id, format string) string {
	stem := strings.TrimSuffix(launch, filepath.Ext(launch))
	return stem + "." + id + "." + format
}
