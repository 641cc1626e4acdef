package discover

import (
	"context"
	"errors"
	"time"
)

var errSkeleton = errors.New("not written yet")

// ParseCommandLine describes a QEMU by its arguments, args[0] included. It is
// pure: relative paths stay relative. An error means that the arguments are
// not what a running QEMU could have been started with.
func ParseCommandLine(args []string) (Process, error) { return Process{}, errSkeleton }

// Scan describes every QEMU on the host in one pass, by rising pid.
func Scan(ctx context.Context) ([]Process, error) { return nil, errSkeleton }

// Inspect describes one process. It fails with ErrGone or ErrNotQEMU.
func Inspect(pid int) (Process, error) { return Process{}, errSkeleton }

// Same reports whether pid is a live process that started at startTime.
func Same(pid int, startTime uint64) bool { return false }

// HostPath returns the name under which this process opens a path that QEMU
// names.
func (p Process) HostPath(path string) (string, error) { return "", errSkeleton }

// Address returns what net.Dial("unix", …) takes to reach a socket of the
// process.
func (p Process) Address(s Socket) (string, error) { return "", errSkeleton }

// Options configure a Watcher. The zero value is good.
type Options struct {
	ScanInterval time.Duration // between scans when the process connector cannot be used; 0: 2 s
	NoNetlink    bool          // scan only
}

// EventKind is what happened.
type EventKind int

// The kinds of events.
const (
	Started EventKind = iota + 1 // a QEMU was found
	Exited                       // it is gone
	Listed                       // all that ran when the watch began have been delivered; once, without a Process
)

// Event is a change in the set of QEMU processes.
type Event struct {
	Kind    EventKind
	Process Process
}

// Watcher follows the QEMU processes of the host.
type Watcher struct{ events chan Event }

// Watch starts following QEMU processes until ctx is done.
func Watch(ctx context.Context, opts Options) (*Watcher, error) { return nil, errSkeleton }

// Events delivers what happens. It is closed when the watch has ended. A
// reader that lags loses nothing.
func (w *Watcher) Events() <-chan Event { return w.events }

// Source tells how starts are noticed, "netlink" or "scan", and for "scan" the
// reason.
func (w *Watcher) Source() (source, reason string) { return "", "" }

// Override is what a configuration file says of one VM.
type Override struct {
	File  string // where it stands
	Line  int
	Match Match

	Name       string
	QMP        []string // socket paths, in order of preference
	GuestAgent string   // socket path
	Unit       string
	OverlayDir string
	Ignore     bool
}

// Match chooses the process that an override is for: all that is given must
// fit.
type Match struct {
	Name        string
	UUID        string
	PIDFile     string // holds the pid, or is named by -pidfile
	CommandLine string // a substring of the arguments joined by spaces
}

// LoadOverrides reads the *.yaml files of a directory, in the order of their
// names. A directory that does not exist holds none.
func LoadOverrides(dir string) ([]Override, error) { return nil, errSkeleton }

// Apply returns the process as the overrides that match it describe it, the
// last one deciding, and whether it is to be managed at all.
func Apply(overrides []Override, p Process) (Process, bool) { return p, false }
