package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// seen are the events that a watcher has seen.
type seen struct {
	mu  sync.Mutex
	all []*vmsnapv1.Event
}

// of returns the messages of the events of a kind, of one VM if it is named.
func (s *seen) of(kind, vm string) (messages []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.all {
		if e.GetKind() == kind && (vm == "" || e.GetVmName() == vm) {
			messages = append(messages, e.GetMessage())
		}
	}
	return messages
}

// unbroken fails unless each number is one more than that before it.
func (s *seen) unbroken() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range s.all {
		if e.GetSeq() != uint64(i+1) {
			return fmt.Errorf("event %d comes as number %d", e.GetSeq(), i+1)
		}
	}
	return nil
}

// watchAll watches all events until the test ends.
func (h *host) watchAll() *seen {
	h.t.Helper()
	s := &seen{}
	ctx, cancel := context.WithCancel(h.t.Context())
	ended := make(chan error, 1)
	watcher := h.Client
	go func() {
		ended <- watcher.WatchEvents(ctx, &vmsnapv1.WatchEventsRequest{Since: proto.Uint64(0)}, func(news *vmsnapv1.WatchEventsResponse) error {
			if news.GetGap() != nil {
				return fmt.Errorf("events are missing: %v", news.GetGap())
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.all = append(s.all, news.GetEvent())
			return nil
		})
	}()
	h.t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			h.t.Errorf("the watcher: %v", err)
		}
	})
	return s
}

// TestQEMUSchedule has schedules run on real QEMUs, one of them missed while the
// daemon was killed, and a watcher that reconnects and misses nothing.
func TestQEMUSchedule(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "timed", "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.sees(eventLimit, vm.name, inState(paused))
		watcher := h.watchAll()

		// As often as a schedule can run: each minute, and so within one.
		h.must("schedule", "create", vm.name, "--name", "each", "--cron", "* * * * *", "--quiesce", "none", "--name-template", "each-{{.Time}}")
		at := time.Now().Add(2 * time.Second).UTC().Truncate(time.Second)
		h.must("schedule", "create", vm.name, "--name", "once", "--once", at.Format(time.RFC3339), "--quiesce", "none", "--name-template", "only")
		h.eventually(eventLimit, "the one that runs once has run", func() error { return h.has(vm.name, "only") })
		h.eventually(eventLimit, "its operation has ended", h.idle)
		if out := h.must("snapshot", "list", vm.name, "--taken"); !strings.Contains(out, "only") || !strings.Contains(out, "succeeded") {
			t.Errorf("taken:\n%s", out)
		}

		late := time.Now().Add(2 * time.Second).UTC().Truncate(time.Second)
		h.must("schedule", "create", vm.name, "--name", "missed", "--once", late.Format(time.RFC3339), "--quiesce", "none", "--name-template", "caught")
		h.signal(syscall.SIGKILL)
		<-time.After(time.Until(late.Add(time.Second)))
		h.start()
		h.eventually(eventLimit, "the one that was missed has run", func() error { return h.has(vm.name, "caught") })
		h.eventually(90*time.Second, "the one of each minute has run", func() error { return h.has(vm.name, "each-") })
		h.must("schedule", "pause", "each")
		h.must("snapshot", "rename", vm.name+"/only", "renamed")
		h.eventually(eventLimit, "the watcher has seen it all", func() error {
			if n := len(watcher.of("snapshot-renamed", vm.name)); n != 1 {
				return fmt.Errorf("%d snapshots were renamed", n)
			}
			return nil
		})
		if err := watcher.unbroken(); err != nil {
			t.Error(err)
		}
		ended := watcher.of("operation-ended", vm.name)
		if len(ended) < 3 || slices.ContainsFunc(ended, func(m string) bool { return m != "snapshot succeeded" }) {
			t.Errorf("operations ended: %q", ended)
		}
		if starts := watcher.of("agent-started", ""); len(starts) != 2 {
			t.Errorf("the daemon was started %d times", len(starts))
		}
		if found := watcher.of("vm-started", vm.name); len(found) != 1 {
			t.Errorf("the VM was started: %q", found)
		}
	})
}

// has reports whether a VM has a snapshot whose name begins so.
func (h *host) has(vm, prefix string) error {
	res, err := h.Snapshots().ListSnapshots(h.ctx(), connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: vm}))
	if err != nil {
		return err
	}
	var names []string
	for _, s := range res.Msg.GetSnapshots() {
		if strings.HasPrefix(s.GetName(), prefix) {
			return nil
		}
		names = append(names, s.GetName())
	}
	return fmt.Errorf("its snapshots are %q", names)
}
