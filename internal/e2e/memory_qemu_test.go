package e2e

import (
	"os"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

func TestQEMUMemory(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := newHost(t, g)
		put(t, g, "before", "before")
		t.Log(h.must("snapshot", "create", g.Name, "live", "--memory", "--dry-run"))
		t.Log(h.must("snapshot", "create", g.Name, "live", "--memory"))
		put(t, g, "after", "after")
		thawed(t, g)
		t.Log(h.must("snapshot", "show", g.Name+"/live"))
		t.Log(h.must("snapshot", "verify", g.Name+"/live"))
		s := h.object("snapshot", "show", g.Name+"/live")
		memory, _ := s["memory"].(map[string]any)
		path, _ := memory["path"].(string)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if s["consistency"] != "memory" || info.Mode().Perm() != 0o600 || info.Size() < 4096 {
			t.Errorf("snapshot %v, file %v", s, info)
		}
		t.Log(h.must("operation", "list"))
		t.Log(h.log.String())
	})
}
