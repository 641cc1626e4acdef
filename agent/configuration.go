package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/monitor"
)

// configuration is what a snapshot keeps of a VM besides its disks: what is
// needed to make it again.
type configuration struct {
	Command     []string `json:"command"`
	QEMUVersion string   `json:"qemu_version"`
	Machine     string   `json:"machine,omitempty"` // as given
	CPU         string   `json:"cpu,omitempty"`     // as given
	MemoryBytes uint64   `json:"memory_bytes,omitempty"`
	Unit        string   `json:"unit,omitempty"`
	UUID        string   `json:"uuid,omitempty"`
	// What an alias like "pc", or nothing, stood for. Memory loads only into the
	// very same.
	MachineType string   `json:"machine_type,omitempty"` // pc-i440fx-7.2
	CPUType     string   `json:"cpu_type,omitempty"`     // qemu64-x86_64-cpu
	CPUs        int      `json:"cpus,omitempty"`
	Devices     []string `json:"devices,omitempty"` // ids of all devices that have one
	// How QEMU was started, beside its command line.
	Binary    string `json:"binary,omitempty"`
	Directory string `json:"directory,omitempty"` // that relative paths start from
	UID       *int   `json:"uid,omitempty"`
	GID       int    `json:"gid,omitempty"`
	Groups    []int  `json:"groups,omitempty"` // supplementary
	Slice     string `json:"slice,omitempty"`
	Foreign   bool   `json:"foreign,omitempty"` // in a file system tree of its own, such as a container's
	Paused    bool   `json:"paused,omitempty"`  // the guest did not run
}

// encode is the configuration as a snapshot keeps it.
func (c configuration) encode() (json.RawMessage, error) { return json.Marshal(c) }

// machine is what the VM can be started again by.
func (c configuration) machine() launch.Machine {
	m := launch.Machine{
		Command: c.Command, Binary: c.Binary, Type: c.MachineType, Directory: c.Directory, GID: c.GID, Groups: c.Groups,
		Unit: c.Unit, Slice: c.Slice, Foreign: c.Foreign,
	}
	if c.UID != nil {
		m.UID = *c.UID
	}
	return m
}

// configuration asks QEMU for what the launch command leaves open.
func (r *run) configuration(ctx context.Context, s *monitor.Session) (configuration, error) {
	r.mu.Lock()
	c := configuration{
		Command: r.proc.Args, QEMUVersion: r.version, Machine: r.proc.Machine, CPU: r.proc.CPU,
		MemoryBytes: r.proc.MemoryBytes, Unit: r.proc.Cgroup.Unit, UUID: r.proc.UUID,
		Binary: r.proc.Binary, Directory: r.proc.Cwd, UID: &r.proc.UID, GID: r.proc.GID, Groups: r.proc.Groups,
		Slice: r.proc.Cgroup.Slice, Foreign: r.proc.Root != "",
	}
	r.mu.Unlock()
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return c, err
	}
	c.Paused = st.Status == monitor.RunStatePaused || st.Status == monitor.RunStatePrelaunch
	machine, err := qomType(ctx, s, "/machine")
	if err != nil {
		return c, err
	}
	c.MachineType = strings.TrimSuffix(machine, "-machine")
	cpus, err := s.QueryCPUsFast(ctx)
	if err != nil {
		return c, err
	}
	if c.CPUs = len(cpus); c.CPUs > 0 {
		if c.CPUType, err = qomType(ctx, s, cpus[0].QOMPath); err != nil {
			return c, err
		}
	}
	var children []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err := s.Execute(ctx, "qom-list", map[string]string{"path": "/machine/peripheral"}, &children); err != nil {
		return c, err
	}
	for _, child := range children {
		if strings.HasPrefix(child.Type, "child<") {
			c.Devices = append(c.Devices, child.Name)
		}
	}
	slices.Sort(c.Devices)
	return c, nil
}

// qomType returns the type of an object in QEMU's composition tree.
func qomType(ctx context.Context, s *monitor.Session, path string) (string, error) {
	var name string
	err := s.Execute(ctx, "qom-get", map[string]string{"path": path, "property": "type"}, &name)
	return name, err
}

// plugged are the devices that are not in the launch command: a process that is
// started by it lacks them.
func (c configuration) plugged() []string {
	var ids []string
	for _, id := range c.Devices {
		if !slices.ContainsFunc(c.Command, func(arg string) bool {
			return slices.Contains(strings.Split(arg, ","), "id="+id) || strings.Contains(arg, `"`+id+`"`)
		}) {
			ids = append(ids, id)
		}
	}
	return ids
}

// unrestorable says why a process with this configuration could not be started
// again to load its memory, or returns nothing.
func (c configuration) unrestorable() []string {
	var why []string
	for _, id := range c.plugged() {
		why = append(why, fmt.Sprintf("device %s was plugged in after the start and is not in the launch command", id))
	}
	return why
}
