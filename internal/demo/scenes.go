package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/daemon"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

const (
	vmName       = "web"
	snapshotName = "web/before-upgrade"

	// What the upgrade changes on each disk, and what it adds.
	releaseFile = "release"
	oldRelease  = "1.0"
	newRelease  = "2.0"
	addedFile   = "upgraded"
)

// moreWrites is how many writes of a disk show that its guest writes on.
const moreWrites = 50

func (d *demo) boot(ctx context.Context) error {
	d.heading("A guest that writes all the time")
	began := time.Now()
	g, err := testvm.Launch(ctx, testvm.Config{QEMU: d.qemu, Name: vmName, Dir: d.path(vmName), Disks: testvm.TwoDisks()})
	if err != nil {
		return err
	}
	d.guest = g
	took := time.Since(began)
	if d.writers, err = g.StartWriters(ctx); err != nil {
		return err
	}
	d.say("%s runs on QEMU %s with the ext4 disks %s. It has booted in %.1fs.", vmName, d.qemu.Name, strings.Join(d.disks(), " and "), took.Seconds())
	d.say("A program in it writes to each disk all the time, and waits for each write to be durable.")
	for _, disk := range d.disks() {
		if err := d.inGuest(ctx, fmt.Sprintf("echo %s > %s && sync", oldRelease, inside(disk, releaseFile))); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) find(ctx context.Context) error {
	d.heading("vmsnapd finds it")
	var err error
	d.daemon, err = daemon.Start(ctx, daemon.Config{
		Binary: vmsnapdPath, Dir: d.path("host"), VMs: map[string]string{vmName: d.guest.UUID},
	})
	if err != nil {
		return err
	}
	if err := d.daemon.AwaitRunning(ctx, vmName); err != nil {
		return err
	}
	d.say("vmsnapd was ready after %s. It was told to manage no VM but %s.", d.daemon.Ready.Round(time.Millisecond), vmName)
	if err := d.vmsnap(ctx, "vm", "list"); err != nil {
		return err
	}
	return d.vmsnap(ctx, "vm", "show", vmName)
}

func (d *demo) snapshot(ctx context.Context) error {
	d.heading("A snapshot, while the guest writes")
	d.writers.Reset()
	if err := d.vmsnap(ctx, "snapshot", "create", vmName, filepath.Base(snapshotName), "--quiesce", "require"); err != nil {
		return err
	}
	onward := d.writers.AwaitWrites(ctx, moreWrites)
	gaps := d.writers.Gaps()
	s, err := d.taken(ctx)
	if err != nil {
		return err
	}
	d.prove(onward, "the guest writes on")
	d.say("longest pause of its writes: %s", pauses(d.disks(), gaps))
	d.say("freeze window, as recorded:  %s", millis(s.GetQuiesce().GetFreezeWindow().AsDuration()))
	return nil
}

// pauses says for each disk how long no write was completed.
func pauses(disks []string, gaps testvm.Gaps) string {
	var parts []string
	for _, disk := range disks {
		parts = append(parts, fmt.Sprintf("%s on %s", millis(gaps.Writes[disk].Length()), disk))
	}
	return strings.Join(parts, ", ")
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%d ms", d.Round(time.Millisecond).Milliseconds())
}

func (d *demo) upgrade(ctx context.Context) error {
	d.heading("Then something changes in the guest")
	for _, disk := range d.disks() {
		command := fmt.Sprintf("echo %s > %s && date > %s && sync", newRelease, inside(disk, releaseFile), inside(disk, addedFile))
		if err := d.inGuest(ctx, command); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) inspect(ctx context.Context) error {
	d.heading("What the snapshot holds")
	s, err := d.taken(ctx)
	if err != nil {
		return err
	}
	d.prove(holds(s.GetConsistency(), vmsnapv1.Consistency_CONSISTENCY_FILESYSTEM), "its consistency is that of the file systems")
	d.prove(holds(len(s.GetDisks()), len(d.disks())), "it holds %d disks", len(d.disks()))
	for _, disk := range s.GetDisks() {
		d.line("")
		d.say("%s: %s", disk.GetDevice(), filepath.Base(disk.GetPath()))
		if err := d.inspectDisk(ctx, disk); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) tell(ctx context.Context) error {
	d.heading("The snapshots of " + vmName)
	if err := d.vmsnap(ctx, "snapshot", "list", vmName); err != nil {
		return err
	}
	return d.vmsnap(ctx, "snapshot", "show", snapshotName)
}

func (d *demo) crash(ctx context.Context) error {
	d.heading("QEMU is killed, and started again by its unchanged command line")
	d.command("# ", fmt.Sprintf("kill -9 %d", d.guest.PID()))
	d.guest.Kill()
	durable := d.writers.Completed()
	args := d.guest.Args()
	d.command("# ", fmt.Sprintf("%s -name %s … -drive …,file=%s,… -drive …,file=%s,…", filepath.Base(args[0]), vmName,
		filepath.Base(d.guest.Disk("root").Path), filepath.Base(d.guest.Disk("data").Path)))
	if err := d.guest.Restart(ctx); err != nil {
		return err
	}
	for _, disk := range d.disks() {
		d.prove(d.newest(ctx, disk, durable[disk]), "%s holds release %s and all %d writes that the guest knew to be durable",
			disk, newRelease, durable[disk])
	}
	if err := d.daemon.AwaitRunning(ctx, vmName); err != nil {
		return err
	}
	return d.vmsnap(ctx, "vm", "list")
}

// newest fails unless a disk of the running guest holds what was last written.
func (d *demo) newest(ctx context.Context, disk string, durable uint64) error {
	text, err := d.guest.ReadFile(ctx, inside(disk, releaseFile))
	if err != nil {
		return err
	}
	last, err := d.guest.LastWrite(ctx, disk)
	if err != nil {
		return err
	}
	if last < durable {
		err = fmt.Errorf("the last write is number %d", last)
	}
	return errors.Join(holds(strings.TrimSpace(string(text)), newRelease), err)
}

// restore takes the running guest back to the snapshot.
func (d *demo) restore(ctx context.Context) error {
	d.heading("Back to the snapshot: the disks are swapped under the running QEMU")
	pid := d.guest.PID()
	if err := d.vmsnap(ctx, "snapshot", "restore", snapshotName); err != nil {
		return err
	}
	if err := d.guest.AwaitBoot(ctx, 2); err != nil { // the first was by the start
		return err
	}
	d.prove(holds(d.guest.PID(), pid), "it is the same QEMU process")
	for _, disk := range d.disks() {
		text, err := d.guest.ReadFile(ctx, inside(disk, releaseFile))
		if err != nil {
			return err
		}
		d.prove(holds(strings.TrimSpace(string(text)), oldRelease), "%s holds release %s again", disk, oldRelease)
	}
	return d.vmsnap(ctx, "snapshot", "list", vmName)
}

// release has vmsnap forget the VM and lift the flags of its layers, which then
// can be deleted as any file.
func (d *demo) release(ctx context.Context) error {
	d.heading("Cleaning up")
	d.guest.Kill()
	if err := d.daemon.AwaitStopped(ctx, vmName); err != nil {
		return err
	}
	if err := d.vmsnap(ctx, "vm", "forget", vmName, "--release"); err != nil {
		return err
	}
	d.prove(os.RemoveAll(d.guest.Dir), "the layers can be deleted as any file")
	return nil
}

// taken returns the snapshot as the API tells it.
func (d *demo) taken(ctx context.Context) (*vmsnapv1.Snapshot, error) {
	res, err := d.daemon.Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: snapshotName}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetSnapshot(), nil
}

// disks returns the names of the guest's disks.
func (d *demo) disks() []string {
	var names []string
	for _, disk := range d.guest.Disks() {
		names = append(names, disk.Name)
	}
	return names
}

// inside returns a file's path in the guest.
func inside(disk, file string) string { return testvm.Mountpoint(disk) + "/" + file }
