package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUAReplacedProcessIsAnother ends a VM's QEMU between two steps, and starts
// another one by the same command line, which answers at the same sockets. Nothing
// is done to that one: what was begun with the first fails, and leaves nothing.
func TestQEMUAReplacedProcessIsAnother(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "replaced")
		b.vm.write(1)
		b.must("snapshot", "create", b.vm.name, "one", "--quiesce", "none")
		for i, c := range []struct {
			step, command string
			nth           int
			args          []string
		}{
			{"preflight", "query-named-block-nodes", 1, []string{"snapshot", "create", b.vm.name, "x", "--quiesce", "none"}},
			{"overlays", "blockdev-add", 2, []string{"snapshot", "create", b.vm.name, "x", "--quiesce", "none"}},
			{"overlays", "blockdev-add", 4, []string{"snapshot", "create", b.vm.name, "x", "--quiesce", "none"}},
			{"overlays", "blockdev-add", 1, []string{"snapshot", "restore", b.vm.name + "/one"}},
			{"overlays", "blockdev-add", 3, []string{"snapshot", "preview", b.vm.name + "/one"}},
		} {
			when := fmt.Sprintf("%s replaced at %s %d", c.args[1], c.command, c.nth)
			value := i + 2
			b.vm.write(value)
			g := b.r.hold(c.command, c.nth)
			run := b.meanwhile(c.args...)
			g.await(b.host)
			b.awaitStep(b.operation(b.vm.name), c.step)
			b.vm.kill()
			b.vm.start()
			before := b.vm.nodes()
			g.release(pass)
			if r := run.end(); r.code == 0 {
				t.Errorf("%s: it succeeded: %s", when, r.stdout)
			}
			b.eventually(eventLimit, when+": it has ended", b.idle)
			b.await(b.vm.name, "paused")
			if after := b.vm.nodes(); strings.Join(after, " ") != strings.Join(before, " ") {
				t.Errorf("%s: the new process has the nodes %v, and had %v", when, after, before)
			}
			b.fails(4, "", "snapshot", "show", b.vm.name+"/x")
			b.vm.holds(value, when)
			b.noOrphans(b.vm, when)
			b.restart() // and a relay again
		}
		b.vm.write(100)
		b.must("snapshot", "create", b.vm.name, "x", "--quiesce", "none")
		b.vm.write(101)
		b.whole(b.vm, "x", 100, 101, "in the end")
	})
}

// nodes lists the nodes of QEMU that somebody has named.
func (s *still) nodes() (names []string) {
	s.t.Helper()
	h := &host{t: s.t}
	g, err := blockdev.ReadGraph(h.ctx(), s.own)
	if err != nil {
		s.t.Fatal(err)
	}
	for name := range g.Nodes {
		if strings.HasPrefix(name, "vmsnap-") {
			names = append(names, name)
		}
	}
	return names
}

// TestQEMUAMigrationIsLeftAlone finds a migration of somebody else's that runs.
func TestQEMUAMigrationIsLeftAlone(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "migrating")
		b.vm.write(1)
		b.must("snapshot", "create", b.vm.name, "one", "--quiesce", "none")
		b.letRun()
		b.qmp("migrate-set-parameters", map[string]any{"max-bandwidth": 4096})
		b.qmp("migrate", map[string]any{"uri": "exec:cat >/dev/null"})
		before := b.world(b.vm.own, b.vm.dir)
		for _, args := range [][]string{
			{"snapshot", "create", b.vm.name, "x", "--quiesce", "none"},
			{"snapshot", "create", b.vm.name, "x", "--memory"},
			{"snapshot", "restore", b.vm.name + "/one"},
			{"snapshot", "preview", b.vm.name + "/one", "--discard-running-state"},
		} {
			if r := b.run(args...); r.code == 0 || !strings.Contains(r.stderr, "migrat") {
				t.Errorf("%v: exit code %d: %s", args, r.code, r.stderr)
			}
			b.unchanged(b.vm, "x", before, fmt.Sprint(args))
		}
		var m struct{ Status string }
		if err := b.vm.own.Execute(b.ctx(), "query-migrate", nil, &m); err != nil || m.Status == "failed" || m.Status == "cancelled" {
			t.Errorf("the migration is %q, %v", m.Status, err)
		}
	})
}
