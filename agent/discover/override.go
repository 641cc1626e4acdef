package discover

import (
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Override is what a configuration file says of one VM.
type Override struct {
	File  string // where it stands
	Line  int
	Match Match

	Name       string
	QMP        []string // socket paths, in order of preference; "@name" is abstract
	GuestAgent string   // socket path; "@name" is abstract
	Unit       string
	Ignore     bool // the VM is not managed

	OverlayDir string            // where the overlays of its disks are made
	Disks      map[string]string // where those of some disks are made instead, by device
}

// Match chooses the process that an override is for: all that is given must
// fit.
type Match struct {
	Name        string
	UUID        string
	PIDFile     string // holds the pid, or is named by -pidfile
	CommandLine string // a substring of the arguments joined by spaces
}

// Fits reports whether a process is the one that is meant.
func (m Match) Fits(p Process) bool {
	switch {
	case m == Match{}:
		return false
	case m.Name != "" && m.Name != p.Name:
		return false
	case m.UUID != "" && !strings.EqualFold(m.UUID, p.UUID):
		return false
	case m.CommandLine != "" && !strings.Contains(strings.Join(p.Args, " "), m.CommandLine):
		return false
	}
	return m.PIDFile == "" || m.PIDFile == p.PIDFile || pidIn(m.PIDFile) == p.PID
}

// pidIn reads a pid file; 0 when it holds none.
func pidIn(file string) int {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0 // a VM that does not run has none
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid < 0 {
		return 0
	}
	return pid
}

// Apply returns the process as the overrides that match it describe it, the
// last one deciding, and whether it is to be managed at all. All are matched
// against what was found, not against each other's results.
func Apply(overrides []Override, found Process) (p Process, manage bool) {
	p, manage = found, true
	p.Overrides = nil
	for _, o := range overrides {
		if o.Match.Fits(found) {
			manage = manage && !o.Ignore
			o.apply(&p)
		}
	}
	return p, manage
}

func (o Override) apply(p *Process) {
	if !slices.Contains(p.Overrides, o.File) {
		p.Overrides = append(p.Overrides, o.File)
	}
	if o.Name != "" {
		p.Name = o.Name
	}
	if len(o.QMP) > 0 {
		p.QMP = nil
		for _, path := range o.QMP {
			p.QMP = append(p.QMP, socketAt(path))
		}
	}
	if o.GuestAgent != "" {
		p.GuestAgent = socketAt(o.GuestAgent)
	}
	if o.Unit != "" {
		p.Cgroup.Unit = o.Unit
	}
	if o.OverlayDir != "" {
		p.OverlayDir = o.OverlayDir
	}
	if len(o.Disks) > 0 {
		p.OverlayDirs = maps.Clone(p.OverlayDirs)
		if p.OverlayDirs == nil {
			p.OverlayDirs = map[string]string{}
		}
		maps.Copy(p.OverlayDirs, o.Disks)
	}
}

func socketAt(path string) Socket {
	name, abstract := strings.CutPrefix(path, "@")
	return Socket{Path: name, Abstract: abstract}
}
