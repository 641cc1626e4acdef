package blockdev

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// CheckResult is what a check of an image's own structures has found.
type CheckResult struct {
	Corruptions uint64 // data may be lost
	Leaks       uint64 // space is, until somebody repairs it; nothing else
	Errors      uint64 // of the check itself: it is not complete
}

// Clean reports whether nothing was found.
func (r CheckResult) Clean() bool { return r == CheckResult{} }

// CheckAlone verifies a qcow2 image's own structures. It opens no other file,
// whatever the image names, writes nothing and takes no locks: an image that is
// written to meanwhile may seem broken.
func CheckAlone(ctx context.Context, path string) (CheckResult, error) {
	image, err := alone(path)
	if err != nil {
		return CheckResult{}, err
	}
	var out, said bytes.Buffer
	cmd := imgCommand(ctx, "check", "--output=json", image)
	cmd.Stdout, cmd.Stderr = &out, &said
	ran := cmd.Run()
	if ctx.Err() != nil {
		return CheckResult{}, context.Cause(ctx)
	}
	// 0: clean, 2: corruptions, 3: leaks (qemu-img's manual, "check").
	if exit, ok := errors.AsType[*exec.ExitError](ran); ran != nil && (!ok || exit.ExitCode() != 2 && exit.ExitCode() != 3) {
		return CheckResult{}, &ImgError{"check", string(bytes.TrimSpace(said.Bytes())), ran}
	}
	var r struct {
		Corruptions uint64 `json:"corruptions"`
		Leaks       uint64 `json:"leaks"`
		Errors      uint64 `json:"check-errors"`
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return CheckResult{}, fmt.Errorf("qemu-img check %s: %w", path, err)
	}
	return CheckResult(r), nil
}

// FreeLeaks has a qcow2 image give back the clusters that nothing in it uses. The
// caller keeps everybody else from writing to it.
func FreeLeaks(ctx context.Context, path string) error {
	image, err := alone(path)
	if err != nil {
		return err
	}
	return runImg(ctx, nil, "check", "-q", "-r", "leaks", image)
}

// alone describes an image to qemu-img, without what it lies on and without locks.
func alone(path string) (string, error) {
	image, err := json.Marshal(map[string]any{
		"driver": "qcow2", "backing": nil,
		"file": map[string]any{"driver": "file", "filename": path, "locking": "off"},
	})
	return "json:" + string(image), err
}

// InUse reports whether a QEMU has an image open, in whatever way, as far as it
// takes image locks.
func InUse(path string) (bool, error) {
	f, err := openImage(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	probe := unix.Flock_t{Type: unix.F_WRLCK, Start: lockPermBase, Len: 2 * (lockSharedBase - lockPermBase)}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &probe); err != nil {
		return false, fmt.Errorf("query the locks of %s: %w", path, err)
	}
	return probe.Type != unix.F_UNLCK, nil
}

// Quarantine moves a file of the directory into a sub-directory that only root may
// read, made when it is not there, under a name that is not taken. It returns
// that name. An immutable flag is lifted for it and not set again.
func (d *Dir) Quarantine(name, sub string) (to string, err error) {
	for _, made := range parents(sub) {
		if err := d.root.Mkdir(made, 0o700); err != nil && !errors.Is(err, syscall.EEXIST) {
			return "", err
		}
	}
	if err := d.SetImmutable(name, false); err != nil && !errors.Is(err, ErrNoImmutable) {
		return "", err
	}
	for n := 0; ; n++ {
		to = sub + "/" + name
		if n > 0 {
			to += fmt.Sprintf(".%d", n)
		}
		// Link and unlink: a rename would replace what has the name.
		err := d.root.Link(name, to)
		switch {
		case errors.Is(err, syscall.EEXIST):
			continue
		case noHardLinks(err):
			if _, err := d.root.Lstat(to); err == nil {
				continue
			}
			err = d.root.Rename(name, to)
		case err == nil:
			err = d.root.Remove(name)
		}
		if err != nil {
			return "", fmt.Errorf("quarantine %s: %w", d.Path(name), err)
		}
		return to, errors.Join(d.Sync(), d.syncSub(sub))
	}
}

// parents returns a path of directories, each with those before it.
func parents(sub string) (all []string) {
	for i, c := range sub + "/" {
		if c == '/' {
			all = append(all, sub[:i])
		}
	}
	return all
}

func (d *Dir) syncSub(sub string) error {
	in, err := d.root.OpenRoot(sub)
	if err != nil {
		return err
	}
	return errors.Join((&Dir{path: d.Path(sub), root: in}).Sync(), in.Close())
}
