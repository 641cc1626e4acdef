package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// mergeOffline merges with qemu-img, when no QEMU has the layers open. inChain says
// that the VM would run on them: the locks keep it from starting until the merge
// has been recorded.
func (d *deletion) mergeOffline(ctx context.Context, g *merging, inChain bool) error {
	err := d.lockMerge(ctx, g, inChain)
	if err != nil {
		return err
	}
	if err := g.expose(); err != nil {
		return errors.Join(err, g.protect())
	}
	leaving, stop := d.leaving(ctx)
	defer stop()
	d.o.Progress(0, g.Bytes, "bytes") // qemu-img first tells when it has written for a while
	for {
		err = d.runOffline(leaving, g)
		if err == nil || !errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err = d.awaitRoom(leaving, g); err != nil {
			break
		}
	}
	if err == nil {
		return nil
	}
	if errors.Is(context.Cause(leaving), op.ErrLeave) {
		return errors.Join(op.ErrLeave, err) // it is begun again
	}
	return errors.Join(err, g.protect())
}

// lockMerge takes the image locks of all layers that are read or written, and of
// those that a start of the VM would open.
func (d *deletion) lockMerge(ctx context.Context, g *merging, inChain bool) error {
	top := g.Upper
	if g.Above.ID != "" {
		top = g.Above
	}
	if inChain {
		disks, err := d.catalog.Disks(ctx, d.vm.id)
		if err != nil {
			return err
		}
		for _, k := range disks {
			if k.ID != g.Disk.ID {
				continue
			}
			if top, err = d.catalog.Layer(ctx, k.ActiveLayer); err != nil {
				return err
			}
		}
	}
	locks, err := d.lockTree(ctx, top)
	if err == nil {
		g.locks = locks
	}
	if !inChain {
		return err
	}
	r, look := d.vm.alone()
	if r != nil {
		return errors.Join(errLookAgain, err)
	}
	return errors.Join(err, look)
}

// runOffline runs qemu-img, and then changes the name that makes the merge count.
func (d *deletion) runOffline(ctx context.Context, g *merging) error {
	img := blockdev.Offline{Locks: g.locks, Rate: d.Speed, Rests: d.o.Rests, Progress: func(done, total uint64) {
		d.o.Progress(uint64(float64(g.Bytes)*float64(done)/float64(total)), g.Bytes, "bytes")
	}}
	if g.Way != MergeCommit {
		return img.Rebase(ctx, g.Upper.Path, g.Below.Path, g.Below.Format)
	}
	if err := img.Commit(ctx, g.Upper.Path, g.Lower.Path, g.Lower.Format); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	switch {
	case g.Active:
		return d.insist(ctx, func(context.Context) error {
			disk, err := g.disk()
			if err != nil {
				return err
			}
			return errors.Join(disk.uncover(), disk.close())
		})
	case g.Above.ID != "":
		if err := blockdev.Rebase(ctx, g.Above.Path, g.Lower.Path, g.Lower.Format); err != nil {
			return err
		}
		return syncLayer(g.Above)
	}
	return nil
}

// syncLayer makes what was written to a layer durable.
func syncLayer(l catalog.Layer) (err error) {
	dir, err := blockdev.OpenDir(filepath.Dir(l.Path), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dir.SyncFile(filepath.Base(l.Path))
}

// removeMemory removes a memory file. It can be done again.
func removeMemory(path string) (err error) {
	dir, err := blockdev.OpenDir(filepath.Dir(path), "")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return errors.Join(dir.Remove(filepath.Base(path)), dir.Sync())
}
