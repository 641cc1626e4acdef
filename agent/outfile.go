package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// The journal entries of a new file at a place that the caller has chosen.
const (
	entryOut      = "out"      // it is about to be made, under its partial name
	entryComplete = "complete" // it is whole, and about to get its name
)

// outFile is a new file at a place that a caller has chosen. It has a partial
// name beside until it is whole, and is its owner's from the beginning. It is
// what the journal keeps of it.
type outFile struct {
	Dir, Name, Partial string
	Caller             Caller
	UID, GID           uint32 // its owner
	Mode               uint32
	ID                 blockdev.FileID // once it is made

	root *os.Root
	file *os.File
}

// planOut looks at the place of a new file, which must not be there yet.
func planOut(path, operation string, c Caller) (*outFile, error) {
	if err := checkPlace(path); err != nil {
		return nil, err
	}
	f := &outFile{Dir: filepath.Dir(path), Name: filepath.Base(path), Caller: c, UID: c.UID, GID: c.GID, Mode: 0o600}
	f.Partial = f.Name + ".partial-" + operation
	if len(f.Partial) > unix.NAME_MAX {
		return nil, fault.New(fault.Usage, "the name %s is too long", f.Name)
	}
	var err error
	if f.root, err = c.openPlace(f.Dir); err != nil {
		return nil, err
	}
	_, err = f.root.Lstat(f.Name)
	if err == nil {
		err = f.taken()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

func (f *outFile) path() string { return filepath.Join(f.Dir, f.Name) }

func (f *outFile) taken() error {
	return fault.New(fault.Exists, "%s is there already", f.path()).WithHint("choose another name, or remove it")
}

// ownedLike makes the file one for the owner of another: the QEMU that opens
// that one can open this one.
func (f *outFile) ownedLike(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("owner of %s: %w", path, err)
	}
	f.UID, f.GID, f.Mode = st.Uid, st.Gid, st.Mode&0o777|0o600
	return nil
}

// create makes the empty file under its partial name. The caller has journalled
// it.
func (f *outFile) create() error {
	file, err := f.root.OpenFile(f.Partial, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("make %s: %w", filepath.Join(f.Dir, f.Partial), err)
	}
	f.file = file
	var st unix.Stat_t
	err = errors.Join(file.Chown(int(f.UID), int(f.GID)), file.Chmod(fs.FileMode(f.Mode)), unix.Fstat(int(file.Fd()), &st))
	if err != nil {
		return fmt.Errorf("give %s to uid %d: %w", filepath.Join(f.Dir, f.Partial), f.UID, err)
	}
	f.ID = blockdev.FileID{Dev: st.Dev, Ino: st.Ino}
	return nil
}

// discard removes the file, whichever of its two names it has by now. What has one
// of these names and is another file is left alone.
func (f *outFile) discard() error {
	if f.root == nil {
		root, err := f.Caller.openPlace(f.Dir)
		if fault.Of(err) == fault.NotFound {
			return nil // it went with its directory
		}
		if err != nil {
			return err
		}
		defer func() { _ = root.Close() }()
		f.root = root
		defer func() { f.root = nil }()
	}
	if f.ID != (blockdev.FileID{}) && f.isAt(f.Name) {
		if err := f.root.Remove(f.Name); err != nil {
			return err
		}
	}
	fi, err := f.root.Lstat(f.Partial)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || f.ID != (blockdev.FileID{}) && !f.isAt(f.Partial) {
		return fault.New(fault.Failed, "%s is not the file that was made; it is left alone", filepath.Join(f.Dir, f.Partial))
	}
	return f.root.Remove(f.Partial)
}

// isAt reports whether a name is that of the file.
func (f *outFile) isAt(name string) bool {
	fi, err := f.root.Lstat(name)
	if err != nil {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && fi.Mode().IsRegular() && f.ID == blockdev.FileID{Dev: st.Dev, Ino: st.Ino}
}

// publish gives the file, which is whole and durable, its name. It can be done
// again.
func (f *outFile) publish() error {
	if f.isAt(f.Name) { // an earlier attempt came so far
		if f.isAt(f.Partial) {
			if err := f.root.Remove(f.Partial); err != nil {
				return err
			}
		}
		return f.syncDir()
	}
	if !f.isAt(f.Partial) {
		return fault.New(fault.Failed, "%s is not the file any more that was made", filepath.Join(f.Dir, f.Partial))
	}
	if err := f.rename(); err != nil {
		return err
	}
	if !f.isAt(f.Name) {
		return fault.New(fault.Failed, "%s is not the file that was made: somebody else works in %s", f.path(), f.Dir)
	}
	return f.syncDir()
}

// rename gives the file its name unless somebody has it.
func (f *outFile) rename() error {
	dir, err := f.root.Open(".")
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	fd := int(dir.Fd())
	err = unix.Renameat2(fd, f.Partial, fd, f.Name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // NFS, for one
		if err = f.root.Link(f.Partial, f.Name); err == nil {
			err = f.root.Remove(f.Partial)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return f.taken()
	}
	if err != nil {
		return fmt.Errorf("name %s: %w", f.path(), err)
	}
	return nil
}

// free returns the bytes that can still be written beside the file.
func (f *outFile) free() (uint64, error) {
	dir, err := f.root.Open(".")
	if err != nil {
		return 0, err
	}
	defer func() { _ = dir.Close() }()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", f.Dir, err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

func (f *outFile) syncDir() error {
	dir, err := f.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// close lets go of what is open.
func (f *outFile) close() error {
	var errs []error
	if f.file != nil {
		errs = append(errs, f.file.Close())
	}
	if f.root != nil {
		errs = append(errs, f.root.Close())
	}
	f.file, f.root = nil, nil
	return errors.Join(errs...)
}

// begin journals the file and makes it, to be removed if the operation fails.
func (f *outFile) begin(ctx context.Context, o *op.Op) error {
	if err := o.Journal(ctx, entryOut, f); err != nil {
		return err
	}
	if err := f.create(); err != nil {
		if f.file == nil {
			return err // nothing was made
		}
		return errors.Join(err, f.discard())
	}
	o.Revert("remove "+filepath.Join(f.Dir, f.Partial), func(context.Context) error { return f.discard() })
	return nil
}

// recoverOut brings the new files of an operation to their end whose agent is
// gone: those that were all whole get their names, else all are removed.
func (a *Agent) recoverOut(o *op.Op, entries []op.Entry) (whole bool, err error) {
	var made, complete []*outFile
	for _, e := range entries {
		if e.Kind != entryOut && e.Kind != entryComplete {
			continue
		}
		f := &outFile{}
		if err := json.Unmarshal(e.Data, f); err != nil {
			return false, err
		}
		if e.Kind == entryOut {
			made = append(made, f)
		} else {
			complete = append(complete, f)
		}
	}
	if len(complete) == 0 || len(complete) < len(made) {
		var errs []error
		for _, f := range made {
			errs = append(errs, f.discard())
		}
		return false, a.leftBehind(o, errors.Join(errs...))
	}
	for _, f := range complete {
		if f.root, err = f.Caller.openPlace(f.Dir); err == nil {
			err = errors.Join(f.publish(), f.close())
		}
		if err != nil {
			break
		}
	}
	if err == nil {
		return true, nil
	}
	errs := []error{}
	for _, f := range complete {
		errs = append(errs, f.discard())
	}
	return false, errors.Join(err, a.leftBehind(o, errors.Join(errs...)))
}

// leftBehind tells of files that could not be removed. They stand under names
// that say what they are, in a directory of the caller's.
func (a *Agent) leftBehind(o *op.Op, err error) error {
	if err != nil {
		o.Warn(op.Warning{Code: warnLeftBehind, Message: "a partial file may be left: " + err.Error()})
	}
	return nil
}
