package main

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/freeze"
	"github.com/vmsnap/vmsnap/qga/qgatest"
)

// guardArgument makes the test binary a guard.
const guardArgument = "guard"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == guardArgument {
		os.Exit(freeze.Main(context.Background(), hclog.LoggerOptions{Level: hclog.Error}))
	}
	os.Exit(m.Run())
}

// BenchmarkGuard measures what the guard itself adds to a freeze window, and
// what it takes to start one: the guest agent is a fake that answers at once,
// and nothing is cut. BenchmarkBareFreeze is the same without a guard.
func BenchmarkGuard(b *testing.B) {
	agent := qgatest.New(b)
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	qemu, err := freeze.ProcessOf(os.Getpid()) // a process that lives
	if err != nil {
		b.Fatal(err)
	}
	cfg := freeze.Config{Executable: []string{self, guardArgument}, Dir: b.TempDir()}
	request := freeze.Request{
		VM: "web", VMID: "1", Operation: "1", AgentSocket: agent.Path(), QEMU: qemu,
		FreezeTimeout: 10 * time.Second, Lease: 10 * time.Second,
	}
	var window, start time.Duration
	for b.Loop() {
		began := time.Now()
		g, err := freeze.Start(b.Context(), cfg, request)
		if err != nil {
			b.Fatal(err)
		}
		start += time.Since(began)
		if _, err := g.Freeze(b.Context()); err != nil {
			b.Fatal(errors.Join(err, g.Close()))
		}
		thawed, err := g.Thaw(b.Context())
		if err := errors.Join(err, g.Close()); err != nil || !thawed.Verified {
			b.Fatalf("%+v, %v", thawed, err)
		}
		window += thawed.Window
	}
	b.ReportMetric(float64(window.Nanoseconds())/float64(b.N), "window-ns/op")
	b.ReportMetric(float64(start.Nanoseconds())/float64(b.N), "start-ns/op")
}

func BenchmarkBareFreeze(b *testing.B) {
	agent := qgatest.New(b)
	conn, err := net.Dial("unix", agent.Path())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	w := &wire{conn: conn, lines: bufio.NewReader(conn)}
	freeze, thaw := encode("guest-fsfreeze-freeze", object{}), encode("guest-fsfreeze-thaw", object{})
	for b.Loop() {
		_, freezeErr := w.exchange(freeze)
		_, thawErr := w.exchange(thaw)
		if err := errors.Join(freezeErr, thawErr); err != nil {
			b.Fatal(err)
		}
	}
}
