package agent

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/discover"
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
}

// configuration asks QEMU for what the launch command leaves open.
func (r *run) configuration(ctx context.Context, s *monitor.Session) (configuration, error) {
	r.mu.Lock()
	c := configuration{
		Command: r.proc.Args, QEMUVersion: r.version, Machine: r.proc.Machine, CPU: r.proc.CPU,
		MemoryBytes: r.proc.MemoryBytes, Unit: r.proc.Cgroup.Unit, UUID: r.proc.UUID,
	}
	r.mu.Unlock()
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

// inherited matches the parts of options that name an open file of the process
// that started QEMU: tap,fd=24 or vhostfds=30:31 or /dev/fdset/2.
var inherited = regexp.MustCompile(`(^|,)((vhost)?fds?|sockfd)=[0-9]|/dev/fd(set)?/[0-9]`)

// unrestorable says why a process with this configuration could not be started
// again to load its memory, or returns nothing.
func (c configuration) unrestorable(p discover.Process) []string {
	var why []string
	for _, arg := range c.Command {
		if inherited.MatchString(arg) {
			why = append(why, fmt.Sprintf("%q uses a file that whoever started QEMU had open", arg))
		}
	}
	for _, id := range c.Devices {
		if !slices.ContainsFunc(c.Command, func(arg string) bool {
			return slices.Contains(strings.Split(arg, ","), "id="+id) || strings.Contains(arg, `"`+id+`"`)
		}) {
			why = append(why, fmt.Sprintf("device %s was plugged in after the start and is not in the launch command", id))
		}
	}
	if p.Incoming != "" {
		why = append(why, "the launch command waits for an incoming migration itself")
	}
	return why
}
