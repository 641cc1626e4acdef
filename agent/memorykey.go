package agent

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/memdump"
)

// MemorySealing says that memory files are encrypted, and with what.
type MemorySealing struct {
	// Setting is what the key was configured as, for messages.
	Setting string
	// Key reads the key. It is called each time that one is needed: a key that has
	// become usable is used.
	Key func() (*memdump.Key, error)
}

// memoryRecipient returns whom new memory files are encrypted to; "" when they are
// to stay plain. Memory that is to be encrypted and cannot be is not saved at all.
func (a *Agent) memoryRecipient() (string, *fault.Error) {
	if a.cfg.Sealing == nil {
		return "", nil
	}
	key, err := a.cfg.Sealing.Key()
	if err != nil {
		return "", fault.New(fault.Failed, "memory is to be encrypted, and the key (memory-key: %s) cannot be used: %v", a.cfg.Sealing.Setting, err).
			WithHint("put the key right, or take the snapshot without memory: none is saved in plain as long as memory-key is set")
	}
	return key.Recipient(), nil
}

// keyFor returns the key that a complete memory file is read with, nil for one that
// is not encrypted. Its errors name the file, whom it is encrypted to, and the
// setting.
func (a *Agent) keyFor(root *os.Root, path string) (*memdump.Key, error) {
	h, sum, err := memdump.Inspect(root, filepath.Base(path))
	if err != nil || sum.Encryption == "" {
		return nil, err
	}
	if a.cfg.Sealing == nil {
		return nil, fault.New(fault.Failed, "%s: %w (memory-key is not set)", path, &memdump.KeyError{Recipient: h.Recipient}).
			WithHint("set memory-key to the key of that recipient, and restart vmsnapd; the disks can be restored without it")
	}
	key, err := a.cfg.Sealing.Key()
	if err != nil { // not as the cause: a key that is not there is no memory that is not there
		return nil, fault.New(fault.Failed, "%s is encrypted to %s, and the key (memory-key: %s) cannot be used: %v", path, h.Recipient, a.cfg.Sealing.Setting, err).
			WithHint("put the key right; the disks can be restored without it")
	}
	if err := key.Opens(h.Recipient); err != nil {
		return nil, fault.New(fault.Failed, "%s: %w (memory-key: %s)", path, err, a.cfg.Sealing.Setting).
			WithHint("add the key of that recipient to the file, on a line of its own; the disks can be restored without it")
	}
	return key, nil
}

// checkMemoryKey tells at the start what would otherwise show at the next snapshot
// with memory only.
func (a *Agent) checkMemoryKey() {
	if _, err := a.memoryRecipient(); err != nil {
		a.log.Error("snapshots with memory are refused", "error", err.Error())
	}
}

// memoryKey says whether memory can be encrypted as it is configured.
func (f hostFacts) memoryKey() HostCheck {
	switch {
	case f.keyError != nil:
		return HostCheck{hostMemoryKey, HostBroken, "snapshots with memory are refused: " + f.keyError.Message, f.keyError.Hint}
	case f.recipient == "":
		return works(hostMemoryKey, "memory files are not encrypted: memory-key is not set")
	}
	return works(hostMemoryKey, "memory files are encrypted to %s", f.recipient)
}

// forgetPlain turns the failure to overwrite a memory file that has gone into a
// warning in the log: there is nothing left that could be tried again.
func (c *cut) forgetPlain(err error) error {
	if errors.Is(err, memdump.ErrNotOverwritten) {
		c.o.Logger().Warn("plain memory may be on the disk still", "error", err)
		return nil
	}
	return err
}
