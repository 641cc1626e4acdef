package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUReload gives a daemon that runs other files of VMs.
func TestQEMUReload(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	q := versions[0]
	first, second := newStill(t, q, "reload-a", "root.qcow2"), newStill(t, q, "reload-b", "root.qcow2")
	h := newHostOf(t, map[string]string{first.name: first.uuid})
	h.sees(eventLimit, first.name, inState(paused))
	h.fails(4, "", "vm", "show", second.name)

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
	h.list(second.name, second.uuid)
	reload("reloaded")
	h.sees(eventLimit, second.name, inState(paused))
	h.sees(time.Second, first.name, inState(paused))

	if err := os.WriteFile(h.path("vms.d/broken.yaml"), []byte("nam: x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	reload("not reloaded")
	if err := os.Remove(h.path("vms.d/broken.yaml")); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("match:\n  uuid: %s\nname: renamed\n", second.uuid)
	if err := os.WriteFile(h.path("vms.d/"+second.name+".yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	reload("takes effect when the VM or vmsnapd is started again: vm=" + second.name)
	// Nothing was cut off, and nothing runs twice.
	h.must("snapshot", "create", second.name, "--quiesce", "none")
	second.kill()
	h.sees(eventLimit, second.name, inState(stopped))
	second.start()
	h.sees(eventLimit, "renamed", inState(paused))
}
