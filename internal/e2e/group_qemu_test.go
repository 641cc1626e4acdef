package e2e

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// group returns the snapshots that are called so, by their VMs' names.
func (h *host) group(name string) []*vmsnapv1.Snapshot {
	h.t.Helper()
	res, err := h.Snapshots().ListSnapshots(h.ctx(), connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Labels: map[string]string{"group": name}}))
	if err != nil {
		h.t.Fatal(err)
	}
	all := res.Msg.GetSnapshots()
	slices.SortFunc(all, func(x, y *vmsnapv1.Snapshot) int { return strings.Compare(x.GetVmName(), y.GetVmName()) })
	return all
}

func TestQEMUAGroup(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "group-b")
		a, c := newStill(t, q, "group-a-"+q.Name, "root.qcow2"), newStill(t, q, "group-c-"+q.Name, "root.qcow2")
		for _, v := range []*still{a, c} {
			b.list(v.name, v.uuid)
		}
		b.signal(syscall.SIGHUP)
		for _, v := range []*still{a, c} {
			b.sees(eventLimit, v.name, inState(paused))
		}
		all := []*still{a, b.vm, c}
		names := []string{a.name, b.vm.name, c.name}
		create := func(name string, more ...string) []string {
			return slices.Concat([]string{"snapshot", "create-group", name}, names, more)
		}
		for _, v := range all {
			v.write(1)
		}
		if out := b.must(create("one", "--quiesce", "none", "--label", "k=v")...); !strings.Contains(out, "group one taken: 3 snapshots, cut within ") {
			t.Errorf("it prints %s", out)
		}
		taken := b.group("one")
		if len(taken) != 3 {
			t.Fatalf("%d snapshots", len(taken))
		}
		for i, s := range taken {
			g := s.GetGroup()
			if s.GetName() != "one" || s.GetVmName() != names[i] || g.GetName() != "one" || g.GetMembers() != 3 || g.GetSkew().AsDuration() <= 0 ||
				g.GetSkew().AsDuration() > time.Second || s.GetLabels()["k"] != "v" {
				t.Errorf("snapshot %v", s)
			}
		}
		t.Logf("QEMU %s: three VMs cut within %s", q.Name, taken[0].GetGroup().GetSkew().AsDuration())

		// One VM's cut is refused when the others are cut: they are merged back,
		// with what their guests have written since.
		for _, v := range all {
			v.write(2)
		}
		gate := b.r.hold("transaction", 1)
		ended := make(chan result, 1)
		go func() { ended <- b.run(create("two", "--quiesce", "none")...) }()
		gate.await(b.host)
		b.eventually(eventLimit, "the others are cut", func() error { return b.areCut(a.name, c.name) })
		a.write(3)
		end := b.occupy("blockdev-mirror")
		gate.release(pass)
		if r := <-ended; r.code != 1 || !strings.Contains(r.stderr, "refused the cut") {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		end()
		b.eventually(eventLimit, "all has ended", b.idle)
		if left := b.group("two"); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		b.haveLayers(2, names...)
		a.holds(3, "merged back")
		c.holds(2, "merged back")
		for _, v := range all {
			v.check("after a group that failed")
		}

		// A name that one of them has, and best effort.
		b.must("snapshot", "create", c.name, "three", "--quiesce", "none")
		b.fails(13, "has a snapshot three already", create("three", "--quiesce", "none")...)
		if left := b.group("three"); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		b.fails(3, "dropped out", create("three", "--quiesce", "none", "--best-effort")...)
		if left := b.group("three"); len(left) != 2 {
			t.Errorf("by best effort: %v", left)
		}
		b.fails(14, "", create("four", "--memory")...)

		// The daemon is killed when some are cut: what is there stays, and is told.
		gate = b.r.hold("transaction", 1)
		id := strings.TrimSpace(b.must(create("five", "--quiesce", "none", "--detach", "-o", "name")...))
		gate.await(b.host)
		b.eventually(eventLimit, "the others are cut", func() error { return b.areCut(a.name, c.name) })
		b.signal(syscall.SIGKILL)
		gate.release(swallow)
		b.start()
		r := b.fails(1, "none of "+b.vm.name, "operation", "watch", id)
		if !strings.Contains(r.stderr, "there are snapshots of "+a.name+", "+c.name) {
			t.Errorf("it says %s", r.stderr)
		}
		b.eventually(eventLimit, "all is recovered", b.idle)
		for _, s := range b.group("five") {
			if s.GetVmName() == b.vm.name || s.GetGroup() == nil || s.GetGroup().GetSkew() != nil {
				t.Errorf("snapshot %v", s)
			}
		}
		for _, v := range all {
			v.check("after a kill")
		}
	})
}

