package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// Caller is on whose behalf the agent writes to a place of the caller's choice.
// The agent may write where the caller may not, so it looks at each directory on
// the way as the kernel would for the caller.
type Caller struct {
	UID, GID uint32
	Groups   []uint32 `json:",omitempty"` // supplementary groups
}

// The permissions of a directory or file, as the mode has them for one class of
// users.
const (
	maySearch = 1
	mayWrite  = 2
	mayRead   = 4
)

// may reports whether a mode permits something to the caller.
func (c Caller) may(uid, gid, mode, want uint32) bool {
	switch {
	case c.UID == 0:
		return true
	case uid == c.UID:
		mode >>= 6
	case gid == c.GID || slices.Contains(c.Groups, gid):
		mode >>= 3
	}
	return mode&want == want
}

// checkPlace refuses paths that do not say from the root on where a file is to
// be.
func checkPlace(path string) error {
	switch {
	case !filepath.IsAbs(path):
		return fault.New(fault.Usage, "%q is not an absolute path", path)
	case filepath.Clean(path) != path || path == "/":
		return fault.New(fault.Usage, "%q is not a plain path: it has empty parts, dots or a slash at its end", path)
	case strings.ContainsRune(path, 0):
		return fault.New(fault.Usage, "%q holds a byte of zero", path)
	}
	return nil
}

// openPlace opens a directory that the caller may make files in.
func (c Caller) openPlace(path string) (*os.Root, error) {
	return c.openDirectory(path, maySearch|mayWrite)
}

// openDirectory opens a directory in which the caller may do something. It
// follows no symbolic link, so that what was looked at is what is opened, and
// tells nothing of what the caller may not see.
func (c Caller) openDirectory(path string, want uint32) (root *os.Root, err error) {
	at, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(at) }()
	way := "/"
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if part == "" {
			break // the root itself
		}
		if err := c.check(at, way, maySearch); err != nil {
			return nil, err
		}
		way = filepath.Join(way, part)
		next, err := unix.Openat(at, part, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.NotFound, "there is no directory %s", way).
				WithHint("vmsnapd may see less of the host than you: see its unit's PrivateTmp and ProtectHome")
		}
		if err != nil {
			return nil, fmt.Errorf("open directory %s: %w", way, err)
		}
		_ = unix.Close(at)
		at = next
		if err := isDirectory(at, way); err != nil {
			return nil, err
		}
	}
	if err := c.check(at, way, want); err != nil {
		return nil, err
	}
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", at))
}

func isDirectory(fd int, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("open directory %s: %w", path, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return nil
	case unix.S_IFLNK:
		return fault.New(fault.Denied, "%s is a symbolic link, which is not followed on the way to a new file", path).
			WithHint("name the directory by its own path")
	default:
		return fault.New(fault.Usage, "%s is not a directory", path)
	}
}

// check fails unless the caller may do something with an open directory.
func (c Caller) check(fd int, path string, want uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("directory %s: %w", path, err)
	}
	if !c.may(st.Uid, st.Gid, st.Mode, want) {
		what := "search"
		if want&mayWrite != 0 {
			what = "make files in"
		}
		return fault.New(fault.Denied, "uid %d may not %s the directory %s", c.UID, what, path)
	}
	if c.UID == 0 {
		return nil
	}
	// With an access control list the mode does not tell.
	_, err := unix.Getxattr(fmt.Sprintf("/proc/self/fd/%d", fd), "system.posix_acl_access", nil)
	if err == nil {
		return fault.New(fault.Denied, "the directory %s has an access control list, by which vmsnapd does not judge what uid %d may", path, c.UID).
			WithHint("choose a directory where its mode alone decides")
	}
	if !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("directory %s: access control list: %w", path, err)
	}
	return nil
}

// openImage opens an image that the caller may read and write, for reading.
func (c Caller) openImage(path string) (*os.File, error) {
	if err := checkPlace(path); err != nil {
		return nil, err
	}
	dir, err := c.openDirectory(filepath.Dir(path), maySearch)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	if fi, err := dir.Lstat(filepath.Base(path)); err == nil && fi.Mode()&fs.ModeSymlink != 0 {
		return nil, fault.New(fault.Denied, "%s is a symbolic link", path).WithHint("name the file by its own path")
	}
	f, err := dir.OpenFile(filepath.Base(path), os.O_RDONLY|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(fault.NotFound, "there is no file %s", path)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if kind := st.Mode & unix.S_IFMT; err == nil && kind != unix.S_IFREG && kind != unix.S_IFBLK {
		err = fault.New(fault.Usage, "%s is neither a file nor a block device", path)
	} else if err == nil && !c.may(st.Uid, st.Gid, st.Mode, mayRead|mayWrite) {
		err = fault.New(fault.Denied, "uid %d may not read and write %s", c.UID, path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
