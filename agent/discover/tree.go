package discover

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// sharesTree reports whether all that the process names in another mount
// namespace is, by the same name, the same here. That is so when either side
// has a namespace only to be kept from something else, as services have.
func (p *Process) sharesTree() bool {
	names := p.names()
	if !p.sameFile("/") {
		return false
	}
	for _, name := range names {
		for _, n := range []string{filepath.Dir(name), name} {
			if !p.sameFile(n) {
				return false
			}
		}
	}
	return len(names) > 0
}

// names are the files of the launch command.
func (p *Process) names() []string {
	var names []string
	add := func(path string) {
		if filepath.IsAbs(path) {
			names = append(names, path)
		}
	}
	for _, s := range append([]Socket{p.GuestAgent}, p.QMP...) {
		if !s.Abstract {
			add(s.Path)
		}
	}
	for _, d := range p.Drives {
		add(d.File)
	}
	return names
}

// sameFile compares what a name leads to there and here. Nothing on both sides
// is the same too: sockets come after the process.
func (p *Process) sameFile(name string) bool {
	there, err := p.HostPath(name)
	if err != nil {
		return false
	}
	theirs, err1 := os.Stat(there)
	ours, err2 := os.Stat(name)
	if errors.Is(err1, fs.ErrNotExist) && errors.Is(err2, fs.ErrNotExist) {
		return true
	}
	return err1 == nil && err2 == nil && os.SameFile(theirs, ours)
}
