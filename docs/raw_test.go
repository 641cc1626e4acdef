package docs_test

import (
	"context"
	"testing"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMULaunchedAsRaw proves what snapshots.md says of such disks: the VM
// comes up with its newest state once the disk was converted, by its unchanged
// command line.
func TestQEMULaunchedAsRaw(t *testing.T) {
	t.Parallel()
	h := newHost(t, testvm.Disk{Name: "root"}, testvm.Disk{Name: "data", Format: testvm.Raw})
	must := func(want int, script string) {
		t.Helper()
		if r := h.shell(script); r.code != want {
			t.Fatalf("%s: exit code %d, not %d:\n%s%s", script, r.code, want, r.stdout, r.stderr)
		}
	}
	must(0, "vmsnap snapshot create web one --quiesce require 2>&1 | grep launch-format-raw:")
	must(0, "vmsnap snapshot create web two")
	must(0, "lsattr /srv/vm/web/data.raw | grep -e '-i-'")
	if err := h.guest.WriteFile(t.Context(), testvm.Mountpoint("data")+"/after", []byte("after")); err != nil {
		t.Fatal(err)
	}
	h.direct("the guest shuts down")
	h.awaitSettled()
	must(0, "test $(ls /srv/vm/web/data.*.qcow2 | wc -l) = 1") // that of the second snapshot
	h.direct("the guest starts")
	got, err := h.guest.ReadFile(t.Context(), testvm.Mountpoint("data")+"/after")
	if err != nil || string(got) != "after" {
		t.Errorf("the disk holds %q, %v", got, err)
	}
	must(0, "vmsnap snapshot create web three --quiesce require")
}

// awaitSettled waits until the disks of the VM that has stopped are converted.
func (h *host) awaitSettled() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), limit)
	defer cancel()
	for {
		res, err := h.client.Operations().ListOperations(ctx, connect.NewRequest(&vmsnapv1.ListOperationsRequest{Vm: "web", Limit: 1}))
		if err != nil {
			h.t.Fatal(err)
		}
		if o := res.Msg.GetOperations()[0]; o.GetKind() == "settle" && o.GetEnded() != nil {
			if o.GetError() != nil {
				h.t.Fatalf("not settled: %v", o.GetError())
			}
			return
		}
		select {
		case <-ctx.Done():
			h.t.Fatalf("not settled: %v", res)
		case <-time.After(20 * time.Millisecond): // the operation's id is not known, so it cannot be watched
		}
	}
}
