package memdump

import (
	"context"
	"fmt"
	"regexp"
	"strconv"

	"github.com/vmsnap/vmsnap/monitor"
)

// Version is a version of QEMU.
type Version struct{ Major, Minor, Micro int }

// AtLeast reports whether it is this version or a newer one.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

func versionOf(s *monitor.Session) Version {
	q := s.Version().QEMU
	return Version{q.Major, q.Minor, q.Micro}
}

// Facts are what decides how the memory of a VM can be saved.
type Facts struct {
	Version Version
	Status  monitor.RunState
	Running bool // the guest's CPUs run

	RAM      uint64 // bytes that a save covers, video memory and firmware included
	Resident uint64 // bytes of it that the guest has touched; RAM if unknown
	Huge     uint64 // bytes of these in huge pages

	Blocked  []string // why QEMU refuses any migration
	Tracking string   // why write tracking cannot be used, "" if it can
	Inexact  string   // why precopy would miss changes of the memory, "" if it would not
	Busy     string   // a migration that is under way, as its status
}

// Probe asks QEMU, and the kernel about the process with this pid, for what
// decides how its memory can be saved. Nothing is changed. Without a pid (0)
// the kernel is not asked, and what QEMU itself refuses is left to Prepare.
func Probe(ctx context.Context, s *monitor.Session, pid int) (Facts, error) {
	f := Facts{Version: versionOf(s)}
	status, err := s.QueryStatus(ctx)
	if err != nil {
		return f, fmt.Errorf("probe memory: %w", err)
	}
	f.Status, f.Running = status.Status, status.Running
	m, err := s.QueryMigrate(ctx)
	if err != nil {
		return f, fmt.Errorf("probe memory: %w", err)
	}
	f.Blocked = m.BlockedReasons
	if underWay(m.Status) {
		f.Busy = string(m.Status)
	}
	if f.RAM, err = ramSize(ctx, s); err != nil {
		return f, fmt.Errorf("probe memory: %w", err)
	}
	f.Resident = f.RAM
	if pid != 0 {
		use, err := residentMemory(pid)
		if err != nil {
			return f, fmt.Errorf("probe memory: %w", err)
		}
		f.Resident, f.Huge = min(use.resident, f.RAM), min(use.huge, f.RAM)
	}
	if f.Tracking, err = trackingObstacle(ctx, s, pid); err != nil {
		return f, fmt.Errorf("probe memory: %w", err)
	}
	if f.Inexact, err = precopyObstacle(ctx, s, f.Version); err != nil {
		return f, fmt.Errorf("probe memory: %w", err)
	}
	return f, nil
}

// precopyObstacle returns why QEMU would not see all that the guest changes while
// it migrates. Before 9.0 it forgets to tell the CPUs that it emulates itself when
// it looks anew for changed pages, so that they do not note the next change
// ("physmem: Fix migration dirty bitmap coherency with TCG memory access"). With
// KVM the kernel notes them.
func precopyObstacle(ctx context.Context, s *monitor.Session, v Version) (string, error) {
	if v.AtLeast(9, 0) {
		return "", nil
	}
	var kvm struct {
		Enabled bool `json:"enabled"`
	}
	if err := s.Execute(ctx, "query-kvm", nil, &kvm); err != nil || kvm.Enabled {
		return "", err
	}
	return "QEMU before 9.0 misses changes of the memory of a guest that it emulates, without KVM", nil
}

// What a stream holds beside the pages: a header of each page, of at most
// pageHeader bytes on average, and the state of all devices.
const (
	pageSize    = 4096
	pageHeader  = 16
	deviceState = 64 << 20
)

// Reserve is the most that a save takes in bytes if it saves each page once, as
// background and stopped do.
func (f Facts) Reserve() uint64 { return f.RAM + f.RAM/pageSize*pageHeader + deviceState }

// underWay tells whether a migration has begun and not ended.
func underWay(s monitor.MigrationStatus) bool {
	switch s {
	case "", monitor.MigrationNone, monitor.MigrationCompleted, monitor.MigrationFailed, monitor.MigrationCancelled:
		return false
	}
	return true
}

// ramSize returns how much memory QEMU would migrate, in bytes: all RAM blocks,
// which only HMP lists. Without a list that makes sense it is what the guest
// was given.
func ramSize(ctx context.Context, s *monitor.Session) (uint64, error) {
	var summary struct {
		Base    uint64 `json:"base-memory"`
		Plugged uint64 `json:"plugged-memory"`
	}
	if err := s.Execute(ctx, "query-memory-size-summary", nil, &summary); err != nil {
		return 0, err
	}
	blocks, err := ask(ctx, s, "info ramblock")
	if err != nil {
		return 0, err
	}
	return max(summary.Base+summary.Plugged, sumBlocks(blocks)), nil
}

// ask runs a line of QEMU's human monitor that only asks.
func ask(ctx context.Context, s *monitor.Session, line string) (string, error) {
	var text string
	err := s.Execute(ctx, "human-monitor-command", map[string]string{"command-line": line}, &text)
	return text, err
}

// ramBlock matches a line of "info ramblock": name, page size, and the offset,
// used and total length, in hexadecimal.
var ramBlock = regexp.MustCompile(`(?m)\s\d+ [KMGTPE]?i?B\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x[0-9a-f]+`)

// maxBlocks bounds the sum of the lengths of RAM blocks: no machine has 2^56
// bytes.
const maxBlocks = 1 << 56

// sumBlocks adds the used lengths in the list of RAM blocks.
func sumBlocks(list string) uint64 {
	var sum uint64
	for _, m := range ramBlock.FindAllStringSubmatch(list, -1) {
		n, err := strconv.ParseUint(m[1], 16, 64)
		if err != nil || n > maxBlocks || sum+n > maxBlocks {
			return 0
		}
		sum += n
	}
	return sum
}
