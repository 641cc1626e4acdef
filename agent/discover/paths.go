package discover

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ErrRelativePath is returned for a path whose directory is not known.
var ErrRelativePath = errors.New("path is relative to an unknown directory")

// maxLinks bounds the symbolic links of one path, as the kernel does.
const maxLinks = 40

// sunPathLength is the size of a unix socket address in bytes.
const sunPathLength = 108

// HostPath returns the name under which this process opens a path that QEMU
// names. It differs from path when QEMU has its own file system tree; symbolic
// links are then followed here, since an absolute one counts from QEMU's root
// and the kernel would count from ours. The last part need not exist. Whoever
// writes to that tree can change links between this call and the next, so
// check what was opened.
func (p Process) HostPath(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("%s: %w", path, ErrRelativePath)
	}
	if p.Root == "" {
		return path, nil
	}
	resolved, err := resolveBeneath(p.Root, path)
	if err != nil {
		return "", fmt.Errorf("process %d: %w", p.PID, err)
	}
	return filepath.Join(p.Root, resolved), nil
}

// resolveBeneath follows the symbolic links of a path as if root were the root
// directory.
func resolveBeneath(root, path string) (string, error) {
	rest := splitPath(path)
	var done []string
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		if part == ".." {
			done = done[:max(0, len(done)-1)]
			continue
		}
		target, err := os.Readlink(filepath.Join(root, filepath.Join(done...), part))
		if err != nil { // not a link, or not there: opening it will tell
			done = append(done, part)
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%s: more than %d symbolic links", path, maxLinks)
		}
		if filepath.IsAbs(target) {
			done = nil
		}
		rest = append(splitPath(target), rest...)
	}
	return "/" + strings.Join(done, "/"), nil
}

func splitPath(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// Address returns what net.Dial("unix", …) takes to reach a socket of the
// process. An abstract socket is reached only from QEMU's network namespace.
// A name behind /proc/PID/root may be too long to dial; connect through a
// descriptor of its directory then.
func (p Process) Address(s Socket) (string, error) {
	if !s.Abstract {
		return p.HostPath(s.Path)
	}
	name := "@" + s.Path
	if s.Loose {
		name += strings.Repeat("\x00", max(0, sunPathLength-len(name)))
	}
	return name, nil
}
