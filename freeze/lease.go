package freeze

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"time"
)

// LeaseState is what a lease file says of its guest.
type LeaseState string

// The states of a lease. The file is not touched between the freeze and the
// thaw, so that the first covers all of that time.
const (
	LeaseHeld       LeaseState = "held"       // a freeze was or is about to be sent
	LeaseUnresolved LeaseState = "unresolved" // the guest does not answer the thaw
)

// Lease says that a guest is, or may be, frozen. It is durable before the
// freeze is sent, and removed after the guest has answered thawed.
type Lease struct {
	ID       string     `json:"id"`
	Request  Request    `json:"request"`
	Boot     string     `json:"boot"`  // the host's boot id
	Owner    Process    `json:"owner"` // the agent
	Guard    Process    `json:"guard"`
	State    LeaseState `json:"state"`
	Since    time.Time  `json:"since"`    // when the freeze was about to be sent
	Deadline time.Time  `json:"deadline"` // by when the guard thaws at the latest
	Problem  string     `json:"problem,omitempty"`
}

// Leases returns the outstanding leases in dir, oldest first. Those that can be
// read are returned also when others cannot. A directory that does not exist
// has none.
func Leases(dir string) ([]Lease, error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var leases []Lease
	var errs []error
	for _, entry := range entries {
		if !leaseName.MatchString(entry.Name()) {
			continue
		}
		l, err := readLease(root, entry.Name())
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile: the guest is thawed
		case err != nil:
			errs = append(errs, fmt.Errorf("lease %s: %w", entry.Name(), err))
		default:
			leases = append(leases, l)
		}
	}
	slices.SortFunc(leases, func(a, b Lease) int { return a.Since.Compare(b.Since) })
	return leases, errors.Join(errs...)
}

// leaseName matches the files that are leases, not those half written.
var leaseName = regexp.MustCompile(`^[0-9a-f]{20}\.json$`)

// longestLease is more than any request fills.
const longestLease = 1 << 20

func readLease(root *os.Root, name string) (Lease, error) {
	f, err := root.Open(name)
	if err != nil {
		return Lease{}, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, longestLease+1))
	if err != nil {
		return Lease{}, err
	}
	l, err := parseLease(b)
	if err == nil && l.ID+".json" != name {
		err = fmt.Errorf("it is of lease %q", l.ID)
	}
	return l, err
}

func parseLease(b []byte) (Lease, error) {
	var l Lease
	if len(b) > longestLease {
		return l, fmt.Errorf("more than %d bytes", longestLease)
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return l, err
	}
	return l, l.Request.check()
}

// write makes the lease durable: whoever reads it sees all of it or its former
// content, whenever the host loses power.
func (l Lease) write(dir string) (err error) {
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	temp := l.ID + ".tmp"
	if err := writeSynced(root, temp, append(b, '\n')); err != nil {
		return errors.Join(err, discard(root, temp))
	}
	if err := root.Rename(temp, l.ID+".json"); err != nil {
		return errors.Join(err, discard(root, temp))
	}
	return syncDir(root)
}

func writeSynced(root *os.Root, name string, b []byte) (err error) {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

func syncDir(root *os.Root) (err error) {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

// remove forgets the lease. If that is lost with the host's power, recovery
// finds a guest that has ended or is thawed.
func (l Lease) remove(dir string) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	return discard(root, l.ID+".json")
}

func discard(root *os.Root, name string) error {
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