// TestQEMUAGroupOfGuests freezes guests that write.
func TestQEMUAGroupOfGuests(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	var guests []*testvm.Guest
	names := []string{"snapshot", "create-group", "all"}
	for range 3 {
		g := testvm.Start(t, testvm.Config{QEMU: versions[0]})
		guests, names = append(guests, g), append(names, g.Name)
	}
	h := newHost(t, guests...)
	h.must(append(names, "--quiesce", "require")...)
	taken := h.group("all")
	if len(taken) != 3 {
		t.Fatalf("%d snapshots", len(taken))
	}
	for _, s := range taken {
		if s.GetConsistency() != vmsnapv1.Consistency_CONSISTENCY_FILESYSTEM {
			t.Errorf("%s is %v", s.GetVmName(), s.GetConsistency())
		}
		t.Logf("%s was frozen for %s", s.GetVmName(), s.GetQuiesce().GetFreezeWindow().AsDuration())
	}
	t.Logf("three guests cut within %s", taken[0].GetGroup().GetSkew().AsDuration())
	for _, g := range guests {
		thawed(t, g)
	}
	// Frozen in order and thawed in reverse, as the events tell of it.
	res, err := h.Events().ListEvents(h.ctx(), connect.NewRequest(&vmsnapv1.ListEventsRequest{Filter: &vmsnapv1.EventFilter{Kinds: []string{"guest-frozen", "guest-thawed"}}}))
	if err != nil {
		t.Fatal(err)
	}
	times := map[string]map[string]time.Time{"guest-frozen": {}, "guest-thawed": {}}
	for _, e := range res.Msg.GetEvents() {
		times[e.GetKind()][e.GetVmName()] = e.GetTime().AsTime()
	}
	for i := 1; i < len(guests); i++ {
		before, after := guests[i-1].Name, guests[i].Name
		if !times["guest-frozen"][before].Before(times["guest-frozen"][after]) || !times["guest-thawed"][after].Before(times["guest-thawed"][before]) {
			t.Errorf("%s and %s: %v", before, after, times)
		}
	}
}

// haveLayers fails unless the first disks of VMs have so many layers.
func (h *host) haveLayers(want int, names ...string) {
	h.t.Helper()
	for _, name := range names {
		vm, err := h.vm(name)
		if err != nil {
			h.t.Fatal(err)
		}
		if got := len(vm.GetDisks()[0].GetLayers()); got != want {
			h.t.Errorf("%s has %d layers, not %d", name, got, want)
		}
	}
}

// areCut fails unless the operations on VMs have come past their cuts.
func (h *host) areCut(names ...string) error {
	res, err := h.Operations().ListOperations(h.ctx(), connect.NewRequest(&vmsnapv1.ListOperationsRequest{Active: true}))
	if err != nil {
		return err
	}
	cut := func(name string) bool {
		return slices.ContainsFunc(res.Msg.GetOperations(), func(o *vmsnapv1.Operation) bool {
			return o.GetVmName() == name && slices.ContainsFunc(o.GetSteps(), func(s *vmsnapv1.Step) bool { return s.GetName() == "cut" && s.GetEnded() != nil })
		})
	}
	for _, name := range names {
		if !cut(name) {
			return fmt.Errorf("%s is not cut", name)
		}
	}
	return nil
}
