package agent

import (
	"context"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// TestRoomIsLookedAtOutsideOfWindows has the room of a VM's disks looked at while
// operations run, and when one of them keeps the guest waiting.
func TestRoomIsLookedAtOutsideOfWindows(t *testing.T) {
	for name, c := range map[string]struct {
		busy  bool
		hush  time.Duration
		asked bool
	}{
		"no operation":                      {false, 0, true},
		"an operation":                      {true, 0, true},
		"an operation in its freeze window": {true, time.Hour, false},
		"an operation after its freeze":     {true, -time.Second, true},
		"the guest of one that has ended":   {false, time.Hour, false},
	} {
		t.Run(name, func(t *testing.T) {
			srv := monitortest.NewServer(t)
			for _, query := range []string{"query-named-block-nodes", "query-block", "query-block-jobs"} {
				srv.HandleReturn(query, []any{})
			}
			srv.HandleReturn("x-debug-query-block-graph", map[string]any{"nodes": []any{}, "edges": []any{}})
			session, err := monitor.Dial(t.Context(), srv.Path())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = session.Close() })
			before := len(srv.Commands())

			a := shelf(t, "web")
			v := a.vms["web"]
			r := newRun(self(t))
			r.hush(c.hush)
			if c.busy {
				defer occupy(t, a, v)()
			}
			w := &roomWatch{Agent: a, vm: v, run: r, session: session, outdated: true}
			if next := w.look(t.Context()); next > roomLookSoon && !c.asked {
				t.Errorf("it is looked again after %s", next)
			}
			if asked := len(srv.Commands()) > before; asked != c.asked {
				t.Errorf("QEMU was asked: %v, %v", asked, srv.Commands()[before:])
			}
			if w.outdated == c.asked {
				t.Errorf("what is known of the disks is outdated: %v", w.outdated)
			}
		})
	}
}

// occupy has an operation run on a VM until the function that it returns is called.
func occupy(t *testing.T, a *Agent, v *vm) (end func()) {
	t.Helper()
	begun, over := make(chan struct{}), make(chan struct{})
	rec, err := a.ops.Start(t.Context(), op.Spec{Kind: op.KindDelete, VMID: v.id, VMName: v.id, Request: struct{}{}}, func(ctx context.Context, _ *op.Op) error {
		close(begun)
		select {
		case <-over:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-begun:
	case <-time.After(20 * time.Second):
		t.Fatal("the operation has not begun")
	}
	return func() {
		close(over)
		if _, err := a.ops.Wait(t.Context(), rec.ID); err != nil {
			t.Error(err)
		}
	}
}
