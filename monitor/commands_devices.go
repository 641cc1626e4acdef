package monitor

import "context"

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
