package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// powerOff unmounts and ends the machine. It does not return, unless with an
// error.
func (s *server) powerOff() error {
	if err := s.stopWriters(); err != nil {
		return err
	}
	s.agentMu.Lock()
	defer s.agentMu.Unlock()
	if err := s.killAgentLocked(); err != nil {
		return err
	}
	for _, label := range s.params.mounts {
		target := filepath.Join(wire.MountRoot, label)
		// A process of the host's may still have a file open; what counts is
		// that nothing is left to be written.
		err := unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		if errors.Is(err, unix.EBUSY) {
			err = syncDisk(target)
		}
		if err != nil {
			return fmt.Errorf("remount %s read-only: %w", target, err)
		}
	}
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func syncDisk(target string) error {
	f, err := os.Open(target)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return unix.Syncfs(int(f.Fd()))
}

// Of an input event (struct input_event): its size and the place of its type,
// code and value, in bytes.
const (
	inputEventSize = 24
	inputType      = 16
	inputCode      = 18
	inputValue     = 20

	typeKey  = 1
	keyPower = 116
)

// watchPowerButton powers off when the button is pressed (system_powerdown).
func watchPowerButton(s *server) {
	devices, err := filepath.Glob("/dev/input/event*")
	if err != nil {
		panic(err) // a bad pattern
	}
	for _, device := range devices {
		go func() {
			if err := awaitPowerKey(device); err == nil {
				err = s.powerOff()
				fmt.Fprintf(os.Stderr, "testvm guest: power off: %v\n", err)
			}
		}()
	}
}

// awaitPowerKey returns nil when the power key of an input device is pressed.
func awaitPowerKey(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var b [inputEventSize]byte
	for {
		if _, err := io.ReadFull(f, b[:]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(b[inputType:]) == typeKey &&
			binary.LittleEndian.Uint16(b[inputCode:]) == keyPower &&
			binary.LittleEndian.Uint32(b[inputValue:]) == 1 {
			return nil
		}
	}
}
