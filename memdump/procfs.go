package memdump

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// memoryUse is what a process uses, in bytes.
type memoryUse struct {
	resident uint64
	huge     uint64 // of these in huge pages
}

// residentMemory reads how much memory a process has touched (proc(5),
// smaps_rollup). What is in hugetlbfs is not counted as resident there.
func residentMemory(pid int) (memoryUse, error) {
	b, err := os.ReadFile(procPath(pid, "smaps_rollup"))
	if err != nil {
		return memoryUse{}, err
	}
	fields := statusFields(b)
	hugetlb := kilobytes(fields["Private_Hugetlb"]) + kilobytes(fields["Shared_Hugetlb"])
	return memoryUse{
		resident: kilobytes(fields["Rss"]) + hugetlb,
		huge:     kilobytes(fields["AnonHugePages"]) + kilobytes(fields["ShmemPmdMapped"]) + hugetlb,
	}, nil
}

// ended makes what the kernel says of a process that is not there any more an
// ErrQEMUEnded.
func ended(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: %w", ErrQEMUEnded, err)
	}
	return err
}

func procPath(pid int, name string) string {
	return filepath.Join("/proc", strconv.Itoa(pid), name)
}

// statusFields reads lines of the form "Name: words".
func statusFields(b []byte) map[string][]string {
	fields := map[string][]string{}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		if name, rest, ok := strings.Cut(lines.Text(), ":"); ok {
			fields[name] = strings.Fields(rest)
		}
	}
	return fields
}

// statFields reads what follows the program's name, which may hold anything, in
// the stat file of a process or a thread: 22 fields and more of proc(5), the
// first of which is field 3.
func statFields(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("%s: %d fields after the name", path, len(fields))
	}
	return fields, nil
}

// kilobytes reads "123 kB" as a number of bytes, 0 if it is none.
func kilobytes(words []string) uint64 {
	if len(words) != 2 || words[1] != "kB" {
		return 0
	}
	n, err := strconv.ParseUint(words[0], 10, 54)
	if err != nil {
		return 0
	}
	return n << 10
}

// onDisk tells whether a path, as the process sees it, is on a file system
// that is not in memory. A path that is gone tells nothing.
func onDisk(pid int, path string) (bool, error) {
	seen := filepath.Join(procPath(pid, "root"), path)
	if !filepath.IsAbs(path) {
		seen = filepath.Join(procPath(pid, "cwd"), path)
	}
	var st unix.Statfs_t
	err := unix.Statfs(seen, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("%s: %w", seen, err)
	}
	return st.Type != unix.TMPFS_MAGIC && st.Type != unix.HUGETLBFS_MAGIC, nil
}

const userfaultDevice = "/dev/userfaultfd"

// mayTrack tells whether the kernel lets a process handle the faults of the
// kernel too (userfaultfd(2)): with CAP_SYS_PTRACE in the first user
// namespace, with vm.unprivileged_userfaultfd=1, or, if it knows how to, by a
// device that it may open.
func mayTrack(pid int, byDevice bool) (bool, error) {
	sysctl, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	if err == nil && strings.TrimSpace(string(sysctl)) == "1" {
		return true, nil
	}
	b, err := os.ReadFile(procPath(pid, "status"))
	if err != nil {
		return false, err
	}
	fields := statusFields(b)
	traces, err := hasCapability(fields, unix.CAP_SYS_PTRACE)
	if err != nil {
		return false, err
	}
	if first, err := firstNamespace(pid); traces && first || err != nil {
		return first, err
	}
	return byDevice && mayOpen(filepath.Join(procPath(pid, "root"), userfaultDevice), fields), nil
}

func hasCapability(fields map[string][]string, bit int) (bool, error) {
	words := fields["CapEff"]
	if len(words) != 1 {
		return false, errors.New("no effective capabilities in the process's status")
	}
	set, err := strconv.ParseUint(words[0], 16, 64)
	return set&(1<<bit) != 0, err
}

// firstUserNamespace is the inode of the first user namespace
// (PROC_USER_INIT_INO in the kernel's include/linux/proc_ns.h).
const firstUserNamespace = 0xeffffffd

func firstNamespace(pid int) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(procPath(pid, "ns/user"), &st); err != nil {
		return false, fmt.Errorf("user namespace of process %d: %w", pid, err)
	}
	return st.Ino == firstUserNamespace, nil
}

// mayOpen tells whether a process with this status may open a file for reading
// and writing, by the file's mode.
func mayOpen(path string, fields map[string][]string) bool {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return false
	}
	effective := func(name string) string {
		if words := fields[name]; len(words) > 1 {
			return words[1]
		}
		return ""
	}
	const readWrite = 0o6
	group := strconv.FormatUint(uint64(st.Gid), 10)
	switch {
	case effective("Uid") == strconv.FormatUint(uint64(st.Uid), 10):
		return st.Mode>>6&readWrite == readWrite
	case effective("Gid") == group || slices.Contains(fields["Groups"], group):
		return st.Mode>>3&readWrite == readWrite
	}
	return st.Mode&readWrite == readWrite
}

// sizeLimit returns the largest file that a process may write, in bytes
// (RLIMIT_FSIZE): beyond it the kernel refuses, or ends the process.
func sizeLimit(pid int) (uint64, error) {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, nil, &limit); err != nil {
		return 0, fmt.Errorf("file size limit of process %d: %w", pid, err)
	}
	return limit.Cur, nil
}
