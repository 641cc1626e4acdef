package monitor

import (
	"context"
	"strings"
)

// A Chardev is one character device (ChardevInfo in qapi/char.json).
type Chardev struct {
	Label    string `json:"label"`    // its id
	Filename string `json:"filename"` // what it is connected to, in QEMU's words
	// FrontendOpen tells whether the guest has the device open; for the port of
	// a guest agent it hints that the agent runs.
	FrontendOpen bool `json:"frontend-open"`
}

// QueryChardev returns all character devices.
func (s *Session) QueryChardev(ctx context.Context) ([]Chardev, error) {
	var r []Chardev
	err := s.Execute(ctx, "query-chardev", nil, &r)
	return r, err
}

// A CPU is one virtual CPU (CpuInfoFast in qapi/machine.json).
type CPU struct {
	Index    int    `json:"cpu-index"`
	QOMPath  string `json:"qom-path"`
	ThreadID int    `json:"thread-id"` // host thread
	Target   string `json:"target"`    // such as "x86_64"
}

// QueryCPUsFast returns the virtual CPUs without interrupting them.
func (s *Session) QueryCPUsFast(ctx context.Context) ([]CPU, error) {
	var r []CPU
	err := s.Execute(ctx, "query-cpus-fast", nil, &r)
	return r, err
}

// NetDevices returns the ids of the back ends of all network devices, as set_link
// takes them. Those that -nic has made for the machine hang on no peripheral.
func (s *Session) NetDevices(ctx context.Context) ([]string, error) {
	var names []string
	for _, parent := range []string{"/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"} {
		devices, err := s.qomList(ctx, parent)
		if err != nil {
			return nil, err
		}
		for _, d := range devices {
			if !strings.HasPrefix(d.Type, "child<") || d.Type == "child<memory-region>" {
				continue
			}
			path := parent + "/" + d.Name
			properties, err := s.qomList(ctx, path)
			if err != nil {
				return nil, err
			}
			for _, p := range properties {
				if p.Name != "netdev" {
					continue
				}
				var id string
				if err := s.Execute(ctx, "qom-get", map[string]string{"path": path, "property": p.Name}, &id); err != nil {
					return nil, err
				}
				if id != "" {
					names = append(names, id)
				}
			}
		}
	}
	return names, nil
}

// qomProperty is an element of qom-list (qapi/qom.json, ObjectPropertyInfo).
type qomProperty struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

func (s *Session) qomList(ctx context.Context, path string) ([]qomProperty, error) {
	var list []qomProperty
	err := s.Execute(ctx, "qom-list", map[string]string{"path": path}, &list)
	return list, err
}
