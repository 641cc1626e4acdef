package blockdev

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// qemuImg is the program that works on images no QEMU has open. It comes with
// QEMU (qemu-utils).
const qemuImg = "qemu-img"

// ImgError is a qemu-img that failed.
type ImgError struct {
	Command string // the sub-command
	Output  string // its own words
	Err     error
}

func (e *ImgError) Error() string {
	if e.Output == "" {
		return fmt.Sprintf("qemu-img %s: %v", e.Command, e.Err)
	}
	return fmt.Sprintf("qemu-img %s: %s", e.Command, e.Output)
}

// Unwrap returns ENOSPC for what qemu-img ends with strerror() of it, beside how
// it ended.
func (e *ImgError) Unwrap() []error {
	errs := []error{e.Err}
	if strings.Contains(e.Output, "No space left on device") {
		errs = append(errs, syscall.ENOSPC)
	}
	return errs
}

// Convert copies an image with everything below it into an existing file, and
// reports its progress in thousandths. The source's locks may be held by the
// caller (-U).
func Convert(ctx context.Context, from, fromFormat, to, toFormat string, progress func(done, total uint64)) error {
	return runImg(ctx, progress, "convert", "-p", "-U", "-f", fromFormat, "-O", toFormat, from, to)
}

// Rebase makes a qcow2 name another file as its backing, in the format of that
// one. Only the header changes: the content of the two backings must be the same.
// The image's locks may be held by the caller, who keeps writers away.
func Rebase(ctx context.Context, path, backing, backingFormat string) error {
	return runImg(ctx, nil, "rebase", "-q", "-u", "-b", backing, "-F", backingFormat, "--image-opts",
		"driver=qcow2,file.driver=file,file.locking=off,file.filename="+strings.ReplaceAll(path, ",", ",,"))
}

// Check verifies a qcow2 image's own structures.
func Check(ctx context.Context, path string) error {
	return runImg(ctx, nil, "check", "-q", "-U", "-f", "qcow2", path)
}

// runImg runs qemu-img and reports its progress in ten-thousandths.
func runImg(ctx context.Context, progress func(done, total uint64), args ...string) error {
	return runCommand(ctx, imgCommand(ctx, args...), progress, nil)
}

// imgCommand is qemu-img, killed when the context ends.
func imgCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, qemuImg, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return cmd
}

// runCommand runs qemu-img. With -p it writes its progress as "(12.34/100%)\r".
func runCommand(ctx context.Context, cmd *exec.Cmd, progress func(done, total uint64), rests func() (bool, <-chan struct{})) error {
	sub := cmd.Args[1]
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return &ImgError{sub, "", err}
	}
	if err := cmd.Start(); err != nil {
		return &ImgError{sub, "", err}
	}
	if rests != nil {
		ended := make(chan struct{})
		defer close(ended)
		go hold(cmd.Process, rests, ended)
	}
	lines := bufio.NewScanner(out)
	lines.Split(splitReturns)
	for lines.Scan() {
		if p, ok := parseProgress(lines.Text()); ok && progress != nil {
			progress(p, 10000)
		}
	}
	err = errors.Join(lines.Err(), cmd.Wait())
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return &ImgError{sub, strings.TrimSpace(stderr.String()), err}
	}
	return nil
}

// hold stops a process while rests says so, until ended is closed. A stopped one can
// be killed all the same.
func hold(p *os.Process, rests func() (bool, <-chan struct{}), ended <-chan struct{}) {
	for stopped := false; ; {
		stop, changed := rests()
		if stop != stopped {
			s := syscall.SIGCONT
			if stop {
				s = syscall.SIGSTOP
			}
			_ = p.Signal(s) // it may have ended
			stopped = stop
		}
		select {
		case <-changed:
		case <-ended:
			return
		}
	}
}

// splitReturns splits at carriage returns and newlines.
func splitReturns(data []byte, atEOF bool) (advance int, token []byte, err error) {
	if i := bytes.IndexAny(data, "\r\n"); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

// parseProgress reads "    (12.34/100%)" as 1234 of 10000.
func parseProgress(line string) (uint64, bool) {
	line = strings.TrimSpace(line)
	value, ok := strings.CutPrefix(line, "(")
	if !ok {
		return 0, false
	}
	value, _, ok = strings.Cut(value, "/")
	if !ok {
		return 0, false
	}
	f, err := strconv.ParseFloat(value, 64)
	if err != nil || f < 0 || f > 100 {
		return 0, false
	}
	return uint64(f * 100), true
}
