package memdump

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// A mapping is what the kernel tells of one stretch of a process's address
// space (proc(5), /proc/PID/smaps).
type mapping struct {
	start, end uint64
	perms      string   // such as "rw-p"
	path       string   // of the file, or a name such as "[heap]"; "" for anonymous memory
	flags      []string // VmFlags: "uw" is tracked for writes by userfaultfd, "um" for missing pages
	huge       uint64   // bytes that transparent huge pages map, of anonymous or shared memory
}

func (m mapping) size() uint64 { return m.end - m.start }

func (m mapping) has(flag string) bool { return slices.Contains(m.flags, flag) }

// mappings reads the address space of a process.
func mappings(pid int) ([]mapping, error) {
	f, err := os.Open(procPath(pid, "smaps"))
	if err != nil {
		return nil, err
	}
	all, err := parseMappings(f)
	return all, errors.Join(err, f.Close())
}

// parseMappings reads smaps. The kernel escapes line feeds in paths, so that a
// line is a line whatever files are called.
func parseMappings(r io.Reader) ([]mapping, error) {
	var all []mapping
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF && line == "" {
			return all, nil
		}
		if err != nil && err != io.EOF {
			return nil, err
		}
		line = strings.TrimSuffix(line, "\n")
		if m, ok := parseMappingHead(line); ok {
			all = append(all, m)
			continue
		}
		if len(all) == 0 {
			return nil, fmt.Errorf("smaps begins with %.80q", line)
		}
		all[len(all)-1].addDetail(line)
	}
}

// parseMappingHead reads a line like
// "7f43d3e00000-7f43f3e00000 rw-p 00000000 00:00 0      /memfd:ram (deleted)".
func parseMappingHead(line string) (mapping, bool) {
	var m mapping
	addresses, rest, ok := strings.Cut(line, " ")
	if !ok {
		return m, false
	}
	from, to, ok := strings.Cut(addresses, "-")
	if !ok {
		return m, false
	}
	var err error
	if m.start, err = strconv.ParseUint(from, 16, 64); err != nil {
		return m, false
	}
	if m.end, err = strconv.ParseUint(to, 16, 64); err != nil || m.end <= m.start {
		return m, false
	}
	fields := strings.Fields(rest)
	const beforePath = 4 // permissions, offset, device, inode
	if len(fields) < beforePath {
		return m, false
	}
	m.perms = fields[0]
	m.path = strings.Join(fields[beforePath:], " ")
	return m, true
}

// addDetail reads a line like "AnonHugePages:     53248 kB".
func (m *mapping) addDetail(line string) {
	name, rest, _ := strings.Cut(line, ":")
	words := strings.Fields(rest)
	switch name {
	case "AnonHugePages", "ShmemPmdMapped":
		m.huge += kilobytes(words)
	case "VmFlags":
		m.flags = words
	}
}
