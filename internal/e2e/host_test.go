package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
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

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "vmsnap-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := errors.Join(build(dir, "vmsnapd", watchFlags()...), build(dir, "vmsnap"), build(dir+"/"+unwatched, "vmsnapd")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	binaries = dir
	code := m.Run()
	tally.print()
	return code
}

// unwatched is where the daemon is that the race detector does not watch: it is
// as fast and as small as an operator's.
const unwatched = "unwatched"

// watchFlags are the flags that have the race detector watch the daemon as it
// does the tests: see RACE in the Makefile.
func watchFlags() []string {
	if !raceEnabled {
		return nil
	}
	return []string{"-race", "-gcflags=modernc.org/...=-d=checkptr=0", "-gcflags=modernc.org/sqlite/lib=-race=false"}
}

// build builds one of our programs.
func build(dir, program string, flags ...string) error {
	args := append([]string{"build", "-trimpath", "-o", dir + "/"}, flags...)
	out, err := exec.Command("go", append(args, "github.com/vmsnap/vmsnap/cmd/"+program)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("build %s: %w\n%s", program, err, out)
	}
	return nil
}

// logFile is where the daemon logs to.
type logFile string

func (f logFile) String() string {
	b, err := os.ReadFile(string(f))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// host is a daemon with its guests.
type host struct {
	t       *testing.T
	dir     string
	socket  string
	metrics string
	flags   []string // of the daemon, beside those that start gives it
	env     []string // of the daemon, beside the test's own
	program string   // below binaries
	daemon  *exec.Cmd
	log     logFile
	exited  chan struct{}
	*client.Client
}

// newHost starts a daemon that manages the guests, and waits until it knows
// them.
func newHost(t *testing.T, guests ...*testvm.Guest) *host {
	t.Helper()
	uuids := map[string]string{}
	for _, g := range guests {
		uuids[g.Name] = g.UUID
	}
	h := newHostOf(t, uuids)
	for _, g := range guests {
		h.await(g.Name, "running")
	}
	return h
}

// newHostOf starts a daemon that manages the VMs of the given names and UUIDs.
func newHostOf(t *testing.T, uuids map[string]string) *host {
	t.Helper()
	h := prepareHost(t)
	for name, uuid := range uuids {
		h.list(name, uuid)
	}
	h.start()
	t.Cleanup(h.end)
	return h
}

// prepareHost makes everything that a daemon needs, and does not start it.
func prepareHost(t *testing.T, flags ...string) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir(), flags: flags, program: "vmsnapd"}
	sockets, err := os.MkdirTemp("", "vs-") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(sockets) })
	h.socket = filepath.Join(sockets, "vmsnapd.sock")
	h.log = logFile(h.path("log"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.metrics = l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(h.path("vms.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

// list names a VM in the daemon's configuration.
func (h *host) list(name, uuid string) {
	h.t.Helper()
	text := fmt.Sprintf("match:\n  uuid: %s\n", uuid)
	if err := os.WriteFile(h.path("vms.d/"+name+".yaml"), []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// arguments are the daemon's.
func (h *host) arguments() []string {
	return append([]string{"--config", "/dev/null", "--state-dir", h.path("state"), "--run-dir", h.dir, "--socket", h.socket,
		"--metrics-listen", h.metrics, "--vms-dir", h.path("vms.d"), "--listed-only", "--log-level", "debug",
		"--max-chain", "0"}, h.flags...) // loops take any number of snapshots
}

// start starts the daemon and waits until it answers.
func (h *host) start() {
	h.t.Helper()
	log, err := os.OpenFile(string(h.log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	h.daemon = exec.Command(filepath.Join(binaries, h.program), h.arguments()...)
	// The race detector would make every process end a second late.
	h.daemon.Env = append(append(os.Environ(), "GORACE=atexit_sleep_ms=0 halt_on_error=1"), h.env...)
	h.daemon.Stderr = log // a file: a pipe would keep Wait back
	h.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := h.daemon.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.exited = make(chan struct{})
	go func() { _ = h.daemon.Wait(); close(h.exited) }()
	h.Client = client.New(h.socket)
	h.eventually(eventLimit, "the daemon answers", func() error {
		select {
		case <-h.exited:
			h.t.Fatalf("vmsnapd ended:\n%s", h.log)
		default:
		}
		_, err := h.VMs().ListVMs(h.ctx(), connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
		return err
	})
}

// signal sends a signal to the daemon, and waits for its end after one that
// ends it.
func (h *host) signal(s syscall.Signal) {
	h.t.Helper()
	if err := h.daemon.Process.Signal(s); err != nil {
		h.t.Fatal(err)
	}
	if s == syscall.SIGKILL || s == syscall.SIGTERM {
		<-h.exited
	}
}

// end stops the daemon; a daemon that does not stop is a failure.
func (h *host) end() {
	select {
	case <-h.exited:
	default:
		_ = h.daemon.Process.Signal(syscall.SIGCONT)
		_ = h.daemon.Process.Signal(syscall.SIGTERM)
		select {
		case <-h.exited:
		case <-time.After(eventLimit):
			_ = h.daemon.Process.Signal(syscall.SIGQUIT)
			<-h.exited
			h.t.Error("vmsnapd did not stop")
		}
	}
	if h.t.Failed() {
		h.t.Logf("vmsnapd's log:\n%s", h.log)
	}
	if strings.Contains(h.log.String(), "DATA RACE") || strings.Contains(h.log.String(), "panic:") {
		h.t.Errorf("vmsnapd:\n%s", h.log)
	}
}

// status returns the daemon's /proc/PID/status.
func (h *host) status() string {
	h.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.daemon.Process.Pid))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

func (h *host) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	h.t.Cleanup(cancel)
	return ctx
}

// eventLimit is the longest that anything may take that has to happen, on a
// machine that others use too. What has to be quick is measured on its own.
const eventLimit = 60 * time.Second

// promptly is what a promise to be quick is held to here: a loaded machine may
// take some more, and what is broken waits for a deadline that is longer.
func promptly(promise time.Duration) time.Duration { return promise + 3*time.Second }

// eventually waits for something that no event announces to a test.
func (h *host) eventually(limit time.Duration, what string, f func() error) {
	h.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("not within %s: %s: %v\nvmsnapd's log:\n%s", limit, what, err, h.log)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// states are the VM's states as the command line calls them.
var states = map[string]vmsnapv1.VMState{
	"running": vmsnapv1.VMState_VM_STATE_RUNNING,
	"paused":  vmsnapv1.VMState_VM_STATE_PAUSED,
	"stopped": vmsnapv1.VMState_VM_STATE_STOPPED,
}

// await waits until the daemon shows a VM in a state. It asks through the API,
// since a program started for each look would take the cores from what is
// waited for.
func (h *host) await(name, state string) *vmsnapv1.VM {
	h.t.Helper()
	want, known := states[state]
	if !known {
		h.t.Fatalf("no state is called %q", state)
	}
	var vm *vmsnapv1.VM
	h.eventually(eventLimit, name+" is "+state, func() error {
		var err error
		vm, err = h.vm(name)
		if err != nil {
			return err
		}
		return inState(want)(vm)
	})
	return vm
}

// vm asks the daemon for a VM.
func (h *host) vm(name string) (*vmsnapv1.VM, error) {
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	res, err := h.VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: name}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetVm(), nil
}

// result is how a vmsnap ended.
type result struct {
	stdout, stderr string
	code           int
}

// run runs vmsnap as a script would.
func (h *host) run(args ...string) result {
	h.t.Helper()
	cmd := exec.CommandContext(h.ctx(), filepath.Join(binaries, "vmsnap"), args...)
	cmd.Env = append(os.Environ(), "VMSNAP_SOCKET="+h.socket, "GORACE=atexit_sleep_ms=0")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Fatalf("vmsnap %v: %v", args, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// must runs vmsnap and expects success.
func (h *host) must(args ...string) string {
	h.t.Helper()
	r := h.run(args...)
	if r.code != 0 {
		h.t.Fatalf("vmsnap %v: exit code %d\n%s%s\nvmsnapd's log:\n%s", args, r.code, r.stdout, r.stderr, h.log)
	}
	return r.stdout
}

// fails runs vmsnap and expects an exit code and words on standard error.
func (h *host) fails(code int, words string, args ...string) result {
	h.t.Helper()
	r := h.run(args...)
	if r.code != code || !strings.Contains(r.stderr, words) {
		h.t.Fatalf("vmsnap %v: exit code %d (want %d), and %q is not in:\n%s\n%s\nvmsnapd's log:\n%s", args, r.code, code, words, r.stderr, r.stdout, h.log)
	}
	return r
}

// object runs vmsnap with -o json and returns what it prints.
func (h *host) object(args ...string) map[string]any {
	h.t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(h.must(append(args, "-o", "json")...)), &v); err != nil {
		h.t.Fatal(err)
	}
	return v
}

// scrape returns the daemon's metrics.
func (h *host) scrape() string {
	h.t.Helper()
	resp, err := http.Get("http://" + h.metrics + "/metrics")
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// shows fails unless a field of `vm show` has a value.
func (h *host) shows(vm, field, value string) error {
	h.t.Helper()
	if got := h.object("vm", "show", vm)[field]; got != value {
		return fmt.Errorf("%s is %v", field, got)
	}
	return nil
}
