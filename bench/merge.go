package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// minMergeRate is the rate of a merge beside the better of its rivals'.
const minMergeRate = 0.95

// mergePlan is what is measured of merges.
type mergePlan struct {
	bytes  int64 // in the layer that is merged down
	rounds int
}

// maxMerges is how often everybody merges at most.
const maxMerges = 5

func planMerges(c config) mergePlan {
	if c.short {
		return mergePlan{bytes: 256 << 20, rounds: 3}
	}
	return mergePlan{bytes: 2 << 30, rounds: min(c.rounds, maxMerges)}
}

// merged is one merge, by whomever.
type merged struct {
	took  time.Duration // for who asked for it
	steps []step        // of vmsnap's
}

// mergeRuns is what was measured on one QEMU.
type mergeRuns struct {
	qemu    string
	bytes   int64
	live    []merged // by vmsnap, of a VM that runs
	stopped []merged // by vmsnap, of one that does not
	virsh   []merged // virsh blockcommit --active --pivot
	img     []merged // qemu-img commit -d
}

// mergeDeadline is for one merge with its preparations: storage may be slow.
const mergeDeadline = 5 * time.Minute

// measureMerges has vmsnap, libvirt and qemu-img merge equal layers down into equal
// ones, in turns. Whoever merges has a base of its own, which all of its rounds go
// to, and at the end all bases hold the same.
func measureMerges(ctx context.Context, c config, r *report, q testvm.QEMU) (err error) {
	plan := planMerges(c)
	dir, err := os.MkdirTemp("", "vmsnap-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, testvm.RemoveAll(dir)) }()
	ours, err := newMergeVM(ctx, q, filepath.Join(dir, "vmsnap"), plan)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ours.end()) }()
	r.host.saw(ours.version)
	lv, err := startLibvirt(ctx, q)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lv.end()) }()
	theirs, err := newMergeDomain(ctx, lv, q, plan)
	if err != nil {
		return fmt.Errorf("libvirt: %w", err)
	}
	alone := mergeFile{filepath.Join(dir, "root.qcow2"), q, plan}
	if err := alone.make(ctx); err != nil {
		return err
	}
	runs := mergeRuns{qemu: q.Name, bytes: plan.bytes}
	all := []struct {
		name  string
		merge func(context.Context) (merged, error)
		runs  *[]merged
	}{
		{"vmsnap, running", ours.mergeLive, &runs.live}, {"virsh blockcommit", theirs.merge, &runs.virsh},
		{"vmsnap, stopped", ours.mergeStopped, &runs.stopped}, {"qemu-img commit", alone.merge, &runs.img},
	}
	for i := range plan.rounds + 1 {
		progress("QEMU %s: merges, round %d of %d", ours.version, i, plan.rounds)
		for j := range all {
			by := all[(i+j)%len(all)]
			one, err := within(ctx, mergeDeadline, by.merge)
			if err != nil {
				return fmt.Errorf("%s: %w", by.name, err)
			}
			if i > 0 { // the first is to warm up
				*by.runs = append(*by.runs, one)
			}
		}
	}
	if err := errors.Join(ours.stop(ctx), theirs.stop(ctx)); err != nil {
		return err
	}
	r.addMerges(runs)
	return errors.Join(alone.equals(ctx, ours.file.path), alone.equals(ctx, theirs.file.path))
}

// within calls f with a deadline.
func within[T any](ctx context.Context, limit time.Duration, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return f(ctx)
}

// mergeFile is the image that layers are merged into. Each of its clusters has
// data, so that what is merged into it replaces data, however often that is done.
type mergeFile struct {
	path string
	qemu testvm.QEMU
	plan mergePlan
}

// fillStep is how much qemu-io writes at a time.
const fillStep = 64 << 20

// size is that of the disk: it takes fewer bytes to merge the layer above down than
// this one up.
func (f mergeFile) size() int64 { return 2*f.plan.bytes + f.plan.bytes/4 }

func (f mergeFile) make(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(f.path), 0o700); err != nil {
		return err
	}
	if err := tool(ctx, f.qemu.Img, "create", "-q", "-f", "qcow2", f.path, strconv.FormatInt(f.size(), 10)); err != nil {
		return err
	}
	if err := f.fill(ctx, f.path, 1, f.size()); err != nil {
		return err
	}
	return syncFile(f.path)
}

// fill writes to an image that nobody has open.
func (f mergeFile) fill(ctx context.Context, path string, pattern byte, bytes int64) error {
	args := []string{"-f", "qcow2"}
	for _, command := range fillCommands(pattern, bytes) {
		args = append(args, "-c", command)
	}
	return tool(ctx, f.qemu.Tool("qemu-io"), append(args, path)...)
}

