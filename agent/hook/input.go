package hook

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode"
)

// InputVersion is the version of the JSON on standard input. Members may be
// added to it; one that changes its meaning changes the version.
const InputVersion = 1

// Input is what a hook is told.
type Input struct {
	Version   int       `json:"version"`
	Phase     Phase     `json:"phase"`
	Operation Operation `json:"operation"`
	VM        *VM       `json:"vm,omitempty"`
	Snapshot  *Snapshot `json:"snapshot,omitempty"`
	Failure   *Failure  `json:"failure,omitempty"` // why the operation failed
	Recovered bool      `json:"recovered"`         // an earlier vmsnapd began the operation and was cut off
}

// Operation is the operation that runs the hook.
type Operation struct {
	ID   string `json:"id"`
	Kind string `json:"kind"`
	UID  uint32 `json:"uid"` // who asked for it
}

// VM is the VM that the operation is about.
type VM struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	UUID string `json:"uuid,omitempty"`
	PID  int    `json:"pid,omitempty"` // of its QEMU process; 0 when it is stopped
}

// Snapshot is a snapshot that is taken or restored.
type Snapshot struct {
	ID          string            `json:"id,omitempty"` // empty until it is recorded
	Name        string            `json:"name"`
	Labels      map[string]string `json:"labels,omitempty"`
	Disks       []string          `json:"disks"`
	Memory      bool              `json:"memory"`
	Quiesce     string            `json:"quiesce"`               // that was asked for: require, prefer or none
	Consistency string            `json:"consistency,omitempty"` // empty until it is recorded
	Layers      []Layer           `json:"layers,omitempty"`      // that hold it, once it is recorded
}

// Layer is the file that holds a disk of a snapshot.
type Layer struct {
	Disk   string `json:"disk"`
	Path   string `json:"path"`
	Format string `json:"format"`
}

// Failure is how an operation failed. The message may have words of the guest,
// and is in no environment.
type Failure struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
}

// JSON returns what the hook finds on standard input.
func (in Input) JSON() ([]byte, error) {
	in.Version = InputVersion
	b, err := json.Marshal(in)
	return append(b, '\n'), err
}

// path is where a hook finds programs.
const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Env returns the environment of a hook. Control characters in names, which come
// from launch commands and callers, are escaped as \xNN.
func (in Input) Env(socket string) []string {
	env := []string{"PATH=" + path, "HOME=/", "LANG=C.UTF-8"}
	set := func(name, value string) { env = append(env, "VMSNAP_"+name+"="+escape(value)) }
	set("PHASE", string(in.Phase))
	set("OPERATION", in.Operation.ID)
	set("OPERATION_KIND", in.Operation.Kind)
	set("UID", fmt.Sprint(in.Operation.UID))
	set("SOCKET", socket)
	if in.Recovered {
		set("RECOVERED", "1")
	}
	if in.VM != nil {
		set("VM", in.VM.Name)
		set("VM_ID", in.VM.ID)
		set("VM_UUID", in.VM.UUID)
	}
	if s := in.Snapshot; s != nil {
		set("SNAPSHOT", s.Name)
		set("SNAPSHOT_ID", s.ID)
		set("CONSISTENCY", s.Consistency)
		set("QUIESCE", s.Quiesce)
		if s.Memory {
			set("MEMORY", "1")
		}
	}
	if in.Failure != nil {
		set("FAILURE", in.Failure.Kind)
	}
	return env
}

func escape(s string) string {
	if !strings.ContainsFunc(s, unicode.IsControl) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unicode.IsControl(r) {
			fmt.Fprintf(&b, `\x%02x`, r)
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}
