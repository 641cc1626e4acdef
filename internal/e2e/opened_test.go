package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
)

// touched is a path that a process has named to the kernel.
type touched struct {
	call  string
	path  string // resolved against the directory that it was relative to
	write bool   // the call may change something
	line  string
}

// pathCalls are the system calls that open, make, remove or execute files.
var pathCalls = []string{"openat", "openat2", "open", "creat", "linkat", "link", "symlinkat", "symlink", "renameat", "renameat2", "rename", "unlinkat", "unlink", "mkdirat", "mkdir", "mknodat", "truncate", "fchmodat", "fchownat", "execve", "connect"}

// touches traces the daemon, and all that it starts, while f runs.
func (h *host) touches(f func()) []touched {
	h.t.Helper()
	out := h.path("touched")
	tracer := exec.Command("strace", "-f", "-q", "-y", "-s", "5000", "-o", out, "-e", "trace="+strings.Join(pathCalls, ","),
		"-p", fmt.Sprint(h.daemon.Process.Pid))
	if err := tracer.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.traced()
	f()
	_ = tracer.Process.Signal(syscall.SIGINT)
	_ = tracer.Wait()
	file, err := os.Open(out)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	var all []touched
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		all = append(all, parseTouched(lines.Text())...)
	}
	if err := lines.Err(); err != nil {
		h.t.Fatal(err)
	}
	if len(all) == 0 {
		h.t.Fatal("the tracer has seen nothing")
	}
	return all
}

var (
	calledWith = regexp.MustCompile(`^\d+ +(\w+)\((.*)`)
	// A path, and the directory before it that it is relative to.
	namedPath = regexp.MustCompile(`(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?(?:sun_path=)?"((?:[^"\\]|\\.)*)"`)
)

// parseTouched takes a line of strace -y apart.
func parseTouched(line string) (all []touched) {
	m := calledWith.FindStringSubmatch(line)
	if m == nil {
		return nil // a signal, or the second half of a call
	}
	write := !slices.Contains([]string{"open", "openat", "openat2", "execve", "connect"}, m[1]) ||
		strings.Contains(m[2], "O_WRONLY") || strings.Contains(m[2], "O_RDWR") || strings.Contains(m[2], "O_CREAT")
	args := m[2]
	paths := namedPath.FindAllStringSubmatch(args, -1)
	if m[1] == "execve" && len(paths) > 1 {
		paths = paths[:1] // the others are arguments
	}
	for _, p := range paths {
		path := p[2]
		if !strings.HasPrefix(path, "/") {
			path = filepath.Join(p[1], path)
		}
		all = append(all, touched{m[1], filepath.Clean(path), write, line})
	}
	return all
}

// systemFiles are read by every program, and say nothing about a VM.
var systemFiles = []string{"/proc", "/sys", "/dev", "/usr", "/lib", "/lib64", "/bin", "/etc", "/run/systemd", "/var/run"}

// staysWithin fails for each path that lies outside some directories, unless it
// is a file of the system that is only read.
func (h *host) staysWithin(all []touched, when string, dirs ...string) {
	h.t.Helper()
	within := func(path string, dirs []string) bool {
		return slices.ContainsFunc(dirs, func(d string) bool { return path == d || strings.HasPrefix(path, d+"/") })
	}
	for _, o := range all {
		through := o.path // as /proc/PID/root/… leads on
		if rest, ok := strings.CutPrefix(o.path, "/proc/"); ok {
			if _, rest, ok = strings.Cut(rest, "/root/"); ok {
				through = "/" + rest
			}
		}
		onTheWay := slices.ContainsFunc(dirs, func(d string) bool { return o.path == "/" || strings.HasPrefix(d, o.path+"/") })
		switch {
		case within(through, dirs), o.path == "/dev/null", strings.HasPrefix(o.path, "/proc/self/fd/"):
		case !o.write && (onTheWay || o.path != "/etc/shadow" && within(o.path, systemFiles)):
		default:
			h.t.Errorf("%s: %s was touched:\n%s", when, o.path, o.line)
		}
	}
}
