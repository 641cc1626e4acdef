package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
)

// TestMain lets this program be the daemon that is given sockets.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_LISTENER") != "" {
		// The pid is known only in the process itself.
		_ = os.Setenv("LISTEN_PID", fmt.Sprint(os.Getpid()))
		l, err := Listener()
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(0)
		}
		if l == nil {
			fmt.Println("none")
			os.Exit(0)
		}
		fmt.Println("listens on", l.Addr(), l.Close(), "environment", os.Getenv("LISTEN_FDS") == "")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// listenTo lets a process of this program take these sockets over.
func listenTo(t *testing.T, sockets ...interface{ File() (*os.File, error) }) string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "TEST_LISTENER=1", fmt.Sprintf("LISTEN_FDS=%d", len(sockets)))
	for _, s := range sockets {
		f, err := s.File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	unix, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(unix.Close(), tcp.Close()) })
	if got, want := listenTo(t, unix), "listens on "+path+" <nil> environment true"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket's name went with the listener: %v", err)
	}
	if got := listenTo(t); got != "none" {
		t.Errorf("without a socket: %q", got)
	}
	for name, got := range map[string]string{"tcp": listenTo(t, tcp), "two": listenTo(t, unix, unix)} {
		if !strings.HasPrefix(got, "error: socket from systemd: ") {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// manager receives what systemd is told.
func manager(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return conn
}

func told(t *testing.T, conn *net.UnixConn, limit time.Duration) string {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 500)
	n, err := conn.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestNotify(t *testing.T) {
	conn := manager(t)
	for want, say := range map[string]func() error{"READY=1": Ready, "STOPPING=1": Stopping, "RELOADING=1\nMONOTONIC_USEC=": Reloading} {
		if err := say(); err != nil {
			t.Fatal(err)
		}
		if got := told(t, conn, 10*time.Second); !strings.HasPrefix(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Ready(); err != nil {
		t.Errorf("without systemd: %v", err)
	}
}

func TestWatchdogIsOnlyToldOfHealth(t *testing.T) {
	conn := manager(t)
	t.Setenv("WATCHDOG_USEC", "60000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	ctx, stop := context.WithCancel(t.Context())
	sick := make(chan struct{})
	hangs := make(chan struct{}, 100)
	ended := make(chan error, 1)
	go func() {
		ended <- Watchdog(ctx, func(ctx context.Context) error {
			select {
			case <-sick:
				<-ctx.Done() // it hangs, which must not outlast the look
				hangs <- struct{}{}
				return ctx.Err()
			default:
				return nil
			}
		}, hclog.NewNullLogger())
	}()
	for range 3 {
		if got := told(t, conn, 10*time.Second); got != "WATCHDOG=1" {
			t.Fatalf("told %q", got)
		}
	}
	close(sick)
	<-hangs
	for told(t, conn, time.Millisecond) != "" { // what was told before it fell sick
	}
	<-hangs
	<-hangs
	if got := told(t, conn, time.Millisecond); got != "" {
		t.Errorf("a daemon that hangs told %q", got)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestWatchdogNotAsked(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	synctest.Test(t, func(t *testing.T) {
		err := Watchdog(t.Context(), func(context.Context) error { t.Error("looked"); return nil }, hclog.NewNullLogger())
		if err != nil {
			t.Error(err)
		}
	})
}

func TestCredential(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if path, err := Credential("x"); path != "" || err != nil {
		t.Errorf("without a directory: %q, %v", path, err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if path, err := Credential("x"); path != "" || err != nil {
		t.Errorf("not given: %q, %v", path, err)
	}
	want := filepath.Join(dir, "x")
	if err := os.WriteFile(want, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if path, err := Credential("x"); path != want || err != nil {
		t.Errorf("given: %q, %v", path, err)
	}
}

// record is what the journal was sent.
type record struct {
	Message  string
	Priority journal.Priority
	Fields   map[string]string
}

func TestJournal(t *testing.T) {
	var got []record
	log := newJournalLog("vmsnapd", hclog.Info, func(m string, p journal.Priority, f map[string]string) error {
		got = append(got, record{m, p, f})
		return nil
	})
	work := log.Named("freeze").With("vm", "web", "operation", "7f3a")
	work.Debug("not yet")
	work.Warn("thawed late", "disk", "root", "after-ms", 7, "error", errors.New("guest says\n\"no\""))
	log.SetLevel(hclog.Debug)
	work.Debug("now", "what", hclog.Fmt("%d of %d", 1, 2))
	log.SetLevel(hclog.Error)
	work.Warn("not any more")
	work.Error("bad")
	ids := map[string]string{"VMSNAP_LOGGER": "vmsnapd.freeze", "VMSNAP_VM": "web", "VMSNAP_OPERATION": "7f3a"}
	with := func(more ...string) map[string]string {
		m := map[string]string{}
		for k, v := range ids {
			m[k] = v
		}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	want := []record{
		{`thawed late: operation=7f3a vm=web disk=root after-ms=7 error="guest says\n\"no\""`, journal.PriWarning,
			with("VMSNAP_DISK", "root", "VMSNAP_AFTER_MS", "7", "VMSNAP_ERROR", "guest says\n\"no\"")},
		{`now: operation=7f3a vm=web what="1 of 2"`, journal.PriDebug, with("VMSNAP_WHAT", "1 of 2")},
		{`bad: operation=7f3a vm=web`, journal.PriErr, with()},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
