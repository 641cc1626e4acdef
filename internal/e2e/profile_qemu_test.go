package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

func TestQEMUProfiles(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	v := newStill(t, versions[0], "profiled", "root.qcow2", "data.qcow2", "scratch.qcow2")
	h := prepareHost(t)
	h.flags = []string{"--config", h.path("vmsnapd.yaml")}
	configure := func(profile string) {
		t.Helper()
		text := "profiles:\n  " + profile + ":\n    exclude: 'scr*'\n    quiesce: none\n    labels: {of: " + profile + "}\n"
		if err := os.WriteFile(h.path("vmsnapd.yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	configure("nightly")
	h.list(v.name, v.uuid)
	h.start()
	t.Cleanup(h.end)
	h.sees(eventLimit, v.name, inState(paused))
	h.must("snapshot", "create", v.name, "one", "--profile", "nightly")
	show := h.must("snapshot", "show", v.name+"/one", "-o", "json")
	for _, want := range []string{`"of": "nightly"`, `"requested": "none"`} {
		if !strings.Contains(show, want) {
			t.Errorf("no %s in\n%s", want, show)
		}
	}
	for _, d := range h.snapshot(v.name + "/one").Disks {
		if excluded := d.Path == ""; excluded != (d.Device == "scratch") {
			t.Errorf("disk %s: excluded is %t", d.Device, excluded)
		}
	}
	h.fails(4, "known are nightly", "snapshot", "create", v.name, "--profile", "weekly")
	h.fails(4, "known are nightly", "schedule", "create", v.name, "--daily", "--profile", "weekly")
	h.must("schedule", "create", v.name, "--name", "s", "--daily", "--profile", "nightly")
	if out := h.must("schedule", "show", "s"); !strings.Contains(out, "nightly") {
		t.Errorf("the schedule does not show its profile:\n%s", out)
	}

	reload := func(words string) {
		t.Helper()
		before := strings.Count(h.log.String(), words)
		h.signal(syscall.SIGHUP)
		h.eventually(eventLimit, "it says "+words, func() error {
			if strings.Count(h.log.String(), words) == before {
				return fmt.Errorf("it does not say it")
			}
			return nil
		})
	}
	configure("weekly")
	reload("reloaded:")
	h.must("snapshot", "create", v.name, "two", "--profile", "weekly")
	configure("we/ekly")
	reload("not reloaded")
	h.must("snapshot", "create", v.name, "three", "--profile", "weekly")
}