// fillCommands are qemu-io's to fill the beginning of a disk.
func fillCommands(pattern byte, bytes int64) []string {
	var all []string
	for at := int64(0); at < bytes; at += fillStep {
		all = append(all, fmt.Sprintf("write -q -P %d %d %d", pattern, at, min(fillStep, bytes-at)))
	}
	return all
}

// merge has qemu-img merge a layer down, which it then removes.
func (f mergeFile) merge(ctx context.Context) (merged, error) {
	overlay := f.path + ".overlay"
	if err := tool(ctx, f.qemu.Img, "create", "-q", "-f", "qcow2", "-b", f.path, "-F", "qcow2", overlay); err != nil {
		return merged{}, err
	}
	if err := f.fill(ctx, overlay, 2, f.plan.bytes); err != nil {
		return merged{}, err
	}
	if err := ready(overlay, f.path, f.plan.bytes); err != nil {
		return merged{}, err
	}
	began := time.Now()
	err := tool(ctx, f.qemu.Img, "commit", "-q", "-d", "-f", "qcow2", overlay)
	err = errors.Join(err, os.Remove(overlay)) // which vmsnap does too
	return merged{took: time.Since(began)}, err
}

// equals fails unless another image holds the same.
func (f mergeFile) equals(ctx context.Context, other string) error {
	return tool(ctx, f.qemu.Img, "compare", "-q", "-f", "qcow2", "-F", "qcow2", f.path, other)
}

// ready makes both layers durable, so that no merge is held up by what was written
// before it, and fails unless the upper one holds what is to be merged.
func ready(upper, lower string, bytes int64) error {
	fi, err := os.Stat(upper)
	if err != nil {
		return err
	}
	if fi.Size() < bytes {
		return fmt.Errorf("%s has %d bytes, and is to hold %d", upper, fi.Size(), bytes)
	}
	return errors.Join(syncFile(upper), syncFile(lower))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func tool(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, out)
	}
	return nil
}

// deleteSnapshot has vmsnap delete a snapshot.
func (m *mergeVM) deleteSnapshot(ctx context.Context, snapshot string) (merged, error) {
	began := time.Now()
	asked, err := m.daemon.Snapshots().DeleteSnapshots(ctx, connect.NewRequest(&vmsnapv1.DeleteSnapshotsRequest{Snapshots: []string{snapshot}}))
	if err != nil {
		return merged{}, err
	}
	operation, err := m.daemon.Wait(ctx, asked.Msg.GetOperation().GetId())
	if err != nil {
		return merged{}, err
	}
	one := merged{took: time.Since(began)}
	commits := 0
	for _, st := range operation.GetSteps() {
		name := st.GetName()
		if name == "commit root" {
			name = "commit"
			commits++
		}
		one.steps = append(one.steps, step{name, st.GetEnded().AsTime().Sub(st.GetStarted().AsTime())})
	}
	if commits != 1 {
		return merged{}, fmt.Errorf("operation %s has not merged the layer down: %v", operation.GetId(), operation.GetSteps())
	}
	return one, nil
}

// newUUID returns a UUID for a VM.
func newUUID() string { return uuid.NewString() }

func (r *report) addMerges(m mergeRuns) {
	took := func(one merged) time.Duration { return one.took }
	virsh, img := each(m.virsh, took), each(m.img, took)
	better := min(median(virsh), median(img))
	add := func(which string, ours []merged, rival string) {
		times := each(ours, took)
		r.rows = append(r.rows, row{
			measure: fmt.Sprintf("merge of %s, %s", mib(m.bytes), which), qemu: m.qemu, ours: spread(times), rival: rival,
			ratio: float64(better) / float64(median(times)), budget: minMergeRate, floor: true,
		})
	}
	add("VM running: rate beside the better rival's", m.live, "virsh blockcommit "+spread(virsh))
	add("VM stopped: rate beside the better rival's", m.stopped, "qemu-img commit "+spread(img))
	for _, by := range []struct {
		name string
		runs []merged
	}{{"vmsnap-running", m.live}, {"vmsnap-stopped", m.stopped}, {"virsh", m.virsh}, {"qemu-img", m.img}} {
		for _, one := range by.runs {
			extra := []measurement{{"merged-bytes", m.bytes}}
			for _, st := range one.steps {
				extra = append(extra, measurement{st.name + "-ns", int64(st.took)})
			}
			r.run(fmt.Sprintf("Merge/qemu=%s/by=%s", m.qemu, by.name), one.took, extra...)
		}
	}
}
