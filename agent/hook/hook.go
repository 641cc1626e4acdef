package hook

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"
)

// Phase is when a hook runs.
type Phase string

// The phases. None of them is within a freeze.
const (
	PreFreeze    Phase = "pre-freeze"    // before the guest is frozen, or cut without a freeze
	PostThaw     Phase = "post-thaw"     // after it was thawed, or cut; whenever pre-freeze was begun
	PostSnapshot Phase = "post-snapshot" // a snapshot is recorded
	PreRestore   Phase = "pre-restore"   // before a VM is taken to another state
	PostRestore  Phase = "post-restore"  // it was; whenever pre-restore was begun
	OnFailure    Phase = "on-failure"    // an operation failed or was cancelled, and what it did is undone
)

// Phases are all phases, in the order in which they come.
var Phases = []Phase{PreFreeze, PostThaw, PostSnapshot, PreRestore, PostRestore, OnFailure}

// DefaultTimeout is the time limit of a hook unless it is given another: a minute is long for a
// database's checkpoint, and short enough not to hold up a stop of the daemon.
const DefaultTimeout = time.Minute

// MaxHooks bounds the hooks of one phase.
const MaxHooks = 64

// Hook is one executable.
type Hook struct {
	Phase Phase
	Name  string // of the file: 10-database
	Path  string // absolute
}

// String returns PHASE/NAME.
func (h Hook) String() string { return string(h.Phase) + "/" + h.Name }

// names are those of files that are hooks: no dots, so that what package
// managers and editors leave behind is none.
var names = regexp.MustCompile(`^[0-9][0-9]-[A-Za-z0-9_-]+$`)

// UntrustedError means that somebody else could decide what the daemon runs.
type UntrustedError struct {
	Path string
	Why  string
}

// Error says which path it is, and why.
func (e *UntrustedError) Error() string {
	return fmt.Sprintf("%s %s: only root and the user of vmsnapd may be able to change what it runs", e.Path, e.Why)
}

// List returns the executables of a phase by name. A directory that does not
// exist has none; files that are not executable, or whose names are not NN-name,
// are no hooks. A *UntrustedError is returned if somebody else may write to the
// directory or to a hook.
func List(dir string, phase Phase) ([]Hook, error) {
	path, err := filepath.EvalSymlinks(filepath.Join(dir, string(phase)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := trustTree(path); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var hooks []Hook
	for _, e := range entries {
		if !names.MatchString(e.Name()) {
			continue
		}
		h := Hook{Phase: phase, Name: e.Name(), Path: filepath.Join(path, e.Name())}
		info, err := os.Lstat(h.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() {
			return nil, &UntrustedError{h.Path, "is not a plain file"}
		}
		if info.Mode()&0o111 == 0 {
			continue // so is a hook put out of use
		}
		if err := trust(h.Path, info); err != nil {
			return nil, err
		}
		hooks = append(hooks, h)
	}
	if len(hooks) > MaxHooks {
		return nil, fmt.Errorf("%s has %d hooks; at most %d are run", path, len(hooks), MaxHooks)
	}
	return hooks, nil
}

// trustTree checks a directory and those on the way to it.
func trustTree(path string) error {
	for {
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if err := trust(path, info); err != nil {
			return err
		}
		parent := filepath.Dir(path)
		if parent == path {
			return nil
		}
		path = parent
	}
}

// trust refuses what somebody else owns or may write to. In a directory like
// /tmp others may make files, and not replace ours.
func trust(path string, info fs.FileInfo) error {
	owner := info.Sys().(*syscall.Stat_t).Uid
	switch mode := info.Mode(); {
	case owner != 0 && owner != uint32(os.Geteuid()):
		return &UntrustedError{path, fmt.Sprintf("belongs to uid %d", owner)}
	case mode.IsDir() && mode&fs.ModeSticky != 0:
		return nil
	case mode.Perm()&0o022 != 0:
		return &UntrustedError{path, fmt.Sprintf("has the mode %#o", mode.Perm())}
	}
	return nil
}

// Valid reports whether there is such a phase.
func (p Phase) Valid() bool { return slices.Contains(Phases, p) }
