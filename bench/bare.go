package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// bare is the rival: a script that has its sockets open, freezes, cuts both
// disks with one transaction, and thaws. It asks nothing, records nothing and
// has no way out if it is killed. Its overlays are merged back after each
// round, outside of what is measured, so that the block graph and the files are
// again as vmsnapd left them.
type bare struct {
	scene *scene
	qmp   *wire
}

func newBare(ctx context.Context, s *scene) (*bare, error) {
	ctx, cancel := context.WithTimeout(ctx, roundDeadline)
	defer cancel()
	qmp, err := dialQMP(ctx, s.guest.ExtraQMPSockets()[0])
	if err != nil {
		return nil, fmt.Errorf("bare script: %w", err)
	}
	return &bare{s, qmp}, nil
}

func (b *bare) close() { b.qmp.close() }

// covered is a disk and the overlay that the script puts on it.
type covered struct {
	node, file    string // what the disk has now
	overlay, path string
	size          int64
}

func (b *bare) snapshot(ctx context.Context) (cut, error) {
	c, err := b.take(ctx)
	if err != nil {
		return cut{}, fmt.Errorf("bare script: %w", err)
	}
	return c, nil
}

func (b *bare) take(ctx context.Context) (_ cut, err error) {
	if err := b.qmp.limit(ctx); err != nil {
		return cut{}, err
	}
	disks, err := b.disks()
	if err != nil {
		return cut{}, err
	}
	b.scene.writers.Reset()
	began := time.Now()
	for _, d := range disks {
		if err := b.build(ctx, d); err != nil {
			return cut{}, err
		}
	}
	c := cut{}
	if c.window, err = b.freezeCutThaw(ctx, disks); err != nil {
		return cut{}, err
	}
	c.took = time.Since(began)
	if c.stall, err = b.scene.stall(ctx); err != nil {
		return cut{}, err
	}
	for _, d := range disks {
		if err := b.mergeBack(d); err != nil {
			return cut{}, err
		}
	}
	return c, b.unchanged(disks)
}

// freezeCutThaw is what is measured. All that is sent is put together before.
func (b *bare) freezeCutThaw(ctx context.Context, disks []covered) (time.Duration, error) {
	agent, err := dialAgent(ctx, b.scene.guest.AgentSocket())
	if err != nil {
		return 0, err
	}
	defer agent.close()
	var actions []object
	for _, d := range disks {
		actions = append(actions, object{"type": "blockdev-snapshot", "data": object{"node": d.node, "overlay": d.overlay}})
	}
	freeze := encode("guest-fsfreeze-freeze", object{})
	transaction := encode("transaction", object{"actions": actions})
	thaw := encode("guest-fsfreeze-thaw", object{})

	began := time.Now()
	frozen, err := agent.exchange(freeze)
	if err != nil {
		return 0, fmt.Errorf("freeze: %w", err)
	}
	_, cutErr := b.qmp.exchange(transaction)
	thawed, err := agent.exchange(thaw)
	took := time.Since(began)
	if err := errors.Join(cutErr, err); err != nil {
		return 0, err
	}
	if want := strconv.Itoa(len(disks)); string(frozen) != want || string(thawed) != want {
		return 0, fmt.Errorf("%s file systems were frozen and %s thawed, not %s", frozen, thawed, want)
	}
	return took, nil
}

// disks asks what the disks have now.
func (b *bare) disks() ([]covered, error) {
	var blocks []struct {
		QDev     string `json:"qdev"`
		Inserted struct {
			Node  string `json:"node-name"`
			File  string `json:"file"`
			Image struct {
				Size int64 `json:"virtual-size"`
			} `json:"image"`
		} `json:"inserted"`
	}
	if err := b.qmp.call("query-block", object{}, &blocks); err != nil {
		return nil, err
	}
	var disks []covered
	for i, block := range blocks {
		disks = append(disks, covered{
			node: block.Inserted.Node, file: block.Inserted.File, size: block.Inserted.Image.Size,
			overlay: fmt.Sprintf("bare-%d", i), path: filepath.Join(b.scene.guest.Dir, fmt.Sprintf("bare-%d.qcow2", i)),
		})
	}
	return disks, nil
}

// build makes an overlay's file and has QEMU open it.
func (b *bare) build(ctx context.Context, d covered) error {
	out, err := exec.CommandContext(ctx, b.scene.qemu.Img, "create", "-q", "-f", "qcow2", "-u", "-b", d.file, "-F", "qcow2",
		d.path, strconv.FormatInt(d.size, 10)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img create: %w: %s", err, out)
	}
	return b.qmp.call("blockdev-add", object{
		"driver": "qcow2", "node-name": d.overlay, "backing": json.RawMessage("null"),
		"file": object{"driver": "file", "filename": d.path},
	}, nil)
}

// mergeBack folds an overlay into what it covers and removes it.
func (b *bare) mergeBack(d covered) error {
	job := d.overlay
	if err := b.qmp.call("block-commit", object{"job-id": job, "device": d.overlay, "base-node": d.node}, nil); err != nil {
		return err
	}
	if err := b.qmp.awaitJob(job, "ready"); err != nil {
		return err
	}
	if err := b.qmp.call("job-complete", object{"id": job}, nil); err != nil {
		return err
	}
	if err := b.qmp.awaitJob(job, "null"); err != nil {
		return err
	}
	if err := b.qmp.call("blockdev-del", object{"node-name": d.overlay}, nil); err != nil {
		return err
	}
	return os.Remove(d.path)
}

// unchanged fails unless the disks have again what they had before.
func (b *bare) unchanged(before []covered) error {
	now, err := b.disks()
	if err != nil {
		return err
	}
	for i, d := range now {
		if d != before[i] {
			return fmt.Errorf("the disk on %s is on %s after its merge", before[i].node, d.node)
		}
	}
	return nil
}
