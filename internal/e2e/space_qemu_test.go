package e2e

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// spaceOf returns what a snapshot is said to take.
func (h *host) spaceOf(ref string) (exclusive, shared, memory uint64) {
	h.t.Helper()
	var s struct {
		Space *struct {
			Exclusive, Shared, Memory uint64
		} `json:"space"`
	}
	if err := json.Unmarshal([]byte(h.must("snapshot", "show", ref, "-o", "json")), &s); err != nil || s.Space == nil {
		h.t.Fatalf("%s: no space is told, %v", ref, err)
	}
	return s.Space.Exclusive, s.Space.Shared, s.Space.Memory
}

// TestQEMUSpace writes 64 KiB to each of two disks between snapshots, always the
// same, so that every snapshot alone holds what the next one has written over.
func TestQEMUSpace(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		const written = 2 * 64 << 10
		vm := newStill(t, q, "space-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		if exclusive, shared, _ := h.spaceOf(vm.name + "/one"); exclusive != 0 || shared != written {
			t.Errorf("while nothing was written over: %d bytes of its own, %d shared", exclusive, shared)
		}
		vm.write(2)
		h.eventually(10*time.Second, "the overlay is seen to hide what is below it", func() error {
			if exclusive, shared, _ := h.spaceOf(vm.name + "/one"); exclusive != written || shared != 0 {
				return fmt.Errorf("%d bytes of its own, %d shared", exclusive, shared)
			}
			return nil
		})
		h.must("snapshot", "create", vm.name, "two", "--memory")
		exclusive, shared, memory := h.spaceOf(vm.name + "/two")
		if memory == 0 || exclusive != memory || shared != 2*written {
			t.Errorf("with memory: %d bytes of its own, %d shared, %d of memory", exclusive, shared, memory)
		}
		if tree := h.must("snapshot", "list", vm.name, "--tree", "--no-header"); !regexp.MustCompile(`─ one .*\n +two .*\n +● you are here\n`).MatchString(tree) {
			t.Errorf("the tree:\n%s", tree)
		}
		gauge := regexp.MustCompile(`vmsnap_vm_reclaimable_bytes\{vm="` + regexp.QuoteMeta(vm.name) + `"\} (\S+)`)
		h.eventually(10*time.Second, "the metrics tell", func() error {
			h.must("vm", "show", vm.name)
			m := gauge.FindStringSubmatch(h.scrape())
			if m == nil {
				return fmt.Errorf("nothing")
			}
			if n, err := strconv.ParseFloat(m[1], 64); err != nil || n != float64(written+memory) {
				return fmt.Errorf("%s bytes, %w", m[1], err)
			}
			return nil
		})
	})
}
