package main

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/memdump"
)

// sealing is how the settings want memory encrypted; nil when they do not. A key
// that cannot be used does not keep vmsnapd from starting: disks are snapshotted
// without it.
func sealing(c config) *agent.MemorySealing {
	if c.MemoryKey == "" {
		return nil
	}
	return &agent.MemorySealing{Setting: c.MemoryKey, Key: func() (*memdump.Key, error) { return readKey(c.MemoryKey) }}
}

// readKey reads a key from a file, or from the credential that the unit hands over
// under this name. One that others may read is none.
func readKey(setting string) (*memdump.Key, error) {
	path := setting
	if !filepath.IsAbs(setting) {
		dir := os.Getenv("CREDENTIALS_DIRECTORY")
		if dir == "" {
			return nil, fmt.Errorf("vmsnapd was handed no credentials: its unit needs LoadCredential=%s", setting)
		}
		path = filepath.Join(dir, setting)
	}
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // it is only read
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no file", path)
	case info.Mode().Perm()&0o007 != 0:
		return nil, fmt.Errorf("%s has the mode %#o: others may read it", path, info.Mode().Perm())
	}
	key, err := memdump.ParseKey(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}
