package catalog

import (
	"encoding/json"
	"time"

	"github.com/vmsnap/vmsnap/agent/op"
)

// VM is a virtual machine that was seen at least once.
type VM struct {
	ID        string // assigned by the catalog; never changes
	Name      string
	UUID      string // empty when the launch command gives none
	Identity  string // what identifies it: "uuid:…", "name:…" or "path:…"; unique
	Unit      string // its own systemd unit when it has one
	FirstSeen time.Time
	LastSeen  time.Time
	// Stopped is how the last QEMU process ended: "" while it runs or when
	// nobody saw it, "shutdown" for a guest shutdown that was witnessed,
	// "killed" otherwise, "migrated" after postmigrate.
	Stopped string
	Command []string // the last launch command seen
}

// Disk is one writable drive of a VM.
type Disk struct {
	ID           string
	VMID         string
	Device       string // its label: qdev id, else drive id, else node name
	LaunchPath   string // the file name by which the launch command opens it, resolved and absolute
	LaunchFormat string // the declared format; "" when the command leaves it to probing
	ActiveLayer  string // id of the layer that is written to
	SettleNeeded bool   // the launch path does not name the active layer yet
	Removed      bool   // no longer a disk of the VM
	Attached     bool   // plugged in by the agent while QEMU runs, with which it ends
}

// Layer is one image file of a disk.
type Layer struct {
	ID          string
	DiskID      string
	Parent      string // id of its backing layer; empty for the lowest known one
	Path        string // permanent name; for a layer never covered so far, the launch path
	Format      string // "qcow2" or "raw"
	VirtualSize uint64 // bytes
	Dev, Ino    uint64 // which file it is; 0 and 0 for a block device
	Device      string // what a block device is known by, also after a restart of the host; empty for a file
	Foreign     bool   // below the first active layer that the agent saw: never written
	Immutable   bool   // the immutable flag was set by the agent; for a block device the read-only flag
	Covered     bool   // another layer lies on it: nothing may write to it
	Operation   string // the operation that made it; empty when found
	Created     time.Time
}

// Consistency says what a snapshot's disks can be trusted for.
type Consistency string

// The levels of consistency.
const (
	Crash      Consistency = "crash"
	Filesystem Consistency = "filesystem"
	Memory     Consistency = "memory"
	Offline    Consistency = "offline"
)

// PointState says whether what a snapshot holds can be restored.
type PointState string

// The states of a snapshot's restore points.
const (
	PointValid    PointState = "valid"
	PointDeleting PointState = "deleting" // its layers are being merged, or will be
	PointInvalid  PointState = "invalid"  // a merge of one of its layers was begun and not finished
)

// Snapshot is a named point in time of a VM.
type Snapshot struct {
	ID          string
	VMID        string
	VMName      string
	Name        string // unique in its VM
	Description string
	Labels      map[string]string
	Created     time.Time // when the cut was taken
	Consistency Consistency
	Quiesce     Quiesce
	Warnings    []op.Warning
	Operation   string
	Disks       []SnapshotDisk
	Config      json.RawMessage // the VM's configuration at the cut
	Partial     bool            // a disk that was asked for dropped out
	Memory      *SavedMemory    // nil when memory was not saved
	Group       *GroupCut       // nil when it was taken by itself
	Automatic   bool            // taken by a restore, of the state before
	Template    bool            // it is not to be deleted
	Expires     time.Time       // when it is to be deleted by itself; zero: never
	State       PointState      // PointValid when it is recorded without one
}

// GroupCut is what the snapshots of a group have in common.
type GroupCut struct {
	Operation string        `json:"operation"`
	Name      string        `json:"name"`
	Members   int           `json:"members"` // VMs that were asked for
	Skew      time.Duration `json:"skew"`    // the cuts lie no further apart
}

// SavedMemory is the file that holds a guest's memory of the cut's instant.
type SavedMemory struct {
	Path       string        `json:"path"`     // absolute
	Strategy   string        `json:"strategy"` // background, precopy or stopped
	Reason     string        `json:"reason"`   // why that one
	Size       uint64        `json:"size"`     // bytes of the file
	StreamSize uint64        `json:"stream_size"`
	Compressed bool          `json:"compressed"`
	Recipient  string        `json:"recipient,omitempty"` // that it is encrypted to, with age; "": it is plain
	Checksum   string        `json:"checksum"`            // over the whole file, hexadecimal
	RAM        uint64        `json:"ram"`                 // the guest's, bytes
	Pause      time.Duration `json:"pause"`               // how long its CPUs stood still
	Duration   time.Duration `json:"duration"`            // from the cut until all was saved
}

// Quiesce is what the freeze came to.
type Quiesce struct {
	Requested string        `json:"requested"`        // require, prefer or none
	Reason    string        `json:"reason,omitempty"` // why the guest was not frozen, or not verifiably
	Frozen    int           `json:"frozen"`           // file systems frozen at the cut
	Total     int           `json:"total"`            // file systems that the guest reports
	Window    time.Duration `json:"window"`           // freeze request to thaw reply; 0 when not frozen
}

// SnapshotDisk is one disk in a snapshot.
type SnapshotDisk struct {
	DiskID   string
	Device   string
	LayerID  string // the restore point; empty when excluded
	Size     uint64 // virtual size, bytes
	Excluded bool
}
