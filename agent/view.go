package agent

import (
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// State is what is known of a VM's execution.
type State string

// The states of a VM.
const (
	Running State = "running"
	Paused  State = "paused"
	Stopped State = "stopped"
	Unknown State = "unknown" // a QEMU process exists and does not tell its state
)

// VMView is a VM as it is shown to callers: a copy, safe to keep.
type VMView struct {
	ID, Name, UUID      string
	State               State
	RunState            string       // QEMU's own run state; empty when stopped or unknown
	Process             *ProcessView // nil when no QEMU process runs
	GuestAgent          GuestAgentView
	Disks               []DiskView
	Problems            []Problem
	Operation           string // id of the operation that runs on it
	Freeze              *FreezeView
	FirstSeen, LastSeen time.Time
	Snapshots           int
	Space               *VMSpace // nil until it has been measured
	OutOfSpace          bool     // QEMU has stopped the guest, since a disk could not grow
}

// ProcessView is the QEMU process of a VM.
type ProcessView struct {
	PID         int
	Started     time.Time
	QEMUVersion string // empty until the monitor has told it
	Binary      string
	Unit, Slice string
	CgroupMode  string // v1, v2 or hybrid
	QMPSocket   string // the socket in use
}

// Presence is what is known of a guest agent without asking it.
type Presence string

// The presences of a guest agent.
const (
	NoChannel    Presence = "none"
	Disconnected Presence = "disconnected"
	Connected    Presence = "connected"
)

// GuestAgentView is the guest agent of a VM.
type GuestAgentView struct {
	Presence Presence
	Socket   string
}

// DiskView is one writable drive.
type DiskView struct {
	Device       string
	Node         string
	Bus          string
	LaunchPath   string
	LaunchFormat string
	VirtualSize  uint64
	Layers       []LayerView // the active layer first
	Throttled    bool
	IOThread     string
	NotCuttable  string // why it cannot be snapshotted; empty when it can
	SettleNeeded bool
	SpaceLow     bool // less is free where it grows than is to be
}

// LayerView is one image file of a disk.
type LayerView struct {
	ID, Path, Format       string
	VirtualSize, Allocated uint64
	Foreign, Immutable     bool
	VM                     string // another VM whose layer it is: the disk is a linked clone
}

// Problem is something wrong with a VM, and what to do about it.
type Problem struct {
	Code, Message, Hint string
}

// FreezeView is a guest that the agent holds frozen.
type FreezeView struct {
	Since, Deadline time.Time
	Frozen, Total   int
	Operation       string
	Unresolved      bool // the guest's agent does not answer; it may be frozen still
}

// Discovery says how processes are found.
type Discovery struct {
	Source string // "netlink" or "scan"
	Reason string // why scanning is used
}

// FreezeRequest asks for a guest to be held frozen.
type FreezeRequest struct {
	VM            string
	Lease         time.Duration // 0: DefaultLease
	FreezeTimeout time.Duration // 0: DefaultFreezeTimeout
	Mountpoints   []string
	UID           uint32
}

// ThawResult is the end of a freeze.
type ThawResult struct {
	WasFrozen bool          // the guest said so just before the thaw
	Window    time.Duration // freeze request to thaw reply
}

// SnapshotRequest asks for a snapshot.
type SnapshotRequest struct {
	VM            string
	Name          string // generated when empty
	Description   string
	Labels        map[string]string
	Disks         []string // all when empty
	Exclude       []string
	Quiesce       Quiesce
	Mountpoints   []string
	FreezeTimeout time.Duration // 0: DefaultFreezeTimeout
	Lease         time.Duration // 0: DefaultLease
	Strict        bool
	AllowPartial  bool
	Memory        bool
	Strategy      MemoryStrategy // chosen when empty
	MaxPause      time.Duration  // 0: no limit
	Compress      bool
	ExpireAfter   time.Duration // it is deleted by itself so long after its cut; 0: never
	Profile       string        // fills in what the others leave open; none when empty
	RequestID     string        `json:"-"`
	UID           uint32        `json:"-"`

	Group *Group `json:",omitempty"` // that it is a part of

	// What only a profile says.
	DiskPatterns    []string `json:",omitempty"`
	ExcludePatterns []string `json:",omitempty"`
	Hooks           *string  `json:",omitempty"` // directory of the hooks; empty: none; nil: the usual one
}

// MemoryStrategy is a way to save memory. See package memdump, whose words
// these are.
type MemoryStrategy string

// The ways to save memory.
const (
	MemoryBackground MemoryStrategy = "background"
	MemoryPrecopy    MemoryStrategy = "precopy"
	MemoryStopped    MemoryStrategy = "stopped"
)

// Quiesce chooses whether the guest is frozen for the cut.
type Quiesce string

// The ways to quiesce.
const (
	QuiescePrefer  Quiesce = "prefer" // also the meaning of "", unless memory is saved
	QuiesceRequire Quiesce = "require"
	QuiesceNone    Quiesce = "none"
)

// The defaults of a freeze.
const (
	DefaultFreezeTimeout = 15 * time.Second
	DefaultLease         = 30 * time.Second
)

// Plan is what a snapshot would do.
type Plan struct {
	VM          string
	Name        string
	Disks       []PlanDisk
	Warnings    []op.Warning
	Blockers    []*fault.Error // why it would be refused
	Consistency catalog.Consistency
	Window      time.Duration // predicted freeze window; 0 when unknown or nothing is frozen
	Live        bool          // the VM runs
	Memory      *PlanMemory   // nil when memory is not saved
}

// PlanMemory is what saving the memory would take. Sizes are bytes.
type PlanMemory struct {
	Strategy  MemoryStrategy
	Reason    string
	Directory string // where the file is made
	Free      uint64 // there
	Reserve   uint64 // set aside for the file
	Recipient string // that it would be encrypted to; "" when it is not
	RAM       uint64
	Bytes     uint64 // predicted size of what is saved
	Duration  time.Duration
	Pause     time.Duration
	DirtyRate uint64 // bytes a second; 0 when unknown
}

// PlanDisk is one disk in a plan.
type PlanDisk struct {
	Device      string
	Excluded    bool
	Directory   string // where the overlay is made
	Free        uint64 // bytes free there
	VirtualSize uint64
	Settle      Settle
}

// Settle is how a launch path is made to name the active layer.
type Settle string

// The ways to settle.
const (
	SettleLive    Settle = "live"    // at the cut, by a hard link
	SettleConvert Settle = "convert" // by converting to the declared format, once the VM has stopped
	SettleDevice  Settle = "device"  // by writing the newest state into the block device, once the VM has stopped
)

// SnapshotFilter chooses snapshots.
type SnapshotFilter struct {
	VM      string // all when empty
	Labels  map[string]string
	Visible Visible
}

// OperationFilter chooses operations.
type OperationFilter struct {
	VM      string
	Active  bool
	Visible Visible
	Limit   int // 0: 100
}

// SnapshotView is a snapshot with the layers that it names.
type SnapshotView struct {
	catalog.Snapshot
	Layers map[string]LayerView // by layer id
	Space  *SnapshotSpace       // nil until it has been measured, and when it cannot be
	Clones []CloneView          // that lie on one of its restore points
	Position
	Here      *Position // where the VM's disks are now, if this is the parent of that; nil else
	Previewed bool      // with Here: what they hold is a trial state
}
