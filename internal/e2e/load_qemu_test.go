package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUTheQueue has more asked for than may run, and kills the daemon.
func TestQEMUTheQueue(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	h := prepareHost(t)
	h.flags = []string{"--max-operations-per-storage", "1", "--hooks-dir", h.path("hooks.d")}
	h.hook("pre-freeze/10-wait", fmt.Sprintf("while [ ! -e %s ]; do sleep 0.05; done; echo $VMSNAP_VM >>%s", h.path("go"), h.path("ran")))
	names := []string{"load-a", "load-b", "load-c", "load-d"}
	for _, n := range names {
		h.list(n, newStill(t, versions[0], n, "root.qcow2").uuid)
	}
	h.start()
	t.Cleanup(h.end)
	ids := map[string]string{}
	for _, n := range names {
		h.sees(eventLimit, n, inState(paused))
		ids[n] = strings.TrimSpace(h.must("snapshot", "create", n, "one", "--detach", "-o", "name"))
	}
	queue := func() string {
		t.Helper()
		res, err := h.Operations().ListOperations(h.ctx(), connect.NewRequest(&vmsnapv1.ListOperationsRequest{Active: true}))
		if err != nil {
			t.Fatal(err)
		}
		var waiting []string
		for _, o := range slices.Backward(res.Msg.GetOperations()) {
			if o.GetState() == vmsnapv1.OperationState_OPERATION_STATE_QUEUED {
				waiting = append(waiting, fmt.Sprint(o.GetVmName(), " ", o.GetQueuePosition()))
			}
		}
		return strings.Join(waiting, ", ")
	}
	if got := queue(); got != "load-b 1, load-c 2, load-d 3" {
		t.Errorf("the queue: %s", got)
	}
	if out := h.must("operation", "list"); !strings.Contains(out, "queued,3") {
		t.Errorf("the list does not tell of it:\n%s", out)
	}
	if out := h.must("operation", "show", ids["load-b"]); !strings.Contains(out, "1 operations run on file system") {
		t.Errorf("the operation does not say what it waits for:\n%s", out)
	}
	h.must("operation", "cancel", ids["load-c"])
	h.fails(130, "", "operation", "watch", ids["load-c"])
	if got := queue(); got != "load-b 1, load-d 2" {
		t.Errorf("the queue without one that was cancelled: %s", got)
	}

	h.signal(syscall.SIGKILL)
	if err := os.WriteFile(h.path("go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.fails(1, "", "operation", "watch", ids["load-a"]) // it had begun
	h.must("operation", "watch", ids["load-b"])
	h.must("operation", "watch", ids["load-d"])
	if got := h.ran(); !slices.Equal(got, []string{"load-b", "load-d"}) {
		t.Errorf("after the restart there ran %v", got)
	}

	// A stop in order leaves the queue as well.
	if err := os.Remove(h.path("go")); err != nil {
		t.Fatal(err)
	}
	first := strings.TrimSpace(h.must("snapshot", "create", "load-a", "two", "--detach", "-o", "name"))
	second := strings.TrimSpace(h.must("snapshot", "create", "load-b", "two", "--detach", "-o", "name"))
	h.signal(syscall.SIGTERM)
	if err := os.WriteFile(h.path("go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.fails(130, "", "operation", "watch", first)
	h.must("operation", "watch", second)
}
