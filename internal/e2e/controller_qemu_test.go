package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// fleet is three agents with a guest each, and the example's controller.
type fleet struct {
	t          *testing.T
	controller string
	hosts      []*host
	vms        []*testvm.Guest
}

// newFleet starts them. A snapshot waits, before its cut, until the file "go" is
// in its host's directory.
func newFleet(t *testing.T, q testvm.QEMU) *fleet {
	t.Helper()
	f := &fleet{t: t, controller: filepath.Join(t.TempDir(), "controller")}
	if out, err := exec.Command("go", "build", "-o", f.controller, "github.com/vmsnap/vmsnap/examples/controller").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	for range 3 {
		vm := testvm.Start(t, testvm.Config{QEMU: q})
		h := prepareHost(t)
		h.flags = []string{"--hooks-dir", h.path("hooks.d")}
		h.hook("pre-freeze/10-wait", fmt.Sprintf("while [ ! -e %s ]; do sleep 0.05; done", h.path("go")))
		h.list(vm.Name, vm.UUID)
		h.start()
		t.Cleanup(h.end)
		f.hosts, f.vms = append(f.hosts, h), append(f.vms, vm)
	}
	for i, h := range f.hosts {
		h.await(f.vms[i].Name, "running")
	}
	return f
}

// run starts a round. Its result comes on the channel; out has what it says.
func (f *fleet) run(round string) (out *loudBuffer, ended <-chan error) {
	f.t.Helper()
	args := []string{"-round", round, "-patience", "60s"}
	for i, h := range f.hosts {
		args = append(args, "-agent", fmt.Sprintf("host%d=%s", i, h.socket))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*eventLimit)
	f.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, f.controller, args...)
	out = new(loudBuffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- cmd.Wait() }()
	return out, end
}

// loudBuffer is a buffer that a program writes to while a test reads.
type loudBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *loudBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *loudBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// release lets the snapshots of a host go on.
func (h *host) release() {
	h.t.Helper()
	if err := os.WriteFile(h.path("go"), nil, 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// snapshots returns the names of a VM's snapshots.
func (h *host) snapshots(vm string) string {
	h.t.Helper()
	res, err := h.Snapshots().ListSnapshots(h.ctx(), connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: vm}))
	if err != nil {
		h.t.Fatal(err)
	}
	var names []string
	for _, s := range res.Msg.GetSnapshots() {
		names = append(names, s.GetName())
	}
	return strings.Join(names, " ")
}

// TestQEMUControllerOfThreeAgents has the example's controller take a round of
// snapshots. One agent is killed and started again while its snapshot is under
// way, one is not there at the beginning, and then the round is repeated: each VM
// has one snapshot.
func TestQEMUControllerOfThreeAgents(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		f := newFleet(t, q)
		plain, killed, away := f.hosts[0], f.hosts[1], f.hosts[2]
		away.signal(syscall.SIGTERM)
		away.release()
		plain.release()
		out, ended := f.run("r1")
		killed.sees(eventLimit, f.vms[1].Name, func(vm *vmsnapv1.VM) error {
			if vm.GetOperationId() == "" {
				return fmt.Errorf("no operation has begun: %s", out)
			}
			return nil
		})
		killed.eventually(eventLimit, "the controller asks again", func() error {
			if !strings.Contains(out.String(), "host2: asked again") {
				return fmt.Errorf("it says: %s", out)
			}
			return nil
		})
		killed.signal(syscall.SIGKILL)
		killed.release()
		killed.start()
		away.start()
		if err := <-ended; err != nil {
			t.Fatalf("the round: %v\n%s", err, out)
		}
		says := []string{"OPERATION_STATE_RUNNING"}
		for i, vm := range f.vms {
			says = append(says, fmt.Sprintf("host%d/%s: r1 taken", i, vm.Name))
		}
		for _, says := range says {
			if !strings.Contains(out.String(), says) {
				t.Errorf("it does not say %q:\n%s", says, out)
			}
		}
		again, ended := f.run("r1")
		if err := <-ended; err != nil {
			t.Errorf("the same round again: %v\n%s", err, again)
		}
		for i, h := range f.hosts {
			name := f.vms[i].Name
			if got := h.snapshots(name); got != "r1" {
				t.Errorf("%s has the snapshots %q", name, got)
			} else if s := h.snapshot(name + "/r1"); s.Consistency != "filesystem" {
				t.Errorf("%s/r1 is %+v", name, s)
			}
			thawed(t, f.vms[i])
		}
	})
}
