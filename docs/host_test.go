package docs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// binaries is where TestMain builds the programs.
var binaries string

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "grpcurl" {
		os.Exit(runGRPCurl())
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "vmsnap-docs-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	build := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "github.com/vmsnap/vmsnap/cmd/vmsnapd", "github.com/vmsnap/vmsnap/cmd/vmsnap")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		return 1
	}
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, filepath.Join(dir, "grpcurl"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	binaries = dir
	return m.Run()
}

// host is what the documents describe: a vmsnapd, and a running VM called web
// with the disks root and data. The daemon manages that VM only, so that hosts
// stand beside each other.
type host struct {
	t       *testing.T
	guest   *testvm.Guest
	dir     string
	socket  string
	metrics string
	client  *client.Client
}

// limit bounds each command of a document, and each wait for the daemon. It is
// for those that hang.
const limit = 60 * time.Second

// newHost starts the VM, with other disks if some are given, and the daemon.
func newHost(t *testing.T, disks ...testvm.Disk) *host {
	t.Helper()
	h := &host{t: t, guest: testvm.Start(t, testvm.Config{Name: "web", Disks: disks}), dir: t.TempDir()}
	sockets, err := os.MkdirTemp("", "vs-") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(sockets) })
	h.socket = filepath.Join(sockets, "vmsnapd.sock")
	h.client = client.New(h.socket)
	h.metrics = freeAddress(t)
	list := fmt.Sprintf("match:\n  uuid: %s\n", h.guest.UUID)
	if err := os.WriteFile(filepath.Join(h.dir, "web.yaml"), []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.await(vmsnapv1.VMState_VM_STATE_RUNNING)
	return h
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// start starts the daemon, which ends with the test.
func (h *host) start() {
	h.t.Helper()
	var log bytes.Buffer
	daemon := exec.Command(filepath.Join(binaries, "vmsnapd"), "--config", "/dev/null", "--state-dir", filepath.Join(h.dir, "state"),
		"--run-dir", h.dir, "--socket", h.socket, "--metrics-listen", h.metrics, "--vms-dir", h.dir, "--listed-only")
	daemon.Stderr = &log
	if err := daemon.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		stop := time.AfterFunc(limit, func() { _ = daemon.Process.Kill() })
		err := errors.Join(daemon.Process.Signal(syscall.SIGTERM), daemon.Wait())
		stop.Stop()
		if err != nil {
			h.t.Errorf("vmsnapd: %v", err)
		}
		if h.t.Failed() {
			h.t.Logf("vmsnapd's log:\n%s", &log)
		}
	})
}

// await waits until the daemon shows the VM in a state, with no operation at
// work on it, and the guest's agent when it runs.
func (h *host) await(state vmsnapv1.VMState) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), limit)
	defer cancel()
	for {
		res, err := h.client.VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: "web"}))
		if err == nil && is(res.Msg.GetVm(), state) {
			return
		}
		select {
		case <-ctx.Done():
			h.t.Fatalf("web is not %v: %v, %v", state, res, err)
		case <-time.After(20 * time.Millisecond): // nothing announces it
		}
	}
}

func is(vm *vmsnapv1.VM, state vmsnapv1.VMState) bool {
	if vm.GetState() != state || vm.GetOperationId() != "" {
		return false
	}
	return state == vmsnapv1.VMState_VM_STATE_STOPPED ||
		vm.GetGuestAgent().GetPresence() == vmsnapv1.GuestAgent_PRESENCE_CONNECTED
}

// direct does what a document's reader is told to do to the VM.
func (h *host) direct(what string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 2*limit)
	defer cancel()
	var err error
	state := vmsnapv1.VMState_VM_STATE_RUNNING
	switch what {
	case "the guest shuts down":
		err = h.guest.Shutdown(ctx)
		state = vmsnapv1.VMState_VM_STATE_STOPPED
	case "the guest starts":
		err = h.guest.Restart(ctx)
	case "the guest has another QEMU":
		var vm *connect.Response[vmsnapv1.GetVMResponse]
		if vm, err = h.client.VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: h.guest.Name})); err == nil {
			err = h.guest.Follow(ctx, int(vm.Msg.GetVm().GetProcess().GetPid()))
		}
	default:
		h.t.Fatalf("no such direction: %q", what)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	h.await(state)
}

// result is how a command of a document ended.
type result struct {
	stdout, stderr string
	code           int
}

// shell runs what stands in a document, on this host in the place of the
// reader's.
func (h *host) shell(script string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), limit)
	defer cancel()
	there := strings.NewReplacer("/srv/vm/web", h.guest.Dir, "127.0.0.1:9777", h.metrics)
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", there.Replace(script))
	cmd.Dir = h.t.TempDir()
	cmd.Env = append(os.Environ(), "VMSNAP_SOCKET="+h.socket, "PATH="+binaries+":"+os.Getenv("PATH"))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		h.t.Fatalf("%v\n%s", err, script)
	}
	return result{strings.ReplaceAll(stdout.String(), h.guest.Dir, "/srv/vm/web"), stderr.String(), cmd.ProcessState.ExitCode()}
}
