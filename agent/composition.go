package agent

import (
	"context"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
)

// DiskChoice takes one disk from a snapshot.
type DiskChoice struct {
	Device   string
	Snapshot string // name of a snapshot of the same VM; empty: that of the request
}

// RestoreRequest asks for a VM to go back to what snapshots hold.
type RestoreRequest struct {
	Snapshot string       // VM/NAME or id
	Disks    []DiskChoice // all of the snapshot when empty
	Exclude  []string     // disks of the snapshot that are left as they are
	NoSafety bool         // do not keep the state before as a snapshot
	Memory   bool         `json:",omitempty"` // the guest goes on from the snapshot's memory, in a new QEMU process
	Launcher launch.Kind  `json:",omitempty"` // that starts it; empty: the agent's choice

	Trial bool `json:"-"` // it opens or ends a preview; set by the agent
	Anew  Anew `json:"-"` // what becomes of the QEMU process without Memory; set by the agent

	Group *Group `json:",omitempty"` // that it is restored with; set by the agent

	RequestID string `json:"-"`
	UID       uint32 `json:"-"`
}

// Anew says what becomes of the QEMU process in a preview, or in its end, that
// loads no memory.
type Anew string

// What can become of it.
const (
	AnewNot   Anew = ""      // the disks are swapped under it
	AnewBoots Anew = "boots" // it is ended; another one boots
	AnewStays Anew = "stays" // it is ended, and that is all
)

// replaces reports whether the QEMU process does not outlive the restore.
func (r RestoreRequest) replaces() bool { return r.Memory || r.Anew != AnewNot }

// givesUp is the option that gives up what the running guest has in memory.
func (r RestoreRequest) givesUp() string {
	if r.Trial {
		return "--discard-running-state"
	}
	return "--no-safety-snapshot"
}

// chosen is one disk of a composition.
type chosen struct {
	disk     catalog.Disk
	point    catalog.SnapshotDisk
	snapshot catalog.Snapshot // that it comes from
}

// compose finds the restore point of each disk that is asked for.
//
// Disks are matched by their layer tree and not by their name: a device may have
// been given another name since. A disk that was added since is in no snapshot
// and stays untouched, as one does that the snapshot excludes; one that was
// removed since is refused unless it is excluded.
func (a *Agent) compose(ctx context.Context, v *vm, s catalog.Snapshot, req RestoreRequest) ([]chosen, error) {
	disks, err := a.catalog.Disks(ctx, v.id)
	if err != nil {
		return nil, err
	}
	if err := checkExclude(v, s, disks, req); err != nil {
		return nil, err
	}
	choices := req.Disks
	if len(choices) == 0 {
		for _, d := range s.Disks {
			if name := nameNow(disks, d); !d.Excluded && !slices.Contains(req.Exclude, name) {
				choices = append(choices, DiskChoice{Device: name})
			}
		}
	}
	var all []chosen
	for _, choice := range choices {
		from := s
		if choice.Snapshot != "" {
			if from, err = a.findSnapshot(ctx, v.id+"/"+choice.Snapshot); err != nil {
				return nil, err
			}
		}
		if err := checkValid(from); err != nil {
			return nil, err
		}
		c, err := choose1(v, from, disks, choice.Device)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(all, func(other chosen) bool { return other.disk.ID == c.disk.ID }) {
			return nil, fault.New(fault.Usage, "VM %s: disk %s is chosen twice", v.name(), choice.Device)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fault.New(fault.Usage, "VM %s: no disk is left to restore", v.name()).
			WithHint("vmsnap snapshot show %s/%s lists the disks that it holds", v.name(), s.Name)
	}
	return all, nil
}

// nameNow is what a disk of a snapshot is called by now, or was when it was
// removed.
func nameNow(disks []catalog.Disk, d catalog.SnapshotDisk) string {
	for _, k := range disks {
		if k.ID == d.DiskID {
			return k.Device
		}
	}
	return d.Device
}

// choose1 finds a disk in a snapshot.
func choose1(v *vm, s catalog.Snapshot, disks []catalog.Disk, device string) (chosen, error) {
	var names []string
	for _, d := range s.Disks {
		name := nameNow(disks, d)
		names = append(names, name)
		if name != device {
			continue
		}
		if d.Excluded {
			return chosen{}, fault.New(fault.NotFound, "snapshot %s/%s was taken without disk %s", v.name(), s.Name, device).
				WithHint("choose another snapshot for it: --disk %s=NAME", device)
		}
		for _, k := range disks {
			if k.ID == d.DiskID && !k.Removed {
				return chosen{disk: k, point: d, snapshot: s}, nil
			}
		}
		return chosen{}, fault.New(fault.Unsupported, "VM %s has no disk %s any more, which snapshot %s holds", v.name(), device, s.Name).
			WithHint("--exclude %s restores without it; vmsnap snapshot export makes a file of what the snapshot holds", device)
	}
	return chosen{}, fault.New(fault.NotFound, "snapshot %s/%s holds no disk %q; its disks are %s", v.name(), s.Name, device, strings.Join(names, ", "))
}

// checkExclude refuses names that exclude nothing.
func checkExclude(v *vm, s catalog.Snapshot, disks []catalog.Disk, req RestoreRequest) error {
	var names []string
	for _, d := range s.Disks {
		names = append(names, nameNow(disks, d))
	}
	for _, e := range req.Exclude {
		if !slices.Contains(names, e) {
			return fault.New(fault.NotFound, "snapshot %s/%s holds no disk %q; its disks are %s", v.name(), s.Name, e, strings.Join(names, ", "))
		}
		for _, c := range req.Disks {
			if c.Device == e {
				return fault.New(fault.Usage, "disk %s is both selected and excluded", e)
			}
		}
	}
	return nil
}
