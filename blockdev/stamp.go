package blockdev

import (
	"fmt"
	"os"
	"syscall"
	"time"
)

// Stamp is what changes of a file with its content: a file whose stamp is the same
// holds the same, if the stamp Tells.
type Stamp struct {
	FileID
	Size              int64
	Modified, Changed time.Duration // since 1970: of the content, and of the file
	Device            bool
}

// StampOf returns the stamp of the file that a path leads to.
func StampOf(path string) (Stamp, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return Stamp{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return Stamp{}, fmt.Errorf("%s: the system does not describe it", path)
	}
	info := infoOf(fi)
	return Stamp{
		FileID: info.FileID, Size: info.Size, Modified: time.Duration(st.Mtim.Nano()), Changed: time.Duration(st.Ctim.Nano()), Device: info.Device,
	}, nil
}

// Tells reports whether a later stamp would be another one had the content
// changed after it was taken. The times of a file tick: one that changed at the
// time of its stamp, or after quiet, could change again within the same tick.
// Those of a block device say nothing.
func (s Stamp) Tells(quiet time.Time) bool {
	return !s.Device && max(s.Modified, s.Changed) < time.Duration(quiet.UnixNano())
}
