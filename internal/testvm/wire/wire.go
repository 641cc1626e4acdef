// Package wire is what a test guest and its host agree on: the names of the
// virtio-serial ports between them, the messages of the control port, and the
// form of the records that the guest's writers put on their file systems.
//
// The control port carries JSON, one message a line. Requests carry an id and
// may overtake each other; the guest answers each by its id. Messages of the
// guest without an id are events.
package wire

// Names of the virtio-serial ports.
const (
	AgentPort     = "org.qemu.guest_agent.0"
	ControlPort   = "org.vmsnap.testvm.control"
	HeartbeatPort = "org.vmsnap.testvm.heartbeat"
	WritesPort    = "org.vmsnap.testvm.writes"
)

// MountsParameter is the kernel parameter that holds the labels of the file
// systems to mount, separated by commas. The file system labelled L is mounted
// at MountRoot/L, whatever device it is on.
const MountsParameter = "testvm.mounts="

// MountRoot is the directory that file systems are mounted in.
const MountRoot = "/mnt"

// WithParameter is the kernel parameter that holds what the guest has beyond
// the ordinary, separated by commas; modules that only this needs are loaded
// only then.
const WithParameter = "testvm.with="

// What WithParameter can name.
const (
	WithHook = "hook" // a freeze hook, in the fw_cfg file FreezeHookFile
	WithSCSI = "scsi" // disks on a virtio-scsi controller
	WithIDE  = "ide"  // disks on an IDE controller
)

// FreezeHookFile is the fw_cfg file that holds the freeze hook.
const FreezeHookFile = "opt/vmsnap/fsfreeze-hook"

// Op says what a request asks for.
type Op string

// The operations of the control port.
const (
	OpExec         Op = "exec"          // run Command with `sh -c`, Data on its standard input
	OpWrite        Op = "write"         // write Data to Path and make it durable
	OpRead         Op = "read"          // answer the content of Path
	OpStartWriters Op = "start-writers" // start the heartbeat and a writer for each mounted file system
	OpStopWriters  Op = "stop-writers"  // stop them; answered when they have stopped
	OpScan         Op = "scan"          // answer the last sequence number on the file system labelled Path
	OpStartAgent   Op = "start-agent"   // start qemu-ga anew
	OpPowerOff     Op = "power-off"     // unmount and power off

	OpStartCounter Op = "start-counter" // count in memory and on each mounted file system, and compare them
	OpCount        Op = "count"         // answer the counter, or what was wrong with it
	OpDirty        Op = "dirty"         // change Rate bytes per second of Size bytes of memory from now on
)

// Request is a message of the host to the guest.
type Request struct {
	ID      uint64 `json:"id"`
	Op      Op     `json:"op"`
	Command string `json:"command,omitempty"`
	Path    string `json:"path,omitempty"`
	Data    []byte `json:"data,omitempty"`
	Rate    int64  `json:"rate,omitempty"`
	Size    int64  `json:"size,omitempty"`
}

// Reply answers the request with the same id. Err is set if the request could
// not be carried out; a command that ran and failed has a Code instead.
type Reply struct {
	ID       uint64 `json:"id,omitempty"`
	Event    string `json:"event,omitempty"`
	Err      string `json:"err,omitempty"`
	Stdout   []byte `json:"stdout,omitempty"`
	Stderr   []byte `json:"stderr,omitempty"`
	Code     int    `json:"code,omitempty"`
	Sequence uint64 `json:"sequence,omitempty"`
}

// EventReady is sent once after each boot, when the file systems are mounted
// and the guest agent was started.
const EventReady = "ready"
