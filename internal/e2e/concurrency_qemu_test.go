package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

func TestQEMUOneOperationAtATime(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "busy")
		b.vm.write(1)
		m := moment{step: "cut", command: "blockdev-add", nth: 4, locked: true}
		c, id, resume := b.stopAt(b.r, m, b.vm.name, "first", "--quiesce", "none")
		b.fails(11, id, "snapshot", "create", b.vm.name, "second", "--quiesce", "none")
		b.fails(11, id, "freeze", b.vm.name)
		b.fails(11, id, "snapshot", "create", b.vm.name, "second", "--quiesce", "none", "--dry-run")
		b.fails(11, id, "vm", "forget", b.vm.name)
		resume(pass)
		if r := c.end(); r.code != 0 {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		b.vm.write(2)
		b.whole(b.vm, "first", 1, 2, "the first")
		b.fails(4, "", "snapshot", "show", b.vm.name+"/second")
		b.next("second")
	})
}

// TestQEMUARequestIDTakesOneSnapshot asks twenty times at once, and again after
// a restart of the daemon.
func TestQEMUARequestIDTakesOneSnapshot(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "request")
		b.vm.write(1)
		args := []string{b.vm.name, "once", "--quiesce", "none", "--request-id", "the-same", "-o", "json"}
		var all []*creation
		for range 20 {
			all = append(all, b.create(args...))
		}
		ids := map[string]int{}
		for _, c := range all {
			if r := c.end(); r.code != 0 {
				t.Errorf("exit code %d: %s", r.code, r.stderr)
			}
			ids[snapshotID(t, c.stdout)]++
		}
		if len(ids) != 1 {
			t.Errorf("snapshots %v", ids)
		}
		b.fails(2, "other arguments", "snapshot", "create", b.vm.name, "other", "--quiesce", "none", "--request-id", "the-same")
		b.signal(syscall.SIGKILL)
		b.start()
		b.await(b.vm.name, "paused")
		ids[snapshotID(t, b.must(append([]string{"snapshot", "create"}, args...)...))]++
		if len(ids) != 1 {
			t.Errorf("snapshots %v after a restart", ids)
		}
		var list struct {
			Snapshots []shown `json:"snapshots"`
		}
		if err := json.Unmarshal([]byte(b.must("snapshot", "list", b.vm.name, "-o", "json")), &list); err != nil {
			t.Fatal(err)
		}
		if len(list.Snapshots) != 1 {
			t.Errorf("%d snapshots", len(list.Snapshots))
		}
		b.vm.write(2)
		b.whole(b.vm, "once", 1, 2, "once")
	})
}

func snapshotID(t *testing.T, text string) string {
	t.Helper()
	var s shown
	if err := json.Unmarshal([]byte(text), &s); err != nil || s.ID == "" {
		t.Fatalf("%v: %s", err, text)
	}
	return s.ID
}

// TestQEMUAHungVMDelaysNoOther stops one QEMU, in the middle of a snapshot, and
// works on with the other.
func TestQEMUAHungVMDelaysNoOther(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		healthy := newStill(t, q, "healthy-"+q.Name, "root.qcow2", "data.qcow2")
		hung := newStill(t, q, "hung-"+q.Name, "root.qcow2", "data.qcow2")
		r := newRelay(t, hung.dir+"/q1")
		h := newHostOf(t, map[string]string{healthy.name: healthy.uuid, hung.name: hung.uuid})
		h.await(healthy.name, "paused")
		h.await(hung.name, "paused")
		hung.write(1)
		n := 0
		work := func() time.Duration {
			began := time.Now()
			h.must("vm", "list")
			n++
			h.must("snapshot", "create", healthy.name, fmt.Sprint("s", n), "--quiesce", "none")
			h.signal(syscall.SIGTERM)
			h.start()
			h.await(healthy.name, "paused")
			return time.Since(began)
		}
		without := work()
		h.await(hung.name, "paused")
		g := r.hold("blockdev-add", 3)
		c := h.create(hung.name, "x", "--quiesce", "none", "--detach")
		g.await(h)
		c.end()
		hung.signal(syscall.SIGSTOP)
		g.release(pass)
		with := []time.Duration{work(), work()} // in the middle of its snapshot, and of its recovery
		t.Logf("%s without, %s with a VM that hangs", without, with)
		for _, d := range with {
			// Whatever waits for the hung QEMU takes at least its greeting's deadline.
			if d > max(3*without, 4*time.Second) {
				t.Errorf("%s with a VM that hangs, %s without", d, without)
			}
		}
		hung.signal(syscall.SIGCONT)
		h.await(hung.name, "paused")
		h.eventually(eventLimit, "the snapshot is taken back", h.idle)
		h.fails(4, "", "snapshot", "show", hung.name+"/x")
		hung.holds(1, "after it continues")
		h.noOrphans(hung, "after it continues")
		b := &bench{h, hung, r}
		b.next("y")
	})
}

// goroutines is the daemon's own count.
var goroutines = regexp.MustCompile(`(?m)^go_goroutines (\d+)`)

// size is what a daemon that leaks has more of.
type size struct{ goroutines, files, threads int }

func (h *host) size() size {
	h.t.Helper()
	m := goroutines.FindStringSubmatch(h.scrape())
	if m == nil {
		h.t.Fatal("go_goroutines is not among the metrics")
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		h.t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d/", h.daemon.Process.Pid)
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		h.t.Fatal(err)
	}
	files := 0
	for _, fd := range fds {
		// It opens the catalog as often as it is read at once, up to a limit.
		if to, err := os.Readlink(proc + "fd/" + fd.Name()); err == nil && !strings.Contains(to, "/catalog.db") {
			files++
		}
	}
	tasks, err := os.ReadDir(proc + "task")
	if err != nil {
		h.t.Fatal(err)
	}
	return size{n, files, len(tasks)}
}

// TestQEMUTheDaemonDoesNotGrow takes fifteen snapshots, fails and cancels some
// more, and expects the daemon to be as it was.
func TestQEMUTheDaemonDoesNotGrow(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "grow")
		for i := range 3 {
			b.must("snapshot", "create", b.vm.name, fmt.Sprint("warm", i), "--quiesce", "none")
		}
		b.Close()
		base := b.size()
		var group sync.WaitGroup
		for i := range 15 {
			b.must("snapshot", "create", b.vm.name, fmt.Sprint("s", i), "--quiesce", "none")
			group.Go(func() { b.run("vm", "show", b.vm.name) })
		}
		group.Wait()
		for range 5 {
			b.fails(13, "", "snapshot", "create", b.vm.name, "s0", "--quiesce", "none")
			c, id, resume := b.stopAt(b.r, moment{step: "overlays", command: "blockdev-add", nth: 1}, b.vm.name, "x", "--quiesce", "none")
			if err := b.cancel(id); err != nil {
				t.Error(err)
			}
			resume(pass)
			c.end()
		}
		b.Close()
		b.returnsTo(base)
	})
}

// returnsTo waits until the daemon is as it was.
func (h *host) returnsTo(base size) {
	h.t.Helper()
	var now size
	h.eventually(eventLimit, "the daemon is as it was", func() error {
		now = h.size()
		if now.goroutines > base.goroutines+2 || now.files > base.files+1 || now.threads > base.threads+8 {
			return fmt.Errorf("%+v, at first %+v", now, base)
		}
		return nil
	})
	h.t.Logf("%+v, at first %+v", now, base)
}
