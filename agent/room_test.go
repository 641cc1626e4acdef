package agent

import (
	"context"
	"testing"

	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// TestRoom has layers grow in file systems of all kinds.
func TestRoom(t *testing.T) {
	const mib, gib = uint64(1 << 20), uint64(1 << 30)
	const tables = gib>>12 + roomForTables
	layer := func(allocated, free uint64) growing {
		return growing{device: "root", path: "/x", node: "n", virtual: gib, seen: true, room: fileStat{allocated: allocated, free: free, size: allocated}}
	}
	for name, c := range map[string]struct {
		disk   growing
		limit  uint64
		wants  uint64
		tight  bool
		still  bool // tight when it was before
		rearms uint64
	}{
		"much is free":                        {disk: layer(mib, 500*gib), limit: 100 * mib, wants: 100 * mib, rearms: mib + (500*gib-100*mib)/2},
		"half of what is left":                {disk: layer(mib, 120*mib), limit: 100 * mib, wants: 100 * mib, rearms: 11 * mib},
		"little is left":                      {disk: layer(mib, 100*mib+1), limit: 100 * mib, wants: 100 * mib, still: true, rearms: mib + thresholdStep},
		"little is free":                      {disk: layer(mib, 100*mib-1), limit: 100 * mib, wants: 100 * mib, tight: true, still: true},
		"an eighth more":                      {disk: layer(mib, 113*mib), limit: 100 * mib, wants: 100 * mib, rearms: mib + 13*mib/2},
		"nothing is free":                     {disk: layer(mib, 0), limit: 100 * mib, wants: 100 * mib, tight: true, still: true},
		"it can hardly grow":                  {disk: layer(gib, 5*mib), limit: 100 * mib, wants: tables, rearms: gib + (5*mib-tables)/2},
		"it is as large as it gets":           {disk: layer(gib+tables, 0), limit: 100 * mib},
		"it is larger":                        {disk: layer(2*gib, 0), limit: 100 * mib},
		"nobody wants to know":                {disk: layer(mib, 0)},
		"its file system has never been seen": {disk: growing{path: "/x", virtual: gib, node: "n"}, limit: mib, wants: mib, still: true},
		"it grows in no file":                 {disk: growing{virtual: gib}, limit: mib, wants: mib},
		"raw, and sparse": {
			disk: growing{path: "/x", node: "n", raw: true, virtual: gib, seen: true, room: fileStat{allocated: mib, free: 2 * mib, size: gib}}, limit: 3 * mib, wants: 3 * mib, tight: true, still: true,
		},
		"raw, and whole": {
			disk: growing{path: "/x", node: "n", raw: true, virtual: gib, seen: true, room: fileStat{allocated: gib, size: gib}}, limit: 3 * mib,
		},
		"a threshold is set": {
			disk: growing{path: "/x", node: "n", threshold: 11 * mib, virtual: gib, seen: true, room: fileStat{allocated: mib, free: 120 * mib, size: mib}}, limit: 100 * mib, wants: 100 * mib,
		},
		"one is set that is passed": {
			disk: growing{path: "/x", node: "n", threshold: mib, virtual: gib, seen: true, room: fileStat{allocated: mib, free: 120 * mib, size: mib}}, limit: 100 * mib, wants: 100 * mib, rearms: 11 * mib,
		},
		"one is set that would come too late": {
			disk: growing{path: "/x", node: "n", threshold: 22 * mib, virtual: gib, seen: true, room: fileStat{allocated: mib, free: 120 * mib, size: mib}}, limit: 100 * mib, wants: 100 * mib, rearms: 11 * mib,
		},
	} {
		d := c.disk
		if got := d.wants(c.limit); got != c.wants {
			t.Errorf("%s: it wants %d, not %d", name, got, c.wants)
		}
		if now, still := d.tight(c.limit, false), d.tight(c.limit, true); now != c.tight || still != c.still {
			t.Errorf("%s: tight %v, and still so %v", name, now, still)
		}
		if got := d.rearm(c.limit); got != c.rearms {
			t.Errorf("%s: the threshold becomes %d, not %d", name, got, c.rearms)
		}
	}
}

// TestOutOfSpace tells guests that wait for space from those whose disks fail.
func TestOutOfSpace(t *testing.T) {
	for _, c := range []struct {
		failed []blockdev.Stop
		want   int
	}{
		{[]blockdev.Stop{blockdev.NotStopped, blockdev.NotStopped}, 0},
		{[]blockdev.Stop{blockdev.StopNoSpace, blockdev.NotStopped}, 1},
		{[]blockdev.Stop{blockdev.StopNoSpace, blockdev.StopNoSpace}, 2},
		{[]blockdev.Stop{blockdev.StopIOFailed, blockdev.NotStopped}, 0},
		{[]blockdev.Stop{blockdev.StopNoSpace, blockdev.StopIOFailed}, 0},
	} {
		var disks []growing
		for _, f := range c.failed {
			disks = append(disks, growing{failed: f})
		}
		if got := outOfSpace(disks); len(got) != c.want {
			t.Errorf("%v: %d disks are out of space; want %d", c.failed, len(got), c.want)
		}
	}
}

// TestWhoHoldsTheCPUs has a guest let run beside an operation that leaves it alone,
// and not beside one that may stop it, nor after it has let go.
func TestWhoHoldsTheCPUs(t *testing.T) {
	a := shelf(t, "web")
	v := a.vms["web"]
	may := func() bool {
		release, ok := v.holdCPUs()
		if ok {
			release()
		}
		return ok
	}
	if !may() {
		t.Error("without an operation it may not be let run")
	}
	for _, calm := range []bool{false, true} {
		rec, err := a.ops.Start(t.Context(), op.Spec{Kind: op.KindDelete, VMID: v.id, VMName: "web", Request: struct{}{}}, func(ctx context.Context, o *op.Op) error {
			v.changing.Lock()
			o.Cleanup(v.changing.Unlock)
			if calm {
				v.leaveCPUs(o)
			}
			if may() != calm {
				t.Errorf("beside an operation that leaves the guest alone (%v) it may be let run: %v", calm, !calm)
			}
			return nil
		})
		if err == nil {
			_, err = a.ops.Wait(t.Context(), rec.ID)
		}
		if err != nil {
			t.Fatal(err)
		}
		if v.calm || !may() {
			t.Errorf("after the operation: calm %v", v.calm)
		}
	}
}
