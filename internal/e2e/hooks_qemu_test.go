package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// hook makes a hook of the host.
func (h *host) hook(name, script string) {
	h.t.Helper()
	path := h.path("hooks.d/" + name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	// Renamed into place: a file that is open for writing cannot be run.
	if err := os.WriteFile(path+".new", []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		h.t.Fatal(err)
	}
}

// ran returns what the hooks have noted, and forgets it.
func (h *host) ran() []string {
	h.t.Helper()
	b, err := os.ReadFile(h.path("ran"))
	if err != nil && !os.IsNotExist(err) {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(h.path("ran"), nil, 0o644); err != nil {
		h.t.Fatal(err)
	}
	return strings.Fields(string(b))
}

// hookedHost starts a daemon with a hook of each phase that notes that it ran.
func hookedHost(t *testing.T, name, uuid string, flags ...string) *host {
	t.Helper()
	h := prepareHost(t)
	h.flags = append(flags, "--hooks-dir", h.path("hooks.d"))
	for _, phase := range []string{"pre-freeze", "post-thaw", "post-snapshot", "pre-restore", "post-restore", "on-failure"} {
		h.hook(phase+"/10-note", fmt.Sprintf(`echo "$VMSNAP_PHASE:$VMSNAP_VM:$VMSNAP_SNAPSHOT:$VMSNAP_CONSISTENCY:$VMSNAP_FAILURE:$VMSNAP_RECOVERED" >>%s`, h.path("ran")))
	}
	h.list(name, uuid)
	h.start()
	t.Cleanup(h.end)
	return h
}

func TestQEMUHooks(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	v := newStill(t, versions[0], "hooked", "root.qcow2")
	h := hookedHost(t, v.name, v.uuid)
	h.sees(eventLimit, v.name, inState(paused))
	want := func(what string, lines ...string) {
		t.Helper()
		if d := cmp.Diff(lines, h.ran()); d != "" {
			t.Errorf("%s: %s", what, d)
		}
	}
	h.must("snapshot", "create", v.name, "one")
	want("a snapshot", "pre-freeze:hooked:one:::", "post-thaw:hooked:one:::", "post-snapshot:hooked:one:crash::")

	h.must("snapshot", "restore", v.name+"/one")
	want("a restore", "pre-restore:hooked:one:crash::", "post-restore:hooked:one:crash::")
	h.hook("pre-restore/20-no", "exit 1")
	h.fails(1, "hook pre-restore/20-no failed", "snapshot", "restore", v.name+"/one")
	want("a restore that is kept from", "pre-restore:hooked:one:crash::", "post-restore:hooked:one:crash::", "on-failure:hooked:one:crash:failed:")

	// What fails before the cut keeps it from happening, and is made good.
	before := h.world(v.own, v.dir)
	h.hook("pre-freeze/20-no", "echo the queue is not empty; exit 1")
	h.fails(1, "hook pre-freeze/20-no failed: exit status 1: the queue is not empty", "snapshot", "create", v.name, "two")
	want("a hook that counts", "pre-freeze:hooked:two:::", "post-thaw:hooked:two:::", "on-failure:hooked:two::failed:")
	if d := cmp.Diff(before, h.world(v.own, v.dir)); d != "" {
		t.Errorf("it left something: %s", d)
	}
	h.hook("pre-freeze/20-no", "exit 0")

	// What fails after it changes nothing but is told.
	h.hook("post-snapshot/20-no", "echo no; exit 7")
	h.must("snapshot", "create", v.name, "three")
	h.ran()
	id := strings.TrimSpace(h.must("operation", "list", v.name, "--limit", "1", "-o", "name"))
	shown := h.must("operation", "show", id)
	if !strings.Contains(shown, "hook-failed") || !strings.Contains(shown, "Output of hook post-snapshot/20-no:\n  no\n") {
		t.Errorf("the operation does not tell of its hooks:\n%s", shown)
	}
	// A hook that others may change is not run, which counts as its failure.
	if err := os.Chmod(h.path("hooks.d/pre-freeze/10-note"), 0o777); err != nil {
		t.Fatal(err)
	}
	h.fails(1, "has the mode 0777", "snapshot", "create", v.name, "four")
	want("a hook that is not trusted", "on-failure:hooked:four::failed:")
}

func TestQEMUHooksOfADaemonThatIsKilled(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	v := newStill(t, versions[0], "hooked", "root.qcow2")
	h := hookedHost(t, v.name, v.uuid)
	h.sees(eventLimit, v.name, inState(paused))
	for phase, wanted := range map[string][]string{
		"pre-freeze":    {"pre-freeze:hooked:x:::", "post-thaw:hooked:x:::1", "on-failure:hooked:x::failed:1"},
		"post-snapshot": {"pre-freeze:hooked:x:::", "post-thaw:hooked:x:::", "post-snapshot:hooked:x:crash::", "post-snapshot:hooked:x:crash::1"},
	} {
		started := h.path("started-" + phase)
		h.hook(phase+"/20-hang", fmt.Sprintf("echo $$ >%s.new; mv %s.new %s; exec sleep 1000", started, started, started))
		h.must("snapshot", "create", v.name, "x", "--detach")
		var pid string
		h.eventually(eventLimit, "the hook runs", func() error {
			b, err := os.ReadFile(started)
			pid = strings.TrimSpace(string(b))
			return err
		})
		h.signal(syscall.SIGKILL)
		h.hook(phase+"/20-hang", "exit 0")
		h.start()
		h.eventually(eventLimit, "it is recovered", h.idle)
		if line, err := os.ReadFile("/proc/" + pid + "/cmdline"); err == nil && len(line) > 0 { // a zombie has none
			t.Errorf("%s: the hook outlives the daemon", phase)
		}
		var got []string
		for _, line := range h.ran() { // failures of the recovered carry no snapshot's name
			got = append(got, strings.Replace(line, "hooked::", "hooked:x:", 1))
		}
		if d := cmp.Diff(wanted, got); d != "" {
			t.Errorf("killed in %s: %s", phase, d)
		}
		if phase == "post-snapshot" {
			h.must("snapshot", "rename", v.name+"/x", "kept")
		}
	}
}

// TestQEMUNoHookRunsInTheFreezeWindow has the hooks look at the guest.
func TestQEMUNoHookRunsInTheFreezeWindow(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	g := testvm.Start(t, testvm.Config{QEMU: versions[0], Disks: testvm.TwoDisks()})
	h := hookedHost(t, g.Name, g.UUID, "--hook-timeout", "2s")
	h.await(g.Name, "running")
	ask := fmt.Sprintf("%s vm show \"$VMSNAP_VM\" -o json --socket \"$VMSNAP_SOCKET\" | grep -c '\"freeze\": *{' >>%s; exit 0", filepath.Join(binaries, "vmsnap"), h.path("frozen"))
	for _, phase := range []string{"pre-freeze", "post-thaw", "post-snapshot"} {
		h.hook(phase+"/20-ask", ask)
	}
	h.hook("post-thaw/30-hang", "sleep 1000")
	h.must("snapshot", "create", g.Name, "one", "--quiesce", "require")
	thawed(t, g)
	if s := h.snapshot(g.Name + "/one"); s.Consistency != "filesystem" {
		t.Errorf("it is %s consistent", s.Consistency)
	}
	h.must("freeze", g.Name)
	h.must("thaw", g.Name)
	thawed(t, g)
	b, err := os.ReadFile(h.path("frozen"))
	if got := strings.Fields(string(b)); err != nil || strings.Join(got, " ") != "0 0 0 0 0" {
		t.Errorf("the guest as the hooks saw it: %v, %v", got, err)
	}
}
