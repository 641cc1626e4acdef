package agent

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// Forget removes the records of a VM that is gone and returns the layers that
// stay on disk. With release it also lifts the immutable flags that the agent
// set on them, so that their owner can delete them.
func (a *Agent) Forget(ctx context.Context, ref string, release bool) ([]string, error) {
	v, err := a.find(ref)
	if err != nil {
		return nil, err
	}
	if id, busy := a.ops.Running(v.id); busy {
		return nil, fault.New(fault.Busy, "VM %s: operation %s is running", v.name(), id)
	}
	a.recording.Lock() // nobody starts it meanwhile
	defer a.recording.Unlock()
	v.mu.Lock()
	running, layers, unsettled := len(v.runs) > 0, v.layers, ""
	for _, d := range v.disks {
		if d.SettleNeeded && !d.Removed {
			unsettled = d.Device
		}
	}
	v.mu.Unlock()
	if running {
		return nil, fault.New(fault.Busy, "VM %s is running: only a VM that is gone can be forgotten", v.name())
	}
	if unsettled != "" {
		return nil, fault.New(fault.Busy, "VM %s: the launch path of disk %s does not lead to its newest layer yet", v.name(), unsettled).
			WithHint("vmsnap operation list %s tells why", v.name())
	}
	if release {
		if err := releaseLayers(layers); err != nil {
			return nil, fault.New(fault.Failed, "VM %s is not forgotten: %w", v.name(), err)
		}
	}
	if err := a.deleteVM(ctx, v); err != nil {
		return nil, err
	}
	a.mu.Lock()
	delete(a.vms, v.id)
	a.mu.Unlock()
	var left []string
	for _, l := range layers {
		if _, err := blockdev.StatPath(l.Path); err == nil && !l.Foreign {
			left = append(left, l.Path)
		}
	}
	return left, nil
}

// releaseLayers lifts the flags that the agent set. A layer that is gone needs
// none.
func releaseLayers(layers []catalog.Layer) error {
	var errs []error
	for _, l := range layers {
		if l.Foreign || !l.Covered {
			continue
		}
		if file, err := fileAt(l.Path); err != nil || !file.is(l) {
			continue
		}
		errs = append(errs, releaseLayer(l))
	}
	return errors.Join(errs...)
}

// releaseLayer undoes cutDisk.protect.
func releaseLayer(l catalog.Layer) (err error) {
	if l.Immutable {
		return setImmutable(l.Path, false)
	}
	dir, err := blockdev.OpenDir(filepath.Dir(l.Path), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	name := filepath.Base(l.Path)
	fi, err := dir.Root().Lstat(name)
	if err != nil {
		return err
	}
	return dir.Root().Chmod(name, fi.Mode().Perm()|0o200)
}

// setImmutable sets or lifts the flag of a layer.
func setImmutable(path string, on bool) (err error) {
	dir, err := blockdev.OpenDir(filepath.Dir(path), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dir.SetImmutable(filepath.Base(path), on)
}
