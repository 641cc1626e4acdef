package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// LinkSuffix marks the link that PointAt renames. One that a crash left behind
// is only another name of the layer and is replaced by the next PointAt.
const LinkSuffix = ".vmsnap-link"

// PointAt makes launch lead to a layer, in one atomic step: whoever opens launch
// gets the layer it led to before or the new one. Beside the layer it becomes
// one more name of it, a hard link; in another directory, or where there are no
// hard links, a symbolic link to its path. It is durable after Sync.
func (d *Dir) PointAt(launch string, in *Dir, layer string) error {
	if err := d.pointAt(launch, in, layer); err != nil {
		return fmt.Errorf("point %s at %s: %w", d.Path(launch), in.Path(layer), err)
	}
	return nil
}

func (d *Dir) pointAt(launch string, in *Dir, layer string) error {
	want, err := in.Stat(layer)
	if err != nil {
		return err
	}
	if !want.Regular {
		return errors.New("it is no file")
	}
	if got, err := d.Lead(launch); err == nil && got.FileID == want.FileID {
		return nil // rename between two names of one file would do nothing and keep both
	}
	tmp := launch + LinkSuffix
	if err := d.Remove(tmp); err != nil {
		return err
	}
	err = errElsewhere
	if in.path == d.path {
		err = d.root.Link(layer, tmp)
	}
	if noHardLinks(err) {
		err = d.root.Symlink(in.Path(layer), tmp)
	}
	if err != nil {
		return err
	}
	if err := d.root.Rename(tmp, launch); err != nil {
		return errors.Join(err, d.Remove(tmp))
	}
	return nil
}

// errElsewhere is what the kernel says of hard links between file systems. Those
// between two directories of one would work until one of them is moved.
var errElsewhere error = syscall.EXDEV

// noHardLinks reports whether a file cannot get another name there.
func noHardLinks(err error) bool {
	for _, e := range []error{syscall.EXDEV, syscall.EMLINK, syscall.EPERM, syscall.EOPNOTSUPP, syscall.ENOSYS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Lead describes the file that a launch path leads to: its own, or the one that
// its symbolic link names.
func (d *Dir) Lead(launch string) (Info, error) {
	fi, err := d.root.Lstat(launch)
	if err != nil {
		return Info{}, err
	}
	if fi.Mode()&os.ModeSymlink == 0 {
		return infoOf(fi), nil
	}
	to, err := d.root.Readlink(launch)
	if err != nil {
		return Info{}, err
	}
	if !filepath.IsAbs(to) {
		to = d.Path(to)
	}
	return StatPath(d.prefix + to)
}

// Name gives the file at a launch path a permanent name beside it; both lead to
// it then. Where the file cannot get a second hard link the two change places in
// one atomic step: the file has the permanent name, and the launch path is a
// symbolic link to it. It fails with fs.ErrExist when the name is taken.
func (d *Dir) Name(launch, name string) error {
	err := d.root.Link(launch, name)
	if !noHardLinks(err) {
		return err
	}
	if err := d.root.Symlink(d.Path(name), name); err != nil {
		return err
	}
	if swap := d.exchange(launch, name); swap != nil {
		return errors.Join(err, swap, d.Remove(name))
	}
	return nil
}

func (d *Dir) exchange(a, b string) error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	fd := int(f.Fd())
	if err := unix.Renameat2(fd, a, fd, b, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("exchange %s and %s: %w", d.Path(a), d.Path(b), err)
	}
	return nil
}

// Named reports whether Name has given its permanent name to a file.
func (d *Dir) Named(name string) (bool, error) {
	info, err := d.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && info.Regular, err
}

// Unname undoes Name, wherever it was interrupted. The two may be the only names
// of a VM's data: neither goes before the other is seen to lead there.
func (d *Dir) Unname(launch, name string) error {
	if named, err := d.Named(name); err != nil {
		return err
	} else if !named {
		return d.Remove(name) // they have not changed places
	}
	file, err := d.Stat(name)
	if err != nil {
		return err
	}
	own, err := d.Stat(launch)
	if err != nil {
		return err
	}
	leads, err := d.Lead(launch)
	if err != nil {
		return err
	}
	switch {
	case own.FileID == file.FileID:
		return d.Remove(name)
	case leads.FileID == file.FileID:
		return d.root.Rename(name, launch)
	default:
		return fmt.Errorf("%s does not lead to %s: both are kept", d.Path(launch), d.Path(name))
	}
}
