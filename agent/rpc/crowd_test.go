package rpc_test

import (
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

// median returns how long a call takes to a client that has nothing to do with
// the others.
func median(t *testing.T, c *client.Client) time.Duration {
	t.Helper()
	var took []time.Duration
	for range 21 {
		began := time.Now()
		if _, err := c.VMs().ListVMs(t.Context(), connect.NewRequest(&vmsnapv1.ListVMsRequest{})); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[len(took)/2]
}

// TestIdleConnectionsHurtNobody opens a thousand connections and says nothing.
func TestIdleConnectionsHurtNobody(t *testing.T) {
	const most = 1024
	socket := openServe(t, rpc.Options{Roles: ownRoles(t)})
	c := client.New(socket)
	defer c.Close()
	alone := median(t, c)
	var idle []net.Conn
	defer func() {
		for _, conn := range idle {
			_ = conn.Close()
		}
	}()
	open := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
		return conn
	}
	for range most - 1 { // and the client's own
		open()
	}
	if crowded := median(t, c); crowded > alone+20*time.Millisecond {
		t.Errorf("a call takes %s beside idle connections, and %s without", crowded, alone)
	}
	one := open()
	if err := one.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := one.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one more: %v, want it closed", err)
	}
	out := call(t, &syscall.Credential{Uid: 65534, Gid: 65534}, socket, vmsnapv1connect.VMServiceListVMsProcedure, "{}")
	if want := "uid 65534 has no role"; !strings.Contains(out, want) {
		t.Errorf("another user gets %s, want %q", out, want)
	}
	_ = idle[0].Close()
	again := client.New(socket)
	defer again.Close()
	for deadline := time.Now().Add(20 * time.Second); ; { // the daemon learns of it in a while
		_, err := again.VMs().ListVMs(t.Context(), connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("once one is closed: %v", err)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// TestSilentReadersHurtNobody has clients watch events, and never read what they
// are told.
func TestSilentReadersHurtNobody(t *testing.T) {
	b := rpctest.Sample()
	socket := rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)})
	c := client.New(socket)
	defer c.Close()
	alone := median(t, c)
	for range 20 {
		silent := client.New(socket)
		defer silent.Close()
		stream, err := silent.Events().WatchEvents(t.Context(), connect.NewRequest(&vmsnapv1.WatchEventsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = stream.Close() }()
	}
	long := make([]byte, 64<<10)
	for i := range long {
		long[i] = 'x'
	}
	for range 60 { // far more than a connection holds
		b.AddEvent(event.Event{Kind: event.VMFound, Severity: event.Info, Message: string(long)})
	}
	if crowded := median(t, c); crowded > alone+200*time.Millisecond {
		t.Errorf("a call takes %s beside silent readers, and %s without", crowded, alone)
	}
}
