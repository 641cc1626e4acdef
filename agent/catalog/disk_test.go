package catalog

import (
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// fileCalls are the system calls that matter to what is on a disk, and those by
// which a process talks. A call that the model does not know fails the test.
var fileCalls = []string{
	"write", "pwrite64", "ftruncate", "fsync", "fdatasync",
	"writev", "pwritev", "pwritev2", "fallocate", "sync_file_range", "rename", "renameat", "renameat2", "unlink", "unlinkat", "link", "linkat", "truncate",
}

// fileEvent is a call that has begun, or the end of a sync.
type fileEvent struct {
	call string
	path string // of the file
	data []byte // written
	at   int64  // where, or the size that a file is cut to
	ends bool   // the end of a sync that began before
	said string // on standard output
}

// traceParser takes the lines of strace -f -y -xx apart.
type traceParser struct {
	dir        string               // whose files matter, with a slash
	unfinished map[string]fileEvent // syncs, by thread
}

var (
	tracedCall = regexp.MustCompile(`^(\d+) +(\w+)\((\d+)<([^>]*)>(?:, (\d+))?(?:, (\d+))?(.*)$`)
	tracedEnd  = regexp.MustCompile(`^(\d+) +<\.\.\. (\w+) resumed>\) *= (-?\d+)`)
	otherCall  = regexp.MustCompile(`^\d+ +(\w+)\(`)
)

// parse returns what a line tells of, if that is anything that matters.
func (p traceParser) parse(line string) (e fileEvent, matters bool, err error) {
	if m := tracedEnd.FindStringSubmatch(line); m != nil {
		e, matters = p.unfinished[m[1]]
		delete(p.unfinished, m[1])
		e.ends = true
		if matters && m[3] != "0" {
			err = fmt.Errorf("it failed: %s", line)
		}
		return e, matters, err
	}
	// What was written is long, and taken out before the line is matched.
	data := ""
	if before, rest, ok := strings.Cut(line, `, "`); ok {
		if text, after, ok := strings.Cut(rest, `"`); ok && strings.HasPrefix(text, `\x`) {
			line, data = before+after, text
		}
	}
	m := tracedCall.FindStringSubmatch(line)
	if m == nil {
		if m := otherCall.FindStringSubmatch(line); m != nil && strings.Contains(line, hexed(p.dir)) {
			return e, false, fmt.Errorf("a call that the model does not know: %.200s", line)
		}
		return e, false, nil
	}
	path, thread := unhex(m[4]), m[1]
	e = fileEvent{call: m[2], path: path, data: []byte(unhex(data))}
	if e.call == "write" && m[3] == "1" {
		return fileEvent{said: string(e.data)}, true, nil
	}
	if !strings.HasPrefix(path+"/", p.dir) {
		return e, false, nil
	}
	ended := !strings.Contains(m[7], "<unfinished ...>")
	switch e.call {
	case "pwrite64":
		e.at, err = strconv.ParseInt(m[6], 10, 64)
	case "ftruncate":
		e.at, err = strconv.ParseInt(m[5], 10, 64)
	case "fsync", "fdatasync":
		if e.ends = ended; !ended {
			p.unfinished[thread] = e
		}
	default:
		err = fmt.Errorf("a call that the model does not know: %.200s", line)
	}
	return e, true, err
}

// unhex decodes \xNN; text that strace leaves as it is stays.
func unhex(s string) string {
	if !strings.HasPrefix(s, `\x`) {
		return s
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, `\x`, ""))
	if err != nil {
		return s
	}
	return string(b)
}

func hexed(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, `\x%02x`, s[i])
	}
	return b.String()
}

// disk is what a power cut would leave of the files of a directory.
type disk map[string]*diskFile

// diskFile is a file: what is on the disk for good, and what was written since.
type diskFile struct {
	durable []byte
	pending []fileEvent
	syncing int // how many of pending a sync that runs will have made durable
	created bool
}

// newDisk returns a disk with the files of a directory, all of them synced.
func newDisk(t *testing.T, dir string) disk {
	t.Helper()
	entries, err := os.ReadDir(dir)
	check(t, err)
	d := disk{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		content, err := os.ReadFile(path)
		check(t, err)
		d[path] = &diskFile{durable: content, created: true}
	}
	return d
}

// apply has an event happen.
func (d disk) apply(t *testing.T, e fileEvent) {
	t.Helper()
	if e.path == "" {
		return // it was said
	}
	f := d[e.path]
	if f == nil {
		f = &diskFile{}
		d[e.path] = f
	}
	switch e.call {
	case "fsync", "fdatasync":
		if !e.ends {
			f.syncing = len(f.pending)
			return
		}
		n := len(f.pending)
		if f.syncing > 0 {
			n = f.syncing
		}
		for _, w := range f.pending[:n] {
			f.durable = w.onto(f.durable)
		}
		f.pending, f.syncing, f.created = f.pending[n:], 0, true
	default:
		f.pending = append(f.pending, e)
	}
}

// onto returns the content of a file after a write.
func (e fileEvent) onto(content []byte) []byte {
	size := e.at
	if e.call == "pwrite64" {
		size = max(int64(len(content)), e.at+int64(len(e.data)))
	}
	content = append(content[:min(size, int64(len(content))):min(size, int64(len(content)))], make([]byte, max(0, size-int64(len(content))))...)
	copy(content[min(e.at, size):], e.data)
	return content
}

const sector = 512

// cut cuts the power, and returns a directory with what may be on the disk then:
// nothing, all, or any part of what was not synced, and of one write its begin.
func (d disk) cut(t *testing.T, random *rand.Rand) (dir string) {
	t.Helper()
	dir = t.TempDir()
	keep := []func() bool{
		func() bool { return false },
		func() bool { return true },
		func() bool { return random.IntN(2) == 0 },
	}[random.IntN(3)]
	for path, f := range d {
		if strings.HasSuffix(path, "-shm") || !f.created && !keep() {
			continue // shared memory, not a file
		}
		content := append([]byte(nil), f.durable...)
		for _, w := range f.pending {
			if !keep() {
				continue
			}
			if n := len(w.data); n > sector && random.IntN(4) == 0 {
				w.data = w.data[:random.IntN(n/sector)*sector]
			}
			content = w.onto(content)
		}
		check(t, os.WriteFile(filepath.Join(dir, filepath.Base(path)), content, 0o600))
	}
	return dir
}
